/* The fp32 product over 256 bits. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#include "gemm_types.h"
#define AZQ_NAME(name) name##_avx2

AZQ_TARGET_BEGIN("avx2,fma,f16c")
#include "vec_types.h"
AZQ_INLINE v8 fma8(v8 a, v8 b, v8 c) { return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#include "gemm_fp32_pairs.h"
#define AZQ_FP32_HALVES
AZQ_INLINE wide w_load_f16(const uint8_t *p) {
    return (wide){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                  _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
AZQ_INLINE v8 bf16_to_v8(const uint8_t *p) {
    return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
AZQ_INLINE wide w_load_bf16(const uint8_t *p) { return (wide){bf16_to_v8(p), bf16_to_v8(p + 16)}; }
#include "gemm_fp32.h"
AZQ_TARGET_END
#endif
