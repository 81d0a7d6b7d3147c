/* AVX2: vpmaddubsw adds two products in 16 bits, a few of those still fit, vpmaddwd widens. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#define AZQ_NAME(name) name##_avx2

AZQ_TARGET_BEGIN("avx2,fma,f16c")
#define DENSE_ROWS 2
#define DENSE_FROM 6
#define AZQ_MADDUBS
#define i_maddubs(w, a) ((vi)_mm256_maddubs_epi16((__m256i)(w), (__m256i)(a)))
#define i_madd(x) ((vi)_mm256_madd_epi16((__m256i)(x), _mm256_set1_epi16(1)))
#define i_abs(x) ((vi)_mm256_abs_epi8((__m256i)(x)))
#define i_sign(a, w) ((vi)_mm256_sign_epi8((__m256i)(a), (__m256i)(w)))
#include "gemm_types_256.h"
AZQ_TARGET_END
#endif
