/* The fp32 product over four NEON registers. */
#include "../azq_target.h"
#if AZQ_ARM64
#include <arm_neon.h>
#include "gemm_types.h"
#include "vec_types.h"
#define AZQ_NAME(name) name##_neon
#define TILE_ROWS 3
#define TILE_COLUMNS 2
#define PLANE_ROWS 6
#define PLANE_WIDES 1
#define AZQ_FP32_HALVES

typedef struct {
    float32x4_t a, b, c, d;
} wide;

AZQ_INLINE wide w_set(float x) {
    float32x4_t same = vdupq_n_f32(x);
    return (wide){same, same, same, same};
}
AZQ_INLINE wide w_zero(void) { return w_set(0.0f); }
AZQ_INLINE wide w_load(const float *p) {
    return (wide){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
AZQ_INLINE void w_store(float *p, wide x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
AZQ_INLINE wide w_add(wide x, wide y) {
    return (wide){vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
}
AZQ_INLINE wide w_add_product(wide sum, wide x, wide y) {
    return (wide){vfmaq_f32(sum.a, x.a, y.a), vfmaq_f32(sum.b, x.b, y.b), vfmaq_f32(sum.c, x.c, y.c),
                  vfmaq_f32(sum.d, x.d, y.d)};
}
AZQ_INLINE float32x4_t four_f16(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
AZQ_INLINE float32x4_t four_bf16(const uint8_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
AZQ_INLINE wide w_load_f16(const uint8_t *p) {
    return (wide){four_f16(p), four_f16(p + 8), four_f16(p + 16), four_f16(p + 24)};
}
AZQ_INLINE wide w_load_bf16(const uint8_t *p) {
    return (wide){four_bf16(p), four_bf16(p + 8), four_bf16(p + 16), four_bf16(p + 24)};
}
#include "gemm_fp32.h"
#endif
