/* Int8 products: activations quantized once, panels of packed weights split over the threads. */
#include <stdatomic.h>
#include <string.h>
#include "matrix.h"
#include "threads.h"

enum {
    ROWS_PER_TASK = 64,      /* activation rows that stay in cache while panels stream by */
    PANELS_PER_CALL = 4,     /* panels handed to a kernel at once */
    ACT_PER_TASK = 16384,    /* activations quantized by one task: some 2 us */
    MAX_BANDS = 512,
    STREAM_ROWS = 4,         /* so many are one tile of every kernel, and wait for memory alone */
    AHEAD_BYTES = 128 << 10, /* of either stream of a slice; the second-level cache has room for them */
};

/* Panels that one thread works through; those who are done with theirs help out. */
typedef struct {
    _Alignas(64) _Atomic int32_t next; /* alone on its cache line */
    int32_t end;
    int32_t apart; /* 0, or how far the two panels lie apart that are computed at once */
} matmul_slice;

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
    matmul_slice *slices;
    int n_slices, chunk; /* panels that a thread takes at once */
} matmul_job;

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

static const uint8_t *packed_of(const azq_matrix *w) {
    return atomic_load_explicit(&((azq_matrix *)(uintptr_t)w)->packed, memory_order_relaxed);
}

static void int8_panels(const matmul_job *job, int64_t row0, int64_t rows, int64_t panel0, int64_t panel_end) {
    const azq_matrix *w = job->layer->w;
    const uint8_t *packed = packed_of(w);
    azq_gemm_fn *gemm = job->kernels->gemm[w->type];
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

static void band_task(void *context, int64_t task, int worker) {
    (void)worker;
    const matmul_job *job = context;
    int64_t row0 = task % job->row_tasks * ROWS_PER_TASK;
    int64_t rows = job->m - row0 < ROWS_PER_TASK ? job->m - row0 : ROWS_PER_TASK;
    int64_t band = task / job->row_tasks;
    int8_panels(job, row0, rows, job->starts[band], job->starts[band + 1]);
}

/* Panels p and p + apart for p from panel0 on: two streams of memory without a jump. What comes after the sums is
 * done for some panels at once: an activation takes several vectors in the time of one. */
static void int8_streams(const matmul_job *job, int64_t panel0, int64_t panel_end, int64_t apart) {
    enum { COLUMNS = PANELS_PER_CALL * AZQ_PANEL };
    const azq_matrix *w = job->layer->w;
    const uint8_t *packed = packed_of(w);
    azq_gemm_fn *gemm = job->kernels->gemm[w->type];
    float pair[STREAM_ROWS * 2 * AZQ_PANEL], c[2][STREAM_ROWS * COLUMNS];
    for (int64_t p = panel0; p < panel_end; p += PANELS_PER_CALL) {
        int64_t n = panel_end - p < PANELS_PER_CALL ? panel_end - p : PANELS_PER_CALL;
        for (int64_t i = 0; i < n; i++) {
            gemm(&job->act, 0, job->m, packed + (p + i) * w->panel_bytes, apart * w->panel_bytes, 2, pair, 2 * AZQ_PANEL);
            for (int64_t j = 0; j < 2 * job->m; j++) {
                memcpy(c[j % 2] + j / 2 * COLUMNS + i * AZQ_PANEL, pair + j * AZQ_PANEL, AZQ_PANEL * sizeof *pair);
            }
        }
        for (int i = 0; i < 2; i++) {
            int64_t column = (p + i * apart) * AZQ_PANEL;
            int64_t columns = w->n - column < n * AZQ_PANEL ? w->n - column : n * AZQ_PANEL;
            for (int64_t r = 0; r < job->m; r++) {
                azq_linear_finish(job->layer, r, column, columns, c[i] + r * COLUMNS, job->y, job->ldy);
            }
        }
    }
}

static int64_t panels_of(const azq_matrix *w) { return (w->n + AZQ_PANEL - 1) / AZQ_PANEL; }

static int64_t pair_slices(const azq_matrix *w) {
    int64_t pairs = panels_of(w) / 2, threads = azq_threads();
    return pairs < threads ? pairs : threads;
}

/* Where slice i of n begins, in pairs of panels. */
static int64_t slice_from(const azq_matrix *w, int64_t i, int64_t n) { return panels_of(w) / 2 * i / n; }

/* Has this thread fetch the beginning of what will be its share of the next product, see azq_fetch_ahead. */
static void fetch_slice(const azq_matrix *w, int64_t m, int worker) {
    const uint8_t *packed = w ? packed_of(w) : NULL;
    int64_t n = packed && m <= STREAM_ROWS ? pair_slices(w) : 0;
    if (worker >= n) {
        return;
    }
    int64_t from = slice_from(w, worker, n), half = (slice_from(w, worker + 1, n) - from) * w->panel_bytes;
    int64_t bytes = half < AHEAD_BYTES ? half : AHEAD_BYTES;
    packed += 2 * from * w->panel_bytes;
    azq_fetch_ahead(packed, packed + (azq_active_isa()->paired_panels[w->type] ? half : bytes), bytes / 64);
}

static void slice_task(void *context, int64_t task, int worker) {
    (void)task; /* a worker begins with the slice of its number: memory that follows on what it fetched last */
    const matmul_job *job = context;
    for (int i = 0; i < job->n_slices; i++) {
        matmul_slice *slice = &job->slices[(worker + i) % job->n_slices];
        int32_t panel;
        while ((panel = atomic_fetch_add_explicit(&slice->next, job->chunk, memory_order_relaxed)) < slice->end) {
            int64_t end = slice->end - panel < job->chunk ? slice->end : panel + job->chunk;
            if (slice->apart) {
                int8_streams(job, panel, end, slice->apart);
            } else {
                int8_panels(job, 0, job->m, panel, end);
            }
        }
    }
    /* Whoever is through waits for the others, and for what comes before the next product. */
    fetch_slice(job->layer->next, job->m, worker);
}

/* Microseconds that a panel takes, guessed from its bytes and its multiply-adds. Never 0, as k may be. */
static double panel_cost(const matmul_job *job) {
    enum { BYTES_PER_MICROSECOND = 30000, MACS_PER_MICROSECOND = 250000 };
    int64_t rows = job->m < ROWS_PER_TASK ? job->m : ROWS_PER_TASK;
    return (double)(job->layer->w->panel_bytes + 1) / BYTES_PER_MICROSECOND +
           (double)(rows * job->layer->w->k * AZQ_PANEL) / MACS_PER_MICROSECOND;
}

/* A slice of the panels for each thread, so that it reads one stretch of memory, in chunks of a microsecond. The
 * fewest rows, which wait for memory alone, read it as two streams where the kernel takes two panels at a time: each
 * goes on where it was, instead of both jumping behind the other. An odd panel at the end is a slice by itself. */
static void make_slices(matmul_job *job) {
    const azq_matrix *w = job->layer->w;
    int64_t n = pair_slices(w), panels = panels_of(w);
    int streams = job->m <= STREAM_ROWS && azq_active_isa()->paired_panels[w->type];
    job->n_slices = (int)(n + panels % 2);
    for (int64_t i = 0; i < n; i++) {
        int64_t from = slice_from(w, i, n), to = slice_from(w, i + 1, n);
        matmul_slice *slice = &job->slices[i];
        atomic_init(&slice->next, (int32_t)(2 * from));
        slice->apart = streams ? (int32_t)(to - from) : 0;
        slice->end = (int32_t)(streams ? to + from : 2 * to);
    }
    if (panels % 2) {
        matmul_slice *last = &job->slices[n];
        atomic_init(&last->next, (int32_t)(panels - 1));
        last->apart = 0;
        last->end = (int32_t)panels;
    }
    /* A chunk of streams is as many pairs, of anything else panels. */
    int64_t chunk = (int64_t)(1.0 / panel_cost(job)) / 2 * 2;
    int64_t least = streams ? slice_from(w, 1, n > 0 ? n : 1) / 12 : 2;
    least = least > PANELS_PER_CALL ? PANELS_PER_CALL : least;
    chunk = chunk > INT16_MAX ? INT16_MAX : chunk > least ? chunk : least;
    job->chunk = chunk > 0 ? (int)chunk : 1;
}

/* Bands of panels, long ones first: each a share of what is left, so that no thread waits long for the last
 * one, but worth handing out. */
static void make_bands(matmul_job *job) {
    enum { SHARES = 2, LEAST_MICROSECONDS = 3 };
    const azq_matrix *w = job->layer->w;
    int64_t panels = (w->n + AZQ_PANEL - 1) / AZQ_PANEL, threads = azq_threads();
    double cost = panel_cost(job);
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

static azq_status run(matmul_job *job) {
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
    if (!azq_scratch_claim(s, job->x, job->m, w->k, AZQ_COMPUTE_INT8)) {
        azq_parallel((job->m + act_rows(w->k) - 1) / act_rows(w->k), AZQ_MAX_THREADS, act_task, job);
    }
    job->row_tasks = (job->m + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
    if (job->row_tasks == 1) {
        matmul_slice slices[AZQ_MAX_THREADS + 1];
        job->slices = slices;
        make_slices(job);
        azq_parallel(job->n_slices, AZQ_MAX_THREADS, slice_task, job);
        return AZQ_OK;
    }
    make_bands(job);
    azq_parallel(job->bands * job->row_tasks, AZQ_MAX_THREADS, band_task, job);
    return AZQ_OK;
}

azq_status azq_linear_int8(const azq_linear *layer, azq_scratch *scratch, const float *x, int64_t m, int64_t ldx,
                           float *y, int64_t ldy) {
    matmul_job job = {.layer = layer, .kernels = azq_active(), .scratch = scratch, .x = x, .y = y, .m = m, .ldx = ldx, .ldy = ldy};
    return run(&job);
}
