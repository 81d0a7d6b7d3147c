/* The int8 matmul over 128-bit registers: R rows times V vectors of four columns. The including file, inside its
 * target region, defines for each type
 *
 *   AZQ_INLINE void dots_<type>(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
 *                               const uint8_t *head, const uint8_t *lines, int at, int R, int V, int32x4_t *dots)
 *
 * which sums one block into dots[r * V + v], columns 4 * (at + v) .. of the panel: row r's 32 activations lie at
 * q + r * q_stride, what its sums start from at start + r * start_stride; head and lines are the block's own.
 * Sums of Q4_0 and Q8_0 are left on top of AZQ_MAGIC, the bits of 1.5 * 2^23: below 2^22 (they are below 2^19) that
 * makes them floats by a subtraction, which many processors do twice or four times as fast as a conversion. */
enum { AZQ_MAGIC = 0x4b400000 };
AZQ_INLINE float32x4_t from_magic(int32x4_t x) {
    return vsubq_f32(vreinterpretq_f32_s32(x), vdupq_n_f32(12582912.0f));
}
#define to_f32_q4_0 from_magic
#define to_f32_q8_0 from_magic
#define to_f32_q6_k vcvtq_f32_s32

/* starts: the member of azq_act that `start` walks through, per_block numbers a block. */
#define AZQ_GEMM_128_TILE(type, head_bytes, block_bytes, starts, per_block)                                         \
    AZQ_INLINE void gemm_##type##_tile(const azq_act *act, int64_t row, int R, int V, const uint8_t *panel, int at, \
                                       float *c, int64_t ldc) {                                                     \
        int64_t n_blocks = act->k / 32;                                                                             \
        const int8_t *q = act->q + row * act->k;                                                                    \
        const float *d = act->d + row * n_blocks;                                                                   \
        const int32_t *start = act->starts + (per_block) * row * n_blocks;                                          \
        float32x4_t sums[8];                                                                                        \
        for (int i = 0; i < R * V; i++) {                                                                           \
            sums[i] = vdupq_n_f32(0.0f);                                                                            \
        }                                                                                                           \
        const uint8_t *group = panel;                                                                               \
        for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {                                                         \
            int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;                                 \
            const uint8_t *head = group, *lines = group + in_group * (head_bytes);                                  \
            for (int64_t b = 0; b < in_group; b++, head += (head_bytes), lines += (block_bytes)) {                  \
                int32x4_t dots[8];                                                                                  \
                dots_##type(q, act->k, start, (per_block) * n_blocks, head, lines, at, R, V, dots);                 \
                for (int v = 0; v < V; v++) {                                                                       \
                    float32x4_t dw = load_f16(head + 8 * (at + v));                                                 \
                    for (int r = 0; r < R; r++) {                                                                   \
                        float32x4_t scale = vmulq_n_f32(dw, d[r * n_blocks]);                                       \
                        sums[r * V + v] = vfmaq_f32(sums[r * V + v], to_f32_##type(dots[r * V + v]), scale);        \
                    }                                                                                               \
                }                                                                                                   \
                q += 32;                                                                                            \
                d++;                                                                                                \
                start += (per_block);                                                                               \
            }                                                                                                       \
            group = lines;                                                                                          \
        }                                                                                                           \
        for (int r = 0; r < R; r++) {                                                                               \
            for (int v = 0; v < V; v++) {                                                                           \
                vst1q_f32(c + r * ldc + 4 * (at + v), sums[r * V + v]);                                             \
            }                                                                                                       \
        }                                                                                                           \
    }

AZQ_INLINE float32x4_t load_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

/* Operands of line i of a Q6_K block, columns of the vector at `lines`: u = q + 32. */
AZQ_INLINE void operands_q6_k(const uint8_t *lines, int i, int8x16_t *low, int8x16_t *high) {
    const uint8x16_t six = vdupq_n_u8(63), nibble = vdupq_n_u8(15);
    uint8x16_t w = vld1q_u8(lines + 64 * i), h = vld1q_u8(lines + 256 + 64 * (i / 2));
    uint8x16_t l = i % 2 ? vbslq_u8(nibble, w, h) : vsliq_n_u8(w, h, 4);
    uint8x16_t u = i % 2 ? vshrq_n_u8(h, 2) : vandq_u8(vshlq_n_u8(h, 2), six);
    *low = vreinterpretq_s8_u8(vandq_u8(l, six));
    *high = vreinterpretq_s8_u8(vsriq_n_u8(u, w, 4));
}

/* Four int8 scales of a Q6_K head, widened. */
AZQ_INLINE int32x4_t load_scales_q6_k(const uint8_t *p) {
    int32_t dword;
    memcpy(&dword, p, sizeof dword);
    int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(dword)));
    return vmovl_s16(vget_low_s16(wide));
}
