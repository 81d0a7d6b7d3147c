/* What AVX2 and AVX-VNNI share of gemm_types_simd.h: a panel is two registers. */
#define V_BYTES 32
#define FUSED_ROWS 2
#define i_pairs(x, y) ((vi)_mm256_madd_epi16((__m256i)(x), (__m256i)(y)))
#define i_shuffle(table, x) \
    ((vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table))), (__m256i)(x)))
#define i_bytes(p) ((vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define f_int(x) ((vf)_mm256_cvtepi32_ps((__m256i)(x)))
#define f_halves(p) ((vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define f_fma(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "gemm_types_simd.h"
