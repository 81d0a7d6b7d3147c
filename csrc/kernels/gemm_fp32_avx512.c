/* The fp32 product over 512 bits. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#include "gemm_types.h"
#define AZQ_NAME(name) name##_avx512

AZQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
typedef __m512 wide;
#define TILE_ROWS 6
#define TILE_COLUMNS 4
#define AZQ_FP32_HALVES
#define PLANE_ROWS 12
#define PLANE_WIDES 2
#define w_zero() _mm512_setzero_ps()
#define w_set(x) _mm512_set1_ps(x)
#define w_load(p) _mm512_loadu_ps(p)
#define w_store(p, x) _mm512_storeu_ps(p, x)
#define w_add(a, b) _mm512_add_ps(a, b)
#define w_add_product(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#define w_load_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define w_load_bf16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#include "gemm_fp32.h"
AZQ_TARGET_END
#endif
