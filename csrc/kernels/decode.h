/* Blocks back to fp32, bit by bit as ggml does it (multiply, then add; never fused). One text for every ISA:
 * the including file sets the target and names the functions with AZQ_NAME; the compiler vectorizes. */
#include <assert.h>
#include <string.h>
#include "../azq_half.h"
#include "../azq_kernels.h"
#include "tables.h"

#define AZQ_INLINE_DECODE static inline __attribute__((always_inline))

/* ---- blocks of 32 -------------------------------------------------------------------------------- */

void AZQ_NAME(dequantize_q4_1)(const void *blocks, float *y, int64_t k) {
    const azq_block_q4_1 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK4_1; b++, y += AZQ_QK4_1) {
        float d = azq_f16_to_f32(x[b].d), m = azq_f16_to_f32(x[b].m);
        for (int j = 0; j < 16; j++) {
            y[j] = (float)(x[b].qs[j] & 15) * d + m;
            y[j + 16] = (float)(x[b].qs[j] >> 4) * d + m;
        }
    }
}

/* 16 in byte j where bit j of bits is set. */
AZQ_INLINE_DECODE uint64_t spread_16(uint8_t bits) {
    uint64_t each = bits * 0x0101010101010101u & 0x8040201008040201u;
    return (each + 0x7f7f7f7f7f7f7f7fu) >> 3 & 0x1010101010101010u;
}

/* Bits of weight j: nibble of qs, fifth bit of qh. */
AZQ_INLINE_DECODE void unpack_5(const uint8_t *qs, const uint8_t *qh, uint8_t *q) {
    const uint64_t nibbles = 0x0f0f0f0f0f0f0f0fu;
    uint64_t packed[2], codes[4];
    memcpy(packed, qs, sizeof packed);
    for (int i = 0; i < 2; i++) {
        codes[i] = (packed[i] & nibbles) | spread_16(qh[i]);
        codes[i + 2] = (packed[i] >> 4 & nibbles) | spread_16(qh[i + 2]);
    }
    memcpy(q, codes, sizeof codes);
}

void AZQ_NAME(dequantize_q5_0)(const void *blocks, float *y, int64_t k) {
    const azq_block_q5_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK5_0; b++, y += AZQ_QK5_0) {
        float d = azq_f16_to_f32(x[b].d);
        uint8_t q[32];
        unpack_5(x[b].qs, x[b].qh, q);
        for (int j = 0; j < 32; j++) {
            y[j] = (float)(q[j] - 16) * d;
        }
    }
}

void AZQ_NAME(dequantize_q5_1)(const void *blocks, float *y, int64_t k) {
    const azq_block_q5_1 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK5_1; b++, y += AZQ_QK5_1) {
        float d = azq_f16_to_f32(x[b].d), m = azq_f16_to_f32(x[b].m);
        uint8_t q[32];
        unpack_5(x[b].qs, x[b].qh, q);
        for (int j = 0; j < 32; j++) {
            y[j] = (float)q[j] * d + m;
        }
    }
}

AZQ_INLINE_DECODE void decode_nibbles(const uint8_t *qs, const float *table, float d, float *y) {
    for (int j = 0; j < 16; j++) {
        y[j] = d * table[qs[j] & 15];
        y[j + 16] = d * table[qs[j] >> 4];
    }
}

void AZQ_NAME(dequantize_iq4_nl)(const void *blocks, float *y, int64_t k) {
    const azq_block_iq4_nl *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK4_NL; b++, y += AZQ_QK4_NL) {
        decode_nibbles(x[b].qs, azq_iq4_values, azq_f16_to_f32(x[b].d), y);
    }
}

void AZQ_NAME(dequantize_mxfp4)(const void *blocks, float *y, int64_t k) {
    const azq_block_mxfp4 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_MXFP4; b++, y += AZQ_QK_MXFP4) {
        decode_nibbles(x[b].qs, azq_e2m1_doubled, azq_e8m0_halved(x[b].e), y);
    }
}

void AZQ_NAME(dequantize_nvfp4)(const void *blocks, float *y, int64_t k) {
    const azq_block_nvfp4 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_NVFP4; b++) {
        for (int g = 0; g < 4; g++, y += 16) {
            float d = azq_ue4m3_halved(x[b].d[g]);
            for (int j = 0; j < 8; j++) {
                y[j] = azq_e2m1_doubled[x[b].qs[8 * g + j] & 15] * d;
                y[j + 8] = azq_e2m1_doubled[x[b].qs[8 * g + j] >> 4] * d;
            }
        }
    }
}

void AZQ_NAME(dequantize_q1_0)(const void *blocks, float *y, int64_t k) {
    const azq_block_q1_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK1_0; b++, y += AZQ_QK1_0) {
        float d = azq_f16_to_f32(x[b].d);
        for (int j = 0; j < AZQ_QK1_0; j++) {
            y[j] = x[b].qs[j / 8] >> j % 8 & 1 ? d : -d;
        }
    }
}

void AZQ_NAME(dequantize_q2_0)(const void *blocks, float *y, int64_t k) {
    const azq_block_q2_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK2_0; b++, y += AZQ_QK2_0) {
        float d = azq_f16_to_f32(x[b].d);
        for (int j = 0; j < AZQ_QK2_0; j++) {
            y[j] = (float)((x[b].qs[j / 4] >> j % 4 * 2 & 3) - 1) * d;
        }
    }
}

/* ---- super-blocks --------------------------------------------------------------------------------- */

void AZQ_NAME(dequantize_q2_k)(const void *blocks, float *y, int64_t k) {
    const azq_block_q2_k *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d), dmin = azq_f16_to_f32(x[b].dmin);
        for (int g = 0; g < 16; g++, y += 16) {
            const uint8_t *q = x[b].qs + 32 * (g / 8) + 16 * (g % 2);
            int shift = g / 2 % 4 * 2;
            float scale = d * (float)(x[b].scales[g] & 15), min = dmin * (float)(x[b].scales[g] >> 4);
            for (int l = 0; l < 16; l++) {
                y[l] = scale * (float)(q[l] >> shift & 3) - min;
            }
        }
    }
}

void AZQ_NAME(dequantize_q3_k)(const void *blocks, float *y, int64_t k) {
    const azq_block_q3_k *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int g = 0; g < 16; g++, y += 16) {
            const uint8_t *q = x[b].qs + 32 * (g / 8) + 16 * (g % 2), *high = x[b].hmask + 16 * (g % 2);
            int shift = g / 2 % 4 * 2, bit = g / 2;
            float scale = d * (float)(azq_q3_k_scale(x[b].scales, g) - 32);
            for (int l = 0; l < 16; l++) {
                y[l] = scale * (float)((q[l] >> shift & 3) + (high[l] >> bit & 1) * 4 - 4);
            }
        }
    }
}

void AZQ_NAME(dequantize_q4_k)(const void *blocks, float *y, int64_t k) {
    const azq_block_q4_k *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d), dmin = azq_f16_to_f32(x[b].dmin);
        for (int i = 0; i < 4; i++, y += 64) {
            const uint8_t *q = x[b].qs + 32 * i;
            float d0 = d * (float)azq_k4_scale(x[b].scales, 2 * i), m0 = dmin * (float)azq_k4_min(x[b].scales, 2 * i);
            float d1 = d * (float)azq_k4_scale(x[b].scales, 2 * i + 1);
            float m1 = dmin * (float)azq_k4_min(x[b].scales, 2 * i + 1);
            for (int l = 0; l < 32; l++) {
                y[l] = d0 * (float)(q[l] & 15) - m0;
                y[l + 32] = d1 * (float)(q[l] >> 4) - m1;
            }
        }
    }
}

void AZQ_NAME(dequantize_q5_k)(const void *blocks, float *y, int64_t k) {
    const azq_block_q5_k *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d), dmin = azq_f16_to_f32(x[b].dmin);
        for (int i = 0; i < 4; i++, y += 64) {
            const uint8_t *q = x[b].qs + 32 * i, *high = x[b].qh;
            float d0 = d * (float)azq_k4_scale(x[b].scales, 2 * i), m0 = dmin * (float)azq_k4_min(x[b].scales, 2 * i);
            float d1 = d * (float)azq_k4_scale(x[b].scales, 2 * i + 1);
            float m1 = dmin * (float)azq_k4_min(x[b].scales, 2 * i + 1);
            for (int l = 0; l < 32; l++) {
                y[l] = d0 * (float)((q[l] & 15) + (high[l] >> 2 * i & 1) * 16) - m0;
                y[l + 32] = d1 * (float)((q[l] >> 4) + (high[l] >> (2 * i + 1) & 1) * 16) - m1;
            }
        }
    }
}

void AZQ_NAME(dequantize_q6_k)(const void *blocks, float *y, int64_t k) {
    const azq_block_q6_k *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int g = 0; g < 16; g++, y += 16) {
            int half = g / 8, run = g / 2 % 4, at = 16 * (g % 2);
            const uint8_t *low = x[b].ql + 64 * half + 32 * (run % 2) + at, *high = x[b].qh + 32 * half + at;
            int shift = run / 2 * 4;
            float scale = d * (float)x[b].scales[g];
            for (int l = 0; l < 16; l++) {
                y[l] = scale * (float)((low[l] >> shift & 15) + (high[l] >> 2 * run & 3) * 16 - 32);
            }
        }
    }
}

void AZQ_NAME(dequantize_q8_k)(const void *blocks, float *y, int64_t k) {
    const azq_block_q8_k *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++, y += AZQ_QK_K) {
        for (int j = 0; j < AZQ_QK_K; j++) {
            y[j] = x[b].d * (float)x[b].qs[j];
        }
    }
}

void AZQ_NAME(dequantize_iq4_xs)(const void *blocks, float *y, int64_t k) {
    const azq_block_iq4_xs *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int g = 0; g < 8; g++, y += 32) {
            int scale = (x[b].scales_l[g / 2] >> g % 2 * 4 & 15) | (x[b].scales_h >> 2 * g & 3) << 4;
            decode_nibbles(x[b].qs + 16 * g, azq_iq4_values, d * (float)(scale - 32), y);
        }
    }
}

/* ---- ternary ---------------------------------------------------------------------------------------- */

AZQ_INLINE_DECODE void decode_trits(const uint8_t *bytes, int count, int digits, float d, float *y) {
    uint8_t power = 1;
    for (int n = 0; n < digits; n++, power = (uint8_t)(power * 3), y += count) {
        for (int m = 0; m < count; m++) {
            uint8_t rest = (uint8_t)(bytes[m] * power);
            y[m] = (float)((rest * 3 >> 8) - 1) * d;
        }
    }
}

void AZQ_NAME(dequantize_tq1_0)(const void *blocks, float *y, int64_t k) {
    const azq_block_tq1_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++, y += AZQ_QK_K) {
        float d = azq_f16_to_f32(x[b].d);
        decode_trits(x[b].qs, 32, 5, d, y);
        decode_trits(x[b].qs + 32, 16, 5, d, y + 160);
        decode_trits(x[b].qh, 4, 4, d, y + 240);
    }
}

void AZQ_NAME(dequantize_tq2_0)(const void *blocks, float *y, int64_t k) {
    const azq_block_tq2_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int s = 0; s < 8; s++, y += 32) {
            for (int l = 0; l < 32; l++) {
                y[l] = (float)((x[b].qs[32 * (s / 4) + l] >> s % 4 * 2 & 3) - 1) * d;
            }
        }
    }
}
