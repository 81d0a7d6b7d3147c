/* Quantizers without a search, bit by bit as ggml's reference; one text for every ISA, the compiler
 * vectorizes. The including file sets the target, names the functions with AZQ_NAME, and includes
 * encode_any.h or encode_256.h before. */
#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>
#include "../azq_kernels.h"
#include "lanes.h"
#include "rounding.h"
#include "tables.h"

/* Five-bit codes: nibbles as in Q4_0, the fifth bits in qh. */
static void pack_5(const uint8_t *q, uint8_t *qs, uint8_t *qh) {
    for (int j = 0; j < 16; j++) {
        qs[j] = (uint8_t)((q[j] & 15) | (q[j + 16] & 15) << 4);
    }
    for (int i = 0; i < 4; i++) {
        uint64_t codes;
        memcpy(&codes, q + 8 * i, sizeof codes);
        /* The product brings bit 4 of byte j to bit 56 + j. */
        qh[i] = (uint8_t)((codes >> 4 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
}

void AZQ_NAME(quantize_q5_0)(const float *x, void *blocks, int64_t k) {
    azq_block_q5_0 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK5_0; b++, x += AZQ_QK5_0) {
        float d = extreme_32(x) / -16.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        uint8_t q[32];
        y[b].d = azq_f32_to_f16(d);
        codes_32(x, 0.0f, id, 16.5f, 31, q);
        pack_5(q, y[b].qs, y[b].qh);
    }
}

static void bounds_32(const float *x, float *min, float *max) {
    range_32(x, min, max);
    if (*min == 0.0f) { /* of the zeros, which compare equal, the first one's sign is meant */
        int j = 0;
        while (x[j] != 0.0f) {
            j++;
        }
        *min = x[j];
        *max = *max == 0.0f ? *min : *max;
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
        codes_32(x, min, id, 0.5f, 15, q);
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
        codes_32(x, min, id, 0.5f, 31, q);
        pack_5(q, y[b].qs, y[b].qh);
    }
}

/* For each of 32 elements the nearest of the 16 values times d, the first of equals. */
static void nearest_e2m1(const float *x, float d, uint8_t *q) {
    for (int at = 0; at < 32; at += AZQ_LANES) {
        vf v;
        memcpy(&v, x + at, sizeof v);
        vf least = magnitude(splat(azq_e2m1_doubled[0] * d) - v);
        vi best = {0};
        for (int i = 1; i < 16; i++) {
            vf error = magnitude(splat(azq_e2m1_doubled[i] * d) - v);
            vi closer = error < least;
            best = choose_int(closer, (vi){0} + i, best);
            least = choose(closer, error, least);
        }
        for (int l = 0; l < AZQ_LANES; l++) {
            q[at + l] = (uint8_t)(best[l] & 15);
        }
    }
}

/* The reference takes floor(log2f(amax)): the exponent, but that the logarithm rounds up just below a power
 * of two. log2 in double, rounded once, gives glibc's log2f at each such place (tested), with any C library. */
static uint8_t mxfp4_exponent(float amax) {
    uint32_t bits = azq_bits(amax), exponent = bits >> 23;
    if (exponent > 0 && (bits & 0x7fffff) < 0x7fff00) { /* half a digit of the logarithm is 44 of these */
        return azq_low_byte((int32_t)exponent - 2);
    }
    return amax > 0.0f ? azq_low_byte((int32_t)(floorf((float)log2((double)amax)) - 2.0f + 127.0f)) : 0;
}

void AZQ_NAME(quantize_mxfp4)(const float *x, void *blocks, int64_t k) {
    azq_block_mxfp4 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_MXFP4; b++, x += AZQ_QK_MXFP4) {
        y[b].e = mxfp4_exponent(magnitude_of(x, AZQ_QK_MXFP4));
        float d = azq_e8m0_halved(y[b].e);
        uint8_t q[AZQ_QK_MXFP4];
        nearest_e2m1(x, d, q);
        for (int j = 0; j < 16; j++) {
            y[b].qs[j] = (uint8_t)(q[j] | q[j + 16] << 4);
        }
    }
}

/* ---- ternary ---------------------------------------------------------------------------------------------- */

/* 0, 1, 2 for the nearest of -1, 0, 1, halves away from zero; what cannot be rounded (infinities, NaN, from
 * subnormal scales) is zero. */
static void trits(const float *x, float id, uint8_t *t) {
    for (int j = 0; j < AZQ_QK_K; j++) { /* finite ones are at most a little more than 1 */
        float scaled = x[j] * id;
        int32_t up = scaled >= 0.5f && scaled < 4.0f, down = scaled <= -0.5f && scaled > -4.0f;
        t[j] = (uint8_t)(1 + up - down);
    }
}

/* Five digits of a byte at stride, first most significant: ceil(256 * number / 243). */
static uint8_t pack_trits(const uint8_t *t, int stride, int digits) {
    uint16_t number = 0;
    for (int n = 0; n < 5; n++) {
        number = (uint16_t)(3 * number + (n < digits ? t[n * stride] : 0));
    }
    return (uint8_t)((uint16_t)(number * 256 + 242) / 243);
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
