/* aarch64 with smmla: 2 x 8 times 8 x 2 s8, added into four 32-bit lanes (row 0: columns 0, 1; row 1: the same).
 *
 * The two operands of a packed line, interleaved by dwords, are two columns of eight k each; the same eight bytes of
 * two rows of activations are the other factor. A tile is 2 P rows by half a panel, dots[p * 4 + pair of columns].
 * One row alone is left to sdot, and so is Q6_K, whose two sums a block leave smmla no advantage. What sums start
 * from: see dotprod.c. */
#include "../azq_target.h"
#if AZQ_ARM64_I8MM
#include <arm_neon.h>
#include <string.h>
#include "../azq_kernels.h"
#include "../cpu.h"

AZQ_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")

#include "vec_types.h"
#include "gemm_128.h"

enum { PAIRS = 4 /* of columns in a tile */, MAX_PAIRS = 4 /* of rows */, HEAD_BYTES = 2 * AZQ_PANEL };

/* A number of each of two rows, where their results stand; put together in general registers, which have time. */
AZQ_INLINE int32x4_t two_rows(uint32_t first, uint32_t second) {
    const uint64_t twice = UINT64_C(0x100000001);
    return vreinterpretq_s32_u64(vcombine_u64(vcreate_u64(first * twice), vcreate_u64(second * twice)));
}
AZQ_INLINE float32x4_t two_rows_f32(const float *x, int64_t stride) {
    uint32_t first, second;
    memcpy(&first, x, sizeof first);
    memcpy(&second, x + stride, sizeof second);
    return vreinterpretq_f32_s32(two_rows(first, second));
}

/* Eight k of four columns against P pairs of rows: a pair's activations lie at q + 2 p q_stride. */
AZQ_INLINE void multiply(const int8x16_t *rows, int8x16_t first_k, int8x16_t last_k, int P, int vector, int32x4_t *dots) {
    int32x4_t low = vreinterpretq_s32_s8(first_k), high = vreinterpretq_s32_s8(last_k);
    int8x16_t w0 = vreinterpretq_s8_s32(vzip1q_s32(low, high)), w1 = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    for (int p = 0; p < P; p++) {
        int32x4_t *dot = &dots[p * PAIRS + 2 * vector];
        dot[0] = vmmlaq_s32(dot[0], rows[p], w0);
        dot[1] = vmmlaq_s32(dot[1], rows[p], w1);
    }
}

/* Bytes 16 half .. 16 half + 7 of every row, two rows a register, then the eight after. */
AZQ_INLINE void load_pairs(const int8_t *q, int64_t q_stride, int half, int P, int8x16_t rows[2][4]) {
    for (int p = 0; p < P; p++) {
        int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(q + 2 * p * q_stride + 16 * half));
        int64x2_t second = vreinterpretq_s64_s8(vld1q_s8(q + (2 * p + 1) * q_stride + 16 * half));
        rows[0][p] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
        rows[1][p] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
    }
}

/* A block's starts, see gemm_128.h. */
AZQ_INLINE void set_starts(const int32_t *start, int64_t start_stride, int P, int32x4_t *dots) {
    for (int i = 0; i < P * PAIRS; i++) {
        const int32_t *first = start + 2 * (i / PAIRS) * start_stride;
        dots[i] = i % PAIRS ? dots[i - 1]
                            : two_rows((uint32_t)(AZQ_MAGIC + first[0]), (uint32_t)(AZQ_MAGIC + first[start_stride]));
    }
}

/* One block: `at` (0 or 2) is the tile's first register of columns. */
AZQ_INLINE void dots_q4_0(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *lines, int at, int P, int32x4_t *dots) {
    set_starts(start, start_stride, P, dots);
    int8x16_t rows[2][MAX_PAIRS];
    for (int i = 0; i < 4; i++) {
        if (i % 2 == 0) {
            load_pairs(q, q_stride, i / 2, P, rows);
        }
        for (int v = 0; v < 2; v++) {
            uint8x16_t w = vld1q_u8(lines + 64 * i + 16 * (at + v));
            int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
            multiply(rows[i % 2], low, vreinterpretq_s8_u8(vshrq_n_u8(w, 4)), P, v, dots);
        }
    }
}

AZQ_INLINE void dots_q8_0(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *lines, int at, int P, int32x4_t *dots) {
    (void)start;
    (void)start_stride;
    for (int i = 0; i < P * PAIRS; i++) {
        dots[i] = vdupq_n_s32(AZQ_MAGIC);
    }
    int8x16_t rows[2][MAX_PAIRS];
    for (int i = 0; i < 4; i++) {
        if (i % 2 == 0) {
            load_pairs(q, q_stride, i / 2, P, rows);
        }
        for (int v = 0; v < 2; v++) {
            const int8_t *w = (const int8_t *)lines + 128 * i + 16 * (at + v);
            multiply(rows[i % 2], vld1q_s8(w), vld1q_s8(w + 64), P, v, dots);
        }
    }
}

#define AZQ_GEMM_I8MM(type, ggml_type, block_bytes)                                                                 \
    AZQ_INLINE void gemm_##type##_tile(const azq_act *act, int64_t row, int P, const uint8_t *panel, int at,        \
                                       float *c, int64_t ldc) {                                                     \
        int64_t n_blocks = act->k / 32;                                                                             \
        const int8_t *q = act->q + row * act->k;                                                                    \
        const float *d = act->d + row * n_blocks;                                                                   \
        const int32_t *start = act->sum8 + row * n_blocks;                                                          \
        float32x4_t sums[MAX_PAIRS * PAIRS];                                                                        \
        for (int i = 0; i < P * PAIRS; i++) {                                                                       \
            sums[i] = vdupq_n_f32(0.0f);                                                                            \
        }                                                                                                           \
        const uint8_t *group = panel;                                                                               \
        for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {                                                         \
            int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;                                 \
            const uint8_t *head = group, *lines = group + in_group * HEAD_BYTES;                                    \
            for (int64_t b = 0; b < in_group; b++, head += HEAD_BYTES, lines += (block_bytes)) {                    \
                int32x4_t dots[MAX_PAIRS * PAIRS];                                                                  \
                dots_##type(q, act->k, start, n_blocks, lines, at, P, dots);                                        \
                float32x4_t dw[PAIRS];                                                                              \
                for (int v = 0; v < 2; v++) {                                                                       \
                    float32x4_t s = load_f16(head + 8 * (at + v));                                                  \
                    dw[2 * v] = vcombine_f32(vget_low_f32(s), vget_low_f32(s));                                     \
                    dw[2 * v + 1] = vcombine_f32(vget_high_f32(s), vget_high_f32(s));                               \
                }                                                                                                   \
                for (int p = 0; p < P; p++) {                                                                       \
                    float32x4_t da = two_rows_f32(d + 2 * p * n_blocks, n_blocks);                                  \
                    for (int j = 0; j < PAIRS; j++) {                                                               \
                        int i = p * PAIRS + j;                                                                      \
                        sums[i] = vfmaq_f32(sums[i], to_f32_##type(dots[i]), vmulq_f32(dw[j], da));                 \
                    }                                                                                               \
                }                                                                                                   \
                q += 32;                                                                                            \
                d++;                                                                                                \
                start++;                                                                                            \
            }                                                                                                       \
            group = lines;                                                                                          \
        }                                                                                                           \
        for (int i = 0; i < P * PAIRS; i++) {                                                                       \
            float *out = c + 2 * (i / PAIRS) * ldc + 4 * at + 2 * (i % PAIRS);                                      \
            vst1_f32(out, vget_low_f32(sums[i]));                                                                   \
            vst1_f32(out + ldc, vget_high_f32(sums[i]));                                                            \
        }                                                                                                           \
    }                                                                                                               \
                                                                                                                    \
    static void gemm_##type(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,                  \
                            int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                         \
        for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes, c += AZQ_PANEL) {                             \
            int64_t r = 0;                                                                                          \
            for (; r + 8 <= rows; r += 8) {                                                                         \
                gemm_##type##_tile(act, row0 + r, 4, panels, 0, c + r * ldc, ldc);                                  \
                gemm_##type##_tile(act, row0 + r, 4, panels, 2, c + r * ldc, ldc);                                  \
            }                                                                                                       \
            if (r + 4 <= rows) {                                                                                    \
                gemm_##type##_tile(act, row0 + r, 2, panels, 0, c + r * ldc, ldc);                                  \
                gemm_##type##_tile(act, row0 + r, 2, panels, 2, c + r * ldc, ldc);                                  \
                r += 4;                                                                                             \
            }                                                                                                       \
            if (r + 2 <= rows) {                                                                                    \
                gemm_##type##_tile(act, row0 + r, 1, panels, 0, c + r * ldc, ldc);                                  \
                gemm_##type##_tile(act, row0 + r, 1, panels, 2, c + r * ldc, ldc);                                  \
                r += 2;                                                                                             \
            }                                                                                                       \
            if (r < rows) {                                                                                         \
                azq_kernels_dotprod.slots.gemm[ggml_type](act, row0 + r, 1, panels, panel_bytes, 1, c + r * ldc,    \
                                                          ldc);                                                     \
            }                                                                                                       \
        }                                                                                                           \
    }
AZQ_GEMM_I8MM(q4_0, AZQ_TYPE_Q4_0, 256)
AZQ_GEMM_I8MM(q8_0, AZQ_TYPE_Q8_0, 512)

/* For measuring: 32 multiply-adds an instruction, ten independent sums. */
static int64_t peak_int8(int64_t rounds) {
    const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
    int32x4_t s0 = vdupq_n_s32(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0;
    for (int64_t r = 0; r < rounds; r++) {
        s0 = vmmlaq_s32(s0, a, b), s1 = vmmlaq_s32(s1, a, b), s2 = vmmlaq_s32(s2, a, b), s3 = vmmlaq_s32(s3, a, b);
        s4 = vmmlaq_s32(s4, a, b), s5 = vmmlaq_s32(s5, a, b), s6 = vmmlaq_s32(s6, a, b), s7 = vmmlaq_s32(s7, a, b);
        s8 = vmmlaq_s32(s8, a, b), s9 = vmmlaq_s32(s9, a, b);
        /* Equal sums must not be made one: tell the compiler that they may have changed. */
        __asm__ volatile("" : "+w"(s0), "+w"(s1), "+w"(s2), "+w"(s3), "+w"(s4));
        __asm__ volatile("" : "+w"(s5), "+w"(s6), "+w"(s7), "+w"(s8), "+w"(s9));
    }
    return rounds * 10 * 32;
}

const azq_kernels azq_kernels_i8mm = {
    .isa = "i8mm",
    .needs = AZQ_CPU_NEON | AZQ_CPU_DOTPROD | AZQ_CPU_I8MM,
    .slots = {.peak_int8 = peak_int8,
              .gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0, [AZQ_TYPE_Q8_0] = gemm_q8_0}},
};

AZQ_TARGET_END
#endif
