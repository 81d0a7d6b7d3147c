/* Quantize and dequantize over 128-bit registers; included by neon.c. */

AZQ_INLINE float32x4_t loadf(const float *p) { return vld1q_f32(p); }

/* Truncated, and 0 where x86 gives INT_MIN (the low byte of which is 0): out of range and NaN. */
AZQ_INLINE int32x4_t truncate_or_zero(float32x4_t x) {
    uint32x4_t fits = vcaltq_f32(x, vdupq_n_f32(2147483648.0f));
    return vandq_s32(vcvtq_s32_f32(x), vreinterpretq_s32_u32(fits));
}
/* The low bytes of 4 x 4 dwords, in order. */
AZQ_INLINE uint8x16_t low_bytes(const int32x4_t *x) {
    int16x8_t a = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1])), b = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
    return vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(a), vmovn_s16(b)));
}
AZQ_INLINE float32x4_t largest8(const float32x4_t *v) {
    return vmaxq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3])),
                     vmaxq_f32(vmaxq_f32(v[4], v[5]), vmaxq_f32(v[6], v[7])));
}
/* A block of 32 and its largest magnitude, NaN when any is. */
AZQ_INLINE float load_block(const float *x, float32x4_t *v) {
    float32x4_t magnitude[8];
    for (int i = 0; i < 8; i++) {
        v[i] = loadf(x + 4 * i);
        magnitude[i] = vabsq_f32(v[i]);
    }
    return vmaxvq_f32(largest8(magnitude));
}

/* ---- quantize ------------------------------------------------------------------------------------ */

static void quantize_q4_0(const float *x, void *blocks, int64_t k) {
    azq_block_q4_0 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK4_0; b++, x += AZQ_QK4_0) {
        float32x4_t v[8];
        float amax = load_block(x, v), most = vmaxvq_f32(largest8(v));
        float max = most == amax ? amax : -amax;
        if (most == amax && amax > 0.0f) { /* the first that reaches amax may be a negative one */
            for (int j = 0; j < AZQ_QK4_0; j++) {
                if (fabsf(x[j]) == amax) {
                    max = x[j];
                    break;
                }
            }
        }
        float d = max / -8.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        y[b].d = azq_f32_to_f16(d);
        int32x4_t q[8];
        for (int i = 0; i < 8; i++) {
            float32x4_t t = vaddq_f32(vmulq_n_f32(v[i], id), vdupq_n_f32(8.5f));
            q[i] = vminq_s32(truncate_or_zero(t), vdupq_n_s32(15));
        }
        vst1q_u8(y[b].qs, vsliq_n_u8(low_bytes(q), low_bytes(q + 4), 4));
    }
}

static void quantize_q8_0(const float *x, void *blocks, int64_t k) {
    azq_block_q8_0 *y = blocks;
    for (int64_t b = 0; b < k / AZQ_QK8_0; b++, x += AZQ_QK8_0) {
        float32x4_t v[8];
        float d = load_block(x, v) / 127.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        y[b].d = azq_f32_to_f16(d);
        int32x4_t q[8];
        for (int i = 0; i < 8; i++) {
            q[i] = truncate_or_zero(vrndaq_f32(vmulq_n_f32(v[i], id))); /* half away from zero */
        }
        vst1q_s8(y[b].qs, vreinterpretq_s8_u8(low_bytes(q)));
        vst1q_s8(y[b].qs + 16, vreinterpretq_s8_u8(low_bytes(q + 4)));
    }
}

static void quantize_f16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        vst1_u16(y + i, vreinterpret_u16_f16(vcvt_f16_f32(loadf(x + i))));
        vst1_u16(y + i + 4, vreinterpret_u16_f16(vcvt_f16_f32(loadf(x + i + 4))));
    }
    for (; i < k; i++) {
        y[i] = azq_f32_to_f16(x[i]);
    }
}

AZQ_INLINE uint16x4_t bf16x4(float32x4_t x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}

static void quantize_bf16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        vst1_u16(y + i, bf16x4(loadf(x + i)));
        vst1_u16(y + i + 4, bf16x4(loadf(x + i + 4)));
    }
    for (; i < k; i++) {
        y[i] = azq_f32_to_bf16(x[i]);
    }
}

static int64_t find_bad(const float *x, int64_t n, float limit) {
    float32x4_t bound = vdupq_n_f32(limit);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        uint32x4_t low = vandq_u32(vcaltq_f32(loadf(x + i), bound), vcaltq_f32(loadf(x + i + 4), bound));
        uint32x4_t high = vandq_u32(vcaltq_f32(loadf(x + i + 8), bound), vcaltq_f32(loadf(x + i + 12), bound));
        if (vminvq_u32(vandq_u32(low, high)) == 0) {
            break;
        }
    }
    for (; i < n; i++) {
        if (!(fabsf(x[i]) < limit)) {
            return i;
        }
    }
    return -1;
}

/* ---- dequantize ---------------------------------------------------------------------------------- */

/* y (16) = q * d */
AZQ_INLINE void store_scaled(float *y, int8x16_t q, float d) {
    int16x8_t low = vmovl_s8(vget_low_s8(q)), high = vmovl_high_s8(q);
    vst1q_f32(y, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), d));
    vst1q_f32(y + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(low)), d));
    vst1q_f32(y + 8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), d));
    vst1q_f32(y + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(high)), d));
}
AZQ_INLINE int8x16_t minus(uint8x16_t q, uint8_t offset) {
    return vreinterpretq_s8_u8(vsubq_u8(q, vdupq_n_u8(offset)));
}

static void dequantize_q4_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q4_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK4_0; b++, y += AZQ_QK4_0) {
        float d = azq_f16_to_f32(x[b].d);
        uint8x16_t q = vld1q_u8(x[b].qs);
        store_scaled(y, minus(vandq_u8(q, vdupq_n_u8(15)), 8), d);
        store_scaled(y + 16, minus(vshrq_n_u8(q, 4), 8), d);
    }
}

static void dequantize_q8_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q8_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK8_0; b++, y += AZQ_QK8_0) {
        float d = azq_f16_to_f32(x[b].d);
        store_scaled(y, vld1q_s8(x[b].qs), d);
        store_scaled(y + 16, vld1q_s8(x[b].qs + 16), d);
    }
}

/* Run s of a half (its weights 32 s .. 32 s + 31): nibbles `low`, high bits 2 s of qh, scales 2 s and 2 s + 1. */
#define AZQ_Q6_K_RUN(s, shift_low)                                                             \
    for (int g = 0; g < 2; g++) {                                                              \
        uint8x16_t low = vld1q_u8(ql + 32 * ((s) % 2) + 16 * g), high = vld1q_u8(qh + 16 * g); \
        uint8x16_t two = vandq_u8(vshlq_u8(high, vdupq_n_s8(-2 * (s))), vdupq_n_u8(3));        \
        low = (shift_low) ? vshrq_n_u8(low, 4) : low;                                          \
        uint8x16_t q = vandq_u8(vsliq_n_u8(low, two, 4), vdupq_n_u8(63));                      \
        store_scaled(y + 32 * (s) + 16 * g, minus(q, 32), d * (float)scales[2 * (s) + g]);     \
    }

static void dequantize_q6_k(const void *blocks, float *y, int64_t k) {
    const azq_block_q6_k *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK_K; b++) {
        float d = azq_f16_to_f32(x[b].d);
        for (int half = 0; half < 2; half++, y += 128) {
            const uint8_t *ql = x[b].ql + 64 * half, *qh = x[b].qh + 32 * half;
            const int8_t *scales = x[b].scales + 8 * half;
            AZQ_Q6_K_RUN(0, 0)
            AZQ_Q6_K_RUN(1, 0)
            AZQ_Q6_K_RUN(2, 1)
            AZQ_Q6_K_RUN(3, 1)
        }
    }
}

static void dequantize_f16(const void *blocks, float *y, int64_t k) {
    const uint16_t *x = blocks;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        vst1q_f32(y + i, load_f16(x + i));
        vst1q_f32(y + i + 4, load_f16(x + i + 4));
    }
    for (; i < k; i++) {
        y[i] = azq_f16_to_f32(x[i]);
    }
}

static void dequantize_bf16(const void *blocks, float *y, int64_t k) {
    const uint16_t *x = blocks;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        uint16x8_t h = vld1q_u16(x + i);
        vst1q_f32(y + i, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)));
        vst1q_f32(y + i + 4, vreinterpretq_f32_u32(vshll_high_n_u16(h, 16)));
    }
    for (; i < k; i++) {
        y[i] = azq_bf16_to_f32(x[i]);
    }
}

#define AZQ_BLOCK_SLOTS                                    \
    .quantize_row = {[AZQ_TYPE_F16] = quantize_f16,        \
                     [AZQ_TYPE_BF16] = quantize_bf16,      \
                     [AZQ_TYPE_Q4_0] = quantize_q4_0,      \
                     [AZQ_TYPE_Q8_0] = quantize_q8_0},     \
    .dequantize_row = {[AZQ_TYPE_F16] = dequantize_f16,    \
                       [AZQ_TYPE_BF16] = dequantize_bf16,  \
                       [AZQ_TYPE_Q4_0] = dequantize_q4_0,  \
                       [AZQ_TYPE_Q6_K] = dequantize_q6_k,  \
                       [AZQ_TYPE_Q8_0] = dequantize_q8_0}, \
    .find_bad = find_bad
