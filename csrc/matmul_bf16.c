/* The bf16 way of a linear layer. Activations are rounded to tiles once; a task takes some panels of weights and up
 * to 512 rows. For each stretch of 512 of k it makes bf16 of two panels at a time (32 KB, first-level cache) and
 * multiplies all its rows by them (512 KB at most, second-level cache), adding to sums that stay in tiles until the
 * last stretch is done. So each weight is dequantized once per 512 rows. */
#include <stdatomic.h>
#include <string.h>
#include "matrix.h"
#include "threads.h"
#include "transpose.h"

enum {
    STRETCH = 512, /* of k: whole blocks of every type */
    STRETCH_TILES = STRETCH / AZQ_TILE_K,
    PANELS_PER_CALL = 2,
    MAX_PANELS = 16, /* of a task */
    ROWS_PER_TASK = 512,
    C_TILE = AZQ_TILE_ROWS * AZQ_PANEL,
    B_ELEMENTS = PANELS_PER_CALL * STRETCH_TILES * AZQ_TILE,
};

typedef struct {
    const azq_linear *layer;
    const azq_kernel_slots *kernels;
    azq_scratch *scratch;
    const float *x;
    float *y;
    int64_t m, ldx, ldy;
    int64_t k_tiles;
    int64_t panels_per_task, row_tasks;
    /* What one worker's scratch holds, in floats: sums, tiles of weights, rows to make those of, one row's blocks. */
    int64_t c_floats, b_floats, dense_floats, block_floats;
} bf16_job;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- activations --------------------------------------------------------------------------------- */

static void act_task(void *context, int64_t task, int worker) {
    (void)worker;
    const bf16_job *job = context;
    uint16_t *tiles = (uint16_t *)(void *)job->scratch->act;
    int64_t row = task * AZQ_TILE_ROWS;
    job->kernels->round_bf16(job->x + row * job->ldx, job->ldx, smaller(job->m - row, AZQ_TILE_ROWS),
                             job->layer->w->k, tiles + task * job->k_tiles * AZQ_TILE);
}

/* ---- weights ------------------------------------------------------------------------------------- */

/* Any type: 16 rows to floats, those to tiles as if they were activations, each tile turned. */
static void tiles_of_rows(const bf16_job *job, int64_t panel, int64_t first, int64_t k, uint16_t *tiles, float *dense) {
    const azq_matrix *w = job->layer->w;
    int64_t rows = smaller(w->n - panel * AZQ_PANEL, AZQ_PANEL);
    uint8_t *blocks = (uint8_t *)(dense + job->dense_floats);
    int64_t bytes = azq_row_bytes(w->type, k), begin = azq_row_bytes(w->type, first);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = azq_matrix_row(w, panel * AZQ_PANEL + r, blocks);
        const uint8_t *from = row + begin;
        job->kernels->dequantize_row[w->type](from, dense + r * STRETCH, k);
        if (w->data) { /* short pieces far apart: the processor does not see the next call's coming */
            const uint8_t *next = from + PANELS_PER_CALL * AZQ_PANEL * w->row_bytes;
            for (int64_t i = 0; i < bytes; i += 64) {
                __builtin_prefetch(next + i, 0, 2);
            }
        }
    }
    job->kernels->round_bf16(dense, STRETCH, rows, k, tiles);
    for (int64_t t = 0; t < k; t += AZQ_TILE_K, tiles += AZQ_TILE) {
        uint32_t tile[AZQ_TILE / 2], *turned = (uint32_t *)(void *)tiles; /* pairs of k, of which a row has 16 */
        memcpy(tile, tiles, sizeof tile);
        for (int i = 0; i < AZQ_PANEL; i += 4) {
            for (int n = 0; n < AZQ_PANEL; n += 4) {
                azq_v4 square[4];
                for (int j = 0; j < 4; j++) {
                    square[j] = azq_load4(tile + (n + j) * AZQ_PANEL + i);
                }
                azq_transpose4(square);
                for (int j = 0; j < 4; j++) {
                    azq_store4(turned + (i + j) * AZQ_PANEL + n, square[j]);
                }
            }
        }
    }
}

static void weight_tiles(const bf16_job *job, int64_t panel, int64_t first, int64_t k, uint16_t *tiles, float *dense) {
    const azq_matrix *w = job->layer->w;
    azq_dequantize_bf16_fn *dequantize = job->kernels->dequantize_bf16[w->type];
    if (!dequantize) {
        tiles_of_rows(job, panel, first, k, tiles, dense);
        return;
    }
    const uint8_t *packed = atomic_load_explicit(&((azq_matrix *)(uintptr_t)w)->packed, memory_order_relaxed);
    int64_t block_bytes = azq_head_bytes(w->type) + azq_line_bytes(w->type);
    dequantize(packed + panel * w->panel_bytes + first / 32 * block_bytes, k / 32, tiles);
}

/* ---- products ------------------------------------------------------------------------------------ */

/* The finished sums of the task's rows, tiles no more. */
static void finish_rows(const bf16_job *job, int64_t row0, int64_t rows, int64_t panel0, int64_t panels, const float *c) {
    int64_t col = panel0 * AZQ_PANEL, columns = smaller(job->layer->w->n - col, panels * AZQ_PANEL);
    for (int64_t r = 0; r < rows; r++) {
        float row[MAX_PANELS * AZQ_PANEL];
        const float *from = c + r / AZQ_TILE_ROWS * panels * C_TILE + r % AZQ_TILE_ROWS * AZQ_PANEL;
        for (int64_t p = 0; p < panels; p++) {
            memcpy(row + p * AZQ_PANEL, from + p * C_TILE, AZQ_PANEL * sizeof *row);
        }
        azq_linear_finish(job->layer, row0 + r, col, columns, row, job->y, job->ldy);
    }
}

static void bf16_task(void *context, int64_t task, int worker) {
    const bf16_job *job = context;
    const azq_matrix *w = job->layer->w;
    int64_t row0 = task % job->row_tasks * ROWS_PER_TASK, rows = smaller(job->m - row0, ROWS_PER_TASK);
    int64_t panel0 = task / job->row_tasks * job->panels_per_task;
    int64_t panels = smaller((w->n + AZQ_PANEL - 1) / AZQ_PANEL - panel0, job->panels_per_task);
    int64_t a_stride = job->k_tiles * AZQ_TILE;
    const uint16_t *act = (const uint16_t *)(const void *)job->scratch->act; /* NULL when k is 0 */
    float *c = job->scratch->rows + (size_t)worker * job->scratch->row_floats;
    uint16_t *b = (uint16_t *)(void *)(c + job->c_floats);
    float *dense = c + job->c_floats + job->b_floats;
    if (job->kernels->bf16_begin) {
        job->kernels->bf16_begin();
    }
    for (int64_t first = 0; first < w->k; first += STRETCH) {
        int64_t k = smaller(w->k - first, STRETCH), k_tiles = (k + AZQ_TILE_K - 1) / AZQ_TILE_K;
        for (int64_t p = 0; p < panels; p += PANELS_PER_CALL) {
            int64_t n_panels = smaller(panels - p, PANELS_PER_CALL);
            for (int64_t i = 0; i < n_panels; i++) {
                weight_tiles(job, panel0 + p + i, first, k, b + i * STRETCH_TILES * AZQ_TILE, dense);
            }
            const uint16_t *a = act + row0 / AZQ_TILE_ROWS * a_stride + first / AZQ_TILE_K * AZQ_TILE;
            job->kernels->gemm_bf16(a, a_stride, rows, b, STRETCH_TILES * AZQ_TILE, n_panels, k_tiles, c + p * C_TILE,
                                    panels * C_TILE, first == 0);
        }
    }
    if (job->kernels->bf16_end) {
        job->kernels->bf16_end();
    }
    if (w->k == 0) {
        memset(c, 0, (size_t)job->c_floats * sizeof *c);
    }
    finish_rows(job, row0, rows, panel0, panels, c);
}

azq_status azq_linear_bf16(const azq_linear *layer, azq_scratch *s, const float *x, int64_t m, int64_t ldx, float *y,
                           int64_t ldy) {
    azq_matrix *w = layer->w;
    bf16_job job = {.layer = layer, .kernels = azq_active(), .scratch = s, .x = x, .y = y, .m = m, .ldx = ldx, .ldy = ldy};
    job.k_tiles = (w->k + AZQ_TILE_K - 1) / AZQ_TILE_K;
    int64_t panels = (w->n + AZQ_PANEL - 1) / AZQ_PANEL, row_tiles = (m + AZQ_TILE_ROWS - 1) / AZQ_TILE_ROWS;
    /* A few tasks per thread, so that none waits long; wide ones, so that activations are read few times. */
    int64_t per_task = smaller(panels / (4 * azq_threads()), MAX_PANELS) / PANELS_PER_CALL * PANELS_PER_CALL;
    job.panels_per_task = per_task > PANELS_PER_CALL ? per_task : PANELS_PER_CALL;
    job.row_tasks = (m + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
    int direct = job.kernels->dequantize_bf16[w->type] != NULL;
    job.c_floats = smaller(row_tiles, ROWS_PER_TASK / AZQ_TILE_ROWS) * job.panels_per_task * C_TILE;
    job.b_floats = B_ELEMENTS / 2;
    job.dense_floats = direct ? 0 : AZQ_PANEL * STRETCH;
    job.block_floats = direct ? 0 : (w->row_bytes + 3) / 4;
    azq_status status = direct ? azq_matrix_pack(w) : AZQ_OK;
    if (status == AZQ_OK) {
        status = azq_scratch_reserve(s, (size_t)(row_tiles * job.k_tiles * AZQ_TILE) * sizeof(uint16_t),
                                     (size_t)(job.c_floats + job.b_floats + job.dense_floats + job.block_floats));
    }
    if (status != AZQ_OK) {
        return status;
    }
    if (w->k > 0 && !azq_scratch_claim(s, x, m, w->k, AZQ_COMPUTE_BF16)) {
        azq_parallel(row_tiles, AZQ_MAX_THREADS, act_task, &job);
    }
    azq_parallel((panels + job.panels_per_task - 1) / job.panels_per_task * job.row_tasks, s->workers, bf16_task, &job);
    return AZQ_OK;
}
