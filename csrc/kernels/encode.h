/* Quantizers without a search, bit by bit as ggml's reference; one text for every ISA, the compiler
 * vectorizes. The including file sets the target and names the functions with AZQ_NAME. */
#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>
#include "../azq_kernels.h"
#include "rounding.h"
#include "tables.h"

/* The first element whose magnitude is largest, with its sign. */
static float extreme_32(const float *x) {
    float amax = 0.0f, max = 0.0f;
    for (int j = 0; j < 32; j++) {
        amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
    }
    for (int j = 31; j >= 0; j--) {
        max = amax > 0.0f && fabsf(x[j]) == amax ? x[j] : max;
    }
    return max;
}

static float magnitude_of(const float *x, int n) {
    float amax = 0.0f;
    for (int j = 0; j < n; j++) {
        amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
    }
    return amax;
}

/* Five-bit codes: nibbles as in Q4_0, the fifth bits in qh. */
static void pack_5(const uint8_t *q, uint8_t *qs, uint8_t *qh) {
    for (int j = 0; j < 16; j++) {
        qs[j] = (uint8_t)((q[j] & 15) | (q[j + 16] & 15) << 4);
    }
    for (int i = 0; i < 4; i++) {
        qh[i] = 0;
        for (int j = 0; j < 8; j++) {
            qh[i] |= (uint8_t)((q[8 * i + j] >> 4 & 1) << j);
        }
    }
}

void AZQ_NAME(quantize_q5_0)(const float *x, void *blocks, int64_t k) {
    azq_block_q5_0 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK5_0; b++, x += AZQ_QK5_0) {
        float d = extreme_32(x) / -16.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        uint8_t q[32];
        y[b].d = azq_f32_to_f16(d);
        for (int j = 0; j < 32; j++) {
            int8_t l = azq_truncate_i8(x[j] * id + 16.5f);
            q[j] = (uint8_t)(l < 31 ? l : 31);
        }
        pack_5(q, y[b].qs, y[b].qh);
    }
}

static void bounds_32(const float *x, float *min, float *max) {
    *min = FLT_MAX;
    *max = -FLT_MAX;
    for (int j = 0; j < 32; j++) {
        *min = x[j] < *min ? x[j] : *min;
        *max = x[j] > *max ? x[j] : *max;
    }
}

void AZQ_NAME(quantize_q4_1)(const float *x, void *blocks, int64_t k) {
    azq_block_q4_1 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK4_1; b++, x += AZQ_QK4_1) {
        float min, max;
        bounds_32(x, &min, &max);
        float d = (max - min) / 15.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        uint8_t q[32];
        y[b].d = azq_f32_to_f16(d);
        y[b].m = azq_f32_to_f16(min);
        for (int j = 0; j < 32; j++) {
            int8_t l = azq_truncate_i8((x[j] - min) * id + 0.5f);
            q[j] = (uint8_t)(l < 15 ? l : 15);
        }
        for (int j = 0; j < 16; j++) {
            y[b].qs[j] = (uint8_t)(q[j] | q[j + 16] << 4);
        }
    }
}

void AZQ_NAME(quantize_q5_1)(const float *x, void *blocks, int64_t k) {
    azq_block_q5_1 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK5_1; b++, x += AZQ_QK5_1) {
        float min, max;
        bounds_32(x, &min, &max);
        float d = (max - min) / 31.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        uint8_t q[32];
        y[b].d = azq_f32_to_f16(d);
        y[b].m = azq_f32_to_f16(min);
        for (int j = 0; j < 32; j++) {
            q[j] = (uint8_t)azq_truncate_i8((x[j] - min) * id + 0.5f);
        }
        pack_5(q, y[b].qs, y[b].qh);
    }
}

/* Nearest of the 16 values times d, the first of equals. */
static uint8_t nearest_e2m1(float x, float d) {
    int best = 0;
    float least = fabsf(azq_e2m1_doubled[0] * d - x);
    for (int i = 1; i < 16; i++) {
        float error = fabsf(azq_e2m1_doubled[i] * d - x);
        best = error < least ? i : best;
        least = error < least ? error : least;
    }
    return (uint8_t)best;
}

/* The reference takes floor(log2f(amax)), which rounds up just below a power of two. log2 in double, rounded
 * once, gives glibc's log2f at each such place (tested), with any C library. */
static uint8_t mxfp4_exponent(float amax) {
    return amax > 0.0f ? azq_low_byte((int32_t)(floorf((float)log2((double)amax)) - 2.0f + 127.0f)) : 0;
}

void AZQ_NAME(quantize_mxfp4)(const float *x, void *blocks, int64_t k) {
    azq_block_mxfp4 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_MXFP4; b++, x += AZQ_QK_MXFP4) {
        y[b].e = mxfp4_exponent(magnitude_of(x, AZQ_QK_MXFP4));
        float d = azq_e8m0_halved(y[b].e);
        for (int j = 0; j < 16; j++) {
            y[b].qs[j] = (uint8_t)(nearest_e2m1(x[j], d) | nearest_e2m1(x[j + 16], d) << 4);
        }
    }
}

/* ---- ternary ---------------------------------------------------------------------------------------------- */

/* 0, 1, 2 for the nearest of -1, 0, 1, halves away from zero; what cannot be rounded (infinities, NaN, from
 * subnormal scales) is zero. */
static void trits(const float *x, float id, uint8_t *t) {
    for (int j = 0; j < AZQ_QK_K; j++) {
        float scaled = x[j] * id;
        t[j] = (uint8_t)(fabsf(scaled) < 4.0f ? (int32_t)roundf(scaled) + 1 : 1);
    }
}

/* Five digits of a byte at stride, first most significant: ceil(256 * number / 243). */
static uint8_t pack_trits(const uint8_t *t, int stride, int digits) {
    int number = 0;
    for (int n = 0; n < 5; n++) {
        number = 3 * number + (n < digits ? t[n * stride] : 0);
    }
    return (uint8_t)((number * 256 + 242) / 243);
}

void AZQ_NAME(quantize_tq1_0)(const float *x, void *blocks, int64_t k) {
    azq_block_tq1_0 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++, x += AZQ_QK_K) {
        float d = magnitude_of(x, AZQ_QK_K);
        uint8_t t[AZQ_QK_K];
        trits(x, d != 0.0f ? 1.0f / d : 0.0f, t);
        y[b].d = azq_f32_to_f16(d);
        for (int m = 0; m < 32; m++) {
            y[b].qs[m] = pack_trits(t + m, 32, 5);
        }
        for (int m = 0; m < 16; m++) {
            y[b].qs[32 + m] = pack_trits(t + 160 + m, 16, 5);
        }
        for (int m = 0; m < 4; m++) {
            y[b].qh[m] = pack_trits(t + 240 + m, 4, 4);
        }
    }
}

void AZQ_NAME(quantize_tq2_0)(const float *x, void *blocks, int64_t k) {
    azq_block_tq2_0 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++, x += AZQ_QK_K) {
        float d = magnitude_of(x, AZQ_QK_K);
        uint8_t t[AZQ_QK_K];
        trits(x, d != 0.0f ? 1.0f / d : 0.0f, t);
        y[b].d = azq_f32_to_f16(d);
        for (int i = 0; i < 64; i++) {
            const uint8_t *at = t + i / 32 * 128 + i % 32;
            y[b].qs[i] = (uint8_t)((at[0] & 3) | (at[32] & 3) << 2 | (at[64] & 3) << 4 | (at[96] & 3) << 6);
        }
    }
}
