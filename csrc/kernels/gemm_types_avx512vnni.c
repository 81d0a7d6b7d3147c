/* AVX-512 VNNI: a panel is one register, vpdpbusd adds four products a lane. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#define AZQ_NAME(name) name##_avx512vnni

AZQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#define V_BYTES 64
#define FUSED_ROWS 4
#define DENSE_ROWS 6
#define DENSE_FROM 7
#define i_dot(sum, w, a) ((vi)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(a)))
#define i_pairs(x, y) ((vi)_mm512_madd_epi16((__m512i)(x), (__m512i)(y)))
#define i_shuffle(table, x) \
    ((vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(table))), (__m512i)(x)))
#define i_bytes(p) ((vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define f_int(x) ((vf)_mm512_cvtepi32_ps((__m512i)(x)))
#define f_halves(p) ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define f_fma(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "gemm_types_simd.h"
AZQ_TARGET_END
#endif
