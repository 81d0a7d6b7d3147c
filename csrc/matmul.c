/* y = activation(x W^T + bias) + residual: chooses the path, splits it over the threads. */
#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "matrix.h"
#include "threads.h"

enum {
    ROWS_PER_TASK = 64,      /* activation rows that stay in cache while panels stream by */
    PANELS_PER_CALL = 4,     /* panels handed to a kernel at once */
    ACT_PER_TASK = 16384,    /* activations quantized by one task: some 2 us */
    KEPT_BYTES = 16 << 20,   /* most memory that stays with us between two calls */
    MAX_BANDS = 512,
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

/* ---- what comes after the sum -------------------------------------------------------------------- */

typedef struct {
    const azq_linear *layer;
    const azq_kernel_slots *kernels;
    azq_scratch *scratch;
    const float *x;
    float *y;
    int64_t m, ldx, ldy;
    azq_act act;
    int64_t row_tasks;
    int32_t starts[MAX_BANDS + 1]; /* first panel of each band of panels, and their end */
    int64_t bands;
} matmul_job;

void azq_linear_finish(const azq_linear *layer, int64_t row, int64_t col, int64_t columns, float *c, float *y,
                       int64_t ldy) {
    if (layer->bias) {
        for (int64_t j = 0; j < columns; j++) {
            c[j] += layer->bias[col + j];
        }
    }
    if (layer->activation) {
        layer->activation(c, columns);
    }
    y += row * ldy + col;
    if (layer->residual) {
        const float *residual = layer->residual + row * layer->ld_residual + col;
        for (int64_t j = 0; j < columns; j++) {
            y[j] = c[j] + residual[j];
        }
    } else {
        memcpy(y, c, (size_t)columns * sizeof *y);
    }
}

/* ---- int8 ---------------------------------------------------------------------------------------- */

/* Activations of one call: q (m, k), then d, sum8, sum8_pair (m, k / 32), sum16 (m, k / 16), dsum (m, k / 32). */
static size_t act_size(int64_t m, int64_t k) { return (size_t)(m * (k + k / 32 * 24)); }

static void act_view(matmul_job *job, int64_t m, int64_t k) {
    uint8_t *base = job->scratch->act;
    int64_t blocks = m * (k / 32);
    job->act.q = (const int8_t *)base;
    job->act.d = (const float *)(base + m * k);
    job->act.sum8 = (const int32_t *)(base + m * k) + blocks;
    job->act.sum8_pair = (const int32_t *)(base + m * k) + 2 * blocks;
    job->act.sum16 = (const int32_t *)(base + m * k) + 3 * blocks;
    job->act.dsum = (const float *)(base + m * k) + 5 * blocks;
    job->act.k = k;
}

/* Rows that one task quantizes. */
static int64_t act_rows(int64_t k) { return ACT_PER_TASK / (k + 1) + 1; }

static void act_task(void *context, int64_t task, int worker) {
    (void)worker;
    const matmul_job *job = context;
    int64_t k = job->act.k, blocks = k / 32;
    int64_t per_task = act_rows(k), end = (task + 1) * per_task < job->m ? (task + 1) * per_task : job->m;
    for (int64_t r = task * per_task; r < end; r++) {
        /* The views are const for the kernels that read them; here is where they are filled. */
        job->kernels->quantize_act(job->x + r * job->ldx, k, (int8_t *)(uintptr_t)job->act.q + r * k,
                                   (float *)(uintptr_t)job->act.d + r * blocks,
                                   (int32_t *)(uintptr_t)job->act.sum8 + r * blocks,
                                   (int32_t *)(uintptr_t)job->act.sum8_pair + r * blocks,
                                   (int32_t *)(uintptr_t)job->act.sum16 + 2 * r * blocks);
        float *dsum = (float *)(uintptr_t)job->act.dsum + r * blocks;
        for (int64_t b = 0; b < blocks; b++) {
            const int32_t *half = job->act.sum16 + 2 * (r * blocks + b);
            dsum[b] = job->act.d[r * blocks + b] * (float)(half[0] + half[1]);
        }
    }
}

static void int8_task(void *context, int64_t task, int worker) {
    (void)worker;
    const matmul_job *job = context;
    const azq_matrix *w = job->layer->w;
    const uint8_t *packed = atomic_load_explicit(&((azq_matrix *)(uintptr_t)w)->packed, memory_order_relaxed);
    azq_gemm_fn *gemm = job->kernels->gemm[w->type];
    int64_t row0 = task % job->row_tasks * ROWS_PER_TASK;
    int64_t rows = job->m - row0 < ROWS_PER_TASK ? job->m - row0 : ROWS_PER_TASK;
    int64_t panel0 = job->starts[task / job->row_tasks], panel_end = job->starts[task / job->row_tasks + 1];
    enum { COLUMNS = PANELS_PER_CALL * AZQ_PANEL };
    float c[ROWS_PER_TASK * COLUMNS];
    for (int64_t p = panel0; p < panel_end; p += PANELS_PER_CALL) {
        int64_t n_panels = panel_end - p < PANELS_PER_CALL ? panel_end - p : PANELS_PER_CALL;
        gemm(&job->act, row0, rows, packed + p * w->panel_bytes, w->panel_bytes, n_panels, c, COLUMNS);
        int64_t columns = w->n - p * AZQ_PANEL < COLUMNS ? w->n - p * AZQ_PANEL : COLUMNS;
        columns = columns < n_panels * AZQ_PANEL ? columns : n_panels * AZQ_PANEL;
        for (int64_t r = 0; r < rows; r++) {
            azq_linear_finish(job->layer, row0 + r, p * AZQ_PANEL, columns, c + r * COLUMNS, job->y, job->ldy);
        }
    }
}

/* Bands of panels, long ones first: each a share of what is left, so that no thread waits long for the last
 * one, but worth handing out. How long a panel takes is guessed from its bytes and its multiply-adds. */
static void make_bands(matmul_job *job) {
    enum { SHARES = 2, BYTES_PER_MICROSECOND = 30000, MACS_PER_MICROSECOND = 250000, LEAST_MICROSECONDS = 3 };
    const azq_matrix *w = job->layer->w;
    int64_t panels = (w->n + AZQ_PANEL - 1) / AZQ_PANEL, threads = azq_threads();
    int64_t rows = job->m < ROWS_PER_TASK ? job->m : ROWS_PER_TASK;
    double cost = (double)(w->panel_bytes + 1) / BYTES_PER_MICROSECOND + /* never 0, as k may be */
                  (double)(rows * w->k * AZQ_PANEL) / MACS_PER_MICROSECOND;
    int64_t least = (int64_t)((LEAST_MICROSECONDS + cost) / cost);
    least = least > panels / MAX_BANDS + 1 ? least : panels / MAX_BANDS + 1;
    job->bands = 0;
    for (int64_t panel = 0; panel < panels;) {
        int64_t band = (panels - panel) / (SHARES * threads);
        band = (band > least ? band : least) + 1;
        band -= band & 1; /* kernels take two panels at a time */
        job->starts[job->bands++] = (int32_t)panel;
        panel += band;
    }
    job->starts[job->bands] = (int32_t)panels;
}

static azq_status run_int8(matmul_job *job) {
    azq_matrix *w = job->layer->w;
    azq_status status = azq_matrix_pack(w);
    if (status == AZQ_OK) {
        status = azq_scratch_reserve(job->scratch, act_size(job->m, w->k), 0);
    }
    if (status != AZQ_OK) {
        return status;
    }
    act_view(job, job->m, w->k);
    azq_scratch *s = job->scratch;
    if (s->act_of != job->x || s->act_m != job->m || s->act_k != w->k || s->act_compute != AZQ_COMPUTE_INT8) {
        azq_parallel((job->m + act_rows(w->k) - 1) / act_rows(w->k), AZQ_MAX_THREADS, act_task, job);
        s->act_of = job->x;
        s->act_m = job->m;
        s->act_k = w->k;
        s->act_compute = AZQ_COMPUTE_INT8;
    }
    job->row_tasks = (job->m + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
    make_bands(job);
    azq_parallel(job->bands * job->row_tasks, AZQ_MAX_THREADS, int8_task, job);
    return AZQ_OK;
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
    if (compute == AZQ_COMPUTE_FP32) {
        return azq_linear_fp32(layer, scratch, x, m, ldx, y, ldy);
    }
    matmul_job job = {.layer = layer, .kernels = kernels, .scratch = scratch, .x = x, .y = y, .m = m, .ldx = ldx, .ldy = ldy};
    return run_int8(&job);
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
