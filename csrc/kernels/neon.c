/* aarch64 as every such processor has it (Armv8.0): four fp32 lanes, no dot products.
 *
 * The int8 dot: smlal adds eight s8 x s8 products into 16 bits. A register of a packed line is four columns of four
 * k, so that the low half's sums are columns 0 and 1, the high half's 2 and 3, a lane per k. What 16 bits hold:
 *   Q4_0   u = q + 8 <= 15:   a whole block, 8 * 15 * 127 = 15240
 *   Q6_K   u = q + 32 <= 63:  half a block,  4 * 63 * 127 = 32004
 *   Q8_0   |w| <= 128:        two products,  2 * 128 * 127 = 32512 (an activation is never -128)
 * and -8 sum a (-32 sum a) makes up for the offset. */
#include "../azq_target.h"
#if AZQ_ARM64
#include <arm_neon.h>
#include <math.h>
#include <string.h>
#include "../azq_half.h"
#include "../azq_kernels.h"
#include "../cpu.h"
#include "gemm_types.h"

#include "vec_types.h"

typedef float32x4_t vf;
#define LANES 4
#define V_ZERO vdupq_n_f32(0.0f)
#define v_set(x) vdupq_n_f32(x)
#define v_load(p) vld1q_f32(p)
#define v_store(p, v) vst1q_f32(p, v)
#define v_fma(a, b, c) vfmaq_f32(c, a, b)
#define v_mul(a, b) vmulq_f32(a, b)
#define v_add(a, b) vaddq_f32(a, b)
#define v_div(a, b) vdivq_f32(a, b)
#define v_sub(a, b) vsubq_f32(a, b)
AZQ_INLINE vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
AZQ_INLINE vf v_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
/* A NaN becomes the integer 0, which leaves p, a NaN too. */
AZQ_INLINE vf v_scale(vf p, vf n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
}
#define v_below(x, limit, yes, no) vbslq_f32(vcltq_f32(x, limit), yes, no)
#define v_load_f16(p) load_f16(p)
#define v_set_f16(h) vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h)))
AZQ_INLINE vf v_load_i8(const void *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
#define v_load_i8(p) v_load_i8(p) /* attend_types.h asks for it */
#define AZQ_TILES_1 4
#define AZQ_TILES_4 1
#define AZQ_CHAINS 2
#include "gemm_128.h"

#include "exp.h"
#include "vec.h"
#include "attend_types.h"

/* ---- blocks -------------------------------------------------------------------------------------- */

#include "neon_blocks.h"

/* ---- int8 matmul --------------------------------------------------------------------------------- */

static void quantize_act(const float *x, int64_t k, int8_t *q, float *d, int32_t *sum8, int32_t *sum8_pair,
                         int32_t *sum16) {
    static const uint8_t order[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15}; /* azq_lane_order */
    for (int64_t b = 0; b < k / 32; b++, x += 32, q += 32) {
        float32x4_t v[8];
        float amax = load_block(x, v);
        int finite = amax < INFINITY; /* NaN is not */
        float inverse = 127.0f / amax;
        int8x16_t bytes[2] = {vdupq_n_s8(0), vdupq_n_s8(0)};
        if (finite && inverse < INFINITY) {
            int32x4_t rounded[8];
            for (int i = 0; i < 8; i++) {
                rounded[i] = vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse));
            }
            /* Rounding can reach 127 but never 128: amax * (127 / amax) is within an ulp of 127. */
            for (int half = 0; half < 2; half++) {
                bytes[half] = vreinterpretq_s8_u8(vqtbl1q_u8(low_bytes(rounded + 4 * half), vld1q_u8(order)));
            }
        }
        vst1q_s8(q, bytes[0]);
        vst1q_s8(q + 16, bytes[1]);
        d[b] = finite ? amax / 127.0f : azq_from_bits(0x7fc00000u);
        sum16[2 * b] = vaddlvq_s8(bytes[0]);
        sum16[2 * b + 1] = vaddlvq_s8(bytes[1]);
        sum8[b] = -8 * (sum16[2 * b] + sum16[2 * b + 1]);
        /* Even lanes: bytes 0, 1 of a dword. */
        int16x8_t pairs = vpadalq_s8(vpaddlq_s8(bytes[0]), bytes[1]);
        int32_t even = vaddvq_s16(vuzp1q_s16(pairs, vdupq_n_s16(0)));
        int32_t odd = sum16[2 * b] + sum16[2 * b + 1] - even;
        sum8_pair[b] = (int32_t)(((uint32_t)(-8 * even) & 0xffffu) | (uint32_t)(-8 * odd) << 16);
    }
}

/* Four activations, four times. */
AZQ_INLINE int8x16_t broadcast4(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, sizeof dword);
    return vreinterpretq_s8_s32(vdupq_n_s32(dword));
}

typedef struct {
    int16x8_t low, high;
} products;

AZQ_INLINE products add_products(products s, int8x16_t w, int8x16_t a) {
    return (products){vmlal_s8(s.low, vget_low_s8(w), vget_low_s8(a)), vmlal_high_s8(s.high, w, a)};
}
/* A column's four lanes added. */
AZQ_INLINE int32x4_t columns(products s) { return vpaddq_s32(vpaddlq_s16(s.low), vpaddlq_s16(s.high)); }

AZQ_INLINE void dots_q4_0(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *head, const uint8_t *lines, int at, int R, int V, int32x4_t *dots) {
    (void)head;
    products sums[8];
    for (int i = 0; i < R * V; i++) {
        sums[i] = (products){vdupq_n_s16(0), vdupq_n_s16(0)};
    }
    for (int i = 0; i < 4; i++) {
        int8x16_t low[4], high[4];
        for (int v = 0; v < V; v++) {
            uint8x16_t w = vld1q_u8(lines + 64 * i + 16 * (at + v));
            low[v] = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
            high[v] = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
        }
        for (int r = 0; r < R; r++) {
            int8x16_t a = broadcast4(q + r * q_stride + 8 * i), b = broadcast4(q + r * q_stride + 8 * i + 4);
            for (int v = 0; v < V; v++) {
                sums[r * V + v] = add_products(add_products(sums[r * V + v], low[v], a), high[v], b);
            }
        }
    }
    for (int i = 0; i < R * V; i++) {
        dots[i] = vaddq_s32(columns(sums[i]), vdupq_n_s32(AZQ_MAGIC + start[i / V * start_stride]));
    }
}

AZQ_INLINE void dots_q8_0(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *head, const uint8_t *lines, int at, int R, int V, int32x4_t *dots) {
    (void)head;
    (void)start;
    (void)start_stride;
    int32x4_t low[8], high[8];
    for (int i = 0; i < R * V; i++) {
        low[i] = high[i] = vdupq_n_s32(0);
    }
    for (int i = 0; i < 4; i++) {
        for (int r = 0; r < R; r++) {
            int8x16_t a = broadcast4(q + r * q_stride + 8 * i), b = broadcast4(q + r * q_stride + 8 * i + 4);
            for (int v = 0; v < V; v++) {
                const int8_t *w = (const int8_t *)lines + 128 * i + 16 * (at + v);
                products none = {vdupq_n_s16(0), vdupq_n_s16(0)};
                products two = add_products(add_products(none, vld1q_s8(w), a), vld1q_s8(w + 64), b);
                low[r * V + v] = vpadalq_s16(low[r * V + v], two.low);
                high[r * V + v] = vpadalq_s16(high[r * V + v], two.high);
            }
        }
    }
    for (int i = 0; i < R * V; i++) {
        dots[i] = vaddq_s32(vpaddq_s32(low[i], high[i]), vdupq_n_s32(AZQ_MAGIC));
    }
}

AZQ_INLINE void half_q6_k(const int8_t *q, int64_t q_stride, const int32_t *start, int64_t start_stride,
                          const uint8_t *head, const uint8_t *lines, int half, int at, int R, int V, int32x4_t *isums) {
    products sums[8];
    for (int i = 0; i < R * V; i++) {
        sums[i] = (products){vdupq_n_s16(0), vdupq_n_s16(0)};
    }
    for (int i = 2 * half; i < 2 * half + 2; i++) {
        for (int v = 0; v < V; v++) {
            int8x16_t low, high;
            operands_q6_k(lines + 16 * (at + v), i, &low, &high);
            for (int r = 0; r < R; r++) {
                const int8_t *a = q + r * q_stride + 8 * i;
                products s = add_products(sums[r * V + v], low, broadcast4(a));
                sums[r * V + v] = add_products(s, high, broadcast4(a + 4));
            }
        }
    }
    for (int v = 0; v < V; v++) {
        int32x4_t scale = load_scales_q6_k(head + 32 + 16 * half + 4 * (at + v));
        for (int r = 0; r < R; r++) {
            int32x4_t dot = vaddq_s32(columns(sums[r * V + v]), vdupq_n_s32(-32 * start[r * start_stride + half]));
            isums[r * V + v] = half ? vmlaq_s32(isums[r * V + v], dot, scale) : vmulq_s32(dot, scale);
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

#define AZQ_GEMM_NEON(type)                                                                        \
    static void gemm_##type(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels, \
                            int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {        \
        for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes, c += AZQ_PANEL) {            \
            int64_t r = 0;                                                                         \
            for (; r + 2 <= rows; r += 2) {                                                        \
                gemm_##type##_tile(act, row0 + r, 2, 2, panels, 0, c + r * ldc, ldc);              \
                gemm_##type##_tile(act, row0 + r, 2, 2, panels, 2, c + r * ldc, ldc);              \
            }                                                                                      \
            if (r < rows) {                                                                        \
                gemm_##type##_tile(act, row0 + r, 1, 4, panels, 0, c + r * ldc, ldc);              \
            }                                                                                      \
        }                                                                                          \
    }
AZQ_GEMM_NEON(q4_0)
AZQ_GEMM_NEON(q8_0)
AZQ_GEMM_NEON(q6_k)

/* ---- measuring ----------------------------------------------------------------------------------- */

static uint64_t stream_read(const void *lines, int64_t n) {
    const uint8_t *x = lines;
    uint8x16_t s0 = vdupq_n_u8(0), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t i = 0; i < n; i++, x += 64) {
        s0 = veorq_u8(s0, vld1q_u8(x));
        s1 = veorq_u8(s1, vld1q_u8(x + 16));
        s2 = veorq_u8(s2, vld1q_u8(x + 32));
        s3 = veorq_u8(s3, vld1q_u8(x + 48));
    }
    uint64x2_t s = vreinterpretq_u64_u8(veorq_u8(veorq_u8(s0, s1), veorq_u8(s2, s3)));
    return vgetq_lane_u64(s, 0) ^ vgetq_lane_u64(s, 1);
}

/* smlal: 8 multiply-adds an instruction, eight independent sums. */
static int64_t peak_int8(int64_t rounds) {
    const int8x8_t a = vdup_n_s8(3), b = vdup_n_s8(5);
    int16x8_t s0 = vdupq_n_s16(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    for (int64_t r = 0; r < rounds; r++) {
        s0 = vmlal_s8(s0, a, b), s1 = vmlal_s8(s1, a, b), s2 = vmlal_s8(s2, a, b), s3 = vmlal_s8(s3, a, b);
        s4 = vmlal_s8(s4, a, b), s5 = vmlal_s8(s5, a, b), s6 = vmlal_s8(s6, a, b), s7 = vmlal_s8(s7, a, b);
        /* Equal sums must not be made one: tell the compiler that they may have changed. */
        __asm__ volatile("" : "+w"(s0), "+w"(s1), "+w"(s2), "+w"(s3), "+w"(s4), "+w"(s5), "+w"(s6), "+w"(s7));
    }
    return rounds * 8 * 8;
}

const azq_kernels azq_kernels_neon = {
    .isa = "neon",
    .needs = AZQ_CPU_NEON,
    .slots =
        {
            AZQ_BLOCK_SLOTS,
            .quantize_act = quantize_act,
            .gemm[AZQ_TYPE_Q4_0] = gemm_q4_0,
            .gemm[AZQ_TYPE_Q8_0] = gemm_q8_0,
            .gemm[AZQ_TYPE_Q6_K] = gemm_q6_k,
            AZQ_GEMM_TYPES_SLOTS(neon),
            AZQ_GEMM_FP32_SLOTS(neon),
            .stream_read = stream_read,
            .peak_int8 = peak_int8,
            AZQ_VEC_SLOTS,
            AZQ_EXP_SLOTS,
            AZQ_ATTEND_SLOTS,
        },
};
#endif
