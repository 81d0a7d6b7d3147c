/* The searching families compiled for AVX-512; the others gain nothing over AVX2. */
#include "../azq_target.h"
#if AZQ_X86
#define AZQ_NAME(name) name##_avx512
#define AZQ_LANES 16
#include <immintrin.h>
#define LANE_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define LANE_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#include "families.h"

#if defined(__clang__) /* knows the preference as a flag only, and needs it less: the vectors are written out */
AZQ_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512dq,avx512vl")
#else
AZQ_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#include "search.h"
#include "kquants.h"
#include "weighted.h"
AZQ_TARGET_END
#endif
