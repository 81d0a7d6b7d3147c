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

#include "gemm_256.h"

AZQ_INLINE void block_q4_0(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines, int R,
                           __m256 *sums) {
    const __m256i mask = _mm256_set1_epi8(15);
    int64_t n_blocks = act->k / 32;
    __m256i dots[2 * MAX_ROWS];
    for (int i = 0; i < 2 * R; i++) {
        dots[i] = _mm256_set1_epi32(act->sum8[at + i / 2 * n_blocks]);
    }
    for (int i = 0; i < 4; i++) {
        __m256i low[2], high[2];
        for (int h = 0; h < 2; h++) {
            __m256i w = loadi(lines + 64 * i + 32 * h);
            low[h] = _mm256_and_si256(w, mask);
            high[h] = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
        }
        for (int r = 0; r < R; r++) {
            const int8_t *q = act->q + 32 * at + r * act->k + 8 * i;
            __m256i a = broadcast4(q), b = broadcast4(q + 4);
            for (int h = 0; h < 2; h++) {
                dots[2 * r + h] = _mm256_dpbusd_avx_epi32(dots[2 * r + h], low[h], a);
                dots[2 * r + h] = _mm256_dpbusd_avx_epi32(dots[2 * r + h], high[h], b);
            }
        }
    }
    __m256 products[2 * MAX_ROWS];
    for (int i = 0; i < 2 * R; i++) {
        products[i] = _mm256_cvtepi32_ps(dots[i]);
    }
    add_scaled(act, at, head, R, products, sums);
}
AZQ_GEMM_256(q4_0, 32, 256)

AZQ_INLINE void block_q8_0(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines, int R,
                           __m256 *sums) {
    const __m256i flip = _mm256_set1_epi8(-128);
    int64_t n_blocks = act->k / 32;
    __m256i dots[2 * MAX_ROWS];
    for (int i = 0; i < 2 * R; i++) {
        dots[i] = _mm256_set1_epi32(16 * act->sum8[at + i / 2 * n_blocks]);
    }
    for (int i = 0; i < 8; i++) {
        __m256i w[2];
        for (int h = 0; h < 2; h++) {
            w[h] = _mm256_xor_si256(loadi(lines + 64 * i + 32 * h), flip);
        }
        for (int r = 0; r < R; r++) {
            __m256i a = broadcast4(act->q + 32 * at + r * act->k + 4 * i);
            for (int h = 0; h < 2; h++) {
                dots[2 * r + h] = _mm256_dpbusd_avx_epi32(dots[2 * r + h], w[h], a);
            }
        }
    }
    __m256 products[2 * MAX_ROWS];
    for (int i = 0; i < 2 * R; i++) {
        products[i] = _mm256_cvtepi32_ps(dots[i]);
    }
    add_scaled(act, at, head, R, products, sums);
}
AZQ_GEMM_256(q8_0, 32, 512)

AZQ_INLINE __m256i dot_pair(__m256i sum, __m256i low, __m256i a, __m256i high, __m256i b) {
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, low, a), high, b);
}
#include "q6_k_256.h"
AZQ_GEMM_256(q6_k, 64, 384)

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
    .slots = {.peak_int8 = peak_int8,
              .gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0, [AZQ_TYPE_Q8_0] = gemm_q8_0, [AZQ_TYPE_Q6_K] = gemm_q6_k},
              AZQ_GEMM_TYPES_SLOTS(avxvnni)},
};

AZQ_TARGET_END
#endif
