/* bf16: tiles are the same on every ISA; products are within fp32 rounding of exact sums, a row's own business, and
 * without bf16 instructions the definition's bits. AMX is checked on any x86-64 Linux machine: where the processor
 * lacks it, amx_emulator.c carries out the kernel's instructions. */
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "amx.h"
#include "amx_emulator.h"
#include "azq_half.h"
#include "azq_target.h"
#include "cpu.h"
#include "matrix.h"

/* ---- kernels of a machine that this one is not ---------------------------------------------------- */

/* The linker hands every call of azq_active from other files to this one (see the Makefile). */
static const azq_kernel_slots *borrowed;
const azq_kernel_slots *__real_azq_active(void);
const azq_kernel_slots *__wrap_azq_active(void);
const azq_kernel_slots *__wrap_azq_active(void) { return borrowed ? borrowed : __real_azq_active(); }

/* ---- rounding ------------------------------------------------------------------------------------ */

static uint16_t rounded(float x) {
    uint16_t half = azq_f32_to_bf16(x);
    return fabsf(x) < 0x1p-126f ? (uint16_t)(half & 0x8000) : half;
}

static void check_round(const azq_kernel_slots *slots, int rounds) {
    random_state r = {300};
    for (int round = 0; round < rounds * 40; round++) {
        int64_t rows = random_below(&r, 17), k = random_below(&r, 130), offset = random_below(&r, 16);
        int64_t ldx = k + random_below(&r, 5), tiles = (k + 31) / 32;
        for (int pattern = 0; pattern < PATTERNS; pattern++) {
            int64_t n = rows ? (rows - 1) * ldx + k : 0;
            float *x = input_new(n, sizeof *x, offset);
            fill(&r, pattern, x, n);
            guarded got = guarded_new((size_t)(tiles * AZQ_TILE) * 2, 0);
            slots->round_bf16(x, ldx, rows, k, (uint16_t *)(void *)got.data);
            const uint16_t *tile = (const uint16_t *)(void *)got.data;
            int equal = 1;
            for (int64_t i = 0; i < tiles * AZQ_TILE; i++) {
                int64_t row = i % AZQ_TILE / 32, at = i / AZQ_TILE * 32 + i % 32;
                equal &= tile[i] == (row < rows && at < k ? rounded(x[row * ldx + at]) : 0);
            }
            expect(equal, "rows %d, k %d, pattern %d: not rounded to nearest even", (int)rows, (int)k, pattern);
            expect(guarded_intact(&got), "rows %d, k %d: wrote outside", (int)rows, (int)k);
            guarded_free(&got);
            input_free(x, sizeof *x, offset);
        }
    }
    DRIVES(round_bf16);
}

/* ---- dequantizing -------------------------------------------------------------------------------- */

/* Any bytes: the tiles hold what the dequantizer of rows makes of the blocks, rounded. */
static void check_dequantize(const azq_kernel_slots *slots, int type, int rounds) {
    random_state r = {(uint64_t)type + 400};
    int64_t elements = block_elements(type);
    for (int round = 0; round < rounds * 6; round++) {
        int64_t k = (1 + random_below(&r, 6)) * (elements > 32 ? elements : 32), n_tiles = k / 32;
        int64_t row_bytes = azq_row_bytes(type, k);
        uint8_t *blocks = input_new(AZQ_PANEL * row_bytes, 1, 0);
        for (int64_t i = 0; i < AZQ_PANEL * row_bytes; i++) {
            blocks[i] = (uint8_t)random_next(&r);
        }
        azq_matrix *w;
        expect(azq_matrix_create(type, blocks, AZQ_PANEL, k, &w) == AZQ_OK && azq_matrix_pack(w) == AZQ_OK, "pack");
        guarded got = guarded_new((size_t)(n_tiles * AZQ_TILE) * 2, 0);
        slots->dequantize_bf16[type](w->packed, n_tiles, (uint16_t *)(void *)got.data);
        const uint16_t *tiles = (const uint16_t *)(void *)got.data;
        float *values = input_new(k, sizeof *values, 0);
        int equal = 1;
        for (int64_t n = 0; n < AZQ_PANEL; n++) {
            azq_kernels_scalar.slots.dequantize_row[type](blocks + n * row_bytes, values, k);
            for (int64_t i = 0; i < k; i++) {
                uint16_t half = tiles[i / 32 * AZQ_TILE + i % 32 / 2 * 32 + 2 * n + i % 2], want = rounded(values[i]);
                equal &= half == want || (isnan(azq_bf16_to_f32(half)) && isnan(values[i]));
            }
        }
        expect(equal, "type %d, k %d: other weights than the rows'", type, (int)k);
        expect(guarded_intact(&got), "type %d, k %d: wrote outside", type, (int)k);
        input_free(values, sizeof *values, 0);
        guarded_free(&got);
        azq_matrix_free(w);
        input_free(blocks, 1, 0);
    }
    DRIVES_TYPE(dequantize_bf16, type);
}

/* ---- products of tiles --------------------------------------------------------------------------- */

static uint16_t *tiles_new(random_state *r, int64_t tiles) {
    void *p;
    if (posix_memalign(&p, 64, (size_t)(tiles * AZQ_TILE) * sizeof(uint16_t)) != 0) {
        exit(2);
    }
    for (int64_t i = 0; i < tiles * AZQ_TILE; i++) {
        ((uint16_t *)p)[i] = azq_f32_to_bf16(random_float(r) * (random_below(r, 50) ? 1.0f : 100.0f));
    }
    return p;
}

static void begin(const azq_kernel_slots *slots) {
    if (slots->bf16_begin) {
        slots->bf16_begin();
        DRIVES(bf16_begin);
    }
}

static void end(const azq_kernel_slots *slots) {
    if (slots->bf16_end) {
        slots->bf16_end();
        DRIVES(bf16_end);
    }
}

/* Exact sums, and those of magnitudes, of row r and column j. */
static void exact_sum(const uint16_t *a, int64_t a_stride, int64_t r, const uint16_t *b, int64_t b_stride, int64_t j,
                      int64_t n_tiles, double *sum, double *magnitude) {
    for (int64_t i = 0; i < n_tiles * AZQ_TILE_K; i++) {
        int64_t in = i % AZQ_TILE_K, tile = i / AZQ_TILE_K * AZQ_TILE;
        double x = azq_bf16_to_f32(a[r / 16 * a_stride + tile + r % 16 * AZQ_TILE_K + in]);
        double y = azq_bf16_to_f32(b[j / 16 * b_stride + tile + in / 2 * 32 + j % 16 * 2 + in % 2]);
        *sum += x * y;
        *magnitude += fabs(x * y);
    }
}

enum { C_TILE = AZQ_TILE_ROWS * AZQ_PANEL };

static void check_tile_product(random_state *r, const azq_kernel_slots *slots, int as_defined, int64_t rows,
                               int64_t panels, int64_t n_tiles) {
    int64_t row_tiles = (rows + 15) / 16, a_tiles = n_tiles + random_below(r, 2), b_tiles = n_tiles + random_below(r, 2);
    uint16_t *a = tiles_new(r, row_tiles * a_tiles), *b = tiles_new(r, panels * b_tiles);
    int64_t a_stride = a_tiles * AZQ_TILE, b_stride = b_tiles * AZQ_TILE, c_tiles = panels + random_below(r, 2);
    int64_t bad = random_below(r, 4) ? -1 : random_below(r, rows);
    if (bad >= 0) {
        a[bad / 16 * a_stride + bad % 16 * AZQ_TILE_K + random_below(r, 32)] = 0x7fc0;
    }
    size_t bytes = (size_t)(((row_tiles - 1) * c_tiles + panels) * C_TILE) * sizeof(float);
    guarded got = guarded_new(bytes, 0), want = guarded_new(bytes, 0), once = guarded_new(C_TILE * 2 * sizeof(float), 0);
    float *c = (float *)(void *)got.data, *reference = (float *)(void *)want.data, *alone = (float *)(void *)once.data;
    int64_t half = n_tiles / 2; /* begun in one call, gone on with in the next */
    begin(slots);
    if (half) {
        slots->gemm_bf16(a, a_stride, rows, b, b_stride, panels, half, c, c_tiles * C_TILE, 1);
    }
    slots->gemm_bf16(a + half * AZQ_TILE, a_stride, rows, b + half * AZQ_TILE, b_stride, panels, n_tiles - half, c,
                     c_tiles * C_TILE, !half);
    end(slots);
    azq_kernels_scalar.slots.gemm_bf16(a, a_stride, rows, b, b_stride, panels, n_tiles, reference, c_tiles * C_TILE, 1);
    expect(guarded_intact(&got), "rows %d, panels %d, tiles %d: wrote outside", (int)rows, (int)panels, (int)n_tiles);
    int near = 1, same = 1, own = 1;
    for (int64_t row = 0; row < rows; row++) {
        /* The same row, first of a tile of its own. */
        uint16_t *lone = tiles_new(r, n_tiles);
        for (int64_t t = 0; t < n_tiles; t++) {
            memcpy(lone + t * AZQ_TILE, a + row / 16 * a_stride + t * AZQ_TILE + row % 16 * AZQ_TILE_K, AZQ_TILE_K * 2);
        }
        begin(slots);
        slots->gemm_bf16(lone, n_tiles * AZQ_TILE, 1, b, b_stride, panels, n_tiles, alone, 2 * C_TILE, 1);
        end(slots);
        free(lone);
        for (int64_t j = 0; j < panels * AZQ_PANEL; j++) {
            int64_t at = row / 16 * c_tiles * C_TILE + j / 16 * C_TILE + row % 16 * AZQ_PANEL + j % 16;
            double sum = 0, magnitude = 0;
            exact_sum(a, a_stride, row, b, b_stride, j, n_tiles, &sum, &magnitude);
            double bound = magnitude * (double)(n_tiles * AZQ_TILE_K) * 0x1p-24;
            near &= row == bad ? isnan(c[at]) != 0 : fabs((double)c[at] - sum) <= bound;
            same &= same_floats(c + at, reference + at, 1);
            own &= same_floats(c + at, alone + j / 16 * C_TILE + j % 16, 1);
        }
    }
    expect(near, "rows %d, panels %d, tiles %d: sums are wrong", (int)rows, (int)panels, (int)n_tiles);
    expect(same || !as_defined, "rows %d, panels %d, tiles %d: not the definition's bits", (int)rows, (int)panels,
           (int)n_tiles);
    expect(own, "rows %d, panels %d, tiles %d: a row alone has other bits", (int)rows, (int)panels, (int)n_tiles);
    guarded_free(&got);
    guarded_free(&want);
    guarded_free(&once);
    free(a);
    free(b);
}

static void check_tile_products(const azq_kernel_slots *slots, int as_defined, int rounds) {
    random_state r = {500};
    for (int round = 0; round < rounds; round++) {
        for (int64_t rows = 1; rows <= 50; rows += rows < 20 ? 1 : 5) {
            for (int64_t panels = 1; panels <= 2; panels++) {
                check_tile_product(&r, slots, as_defined, rows, panels, 1 + (rows + panels + round) % 4);
            }
        }
    }
    DRIVES(gemm_bf16);
}

/* ---- whole products ------------------------------------------------------------------------------ */

/* x (m, k) times weights (n, k) of a type, by 1 to 4 threads: the same bits, within DESIGN's bound, nothing outside. */
static void check_matmul(int type, int64_t m, int64_t n, int64_t k) {
    random_state r = {(uint64_t)(m * 1000 + n)};
    int64_t ldx = k + random_below(&r, 3), ldy = n + random_below(&r, 3), bad;
    float *weights = input_new(n * k, sizeof *weights, 0), *x = input_new(m * ldx, sizeof *x, 0);
    fill(&r, 0, weights, n * k);
    fill(&r, 0, x, m * ldx);
    uint8_t *blocks = input_new(n * azq_row_bytes(type, k), 1, 0);
    expect(azq_quantize(type, weights, n, k, blocks, &bad) == AZQ_OK &&
               azq_dequantize(type, blocks, n, k, weights) == AZQ_OK,
           "type %d: quantize", type);
    azq_matrix *w;
    expect(azq_matrix_create(type, blocks, n, k, &w) == AZQ_OK, "create");
    size_t bytes = m && n ? (size_t)((m - 1) * ldy + n) * sizeof(float) : 0;
    guarded first = guarded_new(bytes, 0);
    for (int threads = 1; threads <= 4; threads++) {
        azq_threads_set(threads);
        guarded got = guarded_new(bytes, 0);
        azq_status status = azq_matmul(w, x, m, ldx, (float *)(void *)got.data, ldy, AZQ_COMPUTE_BF16);
        expect(status == AZQ_OK && guarded_intact(&got), "type %d, (%d, %d, %d), %d threads: %s", type, (int)m, (int)n,
               (int)k, threads, status == AZQ_OK ? "wrote outside" : azq_status_name(status));
        if (threads == 1) {
            memcpy(first.data, got.data, bytes);
        }
        expect(memcmp(got.data, first.data, bytes) == 0, "type %d, (%d, %d, %d), %d threads: other bits", type, (int)m,
               (int)n, (int)k, threads);
        guarded_free(&got);
    }
    azq_threads_set(1);
    const float *y = (const float *)(void *)first.data;
    double error = 0, norm = 0;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t t = 0; t < k; t++) {
                double term = (double)x[i * ldx + t] * (double)weights[j * k + t];
                sum += term;
                norm += term * term; /* as relative_error of check_api.c */
            }
            error += ((double)y[i * ldy + j] - sum) * ((double)y[i * ldy + j] - sum);
        }
    }
    error = norm > 0 ? sqrt(error / norm) : sqrt(error);
    expect(error <= 6e-3, "type %d, (%d, %d, %d): relative error %g", type, (int)m, (int)n, (int)k, error);
    if (m > 1 && n > 0) {
        float *alone = input_new(n, sizeof *alone, 0);
        int64_t row = random_below(&r, m);
        expect(azq_matmul(w, x + row * ldx, 1, ldx, alone, n, AZQ_COMPUTE_BF16) == AZQ_OK &&
                   memcmp(alone, y + row * ldy, (size_t)n * sizeof *alone) == 0,
               "type %d, (%d, %d, %d): a row alone has other bits", type, (int)m, (int)n, (int)k);
        input_free(alone, sizeof *alone, 0);
    }
    guarded_free(&first);
    azq_matrix_free(w);
    input_free(blocks, 1, 0);
    input_free(weights, sizeof *weights, 0);
    input_free(x, sizeof *x, 0);
}

static void check_matmuls(void) {
    static const int types[] = {AZQ_TYPE_Q4_0, AZQ_TYPE_Q8_0, AZQ_TYPE_Q6_K, AZQ_TYPE_F32,
                                AZQ_TYPE_F16,  AZQ_TYPE_BF16, AZQ_TYPE_Q4_1, AZQ_TYPE_Q4_K};
    static const int64_t ms[] = {0, 1, 5, 16, 33}, ns[] = {0, 1, 16, 40, 150}, ks[] = {0, 96, 256, 672};
    for (int i = 0; i < 8; i++) {
        int64_t elements = block_elements(types[i]);
        for (int j = 0; j < 20; j++) {
            int64_t k = (ks[j % 4] + elements - 1) / elements * elements;
            check_matmul(types[i], ms[j % 5], ns[(j + j / 5) % 5], elements == 1 ? k + j % 4 * 7 : k);
        }
    }
    check_matmul(AZQ_TYPE_Q4_0, 40, 50, 1120); /* several stretches of k, tiles two by two and one by one */
    check_matmul(AZQ_TYPE_Q4_0, 530, 33, 64); /* more rows than one task takes */
}

/* ---- AMX ----------------------------------------------------------------------------------------- */

#if AZQ_X86
/* The AMX kernel over the scalar ones, its instructions emulated. */
static void check_emulated_amx(int rounds) {
    azq_kernel_slots slots = azq_kernels_scalar.slots;
    slots.gemm_bf16 = azq_kernels_amx.slots.gemm_bf16;
    slots.bf16_begin = azq_kernels_amx.slots.bf16_begin;
    slots.bf16_end = azq_kernels_amx.slots.bf16_end;
    slots.peak_bf16 = azq_kernels_amx.slots.peak_bf16;
    group_begin("amx, emulated", "gemm_bf16");
    check_tile_products(&slots, 0, rounds);
    expect(amx_emulator_count() > 1000, "the kernel's instructions did not come by");
    int64_t one = slots.peak_bf16(1);
    expect(!amx_emulator_holds_tiles(), "the tiles were not released");
    expect(one == 4 * 16 * 16 * 32 && slots.peak_bf16(3) == 3 * one, "peak_bf16 counts wrongly");
    group_end();
    group_begin("amx, emulated", "API: matmul in bf16");
    borrowed = &slots;
    check_matmuls();
    borrowed = NULL;
    expect(!amx_emulator_holds_tiles(), "the tiles were not released");
    group_end();
    group_begin("amx, emulated", "the trial at start");
    expect(azq_bf16_agrees(&slots), "right products are refused");
    amx_emulator_break(AMX_DROPS_ODD_PRODUCTS);
    expect(!azq_bf16_agrees(&slots), "products of half the weights pass");
    amx_emulator_break(AMX_FORGETS_SUMS);
    expect(!azq_bf16_agrees(&slots), "products that forget their sums pass");
    amx_emulator_break(AMX_RIGHT);
    group_end();
}

void check_amx(int rounds) {
    if (azq_cpu_features() & AZQ_CPU_AMXBF16) {
        const char *refusal = azq_amx_refusal();
        group_begin("amx", "the trial at start");
        expect(!refusal || strstr(refusal, "arch_prctl"), "%s", refusal);
        group_end();
    } else if (amx_emulator_start()) {
        check_emulated_amx(rounds);
        amx_emulator_stop();
    }
}
#else
void check_amx(int rounds) { (void)rounds; }
#endif

/* ---- one ISA ------------------------------------------------------------------------------------- */

void check_bf16(const char *isa, const azq_kernel_slots *slots, int rounds) {
    group_begin(isa, "round_bf16");
    check_round(slots, rounds);
    group_end();
    group_begin(isa, "dequantize_bf16");
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (slots->dequantize_bf16[type]) {
            check_dequantize(slots, type, rounds);
        }
    }
    group_end();
    group_begin(isa, "gemm_bf16");
    check_tile_products(slots, !slots->peak_bf16, rounds); /* no peak of bf16: no instructions of their own order */
    expect(azq_bf16_agrees(slots), "the trial at start");
    if (slots->peak_bf16) {
        int64_t one = slots->peak_bf16(1);
        expect(one > 0 && one % 32 == 0 && slots->peak_bf16(0) == 0 && slots->peak_bf16(100) == 100 * one,
               "peak_bf16 counts wrongly");
        DRIVES(peak_bf16);
    }
    group_end();
    group_begin(isa, "API: matmul in bf16");
    check_matmuls();
    group_end();
}
