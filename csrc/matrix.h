#ifndef AZQ_MATRIX_H
#define AZQ_MATRIX_H
#include <stddef.h>
#include "azq.h"
#include "azq_kernels.h"
/* What memory.c, pack.c, matmul.c and program.c share. */

struct azq_matrix {
    int type;
    int64_t n, k, row_bytes;
    const uint8_t *data;            /* (n, row_bytes), the caller's; NULL when only `packed` is there */
    _Atomic(uint8_t *) packed;      /* (ceil(n / 16), panel_bytes); NULL until packed */
    int64_t panel_bytes;
};

/* 64-byte aligned, with huge pages asked for where that helps; NULL when there is no memory. */
void *azq_alloc(size_t bytes);
void azq_free(void *p);

/* The same for packed weights, which stay: several matrices lie in one run of huge pages, so that those of a small
 * model, each under 2 MB, have them too. Memory returns to the system when all matrices of a run are freed. */
void *azq_weights_alloc(size_t bytes);
void azq_weights_free(void *p);

/* Whether the type has a packed form of its own. */
int azq_has_packed(int type);

/* A matrix over bytes in the form azq_pack makes, without a copy; nothing to free. */
azq_status azq_matrix_borrow(int type, const void *packed, int64_t n, int64_t k, azq_matrix *out);

/* One row's blocks as GGUF has them; made in buffer (row_bytes) where there is only the packed form. */
const void *azq_matrix_row(const azq_matrix *w, int64_t row, uint8_t *buffer);

/* ---- one linear layer ---- */

typedef struct {
    azq_matrix *w;
    const float *bias;     /* (n) or NULL */
    const float *residual; /* (m, ld_residual) or NULL; may be the output itself */
    int64_t ld_residual;
    azq_map_fn *activation; /* or NULL */
    const azq_matrix *next; /* what is multiplied after this, most likely, or NULL */
} azq_linear;

/* Memory for quantized activations and per-worker scratch; grows, never shrinks. Zero-initialize. */
typedef struct {
    uint8_t *act;
    size_t act_bytes;
    float *rows; /* per worker: dequantized rows and a tile of results */
    size_t row_floats;
    int workers;
    /* The activations that `act` holds and in what form, so that weights with the same input share them. */
    const float *act_of;
    int64_t act_m, act_k;
    int act_compute; /* AZQ_COMPUTE_INT8, _BF16 or _FP32 */
} azq_scratch;

void azq_scratch_free(azq_scratch *s);

/* y (m, n) = activation(x W^T + bias) + residual. A type without int8 kernels is computed in fp32. */
azq_status azq_linear_run(const azq_linear *layer, azq_scratch *scratch, const float *x, int64_t m, int64_t ldx,
                          float *y, int64_t ldy, int compute);

/* ---- for the files that compute it ---- */

/* At least act_bytes of `act` and row_floats of `rows` for each worker. */
azq_status azq_scratch_reserve(azq_scratch *s, size_t act_bytes, size_t row_floats);
/* Whether `act` holds these activations already, prepared for that compute. If not, the caller fills it now: from here
 * on it counts as holding them. */
int azq_scratch_claim(azq_scratch *s, const float *x, int64_t m, int64_t k, int compute);

/* c (columns): the sums of row `row`, columns col .. -> bias, activation, residual -> y (m, ldy). Changes c. */
void azq_linear_finish(const azq_linear *layer, int64_t row, int64_t col, int64_t columns, float *c, float *y,
                       int64_t ldy);

/* azq_linear_run in int8, in bf16 and in fp32; arguments as there, checked. */
azq_status azq_linear_int8(const azq_linear *layer, azq_scratch *scratch, const float *x, int64_t m, int64_t ldx,
                           float *y, int64_t ldy);
azq_status azq_linear_bf16(const azq_linear *layer, azq_scratch *scratch, const float *x, int64_t m, int64_t ldx,
                           float *y, int64_t ldy);
azq_status azq_linear_fp32(const azq_linear *layer, azq_scratch *scratch, const float *x, int64_t m, int64_t ldx,
                           float *y, int64_t ldy);

#endif
