/* AVX2 + FMA + F16C.
 *
 * The int8 dot: weights are unsigned nibbles u = q + 8, activations signed a in [-127, 127].
 *   sum (u - 8) a = sum u a - 8 sum a
 * vpmaddubsw makes u a + u' a' in 16 bits (|.| <= 2 * 15 * 127 = 3810). One 16-bit lane takes 8 of them per
 * block; started at -8 sum a of its own 16 elements it never leaves [-16256, 16256], so the whole block is
 * summed in 16 bits and widened once by vpmaddwd. Q8_0 weights are signed: vpmaddubsw(|w|, sign(a, w)) is at
 * most 2 * 128 * 127 = 32512, which fits too, but only one product deep. */
#include "../azq_target.h"
#if AZQ_X86
#include <assert.h>
#include <immintrin.h>
#include "../azq_half.h"
#include "../azq_kernels.h"
#include "../cpu.h"
#include "bf16.h"
#include "families.h"
#include "gemm_types.h"

AZQ_TARGET_BEGIN("avx2,fma,f16c")

#include "vec_types.h"

typedef __m256 vf;
#define LANES 8
#define V_ZERO _mm256_setzero_ps()
#define v_set(x) _mm256_set1_ps(x)
#define v_load(p) _mm256_loadu_ps(p)
#define v_store(p, v) _mm256_storeu_ps(p, v)
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define v_mul(a, b) _mm256_mul_ps(a, b)
#define v_add(a, b) _mm256_add_ps(a, b)
#define v_div(a, b) _mm256_div_ps(a, b)
#define v_sub(a, b) _mm256_sub_ps(a, b)
#define v_max(a, b) _mm256_max_ps(a, b)
#define v_min(a, b) _mm256_min_ps(a, b)
AZQ_INLINE vf v_scale(vf p, vf n) {
    __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
    return _mm256_blendv_ps(_mm256_castsi256_ps(scaled), p, _mm256_cmp_ps(n, n, _CMP_UNORD_Q));
}
#define v_below(x, limit, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, limit, _CMP_LT_OQ))
#define v_load_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define v_set_f16(h) _mm256_cvtph_ps(_mm_set1_epi16((short)(h)))
#define v_load_i8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p))))
#define AZQ_TILES_1 4
#define AZQ_TILES_4 1
#define AZQ_CHAINS 1
#include "exp.h"
#include "vec.h"
#include "attend_types.h"

#include "blocks_256.h"

/* ---- int8 matmul --------------------------------------------------------------------------------- */

static void quantize_act(const float *x, int64_t k, int8_t *q, float *d, int32_t *sum8, int32_t *sum8_pair,
                         int32_t *sum16) {
    /* Within each 8 bytes: order 0,4,1,5,2,6,3,7 (azq_lane_order). */
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    for (int64_t b = 0; b < k / 32; b++, x += 32, q += 32) {
        __m256 v[4];
        __m256 most = _mm256_setzero_ps(), finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
        for (int i = 0; i < 4; i++) {
            v[i] = loadf(x + 8 * i);
            __m256 magnitude = abs8(v[i]);
            finite = _mm256_and_ps(finite, _mm256_cmp_ps(magnitude, _mm256_set1_ps(INFINITY), _CMP_LT_OQ));
            most = _mm256_max_ps(magnitude, most);
        }
        float amax = max_lane(most);
        float inverse = 127.0f / amax;
        int all_finite = _mm256_movemask_ps(finite) == 0xff;
        __m256i bytes = _mm256_setzero_si256();
        if (all_finite && inverse < INFINITY) {
            __m256i i32[4];
            for (int i = 0; i < 4; i++) {
                i32[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)));
            }
            /* Rounding can reach 127 but never 128: amax * (127 / amax) is within an ulp of 127. */
            bytes = _mm256_shuffle_epi8(pack_bytes(i32[0], i32[1], i32[2], i32[3]), order);
        }
        _mm256_storeu_si256((__m256i *)q, bytes);
        d[b] = all_finite ? amax / 127.0f : azq_from_bits(0x7fc00000u);
        /* Two signed bytes to 16 bits, the eight dwords added; then -8 times each half. */
        __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        /* The halves of the block are the halves of the register: sixteen 16-bit pairs, eight and eight. */
        __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        quads = _mm256_add_epi32(quads, _mm256_shuffle_epi32(quads, 0x4e));
        quads = _mm256_add_epi32(quads, _mm256_shuffle_epi32(quads, 0xb1));
        sum16[2 * b] = _mm_cvtsi128_si32(_mm256_castsi256_si128(quads));
        sum16[2 * b + 1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(quads, 1));
        __m128i p = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        p = _mm_add_epi16(p, _mm_shuffle_epi32(p, 0x4e));
        p = _mm_add_epi16(p, _mm_shuffle_epi32(p, 0xb1));
        p = _mm_mullo_epi16(p, _mm_set1_epi16(-8));
        sum8_pair[b] = _mm_cvtsi128_si32(p);
        sum8[b] = _mm_cvtsi128_si32(_mm_madd_epi16(p, _mm_set1_epi16(1)));
    }
}

#include "gemm_256.h"

/* Tells the compiler to add now. Left alone it reorders the sums and keeps all products of a block, in memory. */
#define AZQ_PIN(v) __asm__("" : "+x"(v))

AZQ_INLINE void block_q4_0(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines, int R,
                           __m256 *sums) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    int64_t n_blocks = act->k / 32;
    __m256i dots[2 * MAX_ROWS];
    for (int i = 0; i < 2 * R; i++) {
        dots[i] = _mm256_set1_epi32(act->sum8_pair[at + i / 2 * n_blocks]);
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
                dots[2 * r + h] = _mm256_add_epi16(dots[2 * r + h], _mm256_maddubs_epi16(low[h], a));
                AZQ_PIN(dots[2 * r + h]);
                dots[2 * r + h] = _mm256_add_epi16(dots[2 * r + h], _mm256_maddubs_epi16(high[h], b));
                AZQ_PIN(dots[2 * r + h]);
            }
        }
    }
    __m256 products[2 * MAX_ROWS];
    for (int i = 0; i < 2 * R; i++) {
        products[i] = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[i], ones));
    }
    add_scaled(act, at, head, R, products, sums);
}
AZQ_GEMM_256(q4_0, 32, 256)

AZQ_INLINE void block_q8_0(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines, int R,
                           __m256 *sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i dots[2 * MAX_ROWS];
    for (int i = 0; i < 2 * R; i++) {
        dots[i] = _mm256_setzero_si256();
    }
    for (int i = 0; i < 8; i++) {
        for (int h = 0; h < 2; h++) {
            __m256i w = loadi(lines + 64 * i + 32 * h), magnitude = _mm256_abs_epi8(w);
            for (int r = 0; r < R; r++) {
                __m256i a = _mm256_sign_epi8(broadcast4(act->q + 32 * at + r * act->k + 4 * i), w);
                __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, a), ones);
                dots[2 * r + h] = _mm256_add_epi32(dots[2 * r + h], pairs);
                AZQ_PIN(dots[2 * r + h]);
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

/* u = q + 32 is below 64, so two vpmaddubsw add up in 16 bits (4 * 63 * 127 = 32004) and no more. */
AZQ_INLINE __m256i dot_pair(__m256i sum, __m256i low, __m256i a, __m256i high, __m256i b) {
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, a), _mm256_maddubs_epi16(high, b));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#include "q6_k_256.h"
AZQ_GEMM_256(q6_k, 64, 384)

#include "dense_256.h"

/* `from`: rows for which unpacking apart pays, measured on Zen 3. */
#define AZQ_FEW_OR_MANY(name, type, head_bytes, line_bytes, from)                                                \
    static void gemm_##name##_any(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,         \
                                  int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                \
        if (rows < (from) || act->k == 0) {                                                                      \
            gemm_##name(act, row0, rows, panels, panel_bytes, n_panels, c, ldc);                                 \
            return;                                                                                              \
        }                                                                                                        \
        for (int64_t r = 0, n; r < rows; r += n) {                                                               \
            n = rows - r < DENSE_ROWS ? rows - r : DENSE_ROWS;                                                   \
            dense_panels(type, head_bytes, line_bytes, act, row0 + r, n, panels, panel_bytes, n_panels,          \
                         c + r * ldc, ldc);                                                                      \
        }                                                                                                        \
    }
AZQ_FEW_OR_MANY(q4_0, AZQ_TYPE_Q4_0, 32, 256, 24)
AZQ_FEW_OR_MANY(q6_k, AZQ_TYPE_Q6_K, 64, 384, 4)

/* ---- measuring ----------------------------------------------------------------------------------- */

static uint64_t stream_read(const void *lines, int64_t n) {
    const uint8_t *x = lines;
    __m256i s0 = _mm256_setzero_si256(), s1 = s0;
    for (int64_t i = 0; i < n; i++, x += 64) {
        s0 = _mm256_xor_si256(s0, loadi(x));
        s1 = _mm256_xor_si256(s1, loadi(x + 32));
    }
    uint64_t s[4];
    _mm256_storeu_si256((__m256i *)s, _mm256_xor_si256(s0, s1));
    return s[0] ^ s[1] ^ s[2] ^ s[3];
}

/* vpmaddubsw and vpaddw: 32 multiply-adds a pair, eight independent sums. */
static int64_t peak_int8(int64_t rounds) {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    __m256i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a;
    for (int64_t r = 0; r < rounds; r++) {
#define AZQ_STEP(s)                                                                                 \
    __asm__ volatile("" : "+x"(a)); /* a product of its own for every sum */                        \
    s = _mm256_add_epi16(s, _mm256_maddubs_epi16(a, b));
        AZQ_STEP(s0) AZQ_STEP(s1) AZQ_STEP(s2) AZQ_STEP(s3) AZQ_STEP(s4) AZQ_STEP(s5) AZQ_STEP(s6) AZQ_STEP(s7)
#undef AZQ_STEP
    }
    __asm__ volatile("" : : "x"(s0), "x"(s1), "x"(s2), "x"(s3), "x"(s4), "x"(s5), "x"(s6), "x"(s7));
    return rounds * 8 * 32;
}

const azq_kernels azq_kernels_avx2 = {
    .isa = "avx2",
    .needs = AZQ_CPU_AVX2,
    .slots =
        {
            .quantize_row = {[AZQ_TYPE_F16] = quantize_f16,
                             [AZQ_TYPE_BF16] = quantize_bf16,
                             [AZQ_TYPE_Q4_0] = quantize_q4_0,
                             [AZQ_TYPE_Q8_0] = quantize_q8_0},
            .quantize_checked_row = {[AZQ_TYPE_F16] = quantize_checked_f16,
                                     [AZQ_TYPE_BF16] = quantize_checked_bf16,
                                     [AZQ_TYPE_Q4_0] = quantize_checked_q4_0,
                                     [AZQ_TYPE_Q8_0] = quantize_checked_q8_0},
            .dequantize_row = {[AZQ_TYPE_F16] = dequantize_f16,
                               [AZQ_TYPE_BF16] = dequantize_bf16,
                               [AZQ_TYPE_Q4_0] = dequantize_q4_0,
                               [AZQ_TYPE_Q8_0] = dequantize_q8_0},
            AZQ_FAMILY_SLOTS(avx2),
            .find_bad = find_bad,
            .quantize_act = quantize_act,
            .gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0_any, [AZQ_TYPE_Q8_0] = gemm_q8_0, [AZQ_TYPE_Q6_K] = gemm_q6_k_any},
            AZQ_GEMM_TYPES_SLOTS(avx2),
            AZQ_GEMM_FP32_SLOTS(avx2),
            .stream_read = stream_read,
            .peak_int8 = peak_int8,
            AZQ_BF16_SLOTS(avx2),
            AZQ_VEC_SLOTS,
            AZQ_EXP_SLOTS,
            AZQ_ATTEND_SLOTS,
        },
};

AZQ_TARGET_END
#endif
