/* The same bits on every machine: hashes of what quantizers, int8 products, vector kernels and a small model make
 * of fixed input. bits.h holds what the scalar kernels made on x86-64; every ISA of every architecture must make
 * the same. `make bits` writes it anew, which changes the promise: do it only when a definition has changed. */
#include "check.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char name[40];
    uint64_t hash;
} result;

static const result committed[] = {
#include "bits.h"
    {"", 0},
};

enum { MOST = 200 };
typedef struct {
    result results[MOST];
    int n;
} results;

static void add(results *list, const char *what, int number, const void *data, size_t bytes) {
    if (list->n < MOST) {
        result *r = &list->results[list->n++];
        snprintf(r->name, sizeof r->name, number < 0 ? "%s" : "%s %d", what, number);
        r->hash = fnv1a(data, bytes);
    }
}

/* Numbers like weights with outliers; no NaN, whose bits nobody promises. */
static float *floats_new(uint64_t seed, int64_t n) {
    random_state r = {seed};
    float *x = input_new(n, sizeof *x, 0);
    for (int64_t i = 0; i < n; i++) {
        x[i] = (random_float(&r) + random_float(&r)) * (random_below(&r, 50) ? 1.0f : 20.0f);
    }
    return x;
}

static void floats_free(float *x) { input_free(x, sizeof *x, 0); }

enum { ROWS = 4, K = 512, N = 50, M = 45 };

/* Every type that can be quantized to, with importances and without, and back. */
static void add_types(results *list) {
    float *x = floats_new(900, ROWS * K), *y = floats_new(901, ROWS * K), *importance = floats_new(902, K);
    uint8_t *blocks = input_new(ROWS * K, 4, 0);
    for (int64_t i = 0; i < K; i++) {
        importance[i] = fabsf(importance[i]);
    }
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        int64_t bad, row_bytes = azq_row_bytes(type, K);
        if (row_bytes < 0 || azq_quantize_weighted(type, x, ROWS, K, importance, blocks, &bad) != AZQ_OK) {
            continue;
        }
        add(list, "quantize_weighted", type, blocks, (size_t)(ROWS * row_bytes));
        azq_quantize(type, x, ROWS, K, blocks, &bad);
        add(list, "quantize", type, blocks, (size_t)(ROWS * row_bytes));
        azq_dequantize(type, blocks, ROWS, K, y);
        add(list, "dequantize", type, y, ROWS * K * sizeof *y);
    }
    floats_free(x);
    floats_free(y);
    floats_free(importance);
    input_free(blocks, 4, 0);
}

static void add_act(results *list) {
    enum { BLOCKS = K / 32 };
    float *x = floats_new(910, K), d[BLOCKS];
    int8_t q[K];
    int32_t sum8[BLOCKS], pair[BLOCKS], sum16[2 * BLOCKS];
    azq_active()->quantize_act(x, K, q, d, sum8, pair, sum16);
    add(list, "quantize_act q", -1, q, sizeof q);
    add(list, "quantize_act d", -1, d, sizeof d);
    add(list, "quantize_act sum8", -1, sum8, sizeof sum8);
    add(list, "quantize_act sum8_pair", -1, pair, sizeof pair);
    add(list, "quantize_act sum16", -1, sum16, sizeof sum16);
    floats_free(x);
}

static void add_products(results *list, int type, int compute, const char *what) {
    static const int64_t batches[] = {1, 3, 8, 19, M}; /* 45: enough for the fp32 product to go by planes */
    float *values = floats_new(920, N * K), *x = floats_new(921, M * K), *y = floats_new(922, M * N);
    uint8_t *blocks = input_new(N * K, 4, 0);
    azq_matrix *w;
    int64_t bad;
    if (azq_quantize(type, values, N, K, blocks, &bad) == AZQ_OK &&
        azq_matrix_create(type, blocks, N, K, &w) == AZQ_OK) {
        for (int i = 0; i < 5; i++) {
            char name[32];
            snprintf(name, sizeof name, "matmul %s, type %d, m", what, type);
            if (azq_matmul(w, x, batches[i], K, y, N, compute) == AZQ_OK) {
                add(list, name, (int)batches[i], y, (size_t)batches[i] * N * sizeof *y);
            }
        }
        azq_matrix_free(w);
    }
    floats_free(values);
    floats_free(x);
    floats_free(y);
    input_free(blocks, 4, 0);
}

static void add_maps(results *list) {
    enum { n = 1003 };
    const azq_kernel_slots *slots = azq_active();
    const struct {
        const char *name;
        azq_map_fn *map;
    } maps[] = {{"gelu_tanh", slots->gelu_tanh}, {"gelu_erf", slots->gelu_erf}, {"silu", slots->silu}, {"relu", slots->relu}};
    for (int i = 0; i < 4; i++) {
        float *x = floats_new(930, n);
        maps[i].map(x, n);
        add(list, maps[i].name, -1, x, n * sizeof *x);
        floats_free(x);
    }
    float *x = floats_new(931, n), *w = floats_new(932, 4 * n), *y = floats_new(933, n), dots[4];
    slots->gemm_fp32[AZQ_TYPE_F32](x, n, 1, w, n * (int64_t)sizeof *w, 4, n, 0, dots, 4);
    add(list, "gemm_fp32 f32", -1, dots, sizeof dots);
    slots->layer_norm(x, w, w + n, 1e-5f, y, n);
    add(list, "layer_norm", -1, y, n * sizeof *y);
    slots->rms_norm(x, w, 1e-5f, y, n);
    add(list, "rms_norm", -1, y, n * sizeof *y);
    slots->softcap(x, n, 7.5f);
    add(list, "softcap", -1, x, n * sizeof *x);
    y[0] = slots->softmax(x, n);
    add(list, "softmax", -1, x, n * sizeof *x);
    add(list, "softmax sum", -1, y, sizeof *y);
    floats_free(x);
    floats_free(w);
    floats_free(y);
}

static void add_attention(results *list) {
    enum { n = 144, dim = 72, n_rows = 6 };
    const azq_kernel_slots *slots = azq_active();
    float *queries = floats_new(940, n_rows * dim), *keys = floats_new(941, n * dim), *values = floats_new(942, n * dim);
    float *scores = floats_new(943, 4 * n), *out = floats_new(944, n_rows * dim);
    uint16_t *half_keys = input_new(n * dim, 2, 0), *half_values = input_new(n * dim, 2, 0);
    slots->quantize_row[AZQ_TYPE_F16](keys, half_keys, n * dim);
    slots->quantize_row[AZQ_TYPE_F16](values, half_values, n * dim);
    azq_attend_row rows[n_rows];
    for (int64_t i = 0; i < n_rows; i++) {
        rows[i] = (azq_attend_row){queries + i * dim, out + i * dim, i, n - 5 * i};
    }
    for (int softcap = 0; softcap < 2; softcap++) {
        azq_attend_head head = {keys, values, dim, 0.05f, 3.0f * (float)softcap};
        slots->attend_f32(rows, n_rows, &head, scores, n);
        add(list, "attend_f32, softcap", softcap, out, n_rows * dim * sizeof *out);
        head.keys = half_keys;
        head.values = half_values;
        slots->attend_f16(rows, n_rows, &head, scores, n);
        add(list, "attend_f16, softcap", softcap, out, n_rows * dim * sizeof *out);
    }
    floats_free(queries);
    floats_free(keys);
    floats_free(values);
    floats_free(scores);
    floats_free(out);
    input_free(half_keys, 2, 0);
    input_free(half_values, 2, 0);
}

static void compute(results *list) {
    static const int int8_types[] = {AZQ_TYPE_Q4_0, AZQ_TYPE_Q8_0, AZQ_TYPE_Q6_K};
    static const int fp32_types[] = {AZQ_TYPE_Q4_0, AZQ_TYPE_Q6_K, AZQ_TYPE_F16, AZQ_TYPE_BF16, AZQ_TYPE_F32};
    add_types(list);
    add_act(list);
    for (int i = 0; i < 3; i++) {
        add_products(list, int8_types[i], AZQ_COMPUTE_INT8, "int8");
    }
    for (int i = 0; i < 5; i++) {
        add_products(list, fp32_types[i], AZQ_COMPUTE_FP32, "fp32");
    }
    add_maps(list);
    add_attention(list);
    for (int kv_type = AZQ_TYPE_F32; kv_type <= AZQ_TYPE_F16; kv_type++) {
        size_t bytes;
        float *logits = program_logits(AZQ_COMPUTE_INT8, kv_type, &bytes);
        add(list, "logits int8, cache type", kv_type, logits, bytes);
        floats_free(logits);
        logits = program_logits(AZQ_COMPUTE_FP32, kv_type, &bytes);
        add(list, "logits fp32, cache type", kv_type, logits, bytes);
        floats_free(logits);
    }
}

void check_bits(const char *isa) {
    group_begin(isa, "committed bits");
    results *list = calloc(1, sizeof *list);
    compute(list);
    int n_committed = (int)(sizeof committed / sizeof *committed) - 1;
    expect(list->n == n_committed && list->n < MOST, "%d results, %d committed hashes", list->n, n_committed);
    for (int i = 0; i < list->n && i < n_committed; i++) {
        expect(strcmp(list->results[i].name, committed[i].name) == 0 && list->results[i].hash == committed[i].hash,
               "%s: other bits than committed for %s", list->results[i].name, committed[i].name);
    }
    free(list);
    group_end();
}

void print_bits(void) {
    results *list = calloc(1, sizeof *list);
    azq_isa_use("scalar");
    compute(list);
    printf("/* Made by `make bits`; do not edit. FNV-1a 64 of results of the scalar kernels. */\n");
    for (int i = 0; i < list->n; i++) {
        printf("{\"%s\", 0x%016llxu},\n", list->results[i].name, (unsigned long long)list->results[i].hash);
    }
    free(list);
}
