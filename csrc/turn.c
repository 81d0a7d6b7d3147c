/* Matrices that a checkpoint holds turned, such as those of GPT-2: quantized column by column. */
#include <stdlib.h>
#include <string.h>
#include "azq.h"
#include "transpose.h"

enum {
    TILE = 8192, /* elements turned at once: with their blocks they stay in the nearest caches */
    LEAST = 16,  /* columns at once: a line of the cache */
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* out (columns, rows), contiguous: the transpose of x (rows, columns), whose rows are ldx apart. */
static void turn(const float *x, int64_t ldx, int64_t rows, int64_t columns, float *out) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *from = x + r * ldx;
        int64_t c = 0;
        for (; c + 4 <= columns; c += 4) {
            azq_v4 square[4];
            for (int i = 0; i < 4; i++) {
                square[i] = azq_load4(from + i * ldx + c);
            }
            azq_transpose4(square);
            for (int i = 0; i < 4; i++) {
                azq_store4(out + (c + i) * rows + r, square[i]);
            }
        }
        for (; c < columns; c++) {
            for (int64_t i = 0; i < 4; i++) {
                out[c * rows + r + i] = from[i * ldx + c];
            }
        }
    }
    for (; r < rows; r++) {
        for (int64_t c = 0; c < columns; c++) {
            out[c * rows + r] = x[r * ldx + c];
        }
    }
}

azq_status azq_quantize_turned(int type, const float *x, int64_t k, int64_t n, void *dst, int64_t dst_row_bytes) {
    int64_t row_bytes = azq_row_bytes(type, k);
    if (row_bytes < 0 || n < 0 || dst_row_bytes < row_bytes || k > INT64_MAX / 64 / LEAST) {
        return AZQ_E_SHAPE;
    }
    if (n == 0 || k == 0) {
        return AZQ_OK;
    }
    if (!x || !dst) {
        return AZQ_E_NULL;
    }
    int64_t at_once = TILE / k > LEAST ? TILE / k / LEAST * LEAST : LEAST;
    float *turned = malloc((size_t)(at_once * k) * sizeof(float));
    uint8_t *blocks = malloc((size_t)(at_once * row_bytes));
    azq_status status = turned && blocks ? AZQ_OK : AZQ_E_NOMEM;
    for (int64_t first = 0; first < n && status == AZQ_OK; first += at_once) {
        int64_t columns = smaller(at_once, n - first), bad;
        turn(x + first, n, k, columns, turned);
        status = azq_quantize(type, turned, columns, k, blocks, &bad);
        for (int64_t c = 0; c < columns && status == AZQ_OK; c++) {
            memcpy((uint8_t *)dst + (first + c) * dst_row_bytes, blocks + c * row_bytes, (size_t)row_bytes);
        }
    }
    free(turned);
    free(blocks);
    return status;
}
