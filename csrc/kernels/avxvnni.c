/* AVX-VNNI: vpdpbusd over 256-bit registers adds four u8 x s8 products into 32 bits, without saturation.
 *   sum (u - 8) a = sum u a - 8 sum a, the second term being what the dot product starts from.
 * Q8_0 weights are signed: u = w ^ 0x80 = w + 128, so the start is -128 sum a = 16 * sum8. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#include <string.h>
#include "../azq_kernels.h"
#include "../cpu.h"

AZQ_TARGET_BEGIN("avx2,fma,f16c,avxvnni")

#include "vec_types.h"

AZQ_INLINE __m256i loadi(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
AZQ_INLINE __m256i broadcast4(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, sizeof dword);
    return _mm256_set1_epi32(dword);
}

AZQ_INLINE void dots_q4_0(const int8_t *q, int64_t q_stride, const int32_t *init, int64_t init_stride,
                          const uint8_t *lines, int R, int H, __m256i *dots) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < R * H; i++) {
        dots[i] = _mm256_set1_epi32(init[i / H * init_stride]);
    }
    for (int i = 0; i < 4; i++) {
        for (int h = 0; h < H; h++) {
            __m256i w = loadi(lines + 64 * i + 32 * h);
            __m256i low = _mm256_and_si256(w, mask), high = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
            for (int r = 0; r < R; r++) {
                const int8_t *a = q + r * q_stride + 8 * i;
                dots[r * H + h] = _mm256_dpbusd_avx_epi32(dots[r * H + h], low, broadcast4(a));
                dots[r * H + h] = _mm256_dpbusd_avx_epi32(dots[r * H + h], high, broadcast4(a + 4));
            }
        }
    }
}

AZQ_INLINE void dots_q8_0(const int8_t *q, int64_t q_stride, const int32_t *init, int64_t init_stride,
                          const uint8_t *lines, int R, int H, __m256i *dots) {
    const __m256i flip = _mm256_set1_epi8(-128);
    for (int i = 0; i < R * H; i++) {
        dots[i] = _mm256_set1_epi32(16 * init[i / H * init_stride]);
    }
    for (int i = 0; i < 8; i++) {
        for (int h = 0; h < H; h++) {
            __m256i w = _mm256_xor_si256(loadi(lines + 64 * i + 32 * h), flip);
            for (int r = 0; r < R; r++) {
                dots[r * H + h] = _mm256_dpbusd_avx_epi32(dots[r * H + h], w, broadcast4(q + r * q_stride + 4 * i));
            }
        }
    }
}

#define AZQ_INIT(act) (act)->sum8
#include "gemm_256.h"
AZQ_GEMM_256(q4_0, dots_q4_0, 256)
AZQ_GEMM_256(q8_0, dots_q8_0, 512)

const azq_kernels azq_kernels_avxvnni = {
    .isa = "avxvnni",
    .needs = AZQ_CPU_AVX2 | AZQ_CPU_AVXVNNI,
    .slots = {.gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0, [AZQ_TYPE_Q8_0] = gemm_q8_0}},
};

AZQ_TARGET_END
#endif
