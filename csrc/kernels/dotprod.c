/* aarch64 with sdot: four s8 x s8 products added into each 32-bit lane, the second operand's dword picked by lane.
 *
 * A line of a packed block is four registers of four columns, so sixteen activations in one register meet four
 * operands without a broadcast. Per block, R rows and V registers of columns
 *   Q4_0   4 V loads, and / shift to 8 V operands; per row 2 loads, 8 V sdot, V (convert, multiply, multiply-add).
 * Nibbles are u = q + 8: sums start at -8 sum a; Q6_K has u = q + 32, sums start at -32 sum a of each half. */
#include "../azq_target.h"
#if AZQ_ARM64_DOTPROD
#include <arm_neon.h>
#include <string.h>
#include "../azq_kernels.h"
#include "../cpu.h"
#include "gemm_types.h"

AZQ_TARGET_BEGIN("arch=armv8.2-a+dotprod")

#include "vec_types.h"
#include "gemm_128.h"

/* dots += low * dword `first` and high * dword `second` of sixteen activations. Lanes are immediates, so that
 * what would be a loop over lines is written out. */
#define AZQ_SDOT_PAIR(low, high, first, second)                                 \
    for (int r = 0; r < R; r++) {                                               \
        dots[r * V + v] = vdotq_laneq_s32(dots[r * V + v], low, a[r], first);   \
        dots[r * V + v] = vdotq_laneq_s32(dots[r * V + v], high, a[r], second); \
    }

/* Activations of operands 4 * half .. 4 * half + 3. */
AZQ_INLINE void load_rows(const int8_t *q, int64_t q_stride, int half, int R, int8x16_t *a) {
    for (int r = 0; r < R; r++) {
        a[r] = vld1q_s8(q + r * q_stride + 16 * half);
    }
}

AZQ_INLINE void dots_q4_0(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *head, const uint8_t *lines, int at, int R, int V, int32x4_t *dots) {
    (void)head;
    const uint8x16_t mask = vdupq_n_u8(15);
    for (int i = 0; i < R * V; i++) {
        dots[i] = vdupq_n_s32(AZQ_MAGIC + start[i / V * start_stride]);
    }
    for (int half = 0; half < 2; half++) {
        int8x16_t a[4];
        load_rows(q, q_stride, half, R, a);
        const uint8_t *line = lines + 128 * half + 16 * at;
        for (int v = 0; v < V; v++) {
            uint8x16_t w0 = vld1q_u8(line + 16 * v), w1 = vld1q_u8(line + 64 + 16 * v);
            int8x16_t low0 = vreinterpretq_s8_u8(vandq_u8(w0, mask)), high0 = vreinterpretq_s8_u8(vshrq_n_u8(w0, 4));
            int8x16_t low1 = vreinterpretq_s8_u8(vandq_u8(w1, mask)), high1 = vreinterpretq_s8_u8(vshrq_n_u8(w1, 4));
            AZQ_SDOT_PAIR(low0, high0, 0, 1)
            AZQ_SDOT_PAIR(low1, high1, 2, 3)
        }
    }
}

AZQ_INLINE void dots_q8_0(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *head, const uint8_t *lines, int at, int R, int V, int32x4_t *dots) {
    (void)head;
    (void)start;
    (void)start_stride;
    for (int i = 0; i < R * V; i++) {
        dots[i] = vdupq_n_s32(AZQ_MAGIC);
    }
    for (int half = 0; half < 2; half++) {
        int8x16_t a[4];
        load_rows(q, q_stride, half, R, a);
        const int8_t *line = (const int8_t *)lines + 256 * half + 16 * at;
        for (int v = 0; v < V; v++) {
            int8x16_t w0 = vld1q_s8(line + 16 * v), w1 = vld1q_s8(line + 64 + 16 * v);
            int8x16_t w2 = vld1q_s8(line + 128 + 16 * v), w3 = vld1q_s8(line + 192 + 16 * v);
            AZQ_SDOT_PAIR(w0, w1, 0, 1)
            AZQ_SDOT_PAIR(w2, w3, 2, 3)
        }
    }
}

AZQ_INLINE void half_q6_k(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *head, const uint8_t *lines, int half, int at, int R, int V, int32x4_t *isums) {
    int8x16_t a[4];
    int32x4_t dots[8];
    load_rows(q, q_stride, half, R, a);
    for (int v = 0; v < V; v++) {
        for (int r = 0; r < R; r++) {
            dots[r * V + v] = vdupq_n_s32(-32 * start[r * start_stride + half]);
        }
        int8x16_t low0, high0, low1, high1;
        operands_q6_k(lines + 16 * (at + v), 2 * half, &low0, &high0);
        operands_q6_k(lines + 16 * (at + v), 2 * half + 1, &low1, &high1);
        AZQ_SDOT_PAIR(low0, high0, 0, 1)
        AZQ_SDOT_PAIR(low1, high1, 2, 3)
    }
    for (int v = 0; v < V; v++) {
        int32x4_t scale = load_scales_q6_k(head + 32 + 16 * half + 4 * (at + v));
        for (int r = 0; r < R; r++) {
            int i = r * V + v;
            isums[i] = half ? vmlaq_s32(isums[i], dots[i], scale) : vmulq_s32(dots[i], scale);
        }
    }
}

AZQ_INLINE void dots_q6_k(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *head, const uint8_t *lines, int at, int R, int V, int32x4_t *isums) {
    half_q6_k(q, q_stride, start, start_stride, head, lines, 0, at, R, V, isums);
    half_q6_k(q, q_stride, start, start_stride, head, lines, 1, at, R, V, isums);
}

AZQ_GEMM_128_TILE(q4_0, 32, 256, sum8, 1)
AZQ_GEMM_128_TILE(q8_0, 32, 512, sum8, 1)
AZQ_GEMM_128_TILE(q6_k, 64, 384, sum16, 2)

/* Four rows by half a panel fill the registers as one row by a whole one does. */
#define AZQ_GEMM_DOTPROD(type)                                                                     \
    static void gemm_##type(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels, \
                            int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {        \
        for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes, c += AZQ_PANEL) {            \
            int64_t r = 0;                                                                         \
            for (; r + 4 <= rows; r += 4) {                                                        \
                gemm_##type##_tile(act, row0 + r, 4, 2, panels, 0, c + r * ldc, ldc);              \
                gemm_##type##_tile(act, row0 + r, 4, 2, panels, 2, c + r * ldc, ldc);              \
            }                                                                                      \
            if (r + 2 <= rows) {                                                                   \
                gemm_##type##_tile(act, row0 + r, 2, 4, panels, 0, c + r * ldc, ldc);              \
                r += 2;                                                                            \
            }                                                                                      \
            if (r < rows) {                                                                        \
                gemm_##type##_tile(act, row0 + r, 1, 4, panels, 0, c + r * ldc, ldc);              \
            }                                                                                      \
        }                                                                                          \
    }
AZQ_GEMM_DOTPROD(q4_0)
AZQ_GEMM_DOTPROD(q8_0)
AZQ_GEMM_DOTPROD(q6_k)

/* For measuring: 16 multiply-adds an instruction, ten independent sums. */
static int64_t peak_int8(int64_t rounds) {
    const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
    int32x4_t s0 = vdupq_n_s32(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0;
    for (int64_t r = 0; r < rounds; r++) {
        s0 = vdotq_s32(s0, a, b), s1 = vdotq_s32(s1, a, b), s2 = vdotq_s32(s2, a, b), s3 = vdotq_s32(s3, a, b);
        s4 = vdotq_s32(s4, a, b), s5 = vdotq_s32(s5, a, b), s6 = vdotq_s32(s6, a, b), s7 = vdotq_s32(s7, a, b);
        s8 = vdotq_s32(s8, a, b), s9 = vdotq_s32(s9, a, b);
        /* Equal sums must not be made one: tell the compiler that they may have changed. */
        __asm__ volatile("" : "+w"(s0), "+w"(s1), "+w"(s2), "+w"(s3), "+w"(s4));
        __asm__ volatile("" : "+w"(s5), "+w"(s6), "+w"(s7), "+w"(s8), "+w"(s9));
    }
    return rounds * 10 * 16;
}

const azq_kernels azq_kernels_dotprod = {
    .isa = "dotprod",
    .needs = AZQ_CPU_NEON | AZQ_CPU_DOTPROD,
    .slots = {.peak_int8 = peak_int8,
              .gemm[AZQ_TYPE_Q4_0] = gemm_q4_0,
              .gemm[AZQ_TYPE_Q8_0] = gemm_q8_0,
              .gemm[AZQ_TYPE_Q6_K] = gemm_q6_k,
              AZQ_GEMM_TYPES_SLOTS(dotprod)},
};

AZQ_TARGET_END
#endif
