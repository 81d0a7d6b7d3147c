/* The fp32 way of a linear layer. Few rows are multiplied by W's rows as they are, or as floats where the type has no
 * kernel. For many rows both are laid down in planes (azq_gemm_plane_fn): x once, W by each task for its columns. A
 * task then takes BLOCK_TILES tiles of rows through all lanes, so that a lane of their x stays in the second cache
 * while a lane of one panel of W, in the first, meets all of it. */
#include <string.h>
#include "matrix.h"
#include "threads.h"
#include "transpose.h"

enum {
    FEW_ROWS = 36,         /* from here on planes cost less than they gain */
    NEAR_BYTES = 4 << 20,  /* weights that a cache may hold from one call to the next */
    LONG_ROW = 6144,       /* elements; 32 such rows of floats fill three quarters of a megabyte */
    APART = 16,            /* floats between rows or planes, so that they do not lie in the same lines of a cache */
    MAX_PANELS = 4,        /* of AZQ_PLANE_COLUMNS, of a task */
    BLOCK_TILES = 10,      /* of AZQ_PLANE_ROWS */
    TILES_PER_TASK = 80,
    AT_ONCE = 4,           /* rows that are split into planes together */
};

typedef struct {
    const azq_linear *layer;
    const azq_kernel_slots *kernels;
    azq_scratch *scratch;
    const float *x;
    float *y;
    int64_t m, ldx, ldy;
    /* Planes: floats from one to the next, of x and of W; and how the work is cut. */
    int64_t steps, x_plane, w_plane;
    int64_t tiles, row_tasks, panels_per_task;
    int64_t w_floats, sum_floats, dense_floats; /* of one worker's scratch */
} fp32_job;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- few rows ------------------------------------------------------------------------------------ */

/* W's rows are read where they are when x has so few that making fp32 of them would not pay. */
static azq_gemm_fp32_fn *in_place(const fp32_job *job) {
    return job->m <= AZQ_FP32_ROWS ? job->kernels->gemm_fp32[job->layer->w->type] : NULL;
}

/* Columns of a task: rows of W made fp32 should stay in the second cache. */
static int64_t columns_per_task(const fp32_job *job) {
    return in_place(job) || job->layer->w->k <= LONG_ROW ? AZQ_FP32_COLUMNS : AZQ_PANEL;
}

static void few_rows_task(void *context, int64_t task, int worker) {
    const fp32_job *job = context;
    const azq_matrix *w = job->layer->w;
    int64_t most = columns_per_task(job), first = task * most;
    int64_t columns = smaller(w->n - first, most), ldw = w->row_bytes;
    azq_gemm_fp32_fn *gemm = in_place(job);
    const void *weights = w->data + (gemm ? first * w->row_bytes : 0);
    if (!gemm) {
        gemm = job->kernels->gemm_fp32[AZQ_TYPE_F32];
        float *rows = job->scratch->rows + (size_t)worker * job->scratch->row_floats;
        int64_t stride = w->k + APART;
        for (int64_t j = 0; j < columns; j++) {
            const void *blocks = azq_matrix_row(w, first + j, (uint8_t *)(rows + most * stride));
            job->kernels->dequantize_row[w->type](blocks, rows + j * stride, w->k);
        }
        weights = rows;
        ldw = stride * (int64_t)sizeof *rows;
    }
    int from_memory = in_place(job) && w->n * w->row_bytes > NEAR_BYTES;
    for (int64_t r = 0; r < job->m; r += AZQ_FP32_ROWS) {
        float c[AZQ_FP32_ROWS * AZQ_FP32_COLUMNS];
        int64_t rows = smaller(job->m - r, AZQ_FP32_ROWS);
        gemm(job->x + r * job->ldx, job->ldx, rows, weights, ldw, columns, w->k, from_memory, c,
             AZQ_FP32_COLUMNS);
        for (int64_t i = 0; i < rows; i++) {
            azq_linear_finish(job->layer, r + i, first, columns, c + i * AZQ_FP32_COLUMNS, job->y, job->ldy);
        }
    }
}

static azq_status few_rows(fp32_job *job) {
    const azq_matrix *w = job->layer->w;
    int64_t columns = columns_per_task(job);
    /* A task's rows of floats, and the blocks of one row. */
    int64_t floats = in_place(job) ? 1 : (w->k + APART) * columns + (w->row_bytes + 3) / 4;
    azq_status status = azq_scratch_reserve(job->scratch, 0, (size_t)floats);
    if (status == AZQ_OK) {
        azq_parallel((w->n + columns - 1) / columns, job->scratch->workers, few_rows_task, job);
    }
    return status;
}

/* ---- many rows ----------------------------------------------------------------------------------- */

/* Four rows -> planes (AZQ_SUM_LANES, plane), in each of which steps are `width` apart; zeros past k. */
static void split_rows(const float *const rows[AT_ONCE], int64_t k, float *to, int64_t plane, int64_t width) {
    for (int64_t i = 0; i < k; i += AZQ_SUM_LANES, to += width) {
        float pad[AT_ONCE][AZQ_SUM_LANES];
        const float *from[AT_ONCE];
        for (int r = 0; r < AT_ONCE; r++) {
            from[r] = rows[r] + i;
            if (k - i < AZQ_SUM_LANES) {
                memset(pad[r], 0, sizeof pad[r]);
                memcpy(pad[r], from[r], (size_t)(k - i) * sizeof *pad[r]);
                from[r] = pad[r];
            }
        }
        for (int lane = 0; lane < AZQ_SUM_LANES; lane += 4) {
            azq_v4 square[4] = {azq_load4(from[0] + lane), azq_load4(from[1] + lane), azq_load4(from[2] + lane),
                                azq_load4(from[3] + lane)};
            azq_transpose4(square);
            for (int j = 0; j < 4; j++) {
                azq_store4(to + (lane + j) * plane, square[j]);
            }
        }
    }
}

/* x lies in the order in which it is read: (blocks of tiles, lanes, BLOCK_TILES tiles, x_plane). */
static int64_t place_of_x(const fp32_job *job, int64_t tile, int64_t lane) {
    return (tile / BLOCK_TILES * AZQ_SUM_LANES + lane) * BLOCK_TILES * job->x_plane + tile % BLOCK_TILES * job->x_plane;
}

/* A tile of x; the last tile's missing rows are its last one again. */
static void x_task(void *context, int64_t tile, int worker) {
    (void)worker;
    const fp32_job *job = context;
    float *to = (float *)(void *)job->scratch->act + place_of_x(job, tile, 0);
    for (int64_t r = 0; r < AZQ_PLANE_ROWS; r += AT_ONCE) {
        const float *rows[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) {
            rows[i] = job->x + smaller(tile * AZQ_PLANE_ROWS + r + i, job->m - 1) * job->ldx;
        }
        split_rows(rows, job->layer->w->k, to + r, BLOCK_TILES * job->x_plane, AZQ_PLANE_ROWS);
    }
}

/* A panel of W; columns past n are the last one again. */
static void split_panel(const fp32_job *job, int64_t panel, float *to, float *dense) {
    const azq_matrix *w = job->layer->w;
    uint8_t *blocks = (uint8_t *)(dense + job->dense_floats);
    for (int64_t j = 0; j < AZQ_PLANE_COLUMNS; j += AT_ONCE) {
        const float *rows[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) {
            int64_t row = smaller(panel * AZQ_PLANE_COLUMNS + j + i, w->n - 1);
            job->kernels->dequantize_row[w->type](azq_matrix_row(w, row, blocks), dense + i * (w->k + APART), w->k);
            rows[i] = dense + i * (w->k + APART);
        }
        split_rows(rows, w->k, to + j, job->w_plane, AZQ_PLANE_COLUMNS);
    }
}

static void finish_block(const fp32_job *job, int64_t tile, int64_t tiles, int64_t panel, int64_t panels,
                         const float *sums) {
    int64_t col = panel * AZQ_PLANE_COLUMNS, columns = smaller(job->layer->w->n - col, panels * AZQ_PLANE_COLUMNS);
    int64_t rows = smaller(job->m - tile * AZQ_PLANE_ROWS, tiles * AZQ_PLANE_ROWS);
    for (int64_t r = 0; r < rows; r++) {
        float row[MAX_PANELS * AZQ_PLANE_COLUMNS];
        for (int64_t p = 0; p < panels; p++) {
            const float *done = sums + (r / AZQ_PLANE_ROWS * panels + p) * AZQ_PLANE_LEVELS * AZQ_PLANE_SUMS +
                                (AZQ_PLANE_LEVELS - 1) * AZQ_PLANE_SUMS;
            memcpy(row + p * AZQ_PLANE_COLUMNS, done + r % AZQ_PLANE_ROWS * AZQ_PLANE_COLUMNS,
                   AZQ_PLANE_COLUMNS * sizeof *row);
        }
        azq_linear_finish(job->layer, tile * AZQ_PLANE_ROWS + r, col, columns, row, job->y, job->ldy);
    }
}

static void planes_task(void *context, int64_t task, int worker) {
    const fp32_job *job = context;
    int64_t all = (job->layer->w->n + AZQ_PLANE_COLUMNS - 1) / AZQ_PLANE_COLUMNS;
    int64_t panel = task / job->row_tasks * job->panels_per_task, panels = smaller(all - panel, job->panels_per_task);
    int64_t tile = task % job->row_tasks * TILES_PER_TASK, last = smaller(job->tiles, tile + TILES_PER_TASK);
    const float *x = (const float *)(const void *)job->scratch->act; /* NULL when k is 0 */
    float *w = job->scratch->rows + (size_t)worker * job->scratch->row_floats;
    float *sums = w + job->w_floats, *dense = sums + job->sum_floats;
    for (int64_t p = 0; p < panels; p++) {
        split_panel(job, panel + p, w + p * AZQ_SUM_LANES * job->w_plane, dense);
    }
    for (; tile < last; tile += BLOCK_TILES) {
        int64_t tiles = smaller(last - tile, BLOCK_TILES);
        for (int leaf = 0; leaf < AZQ_SUM_LANES; leaf++) {
            int64_t lane = azq_fold_order[leaf];
            for (int64_t p = 0; p < panels; p++) {
                for (int64_t t = 0; t < tiles; t++) {
                    job->kernels->gemm_plane(x + place_of_x(job, tile + t, lane),
                                             w + (p * AZQ_SUM_LANES + lane) * job->w_plane, job->steps, leaf,
                                             sums + (t * panels + p) * AZQ_PLANE_LEVELS * AZQ_PLANE_SUMS);
                }
            }
        }
        finish_block(job, tile, tiles, panel, panels, sums);
    }
}

static azq_status many_rows(fp32_job *job) {
    const azq_matrix *w = job->layer->w;
    azq_scratch *s = job->scratch;
    job->steps = (w->k + AZQ_SUM_LANES - 1) / AZQ_SUM_LANES;
    job->x_plane = job->steps * AZQ_PLANE_ROWS + APART;
    job->w_plane = job->steps * AZQ_PLANE_COLUMNS + APART;
    job->tiles = (job->m + AZQ_PLANE_ROWS - 1) / AZQ_PLANE_ROWS;
    job->row_tasks = (job->tiles + TILES_PER_TASK - 1) / TILES_PER_TASK;
    int64_t panels = (w->n + AZQ_PLANE_COLUMNS - 1) / AZQ_PLANE_COLUMNS;
    /* Wide tasks read x fewer times; a few for each thread, so that none waits long. */
    int64_t share = panels * job->row_tasks / (4 * azq_threads());
    job->panels_per_task = share > MAX_PANELS ? MAX_PANELS : share > 1 ? share : 1;
    job->w_floats = job->panels_per_task * AZQ_SUM_LANES * job->w_plane;
    job->sum_floats = smaller(job->tiles, BLOCK_TILES) * job->panels_per_task * AZQ_PLANE_LEVELS * AZQ_PLANE_SUMS;
    job->dense_floats = AT_ONCE * (w->k + APART);
    azq_status status = azq_scratch_reserve(
        s, (size_t)place_of_x(job, (job->tiles + BLOCK_TILES - 1) / BLOCK_TILES * BLOCK_TILES, 0) * sizeof(float),
        (size_t)(job->w_floats + job->sum_floats + job->dense_floats + (w->row_bytes + 3) / 4));
    if (status != AZQ_OK) {
        return status;
    }
    if (!azq_scratch_claim(s, job->x, job->m, w->k, AZQ_COMPUTE_FP32)) {
        azq_parallel(job->tiles, AZQ_MAX_THREADS, x_task, job);
    }
    azq_parallel((panels + job->panels_per_task - 1) / job->panels_per_task * job->row_tasks, s->workers, planes_task,
                 job);
    return AZQ_OK;
}

azq_status azq_linear_fp32(const azq_linear *layer, azq_scratch *scratch, const float *x, int64_t m, int64_t ldx,
                           float *y, int64_t ldy) {
    fp32_job job = {.layer = layer, .kernels = azq_active(), .scratch = scratch, .x = x, .y = y, .m = m, .ldx = ldx, .ldy = ldy};
    return m <= FEW_ROWS ? few_rows(&job) : many_rows(&job);
}
