/* AVX-512 (F, BW, DQ, VL, VBMI) with VNNI.
 *
 * int8 matmul: a panel's 16 columns are one register. Per block of 32 and 4 rows x 2 panels
 *   2 x 4 loads of nibble lines, and / shift to 16 operands, used by every row;
 *   per row 8 broadcasts of 4 activations, 16 vpdpbusd (weights are the unsigned operand);
 *   per row and panel one convert, one multiply of the scales, one fused multiply-add.
 * Sums start at -8 sum a (Q8_0: u = w ^ 0x80, so -128 sum a), which costs a broadcast and no arithmetic. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "../azq_half.h"
#include "../azq_kernels.h"
#include "../cpu.h"
#include "bf16.h"
#include "families.h"
#include "gemm_types.h"

AZQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")

#include "vec_types.h"

typedef __m512 vf;
#define LANES 16
#define V_ZERO _mm512_setzero_ps()
#define v_set(x) _mm512_set1_ps(x)
#define v_load(p) _mm512_loadu_ps(p)
#define v_store(p, v) _mm512_storeu_ps(p, v)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define v_mul(a, b) _mm512_mul_ps(a, b)
#define v_add(a, b) _mm512_add_ps(a, b)
#define v_div(a, b) _mm512_div_ps(a, b)
#define v_sub(a, b) _mm512_sub_ps(a, b)
#define v_max(a, b) _mm512_max_ps(a, b)
#define v_min(a, b) _mm512_min_ps(a, b)
#define v_scale(p, n) _mm512_scalef_ps(p, n)
#define v_below(x, limit, yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), no, yes)
#define v_load_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define v_set_f16(h) _mm512_cvtph_ps(_mm256_set1_epi16((short)(h)))
#define v_load_i8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))))
#define AZQ_TILES_1 8
#define AZQ_TILES_4 4
#define AZQ_CHAINS 2
#include "exp.h"
#include "vec.h"
#include "attend_types.h"

/* ---- blocks ---------------------------------------------------------------------------------------- */

#include "blocks_512.h"

/* ---- int8 matmul --------------------------------------------------------------------------------- */

#include "gemm_512.h"

/* sums += dots * scales, the end of every block whose 32 weights share a scale. */
AZQ_INLINE void add_scaled(const azq_act *act, int64_t at, const uint8_t *head, int64_t panel_bytes, int R, int P,
                           const __m512i *dots, __m512 *sums) {
    int64_t n_blocks = act->k / 32;
    for (int p = 0; p < P; p++) {
        __m512 dw = load_scales(head + p * panel_bytes);
        for (int r = 0; r < R; r++) {
            __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(act->d[at + r * n_blocks]));
            sums[r * P + p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r * P + p]), scale, sums[r * P + p]);
        }
    }
}

/* Per row, panel and block 8 vpdpbusd, a multiply and a fused multiply-add go through the same two ports of Zen 5:
 * 80% of the int8 peak at most. From 4 rows on 73 to 80% are reached. */
AZQ_INLINE void block_q4_0(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines,
                           int64_t panel_bytes, int R, int P, __m512 *sums) {
    const __m512i mask = _mm512_set1_epi8(15);
    int64_t n_blocks = act->k / 32;
    __m512i dots[MAX_ROWS * 2];
    for (int i = 0; i < R * P; i++) {
        dots[i] = _mm512_set1_epi32(act->sum8[at + i / P * n_blocks]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i low[2], high[2];
        for (int p = 0; p < P; p++) {
            __m512i w = _mm512_loadu_si512(lines + p * panel_bytes + 64 * i);
            low[p] = _mm512_and_si512(w, mask);
            high[p] = _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
        }
        for (int r = 0; r < R; r++) {
            const int8_t *q = act->q + 32 * at + r * act->k + 8 * i;
            __m512i a = broadcast4(q), b = broadcast4(q + 4);
            for (int p = 0; p < P; p++) {
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], low[p], a);
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], high[p], b);
            }
        }
    }
    add_scaled(act, at, head, panel_bytes, R, P, dots, sums);
}
AZQ_GEMM_512(q4_0, 32, 256, 6)

AZQ_INLINE void block_q8_0(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines,
                           int64_t panel_bytes, int R, int P, __m512 *sums) {
    const __m512i flip = _mm512_set1_epi8(-128);
    int64_t n_blocks = act->k / 32;
    __m512i dots[MAX_ROWS * 2];
    for (int i = 0; i < R * P; i++) {
        dots[i] = _mm512_set1_epi32(16 * act->sum8[at + i / P * n_blocks]);
    }
    for (int i = 0; i < 8; i++) {
        __m512i w[2];
        for (int p = 0; p < P; p++) {
            w[p] = _mm512_xor_si512(_mm512_loadu_si512(lines + p * panel_bytes + 64 * i), flip);
        }
        for (int r = 0; r < R; r++) {
            __m512i a = broadcast4(act->q + 32 * at + r * act->k + 4 * i);
            for (int p = 0; p < P; p++) {
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], w[p], a);
            }
        }
    }
    add_scaled(act, at, head, panel_bytes, R, P, dots, sums);
}
AZQ_GEMM_512(q8_0, 32, 512, 6)

/* Q6_K: the block's halves are summed apart and meet with their scales: three sets of R * P registers, 24 with
 * 4 x 2. One panel and 8 rows would broadcast without sharing and is 20% slower.
 * total += dot * scale over one half, whole numbers below 2^24 and so exact. */
AZQ_INLINE void half_q6_k(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines,
                          int64_t panel_bytes, int half, int R, int P, __m512 *total) {
    const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(0x30);
    int64_t n_blocks = act->k / 32;
    __m512i dots[MAX_ROWS * 2];
    for (int i = 0; i < R * P; i++) {
        dots[i] = _mm512_set1_epi32(-32 * act->sum16[2 * (at + i / P * n_blocks) + half]);
    }
    for (int i = 0; i < 2; i++) {
        __m512i low[2], high[2];
        for (int p = 0; p < P; p++) {
            const uint8_t *panel = lines + p * panel_bytes + 64 * half;
            __m512i w = _mm512_loadu_si512(panel + 64 * (half + i)), h = _mm512_loadu_si512(panel + 256);
            __m512i first = i ? h : _mm512_slli_epi16(h, 4);
            __m512i second = i ? _mm512_srli_epi16(h, 2) : _mm512_slli_epi16(h, 2);
            first = _mm512_and_si512(first, upper);
            second = _mm512_and_si512(second, upper);
            /* 0xea: (w & nibble) | first */
            low[p] = _mm512_ternarylogic_epi32(w, nibble, first, 0xea);
            high[p] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(w, 4), nibble, second, 0xea);
        }
        for (int r = 0; r < R; r++) {
            const int8_t *q = act->q + 32 * at + r * act->k + 8 * (2 * half + i);
            __m512i a = broadcast4(q), b = broadcast4(q + 4);
            for (int p = 0; p < P; p++) {
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], low[p], a);
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], high[p], b);
            }
        }
    }
    for (int p = 0; p < P; p++) {
        const __m128i *scales = (const __m128i *)(head + p * panel_bytes + 32 + 16 * half);
        __m512 s = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(scales)));
        for (int r = 0; r < R; r++) {
            total[r * P + p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r * P + p]), s, total[r * P + p]);
        }
    }
}

AZQ_INLINE void block_q6_k(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines,
                           int64_t panel_bytes, int R, int P, __m512 *sums) {
    int64_t n_blocks = act->k / 32;
    __m512 total[MAX_ROWS * 2];
    for (int i = 0; i < R * P; i++) {
        total[i] = _mm512_setzero_ps();
    }
    half_q6_k(act, at, head, lines, panel_bytes, 0, R, P, total);
    half_q6_k(act, at, head, lines, panel_bytes, 1, R, P, total);
    for (int p = 0; p < P; p++) {
        __m512 dw = load_scales(head + p * panel_bytes);
        for (int r = 0; r < R; r++) {
            __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(act->d[at + r * n_blocks]));
            sums[r * P + p] = _mm512_fmadd_ps(total[r * P + p], scale, sums[r * P + p]);
        }
    }
}
AZQ_GEMM_512(q6_k, 64, 384, 4)

/* ---- measuring ----------------------------------------------------------------------------------- */

static uint64_t stream_read(const void *lines, int64_t n) {
    const uint8_t *x = lines;
    __m512i s0 = _mm512_setzero_si512(), s1 = s0;
    int64_t i = 0;
    for (; i + 2 <= n; i += 2, x += 128) {
        _mm_prefetch((const char *)x + 2048, _MM_HINT_T0);
        _mm_prefetch((const char *)x + 2112, _MM_HINT_T0);
        s0 = _mm512_xor_si512(s0, _mm512_loadu_si512(x));
        s1 = _mm512_xor_si512(s1, _mm512_loadu_si512(x + 64));
    }
    if (i < n) {
        s0 = _mm512_xor_si512(s0, _mm512_loadu_si512(x));
    }
    return (uint64_t)_mm512_reduce_or_epi64(_mm512_xor_si512(s0, s1));
}

/* 64 multiply-adds an instruction, ten independent sums. */
static int64_t peak_int8(int64_t rounds) {
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    __m512i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a;
    for (int64_t r = 0; r < rounds; r++) {
        s0 = _mm512_dpbusd_epi32(s0, a, b), s1 = _mm512_dpbusd_epi32(s1, a, b);
        s2 = _mm512_dpbusd_epi32(s2, a, b), s3 = _mm512_dpbusd_epi32(s3, a, b);
        s4 = _mm512_dpbusd_epi32(s4, a, b), s5 = _mm512_dpbusd_epi32(s5, a, b);
        s6 = _mm512_dpbusd_epi32(s6, a, b), s7 = _mm512_dpbusd_epi32(s7, a, b);
        s8 = _mm512_dpbusd_epi32(s8, a, b), s9 = _mm512_dpbusd_epi32(s9, a, b);
        /* Equal sums must not be made one: tell the compiler that they may have changed. */
        __asm__ volatile("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4));
        __asm__ volatile("" : "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9));
    }
    return rounds * 10 * 64;
}

const azq_kernels azq_kernels_avx512vnni = {
    .isa = "avx512vnni",
    .needs = AZQ_CPU_AVX2 | AZQ_CPU_AVX512 | AZQ_CPU_AVX512VNNI,
    .slots = {AZQ_BLOCK_SLOTS,
              AZQ_FAMILY_SEARCH(avx512),
              AZQ_FAMILY_WEIGHTED(avx512),
              AZQ_BF16_SLOTS(avx512),
              AZQ_VEC_SLOTS,
              AZQ_EXP_SLOTS,
              AZQ_ATTEND_SLOTS,
              .stream_read = stream_read,
              .peak_int8 = peak_int8,
              .gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0, [AZQ_TYPE_Q8_0] = gemm_q8_0, [AZQ_TYPE_Q6_K] = gemm_q6_k},
              AZQ_GEMM_TYPES_SLOTS(avx512vnni),
              AZQ_GEMM_FP32_SLOTS(avx512)},
    AZQ_PAIRED_PANELS_512,
};

AZQ_TARGET_END
#endif
