/* Quantizers of the K types, one text for every ISA. A chunk of 16 groups is searched with one group per
 * lane (Q2_K, Q3_K, Q6_K: one super-block; Q4_K, Q5_K: two); then each super-block's scales are themselves
 * rounded and its codes made again with what will be read back. The importance (k), where given, weighs the
 * errors; a row of weights is quantized alike with and without it otherwise. */
#include <math.h>
#include "../azq_kernels.h"

enum { CHUNK = 16 };

/* What a search finds for a chunk. */
typedef struct {
    float scale[CHUNK], minimum[CHUNK], weight[CHUNK]; /* weight: sum of importances */
    uint8_t q[CHUNK * 32];
} found;

static float sum_of_squares(const float *x, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

/* w = importance * sqrt(spread + x^2). */
static void weigh(const float *x, const float *importance, float spread, int n, float *w) {
    for (int i = 0; i < n; i++) {
        w[i] = importance[i] * sqrtf(spread + x[i] * x[i]);
    }
}

LANE_INLINE vf lane_sum(int n, const vf *t) {
    vf sum = splat(0);
    for (int i = 0; i < n; i++) {
        sum += t[i];
    }
    return sum;
}

/* ---- scale and minimum: Q2_K, Q4_K, Q5_K ----------------------------------------------------------- */

LANE_INLINE void search_affine(int n, int nmax, float first, float delta, int nsteps, int use_abs, int groups,
                               const float *x, const float *w, found *f) {
    for (int g = 0; g < groups; g += AZQ_LANES) {
        int count = groups - g < AZQ_LANES ? groups - g : AZQ_LANES;
        vf xt[32], wt[32], minimum;
        vi q[32];
        to_lanes(n, count, x + g * n, xt);
        to_lanes(n, count, w + g * n, wt);
        vf scale = fit_affine(n, nmax, first, delta, nsteps, use_abs, xt, wt, q, &minimum);
        vf weight = lane_sum(n, wt);
        memcpy(f->scale + g, &scale, (size_t)count * sizeof(float));
        memcpy(f->minimum + g, &minimum, (size_t)count * sizeof(float));
        memcpy(f->weight + g, &weight, (size_t)count * sizeof(float));
        from_lanes(n, count, q, f->q + g * n);
    }
}

/* Codes of n weights again, with the scale and minimum as they will be read; a zero scale keeps the search's. */
static void recode_affine(const float *x, float d, float m, int n, int nmax, uint8_t *q) {
    if (d == 0.0f) {
        return;
    }
    for (int i = 0; i < n; i++) {
        q[i] = (uint8_t)azq_clamp(azq_nearest((x[i] + m) / d), 0, nmax);
    }
}

static float largest(const float *x, int n) {
    float max = 0.0f;
    for (int i = 0; i < n; i++) {
        max = x[i] > max ? x[i] : max;
    }
    return max;
}

/* Two bits each, see azq_blocks.h. */
static void pack_2(const uint8_t *q, uint8_t *qs) {
    for (int i = 0; i < 64; i++) {
        const uint8_t *at = q + i / 32 * 128 + i % 32;
        qs[i] = (uint8_t)(at[0] | at[32] << 2 | at[64] << 4 | at[96] << 6);
    }
}

static void quantize_q2_k(const float *x, const float *importance, azq_block_q2_k *y, int64_t k) {
    for (int64_t b = 0; b < k / AZQ_QK_K; b++, x += AZQ_QK_K, y++) {
        float w[AZQ_QK_K];
        found f;
        uint8_t s[16], m[16];
        if (importance) {
            weigh(x, importance + b * AZQ_QK_K, sum_of_squares(x, AZQ_QK_K) / (float)AZQ_QK_K, AZQ_QK_K, w);
            search_affine(16, 3, -0.9f, 0.05f, 36, 0, 16, x, w, &f);
            y->d = azq_f32_to_f16(fit_positive(16, 15, f.scale, f.weight, s));
            y->dmin = azq_f32_to_f16(fit_positive(16, 15, f.minimum, f.weight, m));
        } else {
            for (int i = 0; i < AZQ_QK_K; i++) {
                w[i] = fabsf(x[i]);
            }
            search_affine(16, 3, -0.5f, 0.1f, 15, 1, 16, x, w, &f);
            float max = largest(f.scale, 16), max_m = largest(f.minimum, 16);
            float inverse = 15.0f / max, inverse_m = 15.0f / max_m;
            for (int g = 0; g < 16; g++) {
                s[g] = max > 0.0f ? azq_low_byte(azq_nearest(inverse * f.scale[g])) : 0;
                m[g] = max_m > 0.0f ? azq_low_byte(azq_nearest(inverse_m * f.minimum[g])) : 0;
            }
            y->d = azq_f32_to_f16(max > 0.0f ? max / 15.0f : 0.0f);
            y->dmin = azq_f32_to_f16(max_m > 0.0f ? max_m / 15.0f : 0.0f);
        }
        float d = azq_f16_to_f32(y->d), dmin = azq_f16_to_f32(y->dmin);
        for (int g = 0; g < 16; g++) {
            y->scales[g] = (uint8_t)(s[g] | m[g] << 4);
            recode_affine(x + 16 * g, d * (float)(y->scales[g] & 15), dmin * (float)(y->scales[g] >> 4), 16, 3,
                          f.q + 16 * g);
        }
        pack_2(f.q, y->qs);
    }
}

/* Six-bit scales and minima of Q4_K and Q5_K. */
static void pack_scales(const uint8_t *s, const uint8_t *m, uint8_t *packed) {
    for (int g = 0; g < 4; g++) {
        packed[g] = (uint8_t)(s[g] | s[g + 4] >> 4 << 6);
        packed[g + 4] = (uint8_t)(m[g] | m[g + 4] >> 4 << 6);
        packed[g + 8] = (uint8_t)((s[g + 4] & 15) | (m[g + 4] & 15) << 4);
    }
}

/* Scales of one super-block of 8 groups: rounds them, packs them, and makes its codes. */
static void finish_k4(const float *x, const float *scale, const float *minimum, const float *weight, int nmax,
                      uint16_t *d, uint16_t *dmin, uint8_t *packed, uint8_t *q) {
    uint8_t s[8], m[8];
    if (weight) {
        *d = azq_f32_to_f16(fit_positive(8, 63, scale, weight, s));
        *dmin = azq_f32_to_f16(fit_positive(8, 63, minimum, weight, m));
    } else {
        float max = largest(scale, 8), max_m = largest(minimum, 8);
        float inverse = max > 0.0f ? 63.0f / max : 0.0f, inverse_m = max_m > 0.0f ? 63.0f / max_m : 0.0f;
        for (int g = 0; g < 8; g++) {
            s[g] = azq_low_byte(azq_nearest(inverse * scale[g]));
            m[g] = azq_low_byte(azq_nearest(inverse_m * minimum[g]));
            s[g] = s[g] < 63 ? s[g] : 63;
            m[g] = m[g] < 63 ? m[g] : 63;
        }
        *d = azq_f32_to_f16(max / 63.0f);
        *dmin = azq_f32_to_f16(max_m / 63.0f);
    }
    pack_scales(s, m, packed);
    float of_d = azq_f16_to_f32(*d), of_min = azq_f16_to_f32(*dmin);
    for (int g = 0; g < 8; g++) {
        recode_affine(x + 32 * g, of_d * (float)azq_k4_scale(packed, g), of_min * (float)azq_k4_min(packed, g), 32,
                      nmax, q + 32 * g);
    }
}

/* Searches up to two super-blocks of 8 groups of 32; returns how many. */
LANE_INLINE int search_k4(const float *x, const float *importance, int64_t left, int nmax, float first, int nsteps,
                          found *f) {
    float w[2 * AZQ_QK_K];
    int count = left < 2 ? 1 : 2;
    if (importance) {
        for (int b = 0; b < count; b++, x += AZQ_QK_K, importance += AZQ_QK_K) {
            float spread = 2.0f * sum_of_squares(x, AZQ_QK_K) / (float)AZQ_QK_K;
            weigh(x, importance, spread, AZQ_QK_K, w + b * AZQ_QK_K);
        }
        x -= count * AZQ_QK_K;
        search_affine(32, nmax, -0.9f, 0.05f, 36, 0, 8 * count, x, w, f);
        return count;
    }
    for (int g = 0; g < 8 * count; g++) {
        float mean = sqrtf(sum_of_squares(x + 32 * g, 32) / 32.0f);
        for (int i = 0; i < 32; i++) {
            w[32 * g + i] = mean + fabsf(x[32 * g + i]);
        }
    }
    search_affine(32, nmax, first, 0.1f, nsteps, 0, 8 * count, x, w, f);
    return count;
}

static void quantize_q4_k(const float *x, const float *importance, azq_block_q4_k *y, int64_t k) {
    for (int64_t left = k / AZQ_QK_K; left > 0;) {
        found f;
        int count = search_k4(x, importance, left, 15, -1.0f, 20, &f);
        for (int b = 0; b < count; b++, y++, x += AZQ_QK_K) {
            uint8_t *q = f.q + AZQ_QK_K * b;
            finish_k4(x, f.scale + 8 * b, f.minimum + 8 * b, importance ? f.weight + 8 * b : NULL, 15, &y->d,
                      &y->dmin, y->scales, q);
            for (int i = 0; i < 128; i++) {
                y->qs[i] = (uint8_t)(q[i / 32 * 64 + i % 32] | q[i / 32 * 64 + 32 + i % 32] << 4);
            }
        }
        left -= count;
        importance = importance ? importance + count * AZQ_QK_K : NULL;
    }
}

static void quantize_q5_k(const float *x, const float *importance, azq_block_q5_k *y, int64_t k) {
    for (int64_t left = k / AZQ_QK_K; left > 0;) {
        found f;
        int count = search_k4(x, importance, left, 31, -0.5f, 15, &f);
        for (int b = 0; b < count; b++, y++, x += AZQ_QK_K) {
            uint8_t *q = f.q + AZQ_QK_K * b;
            finish_k4(x, f.scale + 8 * b, f.minimum + 8 * b, importance ? f.weight + 8 * b : NULL, 31, &y->d,
                      &y->dmin, y->scales, q);
            memset(y->qh, 0, sizeof y->qh);
            for (int i = 0; i < 128; i++) {
                uint8_t low = q[i / 32 * 64 + i % 32], high = q[i / 32 * 64 + 32 + i % 32];
                y->qs[i] = (uint8_t)((low & 15) | (high & 15) << 4);
                y->qh[i % 32] |= (uint8_t)((low >> 4 | high >> 4 << 1) << i / 32 * 2);
            }
        }
        left -= count;
        importance = importance ? importance + count * AZQ_QK_K : NULL;
    }
}

/* ---- scale alone: Q3_K, Q6_K ------------------------------------------------------------------------ */

/* q[i] = nmax + the code of x[i] under scale d; a zero scale keeps the search's. */
static void recode_symmetric(const float *x, float d, int nmax, uint8_t *q) {
    if (d == 0.0f) {
        return;
    }
    for (int i = 0; i < 16; i++) {
        q[i] = (uint8_t)(azq_clamp(azq_nearest(x[i] / d), -nmax, nmax - 1) + nmax);
    }
}

LANE_INLINE void search_16(int nmax, const float *x, const float *w, found *f) {
    for (int g = 0; g < 16; g += AZQ_LANES) {
        int count = 16 - g < AZQ_LANES ? 16 - g : AZQ_LANES;
        vf xt[32], wt[32], scale;
        vi q[32];
        to_lanes(16, count, x + 16 * g, xt);
        if (w) {
            to_lanes(16, count, w + 16 * g, wt);
            vf weight = lane_sum(16, wt);
            memcpy(f->weight + g, &weight, (size_t)count * sizeof(float));
            scale = fit_symmetric(16, nmax, xt, wt, q);
        } else {
            scale = fit_descent(16, nmax, xt, q);
        }
        memcpy(f->scale + g, &scale, (size_t)count * sizeof(float));
        from_lanes(16, count, q, f->q + 16 * g);
    }
}

static void quantize_q3_k(const float *x, const float *importance, azq_block_q3_k *y, int64_t k) {
    for (int64_t b = 0; b < k / AZQ_QK_K; b++, x += AZQ_QK_K, y++) {
        found f;
        uint8_t s[32] = {0};
        if (importance) {
            float w[AZQ_QK_K];
            float spread = 2.0f * sum_of_squares(x, AZQ_QK_K) / (float)AZQ_QK_K;
            weigh(x, importance + b * AZQ_QK_K, spread, AZQ_QK_K, w);
            search_16(4, x, w, &f);
            vf xt[32], wt[32];
            vi q[32];
            to_lanes(16, 1, f.scale, xt); /* the scales are one group themselves */
            to_lanes(16, 1, f.weight, wt);
            y->d = azq_f32_to_f16(fit_symmetric(16, 32, xt, wt, q)[0]);
            from_lanes(16, 1, q, s);
        } else {
            search_16(4, x, NULL, &f);
            float inverse = -32.0f / strongest(16, f.scale);
            y->d = azq_f32_to_f16(strongest(16, f.scale) != 0.0f ? 1.0f / inverse : 0.0f);
            for (int g = 0; g < 16 && strongest(16, f.scale) != 0.0f; g++) {
                int8_t l = (int8_t)azq_low_byte(azq_nearest(inverse * f.scale[g]));
                s[g] = (uint8_t)(azq_clamp(l, -32, 31) + 32);
            }
        }
        memset(y->scales, 0, sizeof y->scales);
        for (int g = 0; g < 16; g++) {
            y->scales[g % 8] |= (uint8_t)((s[g] & 15) << g / 8 * 4);
            y->scales[8 + g % 4] |= (uint8_t)(s[g] >> 4 << g / 4 * 2);
        }
        float d = azq_f16_to_f32(y->d);
        for (int g = 0; g < 16; g++) {
            recode_symmetric(x + 16 * g, d * (float)(azq_q3_k_scale(y->scales, g) - 32), 4, f.q + 16 * g);
        }
        memset(y->hmask, 0, sizeof y->hmask);
        for (int i = 0; i < AZQ_QK_K; i++) {
            y->hmask[i % 32] |= (uint8_t)(f.q[i] >> 2 << i / 32);
            f.q[i] &= 3;
        }
        pack_2(f.q, y->qs);
    }
}

static void quantize_q6_k(const float *x, const float *importance, azq_block_q6_k *y, int64_t k) {
    for (int64_t b = 0; b < k / AZQ_QK_K; b++, x += AZQ_QK_K, y++) {
        float w[AZQ_QK_K];
        found f;
        for (int i = 0; i < AZQ_QK_K; i++) {
            w[i] = importance ? importance[b * AZQ_QK_K + i] : x[i] * x[i];
        }
        search_16(32, x, w, &f);
        float max = strongest(16, f.scale);
        if (fabsf(max) < AZQ_GROUP_EPS) {
            memset(y, 0, sizeof *y);
            continue;
        }
        float inverse = -128.0f / max;
        y->d = azq_f32_to_f16(1.0f / inverse);
        float d = azq_f16_to_f32(y->d);
        for (int g = 0; g < 16; g++) {
            int32_t s = azq_nearest(inverse * f.scale[g]);
            y->scales[g] = (int8_t)azq_low_byte(s < 127 ? s : 127);
            recode_symmetric(x + 16 * g, d * (float)y->scales[g], 32, f.q + 16 * g);
        }
        for (int half = 0; half < 2; half++) { /* a loop for each row of bytes, which compilers make vectors of */
            const uint8_t *q = f.q + 128 * half;
            uint8_t low[64], high[32];
            for (int i = 0; i < 64; i++) {
                low[i] = (uint8_t)((q[i] & 15) | (q[64 + i] & 15) << 4);
            }
            for (int i = 0; i < 32; i++) {
                high[i] = (uint8_t)(q[i] >> 4 | q[32 + i] >> 4 << 2 | q[64 + i] >> 4 << 4 | q[96 + i] >> 4 << 6);
            }
            memcpy(y->ql + 64 * half, low, sizeof low);
            memcpy(y->qh + 32 * half, high, sizeof high);
        }
    }
}
