/* Two-layer models, one with experts, with every kind of op, run whole, in chunks, in company and by several threads:
 * the same bits each time. What the ops compute is held against NumPy in tests/test_program.py. */
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 50, WIDTH = 64, HEADS = 4, KV_HEADS = 2, DIM = 16, FFN = 96, CONTEXT = 40, LAYERS = 2, TOKENS = 23 };
enum { QKV = (HEADS + 2 * KV_HEADS) * DIM, EXPERTS = 5, CHOSEN = 2, INNER = 40 };

typedef struct {
    azq_matrix *w;
    float *floats;
    uint8_t *blocks;
} weight;

enum { EMBEDDING, POSITIONS, WQKV, WO, W_UP, W_GATE, W_DOWN, HEAD, ROUTER, OF_EXPERTS };
enum { N_WEIGHTS = OF_EXPERTS + 3 * EXPERTS };

typedef struct {
    weight weights[N_WEIGHTS];
    azq_matrix *experts[3 * EXPERTS];
    float ones[WIDTH], bias[QKV], frequencies[DIM / 2];
    azq_op ops[LAYERS * 14 + 4];
    int n_ops;
} model;

static weight weight_new(random_state *r, int type, int64_t n, int64_t k) {
    weight made = {NULL, input_new(n * k, sizeof(float), 0), input_new(n * azq_row_bytes(type, k), 1, 0)};
    for (int64_t i = 0; i < n * k; i++) {
        made.floats[i] = random_float(r) * 0.3f;
    }
    int64_t bad;
    expect(azq_quantize(type, made.floats, n, k, made.blocks, &bad) == AZQ_OK, "quantize");
    expect(azq_matrix_create(type, made.blocks, n, k, &made.w) == AZQ_OK, "create");
    return made;
}

enum { X, NORMED, TRIPLE, ATTENDED, UP, GATE, LAST, LOGITS, WORK, N_BUFFERS };
static const azq_buffer BUFFERS[N_BUFFERS] = {
    {WIDTH, 0}, {WIDTH, 0}, {QKV, 0},   {WIDTH, 0}, {FFN, 0},
    {FFN, 0},   {WIDTH, 1}, {VOCAB, 1}, {EXPERTS + CHOSEN * (2 * INNER + WIDTH), 0}};

static azq_op *add(model *m, azq_op_kind kind, int32_t out, int32_t a, int64_t width) {
    azq_op *op = &m->ops[m->n_ops++];
    *op = (azq_op){.kind = (int32_t)kind, .out = out, .a = a, .b = -1, .width = width, .scale = 1.0f, .eps = 1e-5f};
    return op;
}

static azq_op *add_linear(model *m, int32_t out, int32_t a, int which) {
    azq_op *op = add(m, AZQ_OP_LINEAR, out, a, BUFFERS[out].width);
    op->w = m->weights[which].w;
    return op;
}

static void add_experts(model *m) {
    azq_op *op = add(m, AZQ_OP_RMS_NORM, NORMED, X, WIDTH);
    op->vec0 = m->ones;
    op = add(m, AZQ_OP_EXPERTS, X, NORMED, WIDTH);
    op->b = X;
    op->w = m->weights[ROUTER].w;
    op->n_expert = EXPERTS;
    op->n_used = CHOSEN;
    op->work = WORK;
    op->activation = AZQ_ACT_SILU;
    op->experts = m->experts;
}

static model *model_new(int experts) {
    random_state r = {500};
    model *m = calloc(1, sizeof *m);
    const int q4 = AZQ_TYPE_Q4_0;
    m->weights[EMBEDDING] = weight_new(&r, AZQ_TYPE_Q8_0, VOCAB, WIDTH);
    m->weights[POSITIONS] = weight_new(&r, AZQ_TYPE_F32, CONTEXT, WIDTH);
    m->weights[WQKV] = weight_new(&r, q4, QKV, WIDTH);
    m->weights[WO] = weight_new(&r, q4, WIDTH, WIDTH);
    m->weights[W_UP] = weight_new(&r, q4, FFN, WIDTH);
    m->weights[W_GATE] = weight_new(&r, AZQ_TYPE_F16, FFN, WIDTH);
    m->weights[W_DOWN] = weight_new(&r, q4, WIDTH, FFN);
    m->weights[HEAD] = weight_new(&r, AZQ_TYPE_Q8_0, VOCAB, WIDTH);
    random_state more = {501}; /* the other weights stay what they were without these */
    m->weights[ROUTER] = weight_new(&more, AZQ_TYPE_F32, EXPERTS, WIDTH);
    for (int i = 0; i < 3 * EXPERTS; i++) { /* gate and up of 4 bits; 40 is no whole number of blocks for down */
        weight *w = &m->weights[OF_EXPERTS + i];
        *w = i % 3 < 2 ? weight_new(&more, q4, INNER, WIDTH) : weight_new(&more, AZQ_TYPE_F16, WIDTH, INNER);
        m->experts[i] = w->w;
    }
    for (int i = 0; i < WIDTH; i++) {
        m->ones[i] = 1.0f + random_float(&r) * 0.1f;
    }
    for (int i = 0; i < QKV; i++) {
        m->bias[i] = random_float(&r) * 0.1f;
    }
    for (int i = 0; i < DIM / 2; i++) {
        m->frequencies[i] = ldexpf(1.0f, -i);
    }
    azq_op *op = add(m, AZQ_OP_EMBED, X, -1, WIDTH);
    op->w = m->weights[EMBEDDING].w;
    op->w2 = m->weights[POSITIONS].w;
    for (int layer = 0; layer < LAYERS; layer++) {
        op = add(m, layer ? AZQ_OP_RMS_NORM : AZQ_OP_LAYER_NORM, NORMED, X, WIDTH);
        op->vec0 = m->ones;
        op->vec1 = layer ? NULL : m->bias;
        add_linear(m, TRIPLE, NORMED, WQKV)->vec0 = m->bias;
        for (int part = 0; part < 2; part++) { /* queries, then keys */
            op = add(m, AZQ_OP_ROPE, TRIPLE, -1, (part ? KV_HEADS : HEADS) * DIM);
            op->out_col = part ? HEADS * DIM : 0;
            op->n_head = part ? KV_HEADS : HEADS;
            op->head_dim = DIM;
            op->n_rot = DIM;
            op->vec0 = m->frequencies;
            op->rope_mode = layer;
        }
        op = add(m, AZQ_OP_ATTENTION, ATTENDED, TRIPLE, WIDTH);
        op->layer = layer;
        op->n_head = HEADS;
        op->n_head_kv = KV_HEADS;
        op->head_dim = DIM;
        op->scale = 0.25f;
        op->window = layer ? 5 : 0;
        op->softcap = layer ? 2.0f : 0.0f;
        add_linear(m, X, ATTENDED, WO)->b = X;
        op = add(m, AZQ_OP_RMS_NORM, NORMED, X, WIDTH);
        op->vec0 = m->ones;
        add_linear(m, UP, NORMED, W_UP);
        add_linear(m, GATE, NORMED, W_GATE);
        op = add(m, AZQ_OP_GLU, GATE, GATE, FFN);
        op->b = UP;
        op->activation = AZQ_ACT_SILU;
        add_linear(m, X, GATE, W_DOWN)->b = X;
        if (experts) {
            add_experts(m);
        }
    }
    add(m, AZQ_OP_SELECT, LAST, X, WIDTH);
    add_linear(m, LOGITS, LAST, HEAD);
    return m;
}

static void model_free(model *m) {
    for (int i = 0; i < N_WEIGHTS; i++) {
        azq_matrix_free(m->weights[i].w);
        input_free(m->weights[i].floats, sizeof(float), 0);
        input_free(m->weights[i].blocks, 1, 0);
    }
    free(m);
}

/* Logits (TOKENS, VOCAB) of sequence 1, fed `chunk` tokens a step; with `company`, another sequence runs along. */
static int run(const model *m, int compute, int kv_type, int chunk, int company, float *logits) {
    azq_program *p;
    azq_kv *kv;
    if (azq_program_create(m->ops, m->n_ops, BUFFERS, N_BUFFERS, &p) != AZQ_OK) {
        return 0;
    }
    if (azq_kv_create(LAYERS, 2, CONTEXT, KV_HEADS, DIM, kv_type, &kv) != AZQ_OK) {
        azq_program_free(p);
        return 0;
    }
    int good = 1;
    for (int done = 0; done < TOKENS; done += chunk) {
        int n = TOKENS - done < chunk ? TOKENS - done : chunk, total = 0;
        int32_t tokens[2 * TOKENS], sequence[2 * TOKENS], position[2 * TOKENS], rows[TOKENS];
        for (int i = 0; i < n; i++) {
            for (int other = company; other >= 0; other--) { /* interleaved with the other sequence's tokens */
                tokens[total] = other ? (7 * (done + i) + 3) % VOCAB : (done + i) * (done + i) % VOCAB;
                sequence[total] = !other;
                position[total] = done + i;
                if (!other) {
                    rows[i] = total;
                }
                total++;
            }
        }
        good &= azq_program_step(p, kv, compute, total, tokens, sequence, position, n, rows, logits + done * VOCAB) ==
                AZQ_OK;
    }
    azq_kv_free(kv);
    azq_program_free(p);
    return good;
}

float *program_logits(int compute, int kv_type, size_t *bytes) {
    model *m = model_new(0);
    float *logits = input_new(TOKENS * VOCAB, sizeof *logits, 0);
    *bytes = TOKENS * VOCAB * sizeof *logits;
    memset(logits, 0, *bytes);
    azq_threads_set(1);
    run(m, compute, kv_type, TOKENS, 0, logits);
    model_free(m);
    return logits;
}

static void check_step_arguments(const model *m) {
    azq_program *p;
    azq_kv *kv;
    float logits[VOCAB];
    int32_t good[1] = {0}, over[1] = {VOCAB}, minus[1] = {-1}, two[1] = {2}, late[1] = {CONTEXT};
    expect(azq_program_create(m->ops, m->n_ops, BUFFERS, N_BUFFERS, &p) == AZQ_OK, "create");
    expect(azq_kv_create(LAYERS, 2, CONTEXT, KV_HEADS, DIM, AZQ_TYPE_F32, &kv) == AZQ_OK, "create");
#define STEP(kv, compute, n, t, s, pos, n_out, o, l) azq_program_step(p, kv, compute, n, t, s, pos, n_out, o, l)
    const int fp32 = AZQ_COMPUTE_FP32;
    expect(STEP(kv, fp32, 1, good, good, good, 1, good, logits) == AZQ_OK, "a good step");
    expect(STEP(kv, fp32, 1, good, good, good, 0, NULL, NULL) == AZQ_OK, "a step without logits");
    expect(STEP(kv, fp32, 0, good, good, good, 0, NULL, NULL) == AZQ_OK, "a step without tokens");
    expect(STEP(NULL, fp32, 1, good, good, good, 1, good, logits) == AZQ_E_NULL, "no cache");
    expect(STEP(kv, fp32, 1, NULL, good, good, 1, good, logits) == AZQ_E_NULL, "no tokens");
    expect(STEP(kv, fp32, 1, good, good, good, 1, NULL, logits) == AZQ_E_NULL, "no rows");
    expect(STEP(kv, fp32, 1, good, good, good, 1, good, NULL) == AZQ_E_NULL, "no logits");
    expect(STEP(kv, fp32, -1, good, good, good, 1, good, logits) == AZQ_E_SHAPE, "-1 tokens");
    expect(STEP(kv, fp32, 1, good, good, good, -1, good, logits) == AZQ_E_SHAPE, "-1 rows");
    expect(STEP(kv, 99, 1, good, good, good, 1, good, logits) == AZQ_E_TYPE, "compute 99");
    expect(STEP(kv, fp32, 1, over, good, good, 1, good, logits) == AZQ_E_INDEX, "token out of range");
    expect(STEP(kv, fp32, 1, minus, good, good, 1, good, logits) == AZQ_E_INDEX, "token -1");
    expect(STEP(kv, fp32, 1, good, two, good, 1, good, logits) == AZQ_E_INDEX, "sequence out of range");
    expect(STEP(kv, fp32, 1, good, minus, good, 1, good, logits) == AZQ_E_INDEX, "sequence -1");
    expect(STEP(kv, fp32, 1, good, good, late, 1, good, logits) == AZQ_E_INDEX, "position out of range");
    expect(STEP(kv, fp32, 1, good, good, minus, 1, good, logits) == AZQ_E_INDEX, "position -1");
    expect(STEP(kv, fp32, 1, good, good, good, 1, two, logits) == AZQ_E_INDEX, "row out of range");
    azq_kv_free(kv);
    expect(azq_kv_create(LAYERS, 2, CONTEXT, KV_HEADS, DIM + 1, AZQ_TYPE_F32, &kv) == AZQ_OK, "create");
    expect(STEP(kv, fp32, 1, good, good, good, 1, good, logits) == AZQ_E_SHAPE, "another model's cache");
    azq_kv_free(kv);
#undef STEP
    azq_program_free(p);
}

/* Each change to one op of a good program must be refused. */
static void check_bad_programs(model *m) {
    azq_program *p = NULL;
    expect(azq_program_create(NULL, 1, BUFFERS, N_BUFFERS, &p) == AZQ_E_NULL, "no ops");
    expect(azq_program_create(m->ops, m->n_ops, NULL, N_BUFFERS, &p) == AZQ_E_NULL, "no buffers");
    expect(azq_program_create(m->ops, m->n_ops, BUFFERS, N_BUFFERS, NULL) == AZQ_E_NULL, "no out");
    expect(azq_program_create(m->ops, 0, BUFFERS, N_BUFFERS, &p) == AZQ_E_PROGRAM, "0 ops");
    expect(azq_program_create(m->ops, m->n_ops, BUFFERS, 0, &p) == AZQ_E_PROGRAM, "0 buffers");
    expect(azq_program_create(m->ops, m->n_ops - 2, BUFFERS, N_BUFFERS, &p) == AZQ_E_PROGRAM, "no logits at the end");
    azq_program_free(NULL);
#define BAD(index, field, value)                                                                                \
    do {                                                                                                        \
        azq_op kept = m->ops[index];                                                                            \
        m->ops[index].field = value;                                                                            \
        azq_status status = azq_program_create(m->ops, m->n_ops, BUFFERS, N_BUFFERS, &p);                       \
        expect(status == AZQ_E_PROGRAM && p == NULL, "op %d with " #field " = " #value ": %s", index,           \
               azq_status_name(status));                                                                        \
        azq_program_free(p);                                                                                    \
        m->ops[index] = kept;                                                                                   \
    } while (0)
    enum { EMBED_AT, NORM_AT, QKV_AT, ROPE_AT, ATTENTION_AT = 5, OUT_AT, GLU_AT = 10 };
    const int last = m->n_ops - 1, select = m->n_ops - 2;
    BAD(EMBED_AT, kind, 0);
    BAD(EMBED_AT, kind, 99);
    BAD(EMBED_AT, out, -1);
    BAD(EMBED_AT, out, N_BUFFERS);
    BAD(EMBED_AT, out_col, 1);
    BAD(EMBED_AT, out_col, -1);
    BAD(EMBED_AT, width, 0);
    BAD(EMBED_AT, width, WIDTH - 1);
    BAD(EMBED_AT, w, NULL);
    BAD(EMBED_AT, w2, m->weights[W_DOWN].w);
    BAD(NORM_AT, a, -1);
    BAD(NORM_AT, a, LAST);
    BAD(NORM_AT, a_col, 1);
    BAD(NORM_AT, vec0, NULL);
    BAD(QKV_AT, w, NULL);
    BAD(QKV_AT, w, m->weights[WO].w);
    BAD(QKV_AT, a, TRIPLE);
    BAD(QKV_AT, b, N_BUFFERS);
    BAD(QKV_AT, b, X);
    BAD(QKV_AT, activation, 99);
    BAD(QKV_AT, activation, -1);
    BAD(ROPE_AT, vec0, NULL);
    BAD(ROPE_AT, n_head, 0);
    BAD(ROPE_AT, n_rot, DIM + 2);
    BAD(ROPE_AT, n_rot, 3);
    BAD(ROPE_AT, head_dim, -1);
    BAD(ATTENTION_AT, n_head_kv, 3);
    BAD(ATTENTION_AT, n_head_kv, 0);
    BAD(ATTENTION_AT, head_dim, DIM * 2);
    BAD(ATTENTION_AT, layer, -1);
    BAD(ATTENTION_AT, window, -1);
    BAD(ATTENTION_AT, softcap, -1.0f);
    BAD(ATTENTION_AT, softcap, NAN);
    BAD(ATTENTION_AT, a_col, 1);
    BAD(ATTENTION_AT, out, TRIPLE);
    BAD(GLU_AT, b, -1);
    BAD(GLU_AT, out, UP);
    BAD(GLU_AT, a, LOGITS);
    BAD(GLU_AT, activation, 9);
    BAD(select, out, NORMED);
    BAD(select, a, LAST);
    BAD(last, out_col, 1);
    enum { EXPERTS_AT = 13 };
    BAD(EXPERTS_AT, w, NULL);
    BAD(EXPERTS_AT, w, m->weights[WO].w);
    BAD(EXPERTS_AT, width, WIDTH - 1);
    BAD(EXPERTS_AT, a, X);
    BAD(EXPERTS_AT, a, LAST);
    BAD(EXPERTS_AT, a_col, 1);
    BAD(EXPERTS_AT, b, LOGITS);
    BAD(EXPERTS_AT, n_expert, 0);
    BAD(EXPERTS_AT, n_expert, EXPERTS - 1);
    BAD(EXPERTS_AT, n_expert, AZQ_MAX_EXPERTS + 1);
    BAD(EXPERTS_AT, n_used, 0);
    BAD(EXPERTS_AT, n_used, CHOSEN + 1);
    BAD(EXPERTS_AT, n_used, EXPERTS + 1);
    BAD(EXPERTS_AT, work, -1);
    BAD(EXPERTS_AT, work, N_BUFFERS);
    BAD(EXPERTS_AT, work, NORMED);
    BAD(EXPERTS_AT, work, X);
    BAD(EXPERTS_AT, work, UP);
    BAD(EXPERTS_AT, work, LAST);
    BAD(EXPERTS_AT, activation, 9);
    BAD(EXPERTS_AT, experts, NULL);
    for (int i = 0; i < 3 * EXPERTS; i += 7) { /* a gate, an up, a down */
        azq_matrix *kept = m->experts[i];
        m->experts[i] = NULL;
        BAD(EXPERTS_AT, out, X);
        m->experts[i] = m->weights[W_UP].w;
        BAD(EXPERTS_AT, out, X);
        m->experts[i] = kept;
    }
#undef BAD
    azq_buffer buffers[N_BUFFERS];
    memcpy(buffers, BUFFERS, sizeof buffers);
    buffers[UP].width = 0;
    expect(azq_program_create(m->ops, m->n_ops, buffers, N_BUFFERS, &p) == AZQ_E_PROGRAM, "a buffer of width 0");
}

void check_programs(const char *isa) {
    enum { BYTES = TOKENS * VOCAB * sizeof(float) };
    static const int chunks[] = {1, 2, 7, 8, 9, TOKENS};
    group_begin(isa, "programs");
    float *want = input_new(TOKENS * VOCAB, sizeof *want, 0), *got = input_new(TOKENS * VOCAB, sizeof *got, 0);
    for (int way = 0; way < 8; way++) {
        const int compute = way & 1 ? AZQ_COMPUTE_FP32 : AZQ_COMPUTE_INT8;
        const int kv_type = way & 2 ? AZQ_TYPE_F16 : AZQ_TYPE_F32;
        model *m = model_new(way & 4);
        azq_threads_set(1);
        azq_isa_use("scalar");
        expect(run(m, compute, kv_type, TOKENS, 0, want), "the scalar run");
        azq_isa_use(isa);
        for (int i = 0; i < 48; i++) {
            int threads = i % 4 + 1, chunk = chunks[i / 4 % 6], company = i / 24;
            azq_threads_set(threads);
            memset(got, 0, BYTES);
            expect(run(m, compute, kv_type, chunk, company, got) && memcmp(got, want, BYTES) == 0,
                   "compute %d, cache type %d, chunks of %d, %d threads, company %d, experts %d: other bits", compute,
                   kv_type, chunk, threads, company, way & 4);
        }
        model_free(m);
    }
    azq_threads_set(1);
    model *m = model_new(1);
    check_step_arguments(m);
    check_bad_programs(m);
    model_free(m);
    input_free(want, sizeof *want, 0);
    input_free(got, sizeof *got, 0);
    group_end();
}
