/* y = activation(x W^T + bias) + residual: chooses the path, splits it over the threads. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "matrix.h"
#include "threads.h"

enum {
    KEPT_BYTES = 16 << 20, /* most memory that stays with us between two calls */
};

/* ---- scratch ------------------------------------------------------------------------------------ */

void azq_scratch_free(azq_scratch *s) {
    azq_free(s->act);
    azq_free(s->rows);
    memset(s, 0, sizeof *s);
}

/* The scratch of calls that bring none: new pages for every call would cost 512 rows a tenth of their time. It
 * serves one call at a time; others meanwhile make their own. */
static azq_scratch kept;
static atomic_flag kept_busy = ATOMIC_FLAG_INIT;

static azq_scratch *scratch_borrow(azq_scratch *own) {
    return atomic_flag_test_and_set_explicit(&kept_busy, memory_order_acquire) ? own : &kept;
}

static void scratch_return(azq_scratch *s) {
    s->act_of = NULL; /* the next call's x may lie at the same address */
    if (s != &kept || s->act_bytes + s->row_floats * sizeof(float) * (size_t)s->workers > KEPT_BYTES) {
        azq_scratch_free(s);
    }
    if (s == &kept) {
        atomic_flag_clear_explicit(&kept_busy, memory_order_release);
    }
}

azq_status azq_scratch_reserve(azq_scratch *s, size_t act_bytes, size_t row_floats) {
    if (act_bytes > s->act_bytes) {
        azq_free(s->act);
        s->act_of = NULL;
        s->act_bytes = 0;
        s->act = azq_alloc(act_bytes);
        if (!s->act) {
            return AZQ_E_NOMEM;
        }
        s->act_bytes = act_bytes;
    }
    int workers = azq_threads();
    if (row_floats > s->row_floats || workers > s->workers) {
        row_floats = row_floats > s->row_floats ? row_floats : s->row_floats;
        row_floats = (row_floats + 15) / 16 * 16;
        azq_free(s->rows);
        s->row_floats = 0;
        s->rows = azq_alloc(row_floats * sizeof(float) * (size_t)workers);
        if (!s->rows) {
            return AZQ_E_NOMEM;
        }
        s->row_floats = row_floats;
        s->workers = workers;
    }
    return AZQ_OK;
}

int azq_scratch_claim(azq_scratch *s, const float *x, int64_t m, int64_t k, int compute) {
    int held = s->act_of == x && s->act_m == m && s->act_k == k && s->act_compute == compute;
    s->act_of = x;
    s->act_m = m;
    s->act_k = k;
    s->act_compute = compute;
    return held;
}

/* ---- what comes after the sum -------------------------------------------------------------------- */

void azq_linear_finish(const azq_linear *layer, int64_t row, int64_t col, int64_t columns, float *c, float *y,
                       int64_t ldy) {
    const azq_kernel_slots *kernels = azq_active();
    if (layer->bias) {
        kernels->sum(c, layer->bias + col, c, columns);
    }
    if (layer->activation) {
        layer->activation(c, columns);
    }
    y += row * ldy + col;
    if (layer->residual) {
        kernels->sum(c, layer->residual + row * layer->ld_residual + col, y, columns);
    } else {
        memcpy(y, c, (size_t)columns * sizeof *y);
    }
}

/* ---- entries ------------------------------------------------------------------------------------- */

int azq_choice(int type, int64_t m, int64_t n, int64_t k) {
    (void)n; /* no crossover measured yet depends on them */
    (void)k;
    if (type < 0 || type >= AZQ_TYPE_COUNT) {
        return AZQ_COMPUTE_FP32;
    }
    int64_t bf16_rows = azq_active_isa()->bf16_rows[type];
    if (bf16_rows && m >= bf16_rows) {
        return AZQ_COMPUTE_BF16;
    }
    return azq_active()->gemm[type] ? AZQ_COMPUTE_INT8 : AZQ_COMPUTE_FP32;
}

azq_status azq_linear_run(const azq_linear *layer, azq_scratch *scratch, const float *x, int64_t m, int64_t ldx,
                          float *y, int64_t ldy, int compute) {
    const azq_matrix *w = layer->w;
    if (m > INT64_MAX / 128 / (w->k + 1)) {
        return AZQ_E_SHAPE;
    }
    if (m == 0 || w->n == 0) {
        return AZQ_OK;
    }
    const azq_kernel_slots *kernels = azq_active();
    if (compute == AZQ_COMPUTE_AUTO) {
        compute = azq_choice(w->type, m, w->n, w->k);
    } else if (compute == AZQ_COMPUTE_INT8 && !kernels->gemm[w->type]) {
        compute = AZQ_COMPUTE_FP32;
    }
    if (compute == AZQ_COMPUTE_BF16) {
        return azq_linear_bf16(layer, scratch, x, m, ldx, y, ldy);
    }
    return compute == AZQ_COMPUTE_INT8 ? azq_linear_int8(layer, scratch, x, m, ldx, y, ldy)
                                       : azq_linear_fp32(layer, scratch, x, m, ldx, y, ldy);
}

azq_status azq_matmul(azq_matrix *w, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy, int compute) {
    if (!w || (m > 0 && w->n > 0 && (!y || (!x && w->k > 0)))) {
        return AZQ_E_NULL;
    }
    if (m < 0 || (m > 1 && (ldx < w->k || ldy < w->n))) {
        return AZQ_E_SHAPE;
    }
    if (compute < AZQ_COMPUTE_AUTO || compute > AZQ_COMPUTE_BF16 ||
        (compute == AZQ_COMPUTE_INT8 && !azq_active()->gemm[w->type])) {
        return AZQ_E_TYPE;
    }
    azq_scratch own = {0}, *scratch = scratch_borrow(&own);
    azq_linear layer = {.w = w};
    azq_status status = azq_linear_run(&layer, scratch, x, m, ldx, y, ldy, compute);
    scratch_return(scratch);
    return status;
}

azq_status azq_matmul_packed(int type, const void *packed, int64_t n, int64_t k, const float *bias, const float *x,
                             int64_t m, float *y, int compute, int threads) {
    azq_matrix w;
    azq_status status = azq_matrix_borrow(type, packed, n, k, &w);
    if (status != AZQ_OK) {
        return status;
    }
    if (n > 0 && k > 0 && m > 0 && (!packed || !x || !y)) {
        return AZQ_E_NULL;
    }
    if (m < 0) {
        return AZQ_E_SHAPE;
    }
    if (compute < AZQ_COMPUTE_AUTO || compute > AZQ_COMPUTE_BF16 ||
        (compute == AZQ_COMPUTE_INT8 && !azq_active()->gemm[type])) {
        return AZQ_E_TYPE;
    }
    azq_scratch own = {0}, *scratch = scratch_borrow(&own);
    azq_linear layer = {.w = &w, .bias = bias};
    azq_threads_here(threads);
    status = azq_linear_run(&layer, scratch, x, m, k, y, n, compute);
    azq_threads_here(0);
    scratch_return(scratch);
    return status;
}

/* ---- rows of packed weights ------------------------------------------------------------------------ */

enum { ROWS_PER_LOOKUP = 16 };

typedef struct {
    const azq_matrix *w;
    const azq_kernel_slots *kernels;
    const int64_t *rows;
    int64_t count;
    float *y;
    uint8_t *buffers; /* (workers, row_bytes) */
} rows_job;

static void rows_task(void *context, int64_t task, int worker) {
    const rows_job *job = context;
    const azq_matrix *w = job->w;
    int64_t end = (task + 1) * ROWS_PER_LOOKUP < job->count ? (task + 1) * ROWS_PER_LOOKUP : job->count;
    for (int64_t i = task * ROWS_PER_LOOKUP; i < end; i++) {
        const void *blocks = azq_matrix_row(w, job->rows[i], job->buffers + worker * w->row_bytes);
        job->kernels->dequantize_row[w->type](blocks, job->y + i * w->k, w->k);
    }
}

azq_status azq_packed_rows(int type, const void *packed, int64_t n, int64_t k, const int64_t *rows, int64_t count,
                           float *y, int threads) {
    azq_matrix w;
    azq_status status = azq_matrix_borrow(type, packed, n, k, &w);
    if (status != AZQ_OK || count == 0 || k == 0) {
        return status;
    }
    if (count < 0) {
        return AZQ_E_SHAPE;
    }
    if (!packed || !rows || !y) {
        return AZQ_E_NULL;
    }
    for (int64_t i = 0; i < count; i++) {
        if (rows[i] < 0 || rows[i] >= n) {
            return AZQ_E_INDEX;
        }
    }
    azq_threads_here(threads);
    int workers = azq_threads();
    uint8_t *buffers = azq_alloc((size_t)w.row_bytes * (size_t)workers);
    if (buffers) {
        rows_job job = {&w, azq_active(), rows, count, y, buffers};
        azq_parallel((count + ROWS_PER_LOOKUP - 1) / ROWS_PER_LOOKUP, workers, rows_task, &job);
    }
    azq_threads_here(0);
    azq_free(buffers);
    return buffers ? AZQ_OK : AZQ_E_NOMEM;
}
