/* bf16 on any machine: the definition. */
#include "bf16.h"
#include <assert.h>
#include <math.h>
#include <string.h>
#include "../azq_half.h"

#define AZQ_NAME(name) name##_scalar
#include "bf16_tiles.h"

void gemm_bf16_scalar(const uint16_t *a, int64_t a_stride, int64_t rows, const uint16_t *b, int64_t b_stride,
                      int64_t n_panels, int64_t n_tiles, float *c, int64_t c_stride, int first) {
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *row = a + r / AZQ_TILE_ROWS * a_stride + r % AZQ_TILE_ROWS * AZQ_TILE_K;
        for (int64_t j = 0; j < n_panels * AZQ_PANEL; j++) {
            const uint16_t *column = b + j / AZQ_PANEL * b_stride + j % AZQ_PANEL * 2;
            float *out = c + r / AZQ_TILE_ROWS * c_stride + j / AZQ_PANEL * (AZQ_TILE_ROWS * AZQ_PANEL) +
                         r % AZQ_TILE_ROWS * AZQ_PANEL + j % AZQ_PANEL;
            float sum = first ? 0.0f : *out;
            for (int64_t t = 0; t < n_tiles; t++) {
                for (int i = 0; i < AZQ_TILE_K; i++) {
                    float weight = azq_bf16_to_f32(column[t * AZQ_TILE + i / 2 * WORDS + i % 2]);
                    sum = fmaf(azq_bf16_to_f32(row[t * AZQ_TILE + i]), weight, sum);
                }
            }
            *out = sum;
        }
    }
}
