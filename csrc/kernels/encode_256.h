/* What encode.h does to 32 elements at a time, for AVX2 by hand; with the results of encode_any.h. */
#include <immintrin.h>
#include <string.h>
#include "../azq_target.h"

#define AZQ_ENCODE_INLINE static inline __attribute__((always_inline))

AZQ_ENCODE_INLINE __m256 magnitudes(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

AZQ_ENCODE_INLINE float largest_lane(__m256 x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

AZQ_ENCODE_INLINE float smallest_lane(__m256 x) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

AZQ_ENCODE_INLINE float magnitude_of(const float *x, int n) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
    for (int i = 0; i < n; i += 32) {
        a = _mm256_max_ps(magnitudes(_mm256_loadu_ps(x + i)), a);
        b = _mm256_max_ps(magnitudes(_mm256_loadu_ps(x + i + 8)), b);
        c = _mm256_max_ps(magnitudes(_mm256_loadu_ps(x + i + 16)), c);
        d = _mm256_max_ps(magnitudes(_mm256_loadu_ps(x + i + 24)), d);
    }
    return largest_lane(_mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
}

AZQ_ENCODE_INLINE float extreme_32(const float *x) {
    float amax = magnitude_of(x, 32);
    uint32_t reach = 0;
    for (int i = 0; i < 4; i++) {
        __m256 equal = _mm256_cmp_ps(magnitudes(_mm256_loadu_ps(x + 8 * i)), _mm256_set1_ps(amax), _CMP_EQ_OQ);
        reach |= (uint32_t)_mm256_movemask_ps(equal) << 8 * i;
    }
    return amax > 0.0f ? x[__builtin_ctz(reach)] : 0.0f;
}

AZQ_ENCODE_INLINE void range_32(const float *x, float *min, float *max) {
    __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(x + 8);
    __m256 c = _mm256_loadu_ps(x + 16), d = _mm256_loadu_ps(x + 24);
    *min = smallest_lane(_mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d)));
    *max = largest_lane(_mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
}

AZQ_ENCODE_INLINE void codes_32(const float *x, float shift, float id, float half, int most, uint8_t *q) {
    __m256i codes[4];
    for (int i = 0; i < 4; i++) {
        __m256 scaled = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(shift)),
                                      _mm256_set1_ps(id));
        __m256i whole = _mm256_cvttps_epi32(_mm256_add_ps(scaled, _mm256_set1_ps(half)));
        codes[i] = _mm256_min_epi32(whole, _mm256_set1_epi32(most));
    }
    /* Saturation makes 0 of INT_MIN, which is what its low byte is. */
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)(void *)q, bytes);
}
