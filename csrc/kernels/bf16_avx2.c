/* bf16 with AVX2 and FMA: two registers hold a panel's 16 columns. */
#include "../azq_target.h"
#if AZQ_X86
#include <assert.h>
#include <immintrin.h>
#include <string.h>
#include "../azq_half.h"
#include "bf16.h"

AZQ_TARGET_BEGIN("avx2,fma,f16c")

#include "vec_types.h"
#define AZQ_NAME(name) name##_avx2
#include "bf16_tiles.h"

typedef __m256 vf;
enum { LANES = 8, MAX_ROWS = 4 };
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define v_zero() _mm256_setzero_ps()
#define v_load(p) _mm256_loadu_ps(p)
#define v_store(p, v) _mm256_storeu_ps(p, v)
AZQ_INLINE vf v_even(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)p), 16));
}
AZQ_INLINE vf v_odd(const uint16_t *p) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
}
AZQ_INLINE vf s_even(const uint16_t *pair) { return _mm256_set1_ps(azq_bf16_to_f32(pair[0])); }
AZQ_INLINE vf s_odd(const uint16_t *pair) { return _mm256_set1_ps(azq_bf16_to_f32(pair[1])); }

#include "bf16_fma.h"

AZQ_TARGET_END
#endif
