/* The families compiled for AVX2. FMA is left out of the target: the bytes must not depend on it. */
#include "../azq_target.h"
#if AZQ_X86
#define AZQ_NAME(name) name##_avx2
#define AZQ_LANES 8
#include <immintrin.h>
#define LANE_MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define LANE_MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#include "families.h"

AZQ_TARGET_BEGIN("avx2,f16c")
#include "decode.h"
#include "encode_256.h"
#include "encode.h"
#include "search.h"
#include "kquants.h"
#include "weighted.h"
AZQ_TARGET_END
#endif
