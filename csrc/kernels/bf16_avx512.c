/* bf16 with AVX-512 but without its BF16 instructions: one register holds a panel's 16 columns. */
#include "../azq_target.h"
#if AZQ_X86
#include <assert.h>
#include <immintrin.h>
#include <string.h>
#include "../azq_half.h"
#include "bf16.h"

AZQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")

#include "vec_types.h"
#define AZQ_NAME(name) name##_avx512
#include "bf16_tiles.h"

typedef __m512 vf;
enum { LANES = 16, MAX_ROWS = 8 };
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define v_zero() _mm512_setzero_ps()
#define v_load(p) _mm512_loadu_ps(p)
#define v_store(p, v) _mm512_storeu_ps(p, v)
AZQ_INLINE vf v_even(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
AZQ_INLINE vf v_odd(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)));
}
AZQ_INLINE vf s_even(const uint16_t *pair) { return _mm512_set1_ps(azq_bf16_to_f32(pair[0])); }
AZQ_INLINE vf s_odd(const uint16_t *pair) { return _mm512_set1_ps(azq_bf16_to_f32(pair[1])); }

#include "bf16_fma.h"

AZQ_TARGET_END
#endif
