/* fp32 vector kernels: the scalar kernel's bits on every ISA, and close to the same sum in double.
 *
 * Bounds, in units of 2^-24 (half a unit in the last place): a sum of n products in 16 lanes may be off by
 * n / 16 + 8 of the sum of their magnitudes, a norm by as much of its result, exp by 8 of its result, an
 * activation by 16 of max(|x|, 1); attention's stands at attends(). */
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "azq_half.h"

static const double HALF_ULP = 0x1p-24;

static const azq_kernel_slots *definition(void) { return &azq_kernels_scalar.slots; }

/* Every ragged length, then longer ones. */
static int64_t length(int i) {
    static const int64_t longer[] = {100, 128, 255, 256, 768, 1000};
    return i < 68 ? i + 1 : longer[i - 68];
}
enum { LENGTHS = 74 };

/* n numbers, fp32 or (half) fp16, and the same in double. */
typedef struct {
    int64_t n, offset;
    int half;
    void *data;
    double *exact;
} numbers;

static numbers numbers_new(random_state *r, int64_t n, int half, float scale) {
    numbers v = {n, random_below(r, 8), half, NULL, NULL};
    v.data = input_new(n, half ? 2 : 4, v.offset);
    v.exact = input_new(n, sizeof(double), 0);
    for (int64_t i = 0; i < n; i++) {
        float x = random_float(r) * scale;
        if (half) {
            ((uint16_t *)v.data)[i] = azq_f32_to_f16(x);
            x = azq_f16_to_f32(azq_f32_to_f16(x));
        } else {
            ((float *)v.data)[i] = x;
        }
        v.exact[i] = (double)x;
    }
    return v;
}

static void numbers_free(numbers *v) {
    input_free(v->data, v->half ? 2 : 4, v->offset);
    input_free(v->exact, sizeof(double), 0);
}

/* ---- attention ----------------------------------------------------------------------------------- */

enum { MAX_ROWS = 9 };

static void spoil(numbers *v, int64_t i) {
    if (v->half) {
        ((uint16_t *)v->data)[i] = 0x7e00;
    } else {
        ((float *)v->data)[i] = NAN;
    }
}

/* One head's cache of n positions. What lies outside first .. n - 1 is NaN: nothing may depend on it. */
typedef struct {
    azq_attend_head head;
    numbers keys, values;
} cache;

static cache cache_new(random_state *r, int64_t first, int64_t n, int64_t dim, int half) {
    cache c = {.keys = numbers_new(r, (n + 15) / 16 * 16 * dim, half, 2.0f), .values = numbers_new(r, n * dim, half, 1.0f)};
    for (int64_t i = 0; i < c.keys.n; i++) {
        int64_t position = i / (16 * dim) * 16 + i % 16;
        if (position < first || position >= n) {
            spoil(&c.keys, i);
        }
    }
    for (int64_t i = 0; i < first * dim; i++) {
        spoil(&c.values, i);
    }
    float scale = (random_float(r) + 1.0f) / sqrtf((float)dim);
    c.head = (azq_attend_head){c.keys.data, c.values.data, dim, scale, random_below(r, 3) ? 0.0f : 2.0f};
    return c;
}

/* Whether a row's result is its positions' mix, in double. A score is off by dim half units of the sum of its
 * terms' magnitudes (s), a weight by twice that, a result by as many half units more as there are positions;
 * values are below 1. */
static int attends(const cache *c, const azq_attend_row *row) {
    int64_t n = row->end - row->first, dim = c->head.dim;
    double *weights = input_new(n, sizeof *weights, 0), top = -INFINITY, total = 0, s = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t p = row->first + i;
        double score = 0, magnitude = 0, cap = (double)c->head.softcap;
        for (int64_t d = 0; d < dim; d++) {
            double term = (double)c->head.scale * (double)row->query[d] * c->keys.exact[(p / 16 * dim + d) * 16 + p % 16];
            score += term;
            magnitude += fabs(term);
        }
        weights[i] = cap > 0 ? cap * tanh(score / cap) : score;
        top = weights[i] > top ? weights[i] : top;
        s = magnitude > s ? magnitude : s;
    }
    for (int64_t i = 0; i < n; i++) {
        weights[i] = exp(weights[i] - top);
        total += weights[i];
    }
    int close = 1;
    for (int64_t d = 0; d < dim; d++) {
        double exact = 0;
        for (int64_t i = 0; i < n; i++) {
            exact += weights[i] / total * c->values.exact[(row->first + i) * dim + d];
        }
        close &= fabs((double)row->out[d] - exact) <= HALF_ULP * (2 * (double)dim * s + (double)n + 32);
    }
    input_free(weights, sizeof *weights, 0);
    return close;
}

/* Ranges of positions below n for some rows: of consecutive tokens, with a window or without, or any mixture,
 * disjoint ones included. Returns the least first. */
static int64_t choose_ranges(random_state *r, azq_attend_row *rows, int64_t n_rows, int64_t n) {
    int64_t least = n, mixture = random_below(r, 2), window = random_below(r, 2) ? n : 1 + random_below(r, n);
    for (int64_t i = 0; i < n_rows; i++) {
        int64_t end = mixture ? 1 + random_below(r, n) : n - (n_rows - 1 - i);
        end = end < 1 ? 1 : end;
        rows[i].end = end;
        rows[i].first = mixture && random_below(r, 2) ? random_below(r, end) : end > window ? end - window : 0;
        least = rows[i].first < least ? rows[i].first : least;
    }
    return least;
}

static void check_attend(random_state *r, int64_t n, azq_attend_fn *attend, azq_attend_fn *want, int half) {
    static const int64_t dims[] = {1, 5, 8, 16, 24, 31, 32, 64, 80, 100, 128};
    int64_t dim = dims[random_below(r, 11)], n_rows = 1 + random_below(r, MAX_ROWS);
    int64_t ld = (n + 15) / 16 * 16 + 16 * random_below(r, 2);
    azq_attend_row rows[MAX_ROWS];
    cache c = cache_new(r, choose_ranges(r, rows, n_rows, n), n, dim, half);
    numbers queries = numbers_new(r, n_rows * dim, 0, 2.0f);
    guarded scores = guarded_new((size_t)(4 * ld) * sizeof(float), 0);
    guarded got = guarded_new((size_t)(n_rows * dim) * sizeof(float), (size_t)(4 * random_below(r, 16)));
    guarded defined = guarded_new(got.bytes, 0), alone = guarded_new((size_t)dim * sizeof(float), 4);
    for (int64_t i = 0; i < n_rows; i++) {
        rows[i].query = (float *)queries.data + i * dim;
        rows[i].out = (float *)(void *)defined.data + i * dim;
    }
    want(rows, n_rows, &c.head, (float *)(void *)scores.data, ld);
    for (int64_t i = 0; i < n_rows; i++) {
        rows[i].out = (float *)(void *)got.data + i * dim;
    }
    attend(rows, n_rows, &c.head, (float *)(void *)scores.data, ld);
    expect(memcmp(got.data, defined.data, got.bytes) == 0, "attend (fp%d), n %d, dim %d, %d rows: other bits",
           half ? 16 : 32, (int)n, (int)dim, (int)n_rows);
    expect(guarded_intact(&got) && guarded_intact(&scores), "attend, n %d, dim %d: wrote outside", (int)n, (int)dim);
    for (int64_t i = 0; i < n_rows; i++) {
        azq_attend_row row = rows[i];
        row.out = (float *)(void *)alone.data;
        attend(&row, 1, &c.head, (float *)(void *)scores.data, ld);
        expect(memcmp(alone.data, rows[i].out, alone.bytes) == 0, "attend, n %d, dim %d: row %d differs when alone",
               (int)n, (int)dim, (int)i);
        expect(attends(&c, &rows[i]), "attend, positions %d to %d, dim %d: far off", (int)row.first, (int)row.end,
               (int)dim);
    }
    expect(guarded_intact(&alone) && guarded_intact(&scores), "attend, n %d, dim %d: wrote outside", (int)n, (int)dim);
    guarded_free(&scores);
    guarded_free(&got);
    guarded_free(&defined);
    guarded_free(&alone);
    numbers_free(&queries);
    numbers_free(&c.keys);
    numbers_free(&c.values);
}

/* A q8_0 cache's number at dimension d of a position, and the block it stands in. */
static float q8_0_number(uint8_t *keys, uint8_t *values, int64_t row_bytes, int64_t position, int64_t d, int is_key,
                         int spoiled) {
    int64_t block = d / AZQ_QK8_0, i = d % AZQ_QK8_0, lane = position % 16;
    uint8_t *tile = keys + position / 16 * 16 * row_bytes + block * 16 * (int64_t)sizeof(azq_block_q8_0);
    azq_block_q8_0 *value = (azq_block_q8_0 *)(void *)(values + position * row_bytes) + block;
    uint16_t *scale = is_key ? (uint16_t *)(void *)tile + lane : &value->d;
    if (spoiled) {
        *scale = 0x7e00;
    }
    int8_t q = is_key ? (int8_t)tile[32 + i * 16 + lane] : value->qs[i];
    return azq_f16_to_f32(*scale) * (float)q;
}

/* attend_q8_0 against the definition of attend_f32 over the dequantized cache: the same bits. */
static void check_attend_q8_0(random_state *r, int64_t n, const azq_kernel_slots *slots) {
    static const int64_t dims[] = {1, 8, 24, 32, 48, 64, 80, 100, 128};
    int64_t dim = dims[random_below(r, 9)], n_rows = 1 + random_below(r, MAX_ROWS);
    int64_t room = (n + 15) / 16 * 16, row_bytes = (dim + 31) / 32 * (int64_t)sizeof(azq_block_q8_0);
    azq_attend_row rows[MAX_ROWS];
    int64_t first = choose_ranges(r, rows, n_rows, n);
    uint8_t *keys = input_new(room * row_bytes, 1, 0), *values = input_new(n * row_bytes, 1, 0);
    for (int64_t i = 0; i < room * row_bytes; i++) {
        keys[i] = (uint8_t)random_below(r, 256);
    }
    for (int64_t i = 0; i < n * row_bytes; i++) {
        values[i] = (uint8_t)random_below(r, 256);
    }
    for (int64_t p = 0; p < room; p++) { /* ordinary scales */
        for (int64_t b = 0; b < (dim + 31) / 32; b++) {
            uint16_t *key = (uint16_t *)(void *)(keys + p / 16 * 16 * row_bytes + b * 544) + p % 16;
            *key = azq_f32_to_f16((random_float(r) + 1.5f) / 100.0f);
            if (p < n) {
                ((azq_block_q8_0 *)(void *)(values + p * row_bytes))[b].d = azq_f32_to_f16(random_float(r) / 100.0f);
            }
        }
    }
    float *exact_keys = input_new(room * dim, sizeof(float), 0), *exact_values = input_new(n * dim, sizeof(float), 0);
    for (int64_t p = 0; p < room; p++) {
        for (int64_t d = 0; d < dim; d++) {
            int spoiled = p < first || p >= n;
            exact_keys[(p / 16 * dim + d) * 16 + p % 16] = q8_0_number(keys, values, row_bytes, p, d, 1, spoiled);
            if (p < n) {
                exact_values[p * dim + d] = q8_0_number(keys, values, row_bytes, p, d, 0, spoiled);
            }
        }
    }
    numbers queries = numbers_new(r, n_rows * dim, 0, 1.0f);
    guarded scores = guarded_new((size_t)(4 * room) * sizeof(float), 0);
    guarded got = guarded_new((size_t)(n_rows * dim) * sizeof(float), (size_t)(4 * random_below(r, 16)));
    guarded defined = guarded_new(got.bytes, 0);
    azq_attend_head head = {exact_keys, exact_values, dim, 1.0f / sqrtf((float)dim), random_below(r, 3) ? 0.0f : 2.0f};
    for (int64_t i = 0; i < n_rows; i++) {
        rows[i].query = (float *)queries.data + i * dim;
        rows[i].out = (float *)(void *)defined.data + i * dim;
    }
    definition()->attend_f32(rows, n_rows, &head, (float *)(void *)scores.data, room);
    head.keys = keys;
    head.values = values;
    for (int64_t i = 0; i < n_rows; i++) {
        rows[i].out = (float *)(void *)got.data + i * dim;
    }
    slots->attend_q8_0(rows, n_rows, &head, (float *)(void *)scores.data, room);
    expect(memcmp(got.data, defined.data, got.bytes) == 0, "attend (q8_0), n %d, dim %d, %d rows: other bits", (int)n,
           (int)dim, (int)n_rows);
    expect(guarded_intact(&got) && guarded_intact(&scores), "attend (q8_0), n %d, dim %d: wrote outside", (int)n,
           (int)dim);
    guarded_free(&scores);
    guarded_free(&got);
    guarded_free(&defined);
    numbers_free(&queries);
    input_free(keys, 1, 0);
    input_free(values, 1, 0);
    input_free(exact_keys, sizeof(float), 0);
    input_free(exact_values, sizeof(float), 0);
}

/* ---- norms, softmax, activations, sums ----------------------------------------------------------- */

/* layer_norm with and without bias, rms_norm (kind 2). */
static void check_norm(random_state *r, const azq_kernel_slots *slots, int64_t n, int kind) {
    numbers x = numbers_new(r, n, 0, 2.0f), w = numbers_new(r, n, 0, 1.0f), b = numbers_new(r, n, 0, 1.0f);
    const float *bias = kind == 1 ? b.data : NULL;
    float eps = 1e-5f;
    guarded got = guarded_new((size_t)n * sizeof(float), (size_t)(4 * random_below(r, 16)));
    guarded defined = guarded_new((size_t)n * sizeof(float), 0);
    if (kind == 2) {
        slots->rms_norm(x.data, w.data, eps, (float *)(void *)got.data, n);
        definition()->rms_norm(x.data, w.data, eps, (float *)(void *)defined.data, n);
    } else {
        slots->layer_norm(x.data, w.data, bias, eps, (float *)(void *)got.data, n);
        definition()->layer_norm(x.data, w.data, bias, eps, (float *)(void *)defined.data, n);
    }
    expect(memcmp(got.data, defined.data, got.bytes) == 0, "norm %d, n %d: other bits", kind, (int)n);
    expect(guarded_intact(&got), "norm %d, n %d: wrote outside", kind, (int)n);
    double mean = 0, square = 0;
    for (int64_t i = 0; i < n && kind != 2; i++) {
        mean += x.exact[i] / (double)n;
    }
    for (int64_t i = 0; i < n; i++) {
        square += (x.exact[i] - mean) * (x.exact[i] - mean) / (double)n;
    }
    double scale = 1 / sqrt(square + (double)eps);
    int close = 1;
    for (int64_t i = 0; i < n; i++) {
        double exact = (x.exact[i] - mean) * scale * w.exact[i] + (bias ? b.exact[i] : 0);
        /* the mean is rounded too, which a small deviation makes the most of */
        double bound = ((double)n / 16 + 8) * HALF_ULP * (fabs(exact) + 1 + 2 * scale);
        close &= fabs((double)((float *)(void *)got.data)[i] - exact) <= bound;
    }
    expect(close, "norm %d, n %d: far off", kind, (int)n);
    guarded_free(&got);
    guarded_free(&defined);
    numbers_free(&x);
    numbers_free(&w);
    numbers_free(&b);
}

static void check_softmax(random_state *r, const azq_kernel_slots *slots, int64_t n) {
    static const float spreads[] = {0.0f, 1.0f, 20.0f, 1000.0f};
    numbers x = numbers_new(r, n, 0, spreads[random_below(r, 4)]);
    guarded got = guarded_new((size_t)n * sizeof(float), (size_t)(4 * random_below(r, 16)));
    guarded defined = guarded_new((size_t)n * sizeof(float), 0);
    memcpy(got.data, x.data, got.bytes);
    memcpy(defined.data, x.data, got.bytes);
    float sum = slots->softmax((float *)(void *)got.data, n);
    float want = definition()->softmax((float *)(void *)defined.data, n);
    expect(memcmp(got.data, defined.data, got.bytes) == 0 && same_floats(&sum, &want, 1), "softmax, n %d: other bits",
           (int)n);
    expect(guarded_intact(&got), "softmax, n %d: wrote outside", (int)n);
    double top = x.exact[0], total = 0;
    int close = 1;
    for (int64_t i = 0; i < n; i++) {
        top = x.exact[i] > top ? x.exact[i] : top;
    }
    for (int64_t i = 0; i < n; i++) {
        double exact = exp((double)(float)(x.exact[i] - top));
        double value = (double)((float *)(void *)got.data)[i];
        close &= fabs(value - exact) <= 8 * HALF_ULP * exact + 1e-37; /* smaller ones may be 0 */
        total += value;
    }
    expect(close, "softmax, n %d: far off", (int)n);
    expect(fabs((double)sum - total) <= ((double)n / 16 + 8) * HALF_ULP * total, "softmax, n %d: wrong sum", (int)n);
    guarded_free(&got);
    guarded_free(&defined);
    numbers_free(&x);
}

static double exact_gelu_tanh(double x) {
    return 0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
}
static double exact_gelu_erf(double x) { return 0.5 * x * (1 + erf(x * 0.70710678118654752440)); }
static double exact_silu(double x) { return x / (1 + exp(-x)); }
static double exact_relu(double x) { return x > 0 ? x : 0; }

static void check_map(random_state *r, int64_t n, azq_map_fn *map, azq_map_fn *want, double (*exact)(double),
                      const char *name) {
    static const float spreads[] = {0.1f, 1.0f, 10.0f, 200.0f};
    numbers x = numbers_new(r, n, 0, spreads[random_below(r, 4)]);
    if (random_below(r, 4) == 0) {
        ((float *)x.data)[random_below(r, n)] = NAN; /* must stay where it is */
    }
    guarded got = guarded_new((size_t)n * sizeof(float), (size_t)(4 * random_below(r, 16)));
    guarded defined = guarded_new((size_t)n * sizeof(float), 0);
    memcpy(got.data, x.data, got.bytes);
    memcpy(defined.data, x.data, got.bytes);
    map((float *)(void *)got.data, n);
    want((float *)(void *)defined.data, n);
    const float *y = (float *)(void *)got.data;
    expect(same_floats(y, (float *)(void *)defined.data, n), "%s, n %d: other bits", name, (int)n);
    expect(guarded_intact(&got), "%s, n %d: wrote outside", name, (int)n);
    int close = 1;
    for (int64_t i = 0; i < n; i++) {
        float in = ((float *)x.data)[i];
        double bound = 16 * HALF_ULP * fmax(fabs(x.exact[i]), 1);
        close &= isnan(in) ? isnan(y[i]) : fabs((double)y[i] - exact(x.exact[i])) <= bound;
    }
    expect(close, "%s, n %d: far off", name, (int)n);
    guarded_free(&got);
    guarded_free(&defined);
    numbers_free(&x);
}

static void check_softcap(random_state *r, const azq_kernel_slots *slots, int64_t n) {
    static const float spreads[] = {0.1f, 1.0f, 10.0f, 1000.0f};
    numbers x = numbers_new(r, n, 0, spreads[random_below(r, 4)]);
    float cap = (float)(1 + random_below(r, 60)) * 0.5f;
    if (random_below(r, 4) == 0) {
        ((float *)x.data)[random_below(r, n)] = NAN;
    }
    guarded got = guarded_new((size_t)n * sizeof(float), (size_t)(4 * random_below(r, 16)));
    guarded defined = guarded_new((size_t)n * sizeof(float), 0);
    memcpy(got.data, x.data, got.bytes);
    memcpy(defined.data, x.data, got.bytes);
    float *y = (float *)(void *)got.data;
    slots->softcap(y, n, cap);
    definition()->softcap((float *)(void *)defined.data, n, cap);
    expect(same_floats(y, (float *)(void *)defined.data, n), "softcap, n %d: other bits", (int)n);
    expect(guarded_intact(&got), "softcap, n %d: wrote outside", (int)n);
    int close = 1;
    for (int64_t i = 0; i < n; i++) {
        float in = ((float *)x.data)[i];
        double exact = (double)cap * tanh(x.exact[i] / (double)cap);
        close &= isnan(in) ? isnan(y[i]) : fabs((double)y[i] - exact) <= 12 * HALF_ULP * fabs(exact) + 1e-40;
    }
    expect(close, "softcap, n %d: far off", (int)n);
    guarded_free(&got);
    guarded_free(&defined);
    numbers_free(&x);
}

/* y apart from a and b, and y being b. */
static void check_pairs(random_state *r, int64_t n, azq_pairs_fn *pairs, int product) {
    numbers a = numbers_new(r, n, 0, 2.0f), b = numbers_new(r, n, 0, 2.0f);
    const float *x = a.data, *w = b.data;
    guarded got = guarded_new((size_t)n * sizeof(float), (size_t)(4 * random_below(r, 16)));
    guarded both = guarded_new((size_t)n * sizeof(float), (size_t)(4 * random_below(r, 16)));
    float *y = (float *)(void *)got.data, *z = (float *)(void *)both.data;
    memcpy(z, w, both.bytes);
    pairs(x, w, y, n);
    pairs(x, z, z, n);
    int right = 1;
    for (int64_t i = 0; i < n; i++) {
        right &= y[i] == (product ? x[i] * w[i] : x[i] + w[i]) && z[i] == y[i];
    }
    expect(right, "%s, n %d: other numbers", product ? "product" : "sum", (int)n);
    expect(guarded_intact(&got) && guarded_intact(&both), "%s, n %d: wrote outside", product ? "product" : "sum", (int)n);
    guarded_free(&got);
    guarded_free(&both);
    numbers_free(&a);
    numbers_free(&b);
}

void check_vectors(const char *isa, const azq_kernel_slots *slots, int rounds) {
    const azq_kernel_slots *scalar = definition();
    random_state r = {300};
#define GROUP(name, slot, call)                                \
    group_begin(isa, name);                                    \
    for (int i = 0; i < LENGTHS * 4 * rounds; i++) {           \
        int64_t n = length(i % LENGTHS);                       \
        call;                                                  \
    }                                                          \
    DRIVES(slot);                                              \
    group_end()
    GROUP("attend_f32", attend_f32, check_attend(&r, n, slots->attend_f32, scalar->attend_f32, 0));
    GROUP("attend_f16", attend_f16, check_attend(&r, n, slots->attend_f16, scalar->attend_f16, 1));
    GROUP("attend_q8_0", attend_q8_0, check_attend_q8_0(&r, n, slots));
    GROUP("layer_norm", layer_norm, check_norm(&r, slots, n, i / LENGTHS % 2));
    GROUP("rms_norm", rms_norm, check_norm(&r, slots, n, 2));
    GROUP("softmax", softmax, check_softmax(&r, slots, n));
    GROUP("gelu_tanh", gelu_tanh, check_map(&r, n, slots->gelu_tanh, scalar->gelu_tanh, exact_gelu_tanh, "gelu_tanh"));
    GROUP("gelu_erf", gelu_erf, check_map(&r, n, slots->gelu_erf, scalar->gelu_erf, exact_gelu_erf, "gelu_erf"));
    GROUP("silu", silu, check_map(&r, n, slots->silu, scalar->silu, exact_silu, "silu"));
    GROUP("softcap", softcap, check_softcap(&r, slots, n));
    GROUP("sum", sum, check_pairs(&r, n, slots->sum, 0));
    GROUP("product", product, check_pairs(&r, n, slots->product, 1));
    GROUP("relu", relu, check_map(&r, n, slots->relu, scalar->relu, exact_relu, "relu"));
#undef GROUP
}
