/* AVX512-BF16: vdpbf16ps adds the two products of a pair of k to each of 16 columns.
 *
 * A tile's line (k, k + 1 of 16 columns) is one operand, a broadcast pair of activations the other; 8 rows x 2
 * panels of sums stay in registers, 16 instructions for 2 loads and 8 broadcasts.
 *
 * Dequantizing a line of a packed block: each word, widened to 32 bits, is the index of a table of 16 floats
 * (vpermps reads four bits of it), times the column's scale; vcvtne2ps2bf16 puts two halves of a line together. */
#include "../azq_target.h"
#if AZQ_X86
#include <immintrin.h>
#include <string.h>
#include "../cpu.h"
#include "bf16.h"

AZQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")

#include "vec_types.h"

/* ---- rounding ------------------------------------------------------------------------------------ */

AZQ_INLINE void store_pair(uint16_t *to, __m512 low, __m512 high) {
    __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    memcpy(to, &rounded, sizeof rounded);
}

static void round_bf16(const float *x, int64_t ldx, int64_t rows, int64_t k, uint16_t *tiles) {
    for (int64_t first = 0; first < k; first += AZQ_TILE_K) {
        int64_t n = k - first < AZQ_TILE_K ? k - first : AZQ_TILE_K;
        uint32_t mask = n == AZQ_TILE_K ? UINT32_MAX : (UINT32_C(1) << n) - 1;
        for (int64_t r = 0; r < AZQ_TILE_ROWS; r++, tiles += AZQ_TILE_K) {
            if (r >= rows) {
                memset(tiles, 0, AZQ_TILE_K * sizeof *tiles);
                continue;
            }
            const float *row = x + r * ldx + first;
            store_pair(tiles, _mm512_maskz_loadu_ps((__mmask16)mask, row),
                       mask >> 16 ? _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), row + 16) : _mm512_setzero_ps());
        }
    }
}

/* ---- dequantizing -------------------------------------------------------------------------------- */

/* Scales of columns 0..7 and 8..15, each twice: one for either word of a dword. */
typedef struct {
    __m512 low, high;
} twice;

AZQ_INLINE twice each_twice(__m512 scales) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return (twice){_mm512_permutexvar_ps(first, scales),
                   _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), scales)};
}

AZQ_INLINE __m512 load_halves(const uint8_t *head) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)head));
}

AZQ_INLINE void block_q4_0(const uint8_t *head, const uint8_t *lines, uint16_t *tile) {
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    twice d = each_twice(load_halves(head));
    for (int i = 0; i < 4; i++, lines += 64) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)lines));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(lines + 32)));
        for (int s = 0; s < 4; s++, tile += 2 * AZQ_PANEL) {
            __m512 a = _mm512_permutexvar_ps(_mm512_srli_epi32(low, 4 * s), table);
            __m512 b = _mm512_permutexvar_ps(_mm512_srli_epi32(high, 4 * s), table);
            store_pair(tile, _mm512_mul_ps(a, d.low), _mm512_mul_ps(b, d.high));
        }
    }
}

/* The two lines of tile that operand o's signed bytes make: its low bytes and its high ones. */
AZQ_INLINE void operand_lines(__m512i operand, int o, twice d, uint16_t *tile) {
    __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(operand));
    __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(operand, 1));
    uint16_t *to = tile + (4 * (o / 2) + o % 2) * 2 * AZQ_PANEL;
    __m512 a = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(low, 24), 24));
    __m512 b = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(high, 24), 24));
    store_pair(to, _mm512_mul_ps(a, d.low), _mm512_mul_ps(b, d.high));
    a = _mm512_cvtepi32_ps(_mm512_srai_epi32(low, 8));
    b = _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 8));
    store_pair(to + 4 * AZQ_PANEL, _mm512_mul_ps(a, d.low), _mm512_mul_ps(b, d.high));
}

AZQ_INLINE void block_q8_0(const uint8_t *head, const uint8_t *lines, uint16_t *tile) {
    twice d = each_twice(load_halves(head));
    for (int o = 0; o < 8; o++) {
        operand_lines(_mm512_loadu_si512(lines + 64 * o), o, d, tile);
    }
}

AZQ_INLINE __m512 load_bytes(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

AZQ_INLINE void block_q6_k(const uint8_t *head, const uint8_t *lines, uint16_t *tile) {
    const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(0x30), offset = _mm512_set1_epi8(32);
    __m512 d = load_halves(head);
    twice scales[2] = {each_twice(_mm512_mul_ps(d, load_bytes(head + 32))),
                       each_twice(_mm512_mul_ps(d, load_bytes(head + 48)))};
    for (int i = 0; i < 4; i++) {
        __m512i w = _mm512_loadu_si512(lines + 64 * i), h = _mm512_loadu_si512(lines + 256 + 64 * (i / 2));
        __m512i first = i % 2 ? h : _mm512_slli_epi16(h, 4);
        __m512i second = i % 2 ? _mm512_srli_epi16(h, 2) : _mm512_slli_epi16(h, 2);
        __m512i even = _mm512_or_si512(_mm512_and_si512(w, nibble), _mm512_and_si512(first, upper));
        __m512i odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(w, 4), nibble), _mm512_and_si512(second, upper));
        operand_lines(_mm512_sub_epi8(even, offset), 2 * i, scales[i / 2], tile);
        operand_lines(_mm512_sub_epi8(odd, offset), 2 * i + 1, scales[i / 2], tile);
    }
}

static AZQ_DEQUANTIZE_BF16(dequantize_bf16_q4_0, q4_0, 32, 256)
static AZQ_DEQUANTIZE_BF16(dequantize_bf16_q8_0, q8_0, 32, 512)
static AZQ_DEQUANTIZE_BF16(dequantize_bf16_q6_k, q6_k, 64, 384)

/* ---- products ------------------------------------------------------------------------------------ */

AZQ_INLINE __m512bh load_line(const uint16_t *p) {
    __m512bh line;
    memcpy(&line, p, sizeof line);
    return line;
}

AZQ_INLINE __m512bh broadcast_pair(const uint16_t *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

enum { MAX_ROWS = 8, C_TILE = AZQ_TILE_ROWS * AZQ_PANEL };

/* R rows of one row tile times P panels (both constants); ahead: how much further the rows lie that come next. */
AZQ_INLINE void gemm_tile(const uint16_t *a, int64_t ahead, int R, const uint16_t *b, int64_t b_stride, int P,
                          int64_t n_tiles, float *c, int first) {
    __m512 sums[MAX_ROWS * 2];
    for (int i = 0; i < R * P; i++) {
        sums[i] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i % P * C_TILE + i / P * AZQ_PANEL);
    }
    for (int64_t t = 0; t < n_tiles; t++, a += AZQ_TILE, b += AZQ_TILE) {
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(a + ahead + r * AZQ_TILE_K);
        }
        for (int i = 0; i < AZQ_TILE_K / 2; i++) {
            __m512bh weights[2];
            for (int p = 0; p < P; p++) {
                weights[p] = load_line(b + p * b_stride + i * 2 * AZQ_PANEL);
            }
            for (int r = 0; r < R; r++) {
                __m512bh pair = broadcast_pair(a + r * AZQ_TILE_K + 2 * i);
                for (int p = 0; p < P; p++) {
                    sums[r * P + p] = _mm512_dpbf16_ps(sums[r * P + p], weights[p], pair);
                }
            }
        }
    }
    for (int i = 0; i < R * P; i++) {
        _mm512_storeu_ps(c + i % P * C_TILE + i / P * AZQ_PANEL, sums[i]);
    }
}

AZQ_INLINE void gemm_rows(const uint16_t *a, int64_t a_stride, int64_t rows, const uint16_t *b, int64_t b_stride, int P,
                          int64_t n_tiles, float *c, int64_t c_stride, int first) {
    for (int64_t r = 0, n; r < rows; r += n) {
        int64_t within = r % AZQ_TILE_ROWS;
        const uint16_t *in = a + r / AZQ_TILE_ROWS * a_stride + within * AZQ_TILE_K;
        float *out = c + r / AZQ_TILE_ROWS * c_stride + within * AZQ_PANEL;
        int64_t ahead = within ? a_stride - within * AZQ_TILE_K : MAX_ROWS * AZQ_TILE_K;
        n = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
        switch (n) {
        case 8: gemm_tile(in, ahead, 8, b, b_stride, P, n_tiles, out, first); break;
        case 7: gemm_tile(in, ahead, 7, b, b_stride, P, n_tiles, out, first); break;
        case 6: gemm_tile(in, ahead, 6, b, b_stride, P, n_tiles, out, first); break;
        case 5: gemm_tile(in, ahead, 5, b, b_stride, P, n_tiles, out, first); break;
        case 4: gemm_tile(in, ahead, 4, b, b_stride, P, n_tiles, out, first); break;
        case 3: gemm_tile(in, ahead, 3, b, b_stride, P, n_tiles, out, first); break;
        case 2: gemm_tile(in, ahead, 2, b, b_stride, P, n_tiles, out, first); break;
        default: gemm_tile(in, ahead, 1, b, b_stride, P, n_tiles, out, first); break;
        }
    }
}

static void gemm_bf16(const uint16_t *a, int64_t a_stride, int64_t rows, const uint16_t *b, int64_t b_stride,
                      int64_t n_panels, int64_t n_tiles, float *c, int64_t c_stride, int first) {
    if (n_panels == 2) {
        gemm_rows(a, a_stride, rows, b, b_stride, 2, n_tiles, c, c_stride, first);
    } else {
        gemm_rows(a, a_stride, rows, b, b_stride, 1, n_tiles, c, c_stride, first);
    }
}

/* ---- measuring ----------------------------------------------------------------------------------- */

/* 32 multiply-adds an instruction, 16 independent sums. */
static int64_t peak_bf16(int64_t rounds) {
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3f00);
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    __m512 s8 = s0, s9 = s0, s10 = s0, s11 = s0, s12 = s0, s13 = s0, s14 = s0, s15 = s0;
    for (int64_t r = 0; r < rounds; r++) {
        s0 = _mm512_dpbf16_ps(s0, a, b), s1 = _mm512_dpbf16_ps(s1, a, b);
        s2 = _mm512_dpbf16_ps(s2, a, b), s3 = _mm512_dpbf16_ps(s3, a, b);
        s4 = _mm512_dpbf16_ps(s4, a, b), s5 = _mm512_dpbf16_ps(s5, a, b);
        s6 = _mm512_dpbf16_ps(s6, a, b), s7 = _mm512_dpbf16_ps(s7, a, b);
        s8 = _mm512_dpbf16_ps(s8, a, b), s9 = _mm512_dpbf16_ps(s9, a, b);
        s10 = _mm512_dpbf16_ps(s10, a, b), s11 = _mm512_dpbf16_ps(s11, a, b);
        s12 = _mm512_dpbf16_ps(s12, a, b), s13 = _mm512_dpbf16_ps(s13, a, b);
        s14 = _mm512_dpbf16_ps(s14, a, b), s15 = _mm512_dpbf16_ps(s15, a, b);
        /* Equal sums must not be made one: tell the compiler that they may have changed. */
        __asm__ volatile("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7));
        __asm__ volatile("" : "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11), "+v"(s12), "+v"(s13), "+v"(s14), "+v"(s15));
    }
    return rounds * 16 * 32;
}

const azq_kernels azq_kernels_avx512bf16 = {
    .isa = "avx512bf16",
    .needs = AZQ_CPU_AVX2 | AZQ_CPU_AVX512 | AZQ_CPU_AVX512VNNI | AZQ_CPU_AVX512BF16,
    .slots = {.round_bf16 = round_bf16,
              .dequantize_bf16 = {[AZQ_TYPE_Q4_0] = dequantize_bf16_q4_0,
                                  [AZQ_TYPE_Q8_0] = dequantize_bf16_q8_0,
                                  [AZQ_TYPE_Q6_K] = dequantize_bf16_q6_k},
              .gemm_bf16 = gemm_bf16,
              .peak_bf16 = peak_bf16},
    /* Weights that are bf16 already; fp32 takes six times as long for many rows. Int8 stays faster than bf16. */
    .bf16_rows = {[AZQ_TYPE_BF16] = 8},
    AZQ_PAIRED_PANELS_512,
};

AZQ_TARGET_END
#endif
