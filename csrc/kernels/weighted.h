/* Blocks of 32 with an importance matrix, and the IQ4 types with and without one. One text for every ISA;
 * groups of 32 go one per lane. */

/* Codes of 32, four bits each: weight j low, j + 16 high. */
static void pack_nibbles(const uint8_t *q, uint8_t *qs) {
    for (int j = 0; j < 16; j++) {
        qs[j] = (uint8_t)((q[j] & 15) | (q[j + 16] & 15) << 4);
    }
}

static void pack_fifth(const uint8_t *q, uint8_t *qh) {
    for (int i = 0; i < 4; i++) {
        qh[i] = 0;
        for (int j = 0; j < 8; j++) {
            qh[i] |= (uint8_t)((q[8 * i + j] >> 4 & 1) << j);
        }
    }
}

enum { BATCH = 16 }; /* groups of 32 searched at once */

/* Searches up to BATCH groups with w = importance * sqrt(spread + x^2). */
LANE_INLINE void search_32(int affine, int nmax, float spread, int groups, const float *x, const float *importance,
                           found *f) {
    float w[BATCH * 32];
    weigh(x, importance, spread, 32 * groups, w);
    if (affine) {
        search_affine(32, nmax, -0.9f, 0.05f, 36, 0, groups, x, w, f);
        return;
    }
    for (int g = 0; g < groups; g += AZQ_LANES) {
        int count = groups - g < AZQ_LANES ? groups - g : AZQ_LANES;
        vf xt[32], wt[32];
        vi q[32];
        to_lanes(32, count, x + 32 * g, xt);
        to_lanes(32, count, w + 32 * g, wt);
        vf scale = fit_symmetric(32, nmax, xt, wt, q);
        memcpy(f->scale + g, &scale, (size_t)count * sizeof(float));
        from_lanes(32, count, q, f->q + 32 * g);
    }
}

/* One row of k in blocks of 32; y, the block type, has qs and d, and what `extra` fills. */
#define AZQ_WEIGHTED(name, block, affine, nmax, extra)                                                     \
    void AZQ_NAME(name)(const float *x, const float *importance, void *blocks, int64_t k) {                \
        block *y = blocks;                                                                                 \
        float spread = sum_of_squares(x, k) / (float)k;                                                    \
        for (int64_t b = 0; b < k / 32; b += BATCH, x += 32 * BATCH, importance += 32 * BATCH) {           \
            int groups = k / 32 - b < BATCH ? (int)(k / 32 - b) : BATCH;                                   \
            found f;                                                                                       \
            search_32(affine, nmax, spread, groups, x, importance, &f);                                    \
            for (int g = 0; g < groups; g++, y++) {                                                        \
                const uint8_t *q = f.q + 32 * g;                                                           \
                y->d = azq_f32_to_f16(f.scale[g]);                                                         \
                pack_nibbles(q, y->qs);                                                                    \
                extra;                                                                                     \
            }                                                                                              \
        }                                                                                                  \
    }
AZQ_WEIGHTED(quantize_weighted_q4_0, azq_block_q4_0, 0, 8, (void)q)
AZQ_WEIGHTED(quantize_weighted_q5_0, azq_block_q5_0, 0, 16, pack_fifth(q, y->qh))
AZQ_WEIGHTED(quantize_weighted_q4_1, azq_block_q4_1, 1, 15, y->m = azq_f32_to_f16(-f.minimum[g]))
AZQ_WEIGHTED(quantize_weighted_q5_1, azq_block_q5_1, 1, 31, y->m = azq_f32_to_f16(-f.minimum[g]);
             pack_fifth(q, y->qh))

/* ---- IQ4_NL, IQ4_XS ----------------------------------------------------------------------------------- */

/* Scales of groups of 32; n weights share a spread. */
LANE_INLINE void search_iq4(int groups, int64_t n, const float *x, const float *importance, float *scale) {
    float w[BATCH * 32];
    for (int i = 0; i < 32 * groups; i += (int)n) {
        if (importance) {
            float spread = sum_of_squares(x + i, n) * (2.0f / (float)n);
            weigh(x + i, importance + i, spread, (int)n, w + i);
        } else {
            for (int j = i; j < i + n; j++) {
                w[j] = x[j] * x[j];
            }
        }
    }
    for (int g = 0; g < groups; g += AZQ_LANES) {
        int count = groups - g < AZQ_LANES ? groups - g : AZQ_LANES;
        vf xt[32], wt[32];
        to_lanes(32, count, x + 32 * g, xt);
        to_lanes(32, count, w + 32 * g, wt);
        vf found_scale = fit_table(xt, wt);
        memcpy(scale + g, &found_scale, (size_t)count * sizeof(float));
    }
}

/* Codes of n weights times inverse; n a multiple of AZQ_LANES. */
LANE_INLINE void code_iq4(const float *x, float inverse, int n, uint8_t *q) {
    for (int i = 0; i < n; i += AZQ_LANES) {
        vf v;
        vi code;
        memcpy(&v, x + i, sizeof v);
        nearest_value(inverse * v, &code);
        from_lanes(1, AZQ_LANES, &code, q + i);
    }
}

static void quantize_iq4_nl(const float *x, const float *importance, azq_block_iq4_nl *y, int64_t k) {
    for (int64_t b = 0; b < k / AZQ_QK4_NL; b += BATCH) {
        int groups = k / 32 - b < BATCH ? (int)(k / 32 - b) : BATCH;
        float scale[BATCH];
        search_iq4(groups, AZQ_QK4_NL, x, importance, scale);
        for (int g = 0; g < groups; g++, y++, x += AZQ_QK4_NL) {
            uint8_t q[AZQ_QK4_NL];
            code_iq4(x, scale[g] != 0.0f ? 1.0f / scale[g] : 0.0f, AZQ_QK4_NL, q);
            y->d = azq_f32_to_f16(scale[g]);
            pack_nibbles(q, y->qs);
        }
        importance = importance ? importance + AZQ_QK4_NL * groups : NULL;
    }
}

static void quantize_iq4_xs(const float *x, const float *importance, azq_block_iq4_xs *y, int64_t k) {
    for (int64_t left = k / AZQ_QK_K; left > 0;) {
        int count = left < 2 ? 1 : 2;
        float scales[BATCH];
        search_iq4(8 * count, AZQ_QK_K, x, importance, scales);
        for (int b = 0; b < count; b++, y++, x += AZQ_QK_K) {
            const float *scale = scales + 8 * b;
            float d = -strongest(8, scale) / 32.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
            y->d = azq_f32_to_f16(d);
            y->scales_h = 0;
            memset(y->scales_l, 0, sizeof y->scales_l);
            for (int g = 0; g < 8; g++) {
                uint8_t q[32];
                int s = azq_clamp(azq_nearest(inverse * scale[g]), -32, 31);
                float step = d * (float)s;
                code_iq4(x + 32 * g, step != 0.0f ? 1.0f / step : 0.0f, 32, q);
                pack_nibbles(q, y->qs + 16 * g);
                y->scales_l[g / 2] |= (uint8_t)((s + 32) % 16 << g % 2 * 4);
                y->scales_h |= (uint16_t)((s + 32) / 16 << 2 * g);
            }
        }
        left -= count;
        importance = importance ? importance + count * AZQ_QK_K : NULL;
    }
}

/* ---- the kernels ---------------------------------------------------------------------------------------- */

#define AZQ_BOTH(type)                                                                                       \
    void AZQ_NAME(quantize_##type)(const float *x, void *blocks, int64_t k) {                                \
        quantize_##type(x, NULL, blocks, k);                                                                 \
    }                                                                                                        \
    void AZQ_NAME(quantize_weighted_##type)(const float *x, const float *importance, void *blocks, int64_t k) { \
        quantize_##type(x, importance, blocks, k);                                                           \
    }
AZQ_BOTH(q2_k)
AZQ_BOTH(q3_k)
AZQ_BOTH(q4_k)
AZQ_BOTH(q5_k)
AZQ_BOTH(q6_k)
AZQ_BOTH(iq4_nl)
AZQ_BOTH(iq4_xs)
