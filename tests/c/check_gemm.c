/* The packed int8 product: every ISA gives the scalar kernel's bits, for any rows, panels and packed bytes. */
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    azq_act act;
    int8_t *q;
    float *d;
    int32_t *sum8, *sum8_pair, *sum16;
    float *dsum;
    int64_t rows;
} activations;

static void *aligned(size_t bytes) {
    void *p;
    if (posix_memalign(&p, 64, bytes ? bytes : 1) != 0) {
        exit(2);
    }
    return p;
}

/* Rows made by the scalar kernel; row `bad` (-1: none) holds a NaN or an infinity. */
static activations activations_new(random_state *r, int64_t rows, int64_t k, int64_t bad) {
    int64_t blocks = k / 32;
    activations a = {.rows = rows};
    a.q = aligned((size_t)(rows * k));
    a.d = aligned((size_t)(rows * blocks) * sizeof(float));
    a.sum8 = aligned((size_t)(rows * blocks) * sizeof(int32_t));
    a.sum8_pair = aligned((size_t)(rows * blocks) * sizeof(int32_t));
    a.sum16 = aligned((size_t)(2 * rows * blocks) * sizeof(int32_t));
    a.dsum = aligned((size_t)(rows * blocks) * sizeof(float));
    float *x = input_new(k, sizeof *x, 0);
    for (int64_t row = 0; row < rows; row++) {
        static const int patterns[] = {0, 0, 3, 9, 10, 1, 4};
        fill(r, row == bad ? FINITE_PATTERNS : patterns[random_below(r, 7)], x, k);
        azq_kernels_scalar.slots.quantize_act(x, k, a.q + row * k, a.d + row * blocks, a.sum8 + row * blocks,
                                              a.sum8_pair + row * blocks, a.sum16 + 2 * row * blocks);
    }
    for (int64_t i = 0; i < rows * blocks; i++) {
        a.dsum[i] = a.d[i] * (float)(a.sum16[2 * i] + a.sum16[2 * i + 1]);
    }
    input_free(x, sizeof *x, 0);
    a.act = (azq_act){.q = a.q, .d = a.d, .sum8 = a.sum8, .sum16 = a.sum16, .sum8_pair = a.sum8_pair, .dsum = a.dsum, .k = k};
    return a;
}

static void activations_free(activations *a) {
    free(a->q);
    free(a->d);
    free(a->sum8);
    free(a->sum8_pair);
    free(a->sum16);
    free(a->dsum);
}

/* fp16 numbers of a column in a block's head. */
static int64_t fp16_in_head(int type) {
    switch (type) {
    case AZQ_TYPE_Q4_1:
    case AZQ_TYPE_Q5_1: return 2;
    case AZQ_TYPE_Q4_0:
    case AZQ_TYPE_Q5_0:
    case AZQ_TYPE_Q8_0:
    case AZQ_TYPE_Q6_K:
    case AZQ_TYPE_IQ4_NL: return 1;
    default: return 0; /* bytes, or fp16 before the groups */
    }
}

static void put_scale(random_state *r, int any_scale, uint8_t *to) {
    uint16_t scale = (uint16_t)random_next(r);
    if (!any_scale && (scale & 0x7c00) == 0x7c00) {
        scale = 0x3c00;
    }
    memcpy(to, &scale, sizeof scale);
}

/* Random packed bytes. Scales are finite unless `any_scale`; now and then every weight byte is one value, so
 * that the extremes (nibbles 0 and 15, Q8_0's -128) meet in one sum. */
static uint8_t *panels_new(random_state *r, int type, int64_t k, int64_t panels, int any_scale) {
    int64_t panel_bytes = azq_panel_bytes(type, k), blocks = k / 32;
    uint8_t *packed = aligned((size_t)(panels * panel_bytes));
    static const uint8_t extremes[] = {0x00, 0xff, 0x80, 0x7f};
    int uniform = random_below(r, 4) == 0;
    uint8_t value = extremes[random_below(r, 4)];
    for (int64_t i = 0; i < panels * panel_bytes; i++) {
        packed[i] = uniform ? value : (uint8_t)random_next(r);
    }
    int64_t halves = fp16_in_head(type), head = azq_head_bytes(type), supers = azq_super_bytes(type, k);
    for (int64_t p = 0; p < panels; p++) {
        uint8_t *group = packed + p * panel_bytes;
        for (int64_t i = 0; i < supers; i += 2) {
            put_scale(r, any_scale, group + i);
        }
        group += supers;
        for (int64_t g = 0; g < blocks; g += AZQ_GROUP) {
            int64_t in_group = blocks - g < AZQ_GROUP ? blocks - g : AZQ_GROUP;
            for (int64_t i = 0; i < in_group * AZQ_PANEL * halves; i++) {
                put_scale(r, any_scale, group + i / (AZQ_PANEL * halves) * head + i % (AZQ_PANEL * halves) * 2);
            }
            group += in_group * (head + azq_line_bytes(type));
        }
    }
    return packed;
}

static void check_product(random_state *r, const azq_kernel_slots *slots, int type, int64_t rows, int64_t k,
                          int64_t panels) {
    int any_scale = random_below(r, 4) == 0;
    int64_t row0 = random_below(r, 3), bad = random_below(r, 3) ? -1 : row0 + random_below(r, rows);
    activations a = activations_new(r, row0 + rows, k, bad);
    uint8_t *packed = panels_new(r, type, k, panels, any_scale);
    int64_t panel_bytes = azq_panel_bytes(type, k), columns = panels * AZQ_PANEL;
    int64_t ldc = columns + random_below(r, 3) * 16 + random_below(r, 2);
    size_t bytes = (size_t)((rows - 1) * ldc + columns) * sizeof(float);
    guarded got = guarded_new(bytes, (size_t)(4 * random_below(r, 16))), want = guarded_new(bytes, 0);
    float *c = (float *)(void *)got.data, *reference = (float *)(void *)want.data;
    slots->gemm[type](&a.act, row0, rows, packed, panel_bytes, panels, c, ldc);
    azq_kernels_scalar.slots.gemm[type](&a.act, row0, rows, packed, panel_bytes, panels, reference, ldc);
    /* Equal over all of c: between the rows both still hold the guard bytes. */
    expect(same_floats(c, reference, (int64_t)(bytes / sizeof(float))), "type %d, rows %d, k %d, panels %d: other values",
           type, (int)rows, (int)k, (int)panels);
    expect(guarded_intact(&got), "type %d, rows %d, k %d, panels %d: wrote outside", type, (int)rows, (int)k,
           (int)panels);
    if (!any_scale) {
        int right = 1;
        for (int64_t row = 0; row < rows; row++) {
            int nan = 0;
            for (int64_t j = 0; j < columns; j++) {
                nan += isnan(c[row * ldc + j]) != 0;
            }
            right &= row0 + row == bad ? nan == columns : nan == 0;
        }
        expect(right, "type %d, rows %d, k %d: NaN in other rows than the bad one", type, (int)rows, (int)k);
    }
    guarded_free(&got);
    guarded_free(&want);
    free(packed);
    activations_free(&a);
}

/* ---- fp32 ---------------------------------------------------------------------------------------- */

/* The definition: 16 lanes of fused multiply-adds from 0, then fold 16 -> 8 -> 4 -> 2 -> 1. */
static float dot_in_lanes(const float *x, const float *w, int64_t k) {
    float lanes[16] = {0};
    for (int64_t i = 0; i < k; i++) {
        lanes[i % 16] = fmaf(x[i], w[i], lanes[i % 16]);
    }
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

static void check_fp32(random_state *r, const azq_kernel_slots *slots, int type, int64_t rows, int64_t columns,
                       int64_t k) {
    int64_t bytes = type == AZQ_TYPE_F32 ? 4 : 2, ldx = k + random_below(r, 5);
    int64_t ldw = (k + random_below(r, 5)) * bytes, ldc = columns + random_below(r, 3);
    int64_t offset = random_below(r, 8);
    float *x = input_new(rows * ldx, sizeof *x, offset), *values = input_new(columns * k, sizeof *values, 0);
    uint8_t *w = input_new(columns * ldw / bytes, (size_t)bytes, offset);
    fill(r, 0, x, rows * ldx);
    if (random_below(r, 4) == 0 && k > 0) {
        x[random_below(r, rows * ldx)] = INFINITY;
    }
    for (int64_t j = 0; j < columns; j++) {
        fill(r, 0, values + j * k, k);
        azq_kernels_scalar.slots.quantize_row[type](values + j * k, w + j * ldw, k);
        azq_kernels_scalar.slots.dequantize_row[type](w + j * ldw, values + j * k, k);
    }
    guarded got = guarded_new((size_t)((rows - 1) * ldc + columns) * sizeof(float), 4);
    float *c = (float *)(void *)got.data;
    slots->gemm_fp32[type](x, ldx, rows, w, ldw, columns, k, (int)random_below(r, 2), c, ldc);
    int same = 1;
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) {
            float want = dot_in_lanes(x + i * ldx, values + j * k, k);
            same &= same_floats(c + i * ldc + j, &want, 1);
        }
    }
    expect(same, "type %d, rows %d, columns %d, k %d: other values", type, (int)rows, (int)columns, (int)k);
    expect(guarded_intact(&got), "type %d, rows %d, columns %d, k %d: wrote outside", type, (int)rows, (int)columns,
           (int)k);
    guarded_free(&got);
    input_free(x, sizeof *x, offset);
    input_free(values, sizeof *values, 0);
    input_free(w, (size_t)bytes, offset);
}

static void check_gemm_fp32(const char *isa, const azq_kernel_slots *slots, int rounds) {
    group_begin(isa, "gemm_fp32");
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (!slots->gemm_fp32[type]) {
            continue;
        }
        random_state r = {(uint64_t)type + 400};
        static const int64_t lengths[] = {0, 1, 15, 16, 17, 31, 64, 77, 333, 1023, 1024, 1025, 2100};
        for (int i = 0; i < 13 * 12 * rounds; i++) {
            int64_t rows = i % 3 ? 1 + random_below(&r, 7) : 1 + random_below(&r, AZQ_FP32_ROWS);
            int64_t columns = i % 2 ? 1 + random_below(&r, 9) : 1 + random_below(&r, AZQ_FP32_COLUMNS);
            check_fp32(&r, slots, type, rows, columns, lengths[i % 13]);
        }
        DRIVES_TYPE(gemm_fp32, type);
    }
    group_end();
}

/* Planes laid down here, in the simplest way, and taken through all leaves. */
static void check_planes(random_state *r, const azq_kernel_slots *slots, int64_t k) {
    enum { ROWS = AZQ_PLANE_ROWS, COLUMNS = AZQ_PLANE_COLUMNS };
    int64_t steps = (k + AZQ_SUM_LANES - 1) / AZQ_SUM_LANES, padded = steps * AZQ_SUM_LANES;
    float *x = input_new(ROWS * padded, sizeof *x, 0), *w = input_new(COLUMNS * padded, sizeof *w, 0);
    fill(r, 0, x, ROWS * padded);
    fill(r, 0, w, COLUMNS * padded);
    for (int64_t i = k; i < padded; i++) {
        for (int row = 0; row < ROWS; row++) {
            x[row * padded + i] = 0;
        }
        for (int column = 0; column < COLUMNS; column++) {
            w[column * padded + i] = 0;
        }
    }
    float *x_plane = input_new(ROWS * steps, sizeof *x_plane, 4), *w_plane = input_new(COLUMNS * steps, sizeof *w_plane, 4);
    guarded sums = guarded_new(AZQ_PLANE_LEVELS * AZQ_PLANE_SUMS * sizeof(float), 4);
    for (int leaf = 0; leaf < AZQ_SUM_LANES; leaf++) {
        for (int64_t s = 0; s < steps; s++) {
            int64_t i = s * AZQ_SUM_LANES + azq_fold_order[leaf];
            for (int row = 0; row < ROWS; row++) {
                x_plane[s * ROWS + row] = x[row * padded + i];
            }
            for (int column = 0; column < COLUMNS; column++) {
                w_plane[s * COLUMNS + column] = w[column * padded + i];
            }
        }
        slots->gemm_plane(x_plane, w_plane, steps, leaf, (float *)(void *)sums.data);
    }
    const float *got = (const float *)(const void *)sums.data + (AZQ_PLANE_LEVELS - 1) * AZQ_PLANE_SUMS;
    int same = 1;
    for (int row = 0; row < ROWS; row++) {
        for (int column = 0; column < COLUMNS; column++) {
            float want = dot_in_lanes(x + row * padded, w + column * padded, padded);
            same &= same_floats(got + row * COLUMNS + column, &want, 1);
        }
    }
    expect(same, "k %d: other values", (int)k);
    expect(guarded_intact(&sums), "k %d: wrote outside", (int)k);
    guarded_free(&sums);
    input_free(x_plane, sizeof *x_plane, 4);
    input_free(w_plane, sizeof *w_plane, 4);
    input_free(x, sizeof *x, 0);
    input_free(w, sizeof *w, 0);
}

static void check_gemm_plane(const char *isa, const azq_kernel_slots *slots, int rounds) {
    if (!slots->gemm_plane) {
        return;
    }
    group_begin(isa, "gemm_plane");
    random_state r = {450};
    static const int64_t lengths[] = {0, 1, 15, 16, 17, 100, 333, 1024};
    for (int i = 0; i < 8 * rounds; i++) {
        check_planes(&r, slots, lengths[i % 8]);
    }
    DRIVES(gemm_plane);
    group_end();
}

void check_gemm(const char *isa, const azq_kernel_slots *slots, int rounds) {
    group_begin(isa, "gemm");
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (!slots->gemm[type]) {
            continue;
        }
        random_state r = {(uint64_t)type + 200};
        for (int round = 0; round < rounds * 4; round++) {
            int64_t unit = block_elements(type) / 32; /* rows are whole super-blocks */
            for (int64_t rows = 1; rows <= 9; rows++) {
                for (int64_t blocks = unit; blocks <= 9 * unit; blocks += unit == 8 ? 3 * unit : 1) {
                    check_product(&r, slots, type, rows, 32 * blocks, 1 + random_below(&r, 5));
                }
            }
            for (int64_t rows = 10; rows <= 66; rows += 7) {
                int64_t blocks = (1 + random_below(&r, 20 / unit + 1)) * unit; /* not within the call: compilers order those as they like */
                check_product(&r, slots, type, rows, 32 * blocks, 1 + random_below(&r, 5));
            }
        }
        DRIVES_TYPE(gemm, type);
    }
    group_end();
    check_gemm_fp32(isa, slots, rounds);
    check_gemm_plane(isa, slots, rounds);
}
