/* Dequantizers of the codebook types (IQ1, IQ2, IQ3): table look-ups, the same on every ISA. */
#include <assert.h>
#include "../azq_codebooks.h"
#include "../azq_half.h"
#include "families.h"

/* Eight signs from seven bits: the eighth makes the number of minus signs even. */
static uint8_t even_signs(uint32_t seven) {
    uint32_t parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return (uint8_t)(seven | (parity & 1) << 7);
}

/* y[j] = scale * magnitude, negative where bit j of signs is set. */
static void put8(float *y, float scale, uint16_t entry, const uint8_t *magnitudes, uint8_t signs) {
    for (int j = 0; j < 8; j++) {
        float value = scale * (float)magnitudes[entry >> 2 * j & 3];
        y[j] = signs >> j & 1 ? -value : value;
    }
}
static void put4(float *y, float scale, uint16_t entry, const uint8_t *magnitudes, uint8_t signs) {
    for (int j = 0; j < 4; j++) {
        float value = scale * (float)magnitudes[entry >> 3 * j & 7];
        y[j] = signs >> j & 1 ? -value : value;
    }
}

static const uint8_t iq2_magnitudes[4] = {8, 25, 43, 0}; /* a two-bit digit is never 3 */
static const uint8_t iq3_xxs_magnitudes[8] = {4, 12, 20, 28, 36, 44, 52, 62};
static const uint8_t iq3_s_magnitudes[8] = {1, 3, 5, 7, 9, 11, 13, 15};

static uint32_t word(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void azq_dequantize_iq2_xxs(const void *blocks, float *y, int64_t k) {
    const azq_block_iq2_xxs *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int g = 0; g < 8; g++) {
            const uint8_t *index = x[b].qs + 8 * g;
            uint32_t rest = word(index + 4);
            float scale = d * (0.5f + (float)(rest >> 28)) * 0.25f;
            for (int l = 0; l < 4; l++, y += 8) {
                put8(y, scale, azq_iq2_xxs_grid[index[l]], iq2_magnitudes, even_signs(rest >> 7 * l & 127));
            }
        }
    }
}

/* Scale of 16 weights: a nibble of the group's byte. */
static float half_scale(float d, uint8_t byte, int second) {
    return d * (0.5f + (float)(second ? byte >> 4 : byte & 15)) * 0.25f;
}

void azq_dequantize_iq2_xs(const void *blocks, float *y, int64_t k) {
    const azq_block_iq2_xs *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int l = 0; l < 32; l++, y += 8) {
            uint16_t q = x[b].qs[l];
            float scale = half_scale(d, x[b].scales[l / 4], l % 4 / 2);
            put8(y, scale, azq_iq2_xs_grid[q & 511], iq2_magnitudes, even_signs(q >> 9));
        }
    }
}

void azq_dequantize_iq2_s(const void *blocks, float *y, int64_t k) {
    const azq_block_iq2_s *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int l = 0; l < 32; l++, y += 8) {
            int index = x[b].qs[l] | (x[b].qh[l / 4] >> l % 4 * 2 & 3) << 8;
            float scale = half_scale(d, x[b].scales[l / 4], l % 4 / 2);
            put8(y, scale, azq_iq2_s_grid[index], iq2_magnitudes, x[b].qs[32 + l]);
        }
    }
}

void azq_dequantize_iq3_xxs(const void *blocks, float *y, int64_t k) {
    const azq_block_iq3_xxs *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int g = 0; g < 8; g++) {
            const uint8_t *index = x[b].qs + 8 * g;
            uint32_t rest = word(x[b].qs + 64 + 4 * g);
            float scale = d * (0.5f + (float)(rest >> 28)) * 0.5f;
            for (int l = 0; l < 8; l++, y += 4) {
                uint8_t signs = even_signs(rest >> 7 * (l / 2) & 127);
                put4(y, scale, azq_iq3_xxs_grid[index[l]], iq3_xxs_magnitudes, (uint8_t)(signs >> l % 2 * 4));
            }
        }
    }
}

void azq_dequantize_iq3_s(const void *blocks, float *y, int64_t k) {
    const azq_block_iq3_s *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int l = 0; l < 64; l++, y += 4) {
            int index = x[b].qs[l] | (x[b].qh[l / 8] >> l % 8 & 1) << 8;
            int s = x[b].scales[l / 16] >> l / 8 % 2 * 4 & 15;
            uint8_t signs = (uint8_t)(x[b].signs[l / 2] >> l % 2 * 4);
            put4(y, d * (float)(1 + 2 * s), azq_iq3_s_grid[index], iq3_s_magnitudes, signs);
        }
    }
}

/* Eight of -1, 0, 1, shifted. */
static void put_ternary(float *y, float scale, uint16_t entry, float shift) {
    for (int j = 0; j < 8; j++) {
        y[j] = scale * ((float)((entry >> 2 * j & 3) - 1) + shift);
    }
}

static const float iq1_shift = 0.125f;

void azq_dequantize_iq1_s(const void *blocks, float *y, int64_t k) {
    const azq_block_iq1_s *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int l = 0; l < 32; l++, y += 8) {
            uint16_t high = x[b].qh[l / 4];
            float scale = d * (float)(2 * (high >> 12 & 7) + 1);
            int index = x[b].qs[l] | (high >> 3 * (l % 4) & 7) << 8;
            put_ternary(y, scale, azq_iq1_grid[index], high & 0x8000 ? -iq1_shift : iq1_shift);
        }
    }
}

void azq_dequantize_iq1_m(const void *blocks, float *y, int64_t k) {
    const azq_block_iq1_m *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        const uint16_t *s = x[b].scales;
        uint16_t half = (uint16_t)(s[0] >> 12 | (s[1] >> 12) << 4 | (s[2] >> 12) << 8 | (s[3] >> 12) << 12);
        float d = azq_f16_to_f32(half);
        for (int l = 0; l < 32; l++, y += 8) {
            int nibble = x[b].qh[l / 2] >> l % 2 * 4 & 15;
            float scale = d * (float)(2 * (s[l / 8] >> l % 8 / 2 * 3 & 7) + 1);
            put_ternary(y, scale, azq_iq1_grid[x[b].qs[l] | (nibble & 7) << 8], nibble & 8 ? -iq1_shift : iq1_shift);
        }
    }
}
