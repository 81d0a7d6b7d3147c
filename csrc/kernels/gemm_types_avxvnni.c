/* AVX-VNNI: vpdpbusd over 256 bits. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#define AZQ_NAME(name) name##_avxvnni

AZQ_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
#define DENSE_ROWS 3
#define DENSE_FROM 6
#define i_dot(sum, w, a) ((vi)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(w), (__m256i)(a)))
#include "gemm_types_256.h"
AZQ_TARGET_END
#endif
