/* aarch64 with sdot. */
#include "../azq_target.h"
#if AZQ_ARM64_DOTPROD
#include <arm_neon.h>
#include <string.h>
#define AZQ_NAME(name) name##_dotprod

AZQ_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#define DENSE_ROWS 6
#define DENSE_FROM 7
#define i_dot(sum, w, a) ((vi)vdotq_s32((int32x4_t)(sum), (int8x16_t)(w), (int8x16_t)(a)))
#include "gemm_types_128.h"
AZQ_TARGET_END
#endif
