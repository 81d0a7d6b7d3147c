/* AVX-VNNI: vpdpbusd over 256-bit registers adds four u8 x s8 products into 32 bits, without saturation.
 *   sum (u - 8) a = sum u a - 8 sum a, the second term being what the dot product starts from.
 * Q8_0 weights are signed: u = w ^ 0x80 = w + 128, so the start is -128 sum a = 16 * sum8. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#include <string.h>
#include "../azq_kernels.h"
#include "../cpu.h"
#include "gemm_types.h"

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

/* For measuring: 32 multiply-adds an instruction, ten independent sums. */
static int64_t peak_int8(int64_t rounds) {
    const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    __m256i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a;
    for (int64_t r = 0; r < rounds; r++) {
        s0 = _mm256_dpbusd_avx_epi32(s0, a, b), s1 = _mm256_dpbusd_avx_epi32(s1, a, b);
        s2 = _mm256_dpbusd_avx_epi32(s2, a, b), s3 = _mm256_dpbusd_avx_epi32(s3, a, b);
        s4 = _mm256_dpbusd_avx_epi32(s4, a, b), s5 = _mm256_dpbusd_avx_epi32(s5, a, b);
        s6 = _mm256_dpbusd_avx_epi32(s6, a, b), s7 = _mm256_dpbusd_avx_epi32(s7, a, b);
        s8 = _mm256_dpbusd_avx_epi32(s8, a, b), s9 = _mm256_dpbusd_avx_epi32(s9, a, b);
        /* Equal sums must not be made one: tell the compiler that they may have changed. */
        __asm__ volatile("" : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4));
        __asm__ volatile("" : "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9));
    }
    return rounds * 10 * 32;
}

const azq_kernels azq_kernels_avxvnni = {
    .isa = "avxvnni",
    .needs = AZQ_CPU_AVX2 | AZQ_CPU_AVXVNNI,
    .slots = {.peak_int8 = peak_int8, .gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0, [AZQ_TYPE_Q8_0] = gemm_q8_0},
            AZQ_GEMM_TYPES_SLOTS(avxvnni)},
};

AZQ_TARGET_END
#endif
