#ifndef AZQ_PROGRAM_H
#define AZQ_PROGRAM_H
#include "azq.h"
#include "azq_kernels.h"
#include "kv.h"
#include "matrix.h"
/* The state of one step, shared by program.c (the list, checks, memory) and ops.c (each op). */

typedef struct {
    const azq_kernel_slots *kernels;
    azq_kv *kv;
    int compute;
    int64_t n_tokens, n_out;
    const int32_t *tokens, *sequence, *position; /* (n_tokens) */
    const int32_t *out_rows;                     /* (n_out) */
} azq_step;

struct azq_program {
    azq_op *ops;
    int64_t n_ops;
    azq_buffer *buffers;
    float **data; /* per buffer: (rows, width) */
    int64_t n_buffers;
    int64_t token_rows, output_rows; /* rows that `data` has room for */
    azq_scratch scratch;
    /* cos and sin of the step's positions, (n_tokens, 2, n_rot / 2); of the op with these frequencies */
    float *rope_table;
    const float *rope_of;
    size_t rope_floats;
    /* attention scores, (workers, n_ctx) */
    float *scores;
    int64_t score_columns;
    int score_workers;
};

azq_status azq_run_op(azq_program *p, const azq_op *op, const azq_step *step);

#endif
