/* Rows of blocks: quantize_row, quantize_checked_row, dequantize_row, find_bad, quantize_act against the scalar
 * kernels. */
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "azq_blocks.h"
#include "azq_half.h"

static const azq_kernel_slots *definition(void) { return &azq_kernels_scalar.slots; }

/* Row lengths: every small number of blocks, every ragged length of a plain type. */
static int64_t row_length(int64_t elements, int i) {
    static const int64_t longer[] = {255, 256, 257, 1000, 4096};
    return elements == 1 ? (i < 70 ? i : longer[i - 70]) : (i < 9 ? i + 1 : 64) * elements;
}

static int row_lengths(int64_t elements) { return elements == 1 ? 75 : 10; }

/* NaN made half precision keeps its sign and little else. */
static void forget_payloads(int type, uint8_t *bytes, int64_t k) {
    uint16_t infinity = type == AZQ_TYPE_F16 ? 0x7c00 : 0x7f80;
    for (int64_t i = 0; i < k; i++) {
        uint16_t h;
        memcpy(&h, bytes + 2 * i, sizeof h);
        h = (h & 0x7fff) > infinity ? 0x7fff : h;
        memcpy(bytes + 2 * i, &h, sizeof h);
    }
}

static void check_quantize_row(const azq_kernel_slots *slots, int type, int rounds) {
    random_state r = {(uint64_t)type + 1};
    int64_t elements = block_elements(type);
    /* Blocks never see NaN or infinity: find_bad stands before them. Plain numbers do, in the KV cache. */
    int patterns = type == AZQ_TYPE_F16 || type == AZQ_TYPE_BF16 ? PATTERNS : FINITE_PATTERNS;
    for (int round = 0; round < rounds * 3; round++) {
        for (int i = 0; i < row_lengths(elements); i++) {
            int64_t k = row_length(elements, i), row_bytes = azq_row_bytes(type, k);
            for (int pattern = 0; pattern < patterns; pattern++) {
                int64_t offset = random_below(&r, 8);
                float *x = input_new(k, sizeof *x, offset);
                fill(&r, pattern, x, k);
                guarded got = guarded_new((size_t)row_bytes, (size_t)(4 * random_below(&r, 16)));
                guarded want = guarded_new((size_t)row_bytes, 0);
                slots->quantize_row[type](x, got.data, k);
                definition()->quantize_row[type](x, want.data, k);
                if (pattern == FINITE_PATTERNS) {
                    forget_payloads(type, got.data, k);
                    forget_payloads(type, want.data, k);
                }
                expect(memcmp(got.data, want.data, (size_t)row_bytes) == 0, "type %d, k %d, pattern %d: other bytes",
                       type, (int)k, pattern);
                expect(guarded_intact(&got), "type %d, k %d: wrote outside", type, (int)k);
                guarded_free(&got);
                guarded_free(&want);
                input_free(x, sizeof *x, offset);
            }
        }
    }
    DRIVES_TYPE(quantize_row, type);
}

/* As quantize_row where it returns true: always for ordinary weights, never with a number that a scale or a plain
 * number has no room for. */
static void check_quantize_checked_row(const azq_kernel_slots *slots, int type, int rounds) {
    random_state r = {(uint64_t)type + 150};
    int64_t elements = block_elements(type);
    int plain = elements == 1;
    for (int round = 0; round < rounds * 3; round++) {
        for (int i = 0; i < row_lengths(elements); i++) {
            int64_t k = row_length(elements, i), row_bytes = azq_row_bytes(type, k);
            for (int pattern = 0; pattern < PATTERNS; pattern++) {
                int64_t offset = random_below(&r, 8);
                float *x = input_new(k, sizeof *x, offset);
                fill(&r, pattern, x, k);
                int finite = 1, ordinary = 1;
                for (int64_t j = 0; j < k; j++) {
                    finite &= fabsf(x[j]) < (plain ? INFINITY : 65520.0f);
                    ordinary &= fabsf(x[j]) < (plain ? INFINITY : 8192.0f);
                }
                guarded got = guarded_new((size_t)row_bytes, (size_t)(4 * random_below(&r, 16)));
                guarded want = guarded_new((size_t)row_bytes, 0);
                definition()->quantize_row[type](x, want.data, k);
                int checked = slots->quantize_checked_row[type](x, got.data, k);
                expect(checked || !ordinary, "type %d, k %d, pattern %d: ordinary weights refused", type, (int)k,
                       pattern);
                expect(!checked || memcmp(got.data, want.data, (size_t)row_bytes) == 0,
                       "type %d, k %d, pattern %d: other bytes", type, (int)k, pattern);
                expect(guarded_intact(&got), "type %d, k %d: wrote outside", type, (int)k);
                static const float too_large[] = {NAN, -NAN, INFINITY, -INFINITY, 1e9f, -1e9f};
                for (int trial = 0; trial < 4 && k > 0 && finite; trial++) {
                    int64_t at = random_below(&r, k);
                    float before = x[at];
                    x[at] = too_large[random_below(&r, plain ? 4 : 6)];
                    expect(!slots->quantize_checked_row[type](x, got.data, k), "type %d, k %d: %g at %d not seen", type,
                           (int)k, (double)x[at], (int)at);
                    x[at] = before;
                }
                guarded_free(&got);
                guarded_free(&want);
                input_free(x, sizeof *x, offset);
            }
        }
    }
    DRIVES_TYPE(quantize_checked_row, type);
}

/* The group of the largest weight sets its super-block's scale, wherever it stands and whatever its sign. All ISAs
 * share this text, so that comparing them would not show what a compiler does to it. */
static void check_strongest_group(const azq_kernel_slots *slots) {
    static const struct {
        int type, groups;
        size_t d;    /* where the super-block's scale is */
        float steps; /* of it, in the largest weight */
    } types[] = {{AZQ_TYPE_Q3_K, 16, offsetof(azq_block_q3_k, d), 4 * 32},
                 {AZQ_TYPE_Q6_K, 16, offsetof(azq_block_q6_k, d), 32 * 128},
                 {AZQ_TYPE_IQ4_XS, 8, offsetof(azq_block_iq4_xs, d), 127 * 32}};
    random_state r = {11};
    for (int i = 0; i < 3; i++) {
        int elements = AZQ_QK_K / types[i].groups;
        for (int at = 0; at < 2 * types[i].groups && slots->quantize_row[types[i].type]; at++) {
            int strongest = at / 2, next = (strongest + 1) % types[i].groups;
            float x[AZQ_QK_K], largest = at % 2 ? -3.0f : 3.0f;
            for (int j = 0; j < AZQ_QK_K; j++) {
                x[j] = random_float(&r);
            }
            x[strongest * elements] = largest;
            x[next * elements] = -2.0f / 3.0f * largest;
            uint8_t block[sizeof(azq_block_q6_k)] __attribute__((aligned(2)));
            uint16_t d;
            slots->quantize_row[types[i].type](x, block, AZQ_QK_K);
            memcpy(&d, block + types[i].d, sizeof d);
            float share = azq_f16_to_f32(d) * types[i].steps / largest;
            expect(share > 0.8f && share < 1.5f, "type %d, largest weight in group %d: a scale for %g of it",
                   types[i].type, strongest, (double)share);
        }
    }
}

/* The same with importances, some of them zero. */
static void check_quantize_weighted_row(const azq_kernel_slots *slots, int type, int rounds) {
    random_state r = {(uint64_t)type + 50};
    int64_t elements = block_elements(type);
    for (int i = 0; i < rounds * row_lengths(elements); i++) {
        int64_t k = row_length(elements, i % row_lengths(elements)), row_bytes = azq_row_bytes(type, k);
        for (int pattern = 0; pattern < FINITE_PATTERNS; pattern++) {
            int64_t offset = random_below(&r, 8);
            float *x = input_new(k, sizeof *x, offset), *importance = input_new(k, sizeof *x, 0);
            fill(&r, pattern, x, k);
            for (int64_t j = 0; j < k; j++) {
                importance[j] = random_below(&r, 5) ? (float)random_below(&r, 1000) * 0.01f : 0.0f;
            }
            guarded got = guarded_new((size_t)row_bytes, (size_t)(4 * random_below(&r, 16)));
            guarded want = guarded_new((size_t)row_bytes, 0);
            slots->quantize_weighted_row[type](x, importance, got.data, k);
            definition()->quantize_weighted_row[type](x, importance, want.data, k);
            expect(memcmp(got.data, want.data, (size_t)row_bytes) == 0, "type %d, k %d, pattern %d: other bytes", type,
                   (int)k, pattern);
            expect(guarded_intact(&got), "type %d, k %d: wrote outside", type, (int)k);
            guarded_free(&got);
            guarded_free(&want);
            input_free(x, sizeof *x, offset);
            input_free(importance, sizeof *x, 0);
        }
    }
    DRIVES_TYPE(quantize_weighted_row, type);
}

static void check_dequantize(const azq_kernel_slots *slots, int type, const uint8_t *blocks, int64_t k, size_t offset) {
    guarded got = guarded_new((size_t)k * sizeof(float), offset), want = guarded_new((size_t)k * sizeof(float), 0);
    slots->dequantize_row[type](blocks, (float *)(void *)got.data, k);
    definition()->dequantize_row[type](blocks, (float *)(void *)want.data, k);
    expect(same_floats((float *)(void *)got.data, (float *)(void *)want.data, k), "type %d, k %d: other values", type,
           (int)k);
    expect(guarded_intact(&got), "type %d, k %d: wrote outside", type, (int)k);
    guarded_free(&got);
    guarded_free(&want);
}

/* Any bytes are a row: infinite and NaN scales of a broken file too. */
static void check_dequantize_row(const azq_kernel_slots *slots, int type, int rounds) {
    random_state r = {(uint64_t)type + 100};
    int64_t elements = block_elements(type);
    for (int round = 0; round < rounds * 20; round++) {
        for (int i = 0; i < row_lengths(elements); i++) {
            int64_t k = row_length(elements, i), row_bytes = azq_row_bytes(type, k);
            int64_t offset = type == AZQ_TYPE_F32 || type == AZQ_TYPE_Q8_K ? 2 * random_below(&r, 8) : random_below(&r, 16);
            uint8_t *blocks = input_new((row_bytes + 1) / 2, 2, offset); /* 2: what a block's scale is aligned to */
            for (int64_t j = 0; j < row_bytes; j++) {
                blocks[j] = (uint8_t)random_next(&r);
            }
            check_dequantize(slots, type, blocks, k, (size_t)(4 * random_below(&r, 16)));
            input_free(blocks, 2, offset);
        }
    }
    if (azq_row_bytes(type, 1) == 2) { /* every number there is */
        uint16_t *all = input_new(1 << 16, 2, 0);
        for (int i = 0; i < 1 << 16; i++) {
            all[i] = (uint16_t)i;
        }
        check_dequantize(slots, type, (uint8_t *)all, 1 << 16, 0);
        input_free(all, 2, 0);
    }
    DRIVES_TYPE(dequantize_row, type);
}

static void check_find_bad(const azq_kernel_slots *slots, int rounds) {
    random_state r = {7};
    for (int round = 0; round < rounds * 20; round++) {
        for (int64_t n = 0; n < 140; n++) {
            float limit = round % 2 ? INFINITY : 524160.0f;
            const float bad[] = {NAN, -NAN, INFINITY, -INFINITY, limit, -limit};
            float *x = input_new(n, sizeof *x, n % 8);
            int64_t want = -1;
            for (int64_t i = 0; i < n; i++) {
                x[i] = random_below(&r, 10) ? random_float(&r) : nextafterf(limit, 0.0f);
            }
            for (int64_t i = n - 1; i >= 0; i--) {
                if (round % 3 && random_below(&r, n) == 0) {
                    x[i] = bad[random_below(&r, 6)];
                    want = i;
                }
            }
            expect(slots->find_bad(x, n, limit) == want, "n %d: not the first bad element, %d", (int)n, (int)want);
            input_free(x, sizeof *x, n % 8);
        }
    }
    DRIVES(find_bad);
}

static void check_quantize_act(const azq_kernel_slots *slots, int rounds) {
    random_state r = {8};
    for (int round = 0; round < rounds * 30; round++) {
        int64_t blocks = round % 9 + 1, k = 32 * blocks;
        for (int pattern = 0; pattern < PATTERNS; pattern++) {
            int64_t offset = random_below(&r, 8);
            float *x = input_new(k, sizeof *x, offset);
            fill(&r, pattern, x, k);
            guarded got[5], want[5]; /* q, d, sum8, sum8_pair, sum16 */
            for (int i = 0; i < 5; i++) {
                size_t bytes = (size_t)(i == 0 ? k : i == 4 ? 8 * blocks : 4 * blocks);
                got[i] = guarded_new(bytes, i == 0 ? 0 : 4);
                want[i] = guarded_new(bytes, 0);
            }
            slots->quantize_act(x, k, (int8_t *)got[0].data, (float *)(void *)got[1].data,
                                (int32_t *)(void *)got[2].data, (int32_t *)(void *)got[3].data,
                                (int32_t *)(void *)got[4].data);
            definition()->quantize_act(x, k, (int8_t *)want[0].data, (float *)(void *)want[1].data,
                                       (int32_t *)(void *)want[2].data, (int32_t *)(void *)want[3].data,
                                       (int32_t *)(void *)want[4].data);
            for (int i = 0; i < 5; i++) {
                expect(memcmp(got[i].data, want[i].data, want[i].bytes) == 0, "output %d, k %d, pattern %d: other bytes",
                       i, (int)k, pattern);
                expect(guarded_intact(&got[i]), "output %d, k %d: wrote outside", i, (int)k);
            }
            for (int64_t b = 0; b < blocks; b++) { /* the sums are of these q, and q is never -128 */
                const int8_t *q = (const int8_t *)got[0].data + 32 * b;
                int sum = 0, pair[2] = {0, 0}, half[2] = {0, 0}, least = 0;
                for (int j = 0; j < 32; j++) {
                    sum += q[j];
                    pair[j >> 1 & 1] += q[j];
                    half[j / 16] += q[j];
                    least = q[j] < least ? q[j] : least;
                }
                int16_t halves[2];
                memcpy(halves, got[3].data + 4 * b, sizeof halves);
                expect(((int32_t *)(void *)got[2].data)[b] == -8 * sum && halves[0] == -8 * pair[0] &&
                           halves[1] == -8 * pair[1] && least >= -127 &&
                           ((int32_t *)(void *)got[4].data)[2 * b] == half[0] &&
                           ((int32_t *)(void *)got[4].data)[2 * b + 1] == half[1],
                       "k %d, pattern %d: wrong sums", (int)k, pattern);
            }
            for (int i = 0; i < 5; i++) {
                guarded_free(&got[i]);
                guarded_free(&want[i]);
            }
            input_free(x, sizeof *x, offset);
        }
    }
    DRIVES(quantize_act);
}

/* The two that only measure: they read what they say and no more, and count what they do. */
static void check_measuring(const azq_kernel_slots *slots) {
    random_state r = {9};
    for (int64_t n = 0; n < 40; n++) {
        uint64_t *lines = input_new(8 * n, sizeof *lines, 0);
        for (int64_t i = 0; i < 8 * n; i++) {
            lines[i] = random_next(&r);
        }
        expect(slots->stream_read(lines, n) == slots->stream_read(lines, n), "%d lines: another value each time", (int)n);
        input_free(lines, sizeof *lines, 0);
    }
    int64_t one = slots->peak_int8(1);
    expect(one >= 32 && one % 32 == 0 && slots->peak_int8(0) == 0 && slots->peak_int8(1000) == 1000 * one,
           "peak_int8 counts wrongly");
    DRIVES(stream_read);
    DRIVES(peak_int8);
}

void check_blocks(const char *isa, const azq_kernel_slots *slots, int rounds) {
    group_begin(isa, "quantize_row");
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (slots->quantize_row[type]) {
            check_quantize_row(slots, type, rounds);
        }
    }
    check_strongest_group(slots);
    group_end();
    group_begin(isa, "quantize_checked_row");
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (slots->quantize_checked_row[type]) {
            check_quantize_checked_row(slots, type, rounds);
        }
    }
    group_end();
    group_begin(isa, "quantize_weighted_row");
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (slots->quantize_weighted_row[type]) {
            check_quantize_weighted_row(slots, type, rounds);
        }
    }
    group_end();
    group_begin(isa, "dequantize_row");
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (slots->dequantize_row[type]) {
            check_dequantize_row(slots, type, rounds);
        }
    }
    group_end();
    group_begin(isa, "find_bad");
    check_find_bad(slots, rounds);
    group_end();
    group_begin(isa, "quantize_act");
    check_quantize_act(slots, rounds);
    group_end();
    group_begin(isa, "measuring");
    check_measuring(slots);
    group_end();
}
