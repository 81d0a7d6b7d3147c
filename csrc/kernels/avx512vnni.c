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
#include "families.h"

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
#define AZQ_TILES_1 8
#define AZQ_TILES_4 4
#include "exp.h"
#include "vec.h"
#include "attend_types.h"

AZQ_INLINE __m512i broadcast4(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, sizeof dword);
    return _mm512_set1_epi32(dword);
}
AZQ_INLINE __m512 load_scales(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* ---- blocks ---------------------------------------------------------------------------------------- */

#include "blocks_512.h"

/* ---- int8 matmul --------------------------------------------------------------------------------- */

/* One block: dots[r * P + p] for R rows and P panels (both constants). The lines of panel p begin at
 * lines + p * panel_bytes. */
AZQ_INLINE void dots_q4_0(const int8_t *q, int64_t q_stride, const uint8_t *lines, int64_t panel_bytes, int R, int P,
                          __m512i *dots) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        __m512i low[2], high[2];
        for (int p = 0; p < P; p++) {
            __m512i w = _mm512_loadu_si512(lines + p * panel_bytes + 64 * i);
            low[p] = _mm512_and_si512(w, mask);
            high[p] = _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
        }
        for (int r = 0; r < R; r++) {
            __m512i a = broadcast4(q + r * q_stride + 8 * i), b = broadcast4(q + r * q_stride + 8 * i + 4);
            for (int p = 0; p < P; p++) {
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], low[p], a);
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], high[p], b);
            }
        }
    }
}

AZQ_INLINE void dots_q8_0(const int8_t *q, int64_t q_stride, const uint8_t *lines, int64_t panel_bytes, int R, int P,
                          __m512i *dots) {
    const __m512i flip = _mm512_set1_epi8(-128);
    for (int i = 0; i < 8; i++) {
        __m512i w[2];
        for (int p = 0; p < P; p++) {
            w[p] = _mm512_xor_si512(_mm512_loadu_si512(lines + p * panel_bytes + 64 * i), flip);
        }
        for (int r = 0; r < R; r++) {
            __m512i a = broadcast4(q + r * q_stride + 4 * i);
            for (int p = 0; p < P; p++) {
                dots[r * P + p] = _mm512_dpbusd_epi32(dots[r * P + p], w[p], a);
            }
        }
    }
}

/* Prefetched ahead by the first pass over a panel, in bytes; later passes find it in a cache. */
enum { MAX_ROWS = 6, AHEAD = 2048 };

#define AZQ_GEMM_512(type, block_bytes, init_factor)                                                             \
    AZQ_INLINE void gemm_##type##_tile(const azq_act *act, int64_t row, int R, const uint8_t *panel,             \
                                       int64_t panel_bytes, int P, int fetch, float *c, int64_t ldc) {           \
        int64_t n_blocks = act->k / 32;                                                                          \
        const int8_t *q = act->q + row * act->k;                                                                 \
        const float *d = act->d + row * n_blocks;                                                                \
        const int32_t *sum8 = act->sum8 + row * n_blocks;                                                        \
        __m512 sums[MAX_ROWS * 2];                                                                               \
        for (int i = 0; i < R * P; i++) {                                                                        \
            sums[i] = _mm512_setzero_ps();                                                                       \
        }                                                                                                        \
        const uint8_t *group = panel;                                                                            \
        for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {                                                      \
            int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;                              \
            const uint8_t *scales = group, *lines = group + in_group * AZQ_PANEL * 2;                            \
            for (int64_t b = 0; b < in_group; b++, lines += (block_bytes), scales += AZQ_PANEL * 2) {            \
                __m512i dots[MAX_ROWS * 2];                                                                      \
                for (int i = 0; i < R * P; i++) {                                                                \
                    dots[i] = _mm512_set1_epi32((init_factor) * sum8[i / P * n_blocks]);                         \
                }                                                                                                \
                if (fetch) {                                                                                     \
                    for (int p = 0; p < P; p++) {                                                                \
                        for (int i = 0; i < (block_bytes); i += 64) {                                            \
                            _mm_prefetch((const char *)(lines + p * panel_bytes + i + AHEAD), _MM_HINT_T0);      \
                        }                                                                                        \
                    }                                                                                            \
                }                                                                                                \
                dots_##type(q, act->k, lines, panel_bytes, R, P, dots);                                          \
                for (int p = 0; p < P; p++) {                                                                    \
                    __m512 dw = load_scales(scales + p * panel_bytes);                                           \
                    for (int r = 0; r < R; r++) {                                                                \
                        __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(d[r * n_blocks]));                       \
                        int i = r * P + p;                                                                       \
                        sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i]), scale, sums[i]);                  \
                    }                                                                                            \
                }                                                                                                \
                q += 32;                                                                                         \
                d++;                                                                                             \
                sum8++;                                                                                          \
            }                                                                                                    \
            group += in_group * (AZQ_PANEL * 2 + (block_bytes));                                                 \
        }                                                                                                        \
        for (int i = 0; i < R * P; i++) {                                                                        \
            _mm512_storeu_ps(c + i / P * ldc + AZQ_PANEL * (i % P), sums[i]);                                    \
        }                                                                                                        \
    }                                                                                                            \
                                                                                                                 \
    AZQ_INLINE void gemm_##type##_rows(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panel,     \
                                       int64_t panel_bytes, int P, float *c, int64_t ldc) {                      \
        for (int64_t r = 0, n; r < rows; r += n) {                                                               \
            int64_t tiles = (rows - r + MAX_ROWS - 1) / MAX_ROWS;                                                \
            n = (rows - r + tiles - 1) / tiles; /* tiles of about equal height: 4 + 4, not 6 + 2 */              \
            float *out = c + r * ldc;                                                                            \
            switch (n) {                                                                                         \
            case 6: gemm_##type##_tile(act, row0 + r, 6, panel, panel_bytes, P, r == 0, out, ldc); break;        \
            case 5: gemm_##type##_tile(act, row0 + r, 5, panel, panel_bytes, P, r == 0, out, ldc); break;        \
            case 4: gemm_##type##_tile(act, row0 + r, 4, panel, panel_bytes, P, r == 0, out, ldc); break;        \
            case 3: gemm_##type##_tile(act, row0 + r, 3, panel, panel_bytes, P, r == 0, out, ldc); break;        \
            case 2: gemm_##type##_tile(act, row0 + r, 2, panel, panel_bytes, P, r == 0, out, ldc); break;        \
            default: gemm_##type##_tile(act, row0 + r, 1, panel, panel_bytes, P, r == 0, out, ldc); break;       \
            }                                                                                                    \
        }                                                                                                        \
    }                                                                                                            \
                                                                                                                 \
    static void gemm_##type(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,               \
                            int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                      \
        int64_t p = 0;                                                                                           \
        for (; p + 2 <= n_panels; p += 2, panels += 2 * panel_bytes, c += 2 * AZQ_PANEL) {                       \
            gemm_##type##_rows(act, row0, rows, panels, panel_bytes, 2, c, ldc);                                 \
        }                                                                                                        \
        if (p < n_panels) {                                                                                      \
            gemm_##type##_rows(act, row0, rows, panels, panel_bytes, 1, c, ldc);                                 \
        }                                                                                                        \
    }
AZQ_GEMM_512(q4_0, 256, 1)
AZQ_GEMM_512(q8_0, 512, 16)

/* Q6_K: like gemm_*_tile with one panel; the block's halves are summed apart and meet with their scales. */
AZQ_INLINE void gemm_q6_k_tile(const azq_act *act, int64_t row, int R, const uint8_t *panel, int fetch, float *c,
                               int64_t ldc) {
    int64_t n_blocks = act->k / 32;
    const int8_t *q = act->q + row * act->k;
    const float *d = act->d + row * n_blocks;
    const int32_t *sum16 = act->sum16 + 2 * row * n_blocks;
    const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(0x30);
    __m512 sums[MAX_ROWS];
    for (int r = 0; r < R; r++) {
        sums[r] = _mm512_setzero_ps();
    }
    const uint8_t *group = panel;
    for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {
        int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;
        const uint8_t *head = group, *lines = group + in_group * 64;
        for (int64_t b = 0; b < in_group; b++, head += 64, lines += 384, q += 32, d++, sum16 += 2) {
            if (fetch) {
                for (int i = 0; i < 384 + 64; i += 64) {
                    _mm_prefetch((const char *)(lines + i + AHEAD), _MM_HINT_T0);
                }
            }
            __m512i dots[2][MAX_ROWS];
            for (int r = 0; r < R; r++) {
                dots[0][r] = _mm512_set1_epi32(-32 * sum16[2 * r * n_blocks]);
                dots[1][r] = _mm512_set1_epi32(-32 * sum16[2 * r * n_blocks + 1]);
            }
            for (int i = 0; i < 4; i++) {
                __m512i w = _mm512_loadu_si512(lines + 64 * i), h = _mm512_loadu_si512(lines + 256 + 64 * (i / 2));
                __m512i first = i % 2 ? h : _mm512_slli_epi16(h, 4);
                __m512i second = i % 2 ? _mm512_srli_epi16(h, 2) : _mm512_slli_epi16(h, 2);
                __m512i low = _mm512_or_si512(_mm512_and_si512(w, nibble), _mm512_and_si512(first, upper));
                __m512i high = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(w, 4), nibble),
                                               _mm512_and_si512(second, upper));
                for (int r = 0; r < R; r++) {
                    const int8_t *a = q + r * act->k + 8 * i;
                    dots[i / 2][r] = _mm512_dpbusd_epi32(dots[i / 2][r], low, broadcast4(a));
                    dots[i / 2][r] = _mm512_dpbusd_epi32(dots[i / 2][r], high, broadcast4(a + 4));
                }
            }
            __m512 dw = load_scales(head);
            __m512 s0 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(head + 32))));
            __m512 s1 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(head + 48))));
            for (int r = 0; r < R; r++) { /* whole numbers below 2^24: exact */
                __m512 dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[1][r]), s1,
                                             _mm512_mul_ps(_mm512_cvtepi32_ps(dots[0][r]), s0));
                sums[r] = _mm512_fmadd_ps(dot, _mm512_mul_ps(dw, _mm512_set1_ps(d[r * n_blocks])), sums[r]);
            }
        }
        group += in_group * (64 + 384);
    }
    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(c + r * ldc, sums[r]);
    }
}

static void gemm_q6_k(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels, int64_t panel_bytes,
                      int64_t n_panels, float *c, int64_t ldc) {
    for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes, c += AZQ_PANEL) {
        for (int64_t r = 0, n; r < rows; r += n) {
            n = rows - r >= MAX_ROWS ? MAX_ROWS : rows - r >= 3 ? 3 : 1;
            switch (n) {
            case MAX_ROWS: gemm_q6_k_tile(act, row0 + r, MAX_ROWS, panels, r == 0, c + r * ldc, ldc); break;
            case 3: gemm_q6_k_tile(act, row0 + r, 3, panels, r == 0, c + r * ldc, ldc); break;
            default: gemm_q6_k_tile(act, row0 + r, 1, panels, r == 0, c + r * ldc, ldc); break;
            }
        }
    }
}

/* ---- measuring ----------------------------------------------------------------------------------- */

static uint64_t stream_read(const void *lines, int64_t n) {
    const uint8_t *x = lines;
    __m512i s0 = _mm512_setzero_si512(), s1 = s0;
    int64_t i = 0;
    for (; i + 2 <= n; i += 2, x += 128) {
        _mm_prefetch((const char *)x + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)x + AHEAD + 64, _MM_HINT_T0);
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
              AZQ_VEC_SLOTS,
              AZQ_EXP_SLOTS,
              AZQ_ATTEND_SLOTS,
              .stream_read = stream_read,
              .peak_int8 = peak_int8,
              .gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0, [AZQ_TYPE_Q8_0] = gemm_q8_0, [AZQ_TYPE_Q6_K] = gemm_q6_k}},
};

AZQ_TARGET_END
#endif
