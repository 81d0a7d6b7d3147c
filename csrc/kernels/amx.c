/* AMX-BF16: tdpbf16ps multiplies a tile of activations (16 rows, 32 of k) by one of weights (16 pairs of k, 16
 * columns) and adds to a tile of sums. 2 x 2 tiles of sums stay in tile registers over a whole call: 4 loads for 4
 * products, which hides the loads.
 *
 * The instructions are written as assembly here: GCC 12's intrinsics tell the compiler neither that ldtilecfg
 * reads 64 bytes nor that tileloadd reads memory at all, so that it may drop or move the stores before them. */
#include "../azq_target.h"
#if AZQ_X86
#include "../cpu.h"
#include "bf16.h"

/* Every tile register whole: 16 rows of 64 bytes. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "as ldtilecfg reads it");

static const _Alignas(64) tile_config whole_tiles = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

/* Rows of a tile are 64 bytes apart in memory, always. The tile numbers are part of the instruction. */
enum { TILE_STRIDE = 64 };
#define tile_load(tile, from)                                                                                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)TILE_STRIDE) : "memory")
#define tile_store(tile, to)                                                                                  \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)TILE_STRIDE) : "memory")
#define tile_zero(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
/* sums += activations * weights. AT&T order: weights, activations, sums. */
#define tile_multiply(sums, activations, weights) \
    __asm__ volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #activations ", %%tmm" #sums ::)

static void bf16_begin(void) { __asm__ volatile("ldtilecfg %0" ::"m"(whole_tiles) : "memory"); }
static void bf16_end(void) { __asm__ volatile("tilerelease" ::: "memory"); }

/* ---- products ------------------------------------------------------------------------------------ */

enum { C_TILE = AZQ_TILE_ROWS * AZQ_PANEL };

static void tiles_2x2(const uint16_t *a, int64_t a_stride, const uint16_t *b, int64_t b_stride, int64_t n_tiles,
                      float *c, int64_t c_stride, int first) {
    if (first) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, c);
        tile_load(1, c + C_TILE);
        tile_load(2, c + c_stride);
        tile_load(3, c + c_stride + C_TILE);
    }
    for (int64_t t = 0; t < n_tiles; t++, a += AZQ_TILE, b += AZQ_TILE) {
        tile_load(6, b);
        tile_load(4, a);
        tile_load(7, b + b_stride);
        tile_multiply(0, 4, 6);
        tile_load(5, a + a_stride);
        tile_multiply(1, 4, 7);
        tile_multiply(2, 5, 6);
        tile_multiply(3, 5, 7);
    }
    tile_store(0, c);
    tile_store(1, c + C_TILE);
    tile_store(2, c + c_stride);
    tile_store(3, c + c_stride + C_TILE);
}

/* One row tile times 2 panels, or 2 row tiles times one panel. */
static void tiles_1x2(const uint16_t *a, const uint16_t *b, int64_t b_stride, int64_t n_tiles, float *c, int first) {
    if (first) {
        tile_zero(0);
        tile_zero(1);
    } else {
        tile_load(0, c);
        tile_load(1, c + C_TILE);
    }
    for (int64_t t = 0; t < n_tiles; t++, a += AZQ_TILE, b += AZQ_TILE) {
        tile_load(4, a);
        tile_load(6, b);
        tile_multiply(0, 4, 6);
        tile_load(7, b + b_stride);
        tile_multiply(1, 4, 7);
    }
    tile_store(0, c);
    tile_store(1, c + C_TILE);
}

static void tiles_2x1(const uint16_t *a, int64_t a_stride, const uint16_t *b, int64_t n_tiles, float *c,
                      int64_t c_stride, int first) {
    if (first) {
        tile_zero(0);
        tile_zero(2);
    } else {
        tile_load(0, c);
        tile_load(2, c + c_stride);
    }
    for (int64_t t = 0; t < n_tiles; t++, a += AZQ_TILE, b += AZQ_TILE) {
        tile_load(6, b);
        tile_load(4, a);
        tile_multiply(0, 4, 6);
        tile_load(5, a + a_stride);
        tile_multiply(2, 5, 6);
    }
    tile_store(0, c);
    tile_store(2, c + c_stride);
}

static void tiles_1x1(const uint16_t *a, const uint16_t *b, int64_t n_tiles, float *c, int first) {
    if (first) {
        tile_zero(0);
    } else {
        tile_load(0, c);
    }
    for (int64_t t = 0; t < n_tiles; t++, a += AZQ_TILE, b += AZQ_TILE) {
        tile_load(4, a);
        tile_load(6, b);
        tile_multiply(0, 4, 6);
    }
    tile_store(0, c);
}

static void gemm_bf16(const uint16_t *a, int64_t a_stride, int64_t rows, const uint16_t *b, int64_t b_stride,
                      int64_t n_panels, int64_t n_tiles, float *c, int64_t c_stride, int first) {
    for (int64_t r = 0; r < rows; r += 2 * AZQ_TILE_ROWS, a += 2 * a_stride, c += 2 * c_stride) {
        int two_rows = rows - r > AZQ_TILE_ROWS;
        if (two_rows && n_panels == 2) {
            tiles_2x2(a, a_stride, b, b_stride, n_tiles, c, c_stride, first);
        } else if (two_rows) {
            tiles_2x1(a, a_stride, b, n_tiles, c, c_stride, first);
        } else if (n_panels == 2) {
            tiles_1x2(a, b, b_stride, n_tiles, c, first);
        } else {
            tiles_1x1(a, b, n_tiles, c, first);
        }
    }
}

/* ---- measuring ----------------------------------------------------------------------------------- */

/* The loop of tiles_2x2, its four operands in the first-level cache. */
static int64_t peak_bf16(int64_t rounds) {
    static _Alignas(64) const uint16_t operands[4][AZQ_TILE];
    bf16_begin();
    for (int64_t r = 0; r < rounds; r++) {
        tile_load(6, operands[2]);
        tile_load(4, operands[0]);
        tile_load(7, operands[3]);
        tile_multiply(0, 4, 6);
        tile_load(5, operands[1]);
        tile_multiply(1, 4, 7);
        tile_multiply(2, 5, 6);
        tile_multiply(3, 5, 7);
    }
    bf16_end();
    return rounds * 4 * AZQ_TILE_ROWS * AZQ_PANEL * AZQ_TILE_K;
}

const azq_kernels azq_kernels_amx = {
    .isa = "amx",
    .needs = AZQ_CPU_AVX2 | AZQ_CPU_AVX512 | AZQ_CPU_AVX512VNNI | AZQ_CPU_AVX512BF16 | AZQ_CPU_AMXBF16,
    .slots = {.gemm_bf16 = gemm_bf16, .bf16_begin = bf16_begin, .bf16_end = bf16_end, .peak_bf16 = peak_bf16},
    /* Where int8 by VNNI is overtaken, reckoned: 16 x 32 weights cost VNNI some 7 cycles a row, AMX about 85 to
     * dequantize and 16 for every 16 rows, so 14 rows; some 400 where rows are dequantized to fp32 first. To be
     * measured by benchmarks/choose_compute.py. F32 and F16 weights would lose bits, so never. */
    .bf16_rows = {[AZQ_TYPE_Q4_0] = 16,
                  [AZQ_TYPE_Q8_0] = 16,
                  [AZQ_TYPE_Q6_K] = 16,
                  [AZQ_TYPE_BF16] = 8,
                  [AZQ_TYPE_Q4_1] = 64,
                  [AZQ_TYPE_Q5_0] = 64,
                  [AZQ_TYPE_Q5_1] = 64,
                  [AZQ_TYPE_Q2_K] = 64,
                  [AZQ_TYPE_Q3_K] = 64,
                  [AZQ_TYPE_Q4_K] = 64,
                  [AZQ_TYPE_Q5_K] = 64,
                  [AZQ_TYPE_IQ4_NL] = 64,
                  [AZQ_TYPE_IQ4_XS] = 64,
                  [AZQ_TYPE_MXFP4] = 64},
    AZQ_PAIRED_PANELS_512,
};
#endif
