/* aarch64 as every such processor has it. Two products fit 16 bits: a code is below 64 or one of IQ4's numbers, none
 * of which is -128, and neither is an activation. */
#include "../azq_target.h"
#if AZQ_ARM64
#include <arm_neon.h>
#include <string.h>
#define AZQ_NAME(name) name##_neon

#define DENSE_ROWS 3
#define DENSE_FROM 7
static inline __attribute__((always_inline)) int32x4_t dot_4(int32x4_t sum, int8x16_t w, int8x16_t a) {
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
}
#define i_dot(sum, w, a) ((vi)dot_4((int32x4_t)(sum), (int8x16_t)(w), (int8x16_t)(a)))
#include "gemm_types_128.h"
#endif
