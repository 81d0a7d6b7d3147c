/* The C API under one ISA: rows, matrices and products, for 1 to 4 threads; then bad arguments. */
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "azq_half.h"

static const int TYPES[] = {AZQ_TYPE_F32, AZQ_TYPE_F16, AZQ_TYPE_BF16, AZQ_TYPE_Q4_0, AZQ_TYPE_Q8_0};
enum { N_TYPES = sizeof TYPES / sizeof *TYPES, MAX_THREADS = 4 };

static float *random_floats(random_state *r, int64_t n) {
    float *x = input_new(n, sizeof *x, 0);
    for (int64_t i = 0; i < n; i++) {
        x[i] = random_float(r);
    }
    return x;
}

static uint8_t *quantized(int type, const float *x, int64_t n, int64_t k) {
    uint8_t *blocks = input_new(n * azq_row_bytes(type, k), 1, 0);
    int64_t bad;
    expect(azq_quantize(type, x, n, k, blocks, &bad) == AZQ_OK, "type %d: quantize fails", type);
    return blocks;
}

/* ---- rows ---------------------------------------------------------------------------------------- */

static void check_rows(int type, int64_t rows, int64_t k) {
    random_state r = {(uint64_t)(rows * 100000 + k + type)};
    int64_t row_bytes = azq_row_bytes(type, k), bad = -2;
    float *x = random_floats(&r, rows * k);
    uint8_t *want = input_new(rows * row_bytes, 1, 0);
    float *values = input_new(rows * k, sizeof *values, 0), *turned = input_new(k * rows, sizeof *turned, 0);
    for (int64_t i = 0; i < rows * k; i++) {
        turned[i % k * rows + i / k] = x[i];
    }
    for (int64_t i = 0; i < rows; i++) {
        azq_kernels_scalar.slots.quantize_row[type](x + i * k, want + i * row_bytes, k);
        azq_kernels_scalar.slots.dequantize_row[type](want + i * row_bytes, values + i * k, k);
    }
    for (int threads = 1; threads <= MAX_THREADS; threads++) {
        azq_threads_set(threads);
        guarded got = guarded_new((size_t)(rows * row_bytes), 0), back = guarded_new((size_t)(rows * k) * 4, 0);
        azq_status status = azq_quantize(type, x, rows, k, got.data, &bad);
        expect(status == AZQ_OK && memcmp(got.data, want, got.bytes) == 0 && guarded_intact(&got),
               "type %d, (%d, %d), %d threads: quantize", type, (int)rows, (int)k, threads);
        status = azq_dequantize(type, want, rows, k, (float *)(void *)back.data);
        expect(status == AZQ_OK && memcmp(back.data, values, back.bytes) == 0 && guarded_intact(&back),
               "type %d, (%d, %d), %d threads: dequantize", type, (int)rows, (int)k, threads);
        memset(got.data, 0, got.bytes);
        status = azq_quantize_turned(type, turned, k, rows, got.data, row_bytes);
        expect(status == AZQ_OK && memcmp(got.data, want, got.bytes) == 0 && guarded_intact(&got),
               "type %d, (%d, %d), %d threads: quantize turned", type, (int)rows, (int)k, threads);
        guarded_free(&got);
        guarded_free(&back);
    }
    input_free(x, sizeof *x, 0);
    input_free(turned, sizeof *turned, 0);
    input_free(want, 1, 0);
    input_free(values, sizeof *values, 0);
}

/* Several bad elements in several bands: the first one is named, whatever thread met which. */
static void check_bad_elements(int type) {
    enum { ROWS = 40, K = 4096 };
    random_state r = {9};
    float *x = random_floats(&r, ROWS * K);
    uint8_t *blocks = input_new(ROWS * azq_row_bytes(type, K), 1, 0);
    for (int threads = 1; threads <= MAX_THREADS; threads++) {
        azq_threads_set(threads);
        for (int trial = 0; trial < 20; trial++) {
            int64_t first = ROWS * K, at[3];
            int finite = trial % 2 && azq_row_bytes(type, 1) < 0; /* too large, for types with a scale */
            for (int i = 0; i < 3; i++) {
                at[i] = random_below(&r, ROWS * K);
                x[at[i]] = finite ? 1e30f : i ? NAN : INFINITY;
                first = at[i] < first ? at[i] : first;
            }
            int64_t bad = -1;
            azq_status status = azq_quantize(type, x, trial % 3 ? ROWS : 1, trial % 3 ? K : ROWS * K, blocks, &bad);
            expect(status == (finite ? AZQ_E_RANGE : AZQ_E_NONFINITE) && bad == first,
                   "type %d, %d threads: element %d named, %d is the first", type, threads, (int)bad, (int)first);
            for (int i = 0; i < 3; i++) {
                x[at[i]] = 0.5f;
            }
        }
    }
    input_free(x, sizeof *x, 0);
    input_free(blocks, 1, 0);
}

/* ---- matrices ------------------------------------------------------------------------------------ */

static void check_pack(int type, int64_t n, int64_t k) {
    random_state r = {(uint64_t)(n * 1000 + k)};
    int64_t bytes = n * azq_row_bytes(type, k);
    uint8_t *blocks = input_new(bytes, 1, 0);
    for (int64_t i = 0; i < bytes; i++) {
        blocks[i] = (uint8_t)random_next(&r);
    }
    for (int threads = 1; threads <= MAX_THREADS; threads += 3) {
        azq_threads_set(threads);
        azq_matrix *w;
        expect(azq_matrix_create(type, blocks, n, k, &w) == AZQ_OK, "type %d, (%d, %d): create", type, (int)n, (int)k);
        expect(azq_matrix_packed_bytes(w) == 0, "packed before it was asked for");
        expect(azq_matrix_pack(w) == AZQ_OK && azq_matrix_pack(w) == AZQ_OK, "type %d, (%d, %d): pack", type, (int)n,
               (int)k);
        int64_t packed = azq_matrix_packed_bytes(w), padded = (n + 15) / 16 * 16 * azq_row_bytes(type, k);
        /* Q6_K repeats its super-scale in every block of 32: 7 bits a weight instead of 6.5625. Six-bit scales
         * get a byte each. */
        int64_t repeated = type == AZQ_TYPE_Q6_K ? padded / 14 : block_elements(type) == 256 ? padded / 26 : 0;
        expect(packed >= padded && packed <= padded + repeated + (n + 15) / 16 * 128, "type %d, (%d, %d): %d bytes packed", type,
               (int)n, (int)k, (int)packed);
        guarded back = guarded_new((size_t)bytes, 0);
        expect(azq_matrix_unpack(w, back.data) == AZQ_OK && memcmp(back.data, blocks, back.bytes) == 0 &&
                   guarded_intact(&back),
               "type %d, (%d, %d): unpack gives other bytes", type, (int)n, (int)k);
        guarded_free(&back);
        azq_matrix_free(w);
    }
    input_free(blocks, 1, 0);
}

/* ---- products ------------------------------------------------------------------------------------ */

typedef struct {
    int type, compute;
    int64_t n, k, m, ldx, ldy;
} product;

/* Error of y in L2, relative to the sum of squared products: what |y| is when signs are random, but not 0 when
 * the few sums of a tiny product happen to cancel. */
static double relative_error(const product *p, const float *values, const float *x, const float *y) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < p->m; i++) {
        for (int64_t j = 0; j < p->n; j++) {
            double sum = 0;
            for (int64_t t = 0; t < p->k; t++) {
                double term = (double)x[i * p->ldx + t] * (double)values[j * p->k + t];
                sum += term;
                norm += term * term;
            }
            double off = (double)y[i * p->ldy + j] - sum;
            error += off * off;
        }
    }
    return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

/* `want` (m, ldy): the scalar ISA's result with one thread. */
static void scalar_product(azq_matrix *w, const product *p, const float *x, float *want) {
    char isa[32];
    strncpy(isa, azq_isa_active(), sizeof isa - 1);
    isa[sizeof isa - 1] = 0;
    azq_isa_use("scalar");
    azq_threads_set(1);
    expect(azq_matmul(w, x, p->m, p->ldx, want, p->ldy, p->compute) == AZQ_OK, "scalar product fails");
    azq_isa_use(isa);
}

static void check_product(const product *p) {
    random_state r = {(uint64_t)(p->m * 1000 + p->n)};
    float *weights = random_floats(&r, p->n * p->k), *x = random_floats(&r, p->m * p->ldx);
    uint8_t *blocks = quantized(p->type, weights, p->n, p->k);
    azq_matrix *w;
    expect(azq_matrix_create(p->type, blocks, p->n, p->k, &w) == AZQ_OK, "create");
    size_t bytes = p->m && p->n ? (size_t)((p->m - 1) * p->ldy + p->n) * sizeof(float) : 0;
    guarded want = guarded_new(bytes, 0);
    scalar_product(w, p, x, (float *)(void *)want.data);
    for (int threads = 1; threads <= MAX_THREADS; threads++) {
        azq_threads_set(threads);
        guarded got = guarded_new(bytes, 0);
        azq_status status = azq_matmul(w, x, p->m, p->ldx, (float *)(void *)got.data, p->ldy, p->compute);
        expect(status == AZQ_OK && memcmp(got.data, want.data, bytes) == 0 && guarded_intact(&got),
               "type %d, compute %d, (%d, %d, %d), %d threads: other bits", p->type, p->compute, (int)p->m, (int)p->n,
               (int)p->k, threads);
        guarded_free(&got);
    }
    const float *y = (float *)(void *)want.data;
    if (bytes) {
        float *values = input_new(p->n * p->k, sizeof *values, 0);
        expect(azq_dequantize(p->type, blocks, p->n, p->k, values) == AZQ_OK, "dequantize");
        /* A few sums are a small sample of int8's error. */
        double bound = p->compute == AZQ_COMPUTE_FP32 ? 1e-5 : p->m * p->n < 64 ? 3e-2 : 1e-2;
        double error = relative_error(p, values, x, y);
        expect(error <= bound, "type %d, compute %d, (%d, %d, %d): relative error %g", p->type, p->compute, (int)p->m,
               (int)p->n, (int)p->k, error);
        input_free(values, sizeof *values, 0);
    }
    float *alone = input_new(p->n, sizeof *alone, 0);
    int equal = 1;
    for (int64_t i = 0; i < p->m; i++) {
        azq_status status = azq_matmul(w, x + i * p->ldx, 1, p->ldx, alone, p->ldy, p->compute);
        equal &= status == AZQ_OK && memcmp(alone, y + i * p->ldy, (size_t)p->n * sizeof *alone) == 0;
    }
    expect(equal, "type %d, compute %d, (%d, %d, %d): a row alone has other bits", p->type, p->compute, (int)p->m,
           (int)p->n, (int)p->k);
    input_free(alone, sizeof *alone, 0);
    azq_matrix_free(w);
    guarded_free(&want);
    input_free(weights, sizeof *weights, 0);
    input_free(x, sizeof *x, 0);
    input_free(blocks, 1, 0);
}

void check_api(const char *isa) {
    group_begin(isa, "API: rows");
    for (int i = 0; i < N_TYPES; i++) {
        int64_t elements = block_elements(TYPES[i]);
        check_rows(TYPES[i], 0, 64 * elements);
        check_rows(TYPES[i], 3, 0);
        check_rows(TYPES[i], 1, elements);
        check_rows(TYPES[i], 701, 3 * elements);
        check_rows(TYPES[i], 70, 2048);
        check_rows(TYPES[i], 1, 4 * 65536); /* one long row, cut over the threads */
        check_rows(TYPES[i], 1, 65536 + 32);
        check_bad_elements(TYPES[i]);
    }
    group_end();
    group_begin(isa, "API: pack, unpack");
    static const int64_t ns[] = {0, 1, 15, 16, 17, 33, 64}, ks[] = {0, 32, 96, 128, 160, 416};
    for (int i = 0; i < 42; i++) {
        check_pack(AZQ_TYPE_Q4_0, ns[i % 7], ks[i / 7]);
        check_pack(AZQ_TYPE_Q8_0, ns[i % 7], ks[i / 7]);
        for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
            if (type != AZQ_TYPE_Q4_0 && type != AZQ_TYPE_Q8_0 && azq_has_int8(type)) {
                check_pack(type, ns[i % 7], block_elements(type) == 32 ? ks[i / 7] : 256 * (i / 7));
            }
        }
    }
    group_end();
    group_begin(isa, "API: matmul");
    static const int64_t ms[] = {0, 1, 2, 5, 65, 130}, widths[] = {0, 1, 16, 37, 200};
    for (int type = 0; type < AZQ_TYPE_COUNT; type++) {
        if (!azq_active()->quantize_row[type]) {
            continue;
        }
        for (int j = 0; j < 30; j++) {
            int64_t k = j % 2 ? 256 : block_elements(type) == 256 ? 512 : 96;
            product p = {type, AZQ_COMPUTE_FP32, widths[j / 6], k, ms[j % 6], 0, 0};
            p.ldx = p.k + j % 3;
            p.ldy = p.n + j % 4;
            check_product(&p);
            if (azq_active()->gemm[p.type]) {
                p.compute = AZQ_COMPUTE_INT8;
                check_product(&p);
            }
        }
    }
    group_end();
    azq_threads_set(1);
}

/* ---- bad arguments ------------------------------------------------------------------------------- */

static void refuse(azq_status got, azq_status want, const char *what) {
    expect(got == want, "%s: %s, not %s", what, azq_status_name(got), azq_status_name(want));
}
#define REFUSE(call, status) refuse(call, status, #call)

static void check_row_arguments(void) {
    float ones[64] = {0};
    uint8_t room[64];
    REFUSE(azq_quantize_turned(AZQ_TYPE_Q4_0, ones, 32, 2, room, 17), AZQ_E_SHAPE);
    REFUSE(azq_quantize_turned(AZQ_TYPE_Q4_0, ones, 33, 1, room, 18), AZQ_E_SHAPE);
    REFUSE(azq_quantize_turned(AZQ_TYPE_Q4_0, ones, 32, -1, room, 18), AZQ_E_SHAPE);
    REFUSE(azq_quantize_turned(AZQ_TYPE_Q4_0, NULL, 32, 2, room, 18), AZQ_E_NULL);
    REFUSE(azq_quantize_turned(AZQ_TYPE_Q4_0, ones, 32, 0, room, 18), AZQ_OK);
    ones[5] = NAN;
    REFUSE(azq_quantize_turned(AZQ_TYPE_Q4_0, ones, 32, 2, room, 18), AZQ_E_NONFINITE);
    float x[64] = {0}, y[64];
    uint8_t blocks[256] = {0};
    int64_t bad;
    static const int unknown[] = {-1, 4, 24, AZQ_TYPE_COUNT, AZQ_TYPE_COUNT + 1, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 7; i++) {
        expect(azq_row_bytes(unknown[i], 256) == -1, "row_bytes of type %d", unknown[i]);
        refuse(azq_quantize(unknown[i], x, 1, 32, blocks, &bad), AZQ_E_TYPE, "quantize to an unknown type");
        refuse(azq_dequantize(unknown[i], blocks, 1, 32, y), AZQ_E_TYPE, "dequantize of an unknown type");
    }
    expect(azq_row_bytes(AZQ_TYPE_Q4_0, 33) == -1 && azq_row_bytes(AZQ_TYPE_Q4_0, -32) == -1, "row_bytes");
    expect(azq_row_bytes(AZQ_TYPE_F32, INT64_MAX) == -1, "row_bytes past int64");
    REFUSE(azq_quantize(AZQ_TYPE_Q4_0, x, 1, 33, blocks, &bad), AZQ_E_SHAPE);
    REFUSE(azq_quantize(AZQ_TYPE_Q4_0, x, -1, 32, blocks, &bad), AZQ_E_SHAPE);
    REFUSE(azq_quantize(AZQ_TYPE_Q4_0, x, INT64_MAX / 32, 64, blocks, &bad), AZQ_E_SHAPE);
    REFUSE(azq_quantize(AZQ_TYPE_Q4_0, NULL, 1, 32, blocks, &bad), AZQ_E_NULL);
    REFUSE(azq_quantize(AZQ_TYPE_Q4_0, x, 1, 32, NULL, &bad), AZQ_E_NULL);
    REFUSE(azq_quantize(AZQ_TYPE_Q4_0, x, 1, 32, blocks, NULL), AZQ_E_NULL);
    REFUSE(azq_quantize(AZQ_TYPE_Q4_0, NULL, 0, 32, NULL, NULL), AZQ_OK);
    REFUSE(azq_dequantize(AZQ_TYPE_Q8_0, blocks, 1, 31, y), AZQ_E_SHAPE);
    REFUSE(azq_dequantize(AZQ_TYPE_Q8_0, blocks, -1, 32, y), AZQ_E_SHAPE);
    REFUSE(azq_dequantize(AZQ_TYPE_Q8_0, NULL, 1, 32, y), AZQ_E_NULL);
    REFUSE(azq_dequantize(AZQ_TYPE_Q8_0, blocks, 1, 32, NULL), AZQ_E_NULL);
    REFUSE(azq_dequantize(AZQ_TYPE_Q8_0, NULL, 5, 0, NULL), AZQ_OK);
}

static void check_matrix_arguments(void) {
    uint8_t blocks[64 * 18] = {0};
    float x[64] = {0}, y[64];
    azq_matrix *w = NULL;
    REFUSE(azq_matrix_create(AZQ_TYPE_Q4_0, blocks, 2, 32, NULL), AZQ_E_NULL);
    REFUSE(azq_matrix_create(AZQ_TYPE_Q4_0, NULL, 2, 32, &w), AZQ_E_NULL);
    REFUSE(azq_matrix_create(4, blocks, 2, 32, &w), AZQ_E_TYPE);
    REFUSE(azq_matrix_create(-1, blocks, 2, 32, &w), AZQ_E_TYPE);
    REFUSE(azq_matrix_create(AZQ_TYPE_COUNT, blocks, 2, 32, &w), AZQ_E_TYPE);
    REFUSE(azq_matrix_create(AZQ_TYPE_Q4_0, blocks, 2, 48, &w), AZQ_E_SHAPE);
    REFUSE(azq_matrix_create(AZQ_TYPE_Q4_0, blocks, -1, 32, &w), AZQ_E_SHAPE);
    REFUSE(azq_matrix_create(AZQ_TYPE_Q4_0, blocks, INT64_MAX / 16, 64, &w), AZQ_E_SHAPE);
    REFUSE(azq_matrix_create(AZQ_TYPE_Q4_0, blocks, INT64_MAX, 0, &w), AZQ_E_SHAPE);
    REFUSE(azq_matrix_create(AZQ_TYPE_F16, blocks, 1, INT64_MAX / 4, &w), AZQ_E_SHAPE);
    expect(w == NULL, "a refused matrix is not NULL");
    azq_matrix_free(NULL);
    REFUSE(azq_matrix_pack(NULL), AZQ_E_NULL);
    int64_t found = 0, ends[3] = {1, 2, 4}, wrong[2] = {2, 1};
    int32_t cuts[6] = {7, 7, 7, 7, 7, 7};
    const uint8_t text[] = "abab"; /* a, b, ab */
    REFUSE(azq_vocabulary_cuts(text, NULL, 3, 1, cuts, 1, &found), AZQ_E_NULL);
    REFUSE(azq_vocabulary_cuts(text, ends, 3, 1, NULL, 1, &found), AZQ_E_NULL);
    REFUSE(azq_vocabulary_cuts(text, ends, 3, 1, cuts, 1, NULL), AZQ_E_NULL);
    REFUSE(azq_vocabulary_cuts(text, ends, -1, 1, cuts, 1, &found), AZQ_E_SHAPE);
    REFUSE(azq_vocabulary_cuts(text, wrong, 2, 1, cuts, 1, &found), AZQ_E_SHAPE);
    expect(azq_vocabulary_cuts(text, ends, 3, 1, cuts, 0, &found) == AZQ_OK && found == 1 && cuts[0] == 7, "counted");
    expect(azq_vocabulary_cuts(text, ends, 3, 1, cuts, 2, &found) == AZQ_OK && found == 1 && cuts[0] == 2 &&
               cuts[1] == 0 && cuts[2] == 1 && cuts[3] == 7,
           "ab is a and b");
    REFUSE(azq_matrices_pack(NULL, 1), AZQ_E_NULL);
    REFUSE(azq_matrices_pack(&w, 1), AZQ_E_NULL); /* one of none */
    expect(azq_matrices_pack(NULL, 0) == AZQ_OK, "packing no matrices");
    expect(azq_matrix_packed_bytes(NULL) == 0, "packed_bytes of NULL");
    REFUSE(azq_matmul(NULL, x, 1, 32, y, 2, AZQ_COMPUTE_AUTO), AZQ_E_NULL);

    expect(azq_matrix_create(AZQ_TYPE_F16, blocks, 2, 32, &w) == AZQ_OK, "create");
    REFUSE(azq_matrix_pack(w), AZQ_E_TYPE);
    REFUSE(azq_matmul(w, x, 1, 32, y, 2, AZQ_COMPUTE_INT8), AZQ_E_TYPE);
    azq_matrix_free(w);

    expect(azq_matrix_create(AZQ_TYPE_Q4_0, blocks, 2, 32, &w) == AZQ_OK, "create");
    REFUSE(azq_matrix_unpack(w, blocks), AZQ_E_TYPE); /* not packed yet */
    REFUSE(azq_matrix_unpack(w, NULL), AZQ_E_NULL);
    REFUSE(azq_matmul(w, NULL, 1, 32, y, 2, AZQ_COMPUTE_AUTO), AZQ_E_NULL);
    REFUSE(azq_matmul(w, x, 1, 32, NULL, 2, AZQ_COMPUTE_AUTO), AZQ_E_NULL);
    REFUSE(azq_matmul(w, x, -1, 32, y, 2, AZQ_COMPUTE_AUTO), AZQ_E_SHAPE);
    REFUSE(azq_matmul(w, x, 2, 31, y, 2, AZQ_COMPUTE_AUTO), AZQ_E_SHAPE);
    REFUSE(azq_matmul(w, x, 2, 32, y, 1, AZQ_COMPUTE_AUTO), AZQ_E_SHAPE);
    REFUSE(azq_matmul(w, x, INT64_MAX / 8, 32, y, 2, AZQ_COMPUTE_AUTO), AZQ_E_SHAPE);
    REFUSE(azq_matmul(w, x, 1, 32, y, 2, -1), AZQ_E_TYPE);
    REFUSE(azq_matmul(w, x, 1, 32, y, 2, 99), AZQ_E_TYPE);
    REFUSE(azq_matmul(w, NULL, 0, 32, NULL, 2, AZQ_COMPUTE_AUTO), AZQ_OK);
    azq_matrix_free(w);

    for (int compute = AZQ_COMPUTE_AUTO; compute <= AZQ_COMPUTE_BF16; compute++) { /* sums of nothing are 0 */
        expect(azq_matrix_create(AZQ_TYPE_Q4_0, NULL, 2, 0, &w) == AZQ_OK, "create (2, 0)");
        y[0] = y[1] = 7.0f;
        REFUSE(azq_matmul(w, NULL, 1, 0, y, 2, compute), AZQ_OK);
        expect(y[0] == 0.0f && y[1] == 0.0f, "x (1, 0) times W (2, 0) is not 0");
        REFUSE(azq_matmul(w, NULL, 1, 0, NULL, 2, compute), AZQ_E_NULL);
        azq_matrix_free(w);
    }
}

static void check_other_arguments(void) {
    azq_kv *kv = NULL;
    REFUSE(azq_kv_create(1, 1, 8, 1, 4, AZQ_TYPE_F32, NULL), AZQ_E_NULL);
    REFUSE(azq_kv_create(1, 1, 8, 1, 4, AZQ_TYPE_Q4_0, &kv), AZQ_E_TYPE);
    REFUSE(azq_kv_create(0, 1, 8, 1, 4, AZQ_TYPE_F32, &kv), AZQ_E_SHAPE);
    REFUSE(azq_kv_create(1, -1, 8, 1, 4, AZQ_TYPE_F32, &kv), AZQ_E_SHAPE);
    REFUSE(azq_kv_create(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1, AZQ_TYPE_F32, &kv), AZQ_E_SHAPE);
    expect(kv == NULL && azq_kv_bytes(NULL) == 0, "a refused cache is not NULL");
    azq_kv_free(NULL);
    REFUSE(azq_kv_copy(NULL, 0, 0, 0), AZQ_E_NULL);
    expect(azq_kv_create(2, 3, 16, 2, 4, AZQ_TYPE_F16, &kv) == AZQ_OK && azq_kv_bytes(kv) == 2 * 2 * 3 * 16 * 2 * 4 * 2,
           "azq_kv_bytes");
    REFUSE(azq_kv_copy(kv, 3, 0, 1), AZQ_E_INDEX);
    REFUSE(azq_kv_copy(kv, 0, -1, 1), AZQ_E_INDEX);
    REFUSE(azq_kv_copy(kv, 0, 1, 17), AZQ_E_INDEX);
    REFUSE(azq_kv_copy(kv, 0, 1, -1), AZQ_E_INDEX);
    REFUSE(azq_kv_copy(kv, 0, 2, 8), AZQ_OK);
    azq_kv_free(kv);

    uint64_t lines[16] = {0};
    expect(azq_stream_read(NULL, 0) == 0 && azq_stream_read(lines, sizeof lines) == azq_stream_read(lines, sizeof lines),
           "azq_stream_read");
    expect(azq_peak_int8(10) > 0 && azq_peak_int8(0) == 0, "azq_peak_int8");
    REFUSE(azq_isa_use(NULL), AZQ_E_NULL);
    REFUSE(azq_isa_use("mmx"), AZQ_E_ISA);
    REFUSE(azq_isa_use(""), AZQ_E_ISA);
    expect(azq_isa_name(-1) == NULL && azq_isa_name(azq_isa_count()) == NULL, "azq_isa_name out of range");
    expect(!azq_isa_usable(-1) && !azq_isa_usable(azq_isa_count()), "azq_isa_usable out of range");
    azq_threads_set(-5);
    expect(azq_threads() == 1, "threads below 1");
    azq_threads_set(INT32_MAX);
    expect(azq_threads() == azq_threads_max(), "threads above the most");
    azq_threads_set(1);
    static const int statuses[] = {0, 10, 11, 12, 13, 14, 15, 20, 21, 30};
    for (int i = 0; i < 10; i++) {
        expect(strncmp(azq_status_name(statuses[i]), "AZQ_", 4) == 0, "name of status %d", statuses[i]);
    }
    expect(strncmp(azq_status_name(-7), "unknown", 7) == 0, "name of an unknown status");
}

void check_arguments(void) {
    group_begin("-", "API: bad arguments");
    check_row_arguments();
    check_matrix_arguments();
    check_other_arguments();
    group_end();
}
