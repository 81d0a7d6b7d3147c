/* Rows of blocks: checks, then bands of rows over the threads. */
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include "azq.h"
#include "azq_kernels.h"
#include "threads.h"

static int block_of(int type, int64_t *elements, int64_t *bytes) {
    switch (type) {
    case AZQ_TYPE_F32: *elements = 1, *bytes = 4; return 1;
    case AZQ_TYPE_F16:
    case AZQ_TYPE_BF16: *elements = 1, *bytes = 2; return 1;
    case AZQ_TYPE_Q4_0: *elements = AZQ_QK4_0, *bytes = sizeof(azq_block_q4_0); return 1;
    case AZQ_TYPE_Q8_0: *elements = AZQ_QK8_0, *bytes = sizeof(azq_block_q8_0); return 1;
    default: return 0;
    }
}

int64_t azq_row_bytes(int type, int64_t k) {
    int64_t elements, bytes;
    if (!block_of(type, &elements, &bytes) || k < 0 || k % elements || k / elements > INT64_MAX / bytes) {
        return -1;
    }
    return k / elements * bytes;
}

/* Magnitudes from which a block's fp16 scale would round to infinity and take the whole block with it.
 * (A plain fp16 or bf16 number that overflows is infinite on its own, as IEEE conversion has it.) */
static float magnitude_limit(int type) {
    switch (type) {
    case AZQ_TYPE_Q4_0: return 65520.0f * 8.0f;
    case AZQ_TYPE_Q8_0: return 65520.0f * 127.0f;
    default: return INFINITY;
    }
}

/* Rows per task: about 64 Ki elements, so that a task outweighs handing it out. */
static int64_t band(int64_t k) { return k >= 65536 ? 1 : 65536 / (k > 0 ? k : 1); }

/* One very long row is cut at block borders, so that all threads share it. */
static void split_long_row(int64_t *rows, int64_t *k, int64_t elements) {
    int64_t piece = 65536 / elements * elements;
    if (*rows == 1 && *k > piece && *k % piece == 0) {
        *rows = *k / piece;
        *k = piece;
    }
}

typedef struct {
    int64_t rows, k, row_bytes, band;
    const float *x;
    uint8_t *blocks;
    azq_quantize_row_fn *row;
    azq_find_bad_fn *find_bad;
    float limit;
    _Atomic int64_t bad; /* smallest offending index so far */
} quantize_job;

static void quantize_task(void *context, int64_t task, int worker) {
    (void)worker;
    quantize_job *job = context;
    int64_t end = (task + 1) * job->band < job->rows ? (task + 1) * job->band : job->rows;
    for (int64_t r = task * job->band; r < end; r++) {
        const float *x = job->x + r * job->k;
        int64_t bad = job->find_bad(x, job->k, job->limit);
        if (bad >= 0) {
            int64_t index = r * job->k + bad;
            int64_t seen = atomic_load(&job->bad);
            while (index < seen && !atomic_compare_exchange_weak(&job->bad, &seen, index)) {
            }
            return;
        }
        job->row(x, job->blocks + r * job->row_bytes, job->k);
    }
}

azq_status azq_quantize(int type, const float *x, int64_t rows, int64_t k, void *dst, int64_t *bad_index) {
    int64_t elements, bytes;
    if (!block_of(type, &elements, &bytes)) {
        return AZQ_E_TYPE;
    }
    if (rows < 0 || azq_row_bytes(type, k) < 0 || (k > 0 && rows > INT64_MAX / 4 / k)) {
        return AZQ_E_SHAPE;
    }
    if (rows == 0 || k == 0) {
        return AZQ_OK;
    }
    if (!x || !dst || !bad_index) {
        return AZQ_E_NULL;
    }
    const azq_kernel_slots *kernels = azq_active();
    split_long_row(&rows, &k, elements);
    quantize_job job = {
        .rows = rows,
        .k = k,
        .row_bytes = azq_row_bytes(type, k),
        .band = band(k),
        .x = x,
        .blocks = dst,
        .row = kernels->quantize_row[type],
        .find_bad = kernels->find_bad,
        .limit = magnitude_limit(type),
        .bad = INT64_MAX,
    };
    azq_parallel((rows + job.band - 1) / job.band, AZQ_MAX_THREADS, quantize_task, &job);
    int64_t bad = atomic_load(&job.bad);
    if (bad == INT64_MAX) {
        return AZQ_OK;
    }
    *bad_index = bad;
    return isfinite(x[bad]) ? AZQ_E_RANGE : AZQ_E_NONFINITE;
}

typedef struct {
    int64_t rows, k, row_bytes, band;
    const uint8_t *blocks;
    float *y;
    azq_dequantize_row_fn *row;
} dequantize_job;

static void dequantize_task(void *context, int64_t task, int worker) {
    (void)worker;
    const dequantize_job *job = context;
    int64_t first = task * job->band;
    int64_t end = first + job->band < job->rows ? first + job->band : job->rows;
    for (int64_t r = first; r < end; r++) {
        job->row(job->blocks + r * job->row_bytes, job->y + r * job->k, job->k);
    }
}

azq_status azq_dequantize(int type, const void *src, int64_t rows, int64_t k, float *y) {
    int64_t elements, bytes;
    if (!block_of(type, &elements, &bytes)) {
        return AZQ_E_TYPE;
    }
    if (rows < 0 || azq_row_bytes(type, k) < 0 || (k > 0 && rows > INT64_MAX / 4 / k)) {
        return AZQ_E_SHAPE;
    }
    if (rows == 0 || k == 0) {
        return AZQ_OK;
    }
    if (!src || !y) {
        return AZQ_E_NULL;
    }
    split_long_row(&rows, &k, elements);
    dequantize_job job = {
        .rows = rows,
        .k = k,
        .row_bytes = azq_row_bytes(type, k),
        .band = band(k),
        .blocks = src,
        .y = y,
        .row = azq_active()->dequantize_row[type],
    };
    azq_parallel((rows + job.band - 1) / job.band, AZQ_MAX_THREADS, dequantize_task, &job);
    return AZQ_OK;
}
