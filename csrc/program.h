#ifndef AZQ_PROGRAM_H
#define AZQ_PROGRAM_H
#include "azq.h"
#include "azq_kernels.h"
#include "kv.h"
#include "matrix.h"
/* The state of one step, shared by program.c (the list, checks, memory), ops.c (each op) and experts.c. */

typedef struct {
    const azq_kernel_slots *kernels;
    azq_kv *kv;
    int compute;
    int64_t n_tokens, n_out;
    const int32_t *tokens, *sequence, *position; /* (n_tokens) */
    const int32_t *out_rows;                     /* (n_out) */
} azq_step;

/* Consecutive tokens of one sequence that attention computes together. */
typedef struct {
    int64_t row, n;
} azq_span;
enum { AZQ_SPAN_TOKENS = 16, AZQ_SPAN_ROWS = 64 };

struct azq_program {
    azq_op *ops;
    int64_t n_ops;
    const azq_matrix **next; /* (n_ops): what the first linear op behind each multiplies by; or NULL */
    azq_buffer *buffers;
    float **data; /* per buffer: (rows, width) */
    int64_t n_buffers;
    int64_t token_rows, output_rows; /* rows that `data` has room for */
    azq_scratch scratch;
    /* cos and sin of the step's positions, (n_tokens, 2, n_rot / 2), as op rope_of needs them */
    float *rope_table;
    const azq_op *rope_of;
    size_t rope_floats;
    azq_span *spans; /* of the step; room for token_rows */
    int64_t n_spans;
    int lone_spans; /* no sequence has two: keys and values of one span are of no interest to another */
    /* attention scores, (workers, 4, score_columns) */
    float *scores;
    int64_t score_columns;
    int score_workers;
    int32_t *routes; /* of op experts, see experts.c */
    size_t route_ints;
    double *seconds; /* (n_ops), the caller's: where each step adds what its ops took; or NULL */
};

azq_status azq_run_op(azq_program *p, const azq_op *op, const azq_step *step);
azq_status azq_run_experts(azq_program *p, const azq_op *op, const azq_step *step);
/* Whether the experts of an op fit each other, its router and its work buffer. */
int azq_check_experts(const azq_program *p, const azq_op *op);
azq_map_fn *azq_activation_of(const azq_kernel_slots *kernels, int32_t activation); /* NULL for none */

#endif
