/* What aarch64 with and without sdot share of gemm_types_simd.h: a panel is four registers, products are s8 x s8. */
#define V_BYTES 16
#define FUSED_ROWS 2
#define AZQ_SIGNED_DOT
#define i_pairs(x, y) \
    ((vi)vpaddq_s32(vmull_s16(vget_low_s16((int16x8_t)(x)), vget_low_s16((int16x8_t)(y))), \
                    vmull_high_s16((int16x8_t)(x), (int16x8_t)(y))))
#define i_shuffle(table, x) ((vi)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)(x)))
#define i_bytes(p) ((vi)four_bytes(p))
#define f_int(x) ((vf)vcvtq_f32_s32((int32x4_t)(x)))
#define f_halves(p) ((vf)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))))
#define f_fma(a, b, c) ((vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))

static inline __attribute__((always_inline)) uint32x4_t four_bytes(const uint8_t *p) {
    uint32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
}

#include "gemm_types_simd.h"
