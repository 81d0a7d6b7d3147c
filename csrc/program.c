/* Programs: checking the list of ops, the memory of a step, running it. */
#include "program.h"
#include <stdlib.h>
#include <string.h>
#include "threads.h"

/* ---- checks ------------------------------------------------------------------------------------- */

static int has_columns(const azq_program *p, int32_t buffer, int64_t col, int64_t width) {
    return buffer >= 0 && buffer < p->n_buffers && col >= 0 && width > 0 && width <= p->buffers[buffer].width &&
           col <= p->buffers[buffer].width - width;
}

/* out and a hold rows of the same kind (tokens or outputs). */
static int same_rows(const azq_program *p, const azq_op *op, int32_t other) {
    return p->buffers[op->out].outputs == p->buffers[other].outputs;
}

/* The columns written overlap those read there. */
static int overlaps(const azq_op *op, int32_t buffer, int64_t col) {
    return op->out == buffer && op->out_col < col + op->width && col < op->out_col + op->width;
}

/* An element of out may be computed from the same element, not from its neighbours. */
static int aligned(const azq_op *op, int32_t buffer, int64_t col) {
    return !overlaps(op, buffer, col) || op->out_col == col;
}

static int check_op(const azq_program *p, const azq_op *op) {
    if (!has_columns(p, op->out, op->out_col, op->width)) {
        return 0;
    }
    int outputs = p->buffers[op->out].outputs;
    switch (op->kind) {
    case AZQ_OP_EMBED:
        return !outputs && op->w && op->w->k == op->width &&
               (!op->w2 || (op->w2->k == op->width && azq_row_bytes(op->w2->type, 256) > 0));
    case AZQ_OP_LAYER_NORM:
    case AZQ_OP_RMS_NORM:
        return has_columns(p, op->a, op->a_col, op->width) && same_rows(p, op, op->a) && op->vec0 &&
               aligned(op, op->a, op->a_col) && op->n_head >= 0 && (op->n_head == 0 || op->width % op->n_head == 0);
    case AZQ_OP_LINEAR:
        return op->w && op->w->n == op->width && has_columns(p, op->a, op->a_col, op->w->k) && op->out != op->a &&
               same_rows(p, op, op->a) &&
               (op->b < 0 || (has_columns(p, op->b, op->b_col, op->width) && same_rows(p, op, op->b) &&
                              aligned(op, op->b, op->b_col))) &&
               op->activation >= AZQ_ACT_NONE && op->activation <= AZQ_ACT_RELU;
    case AZQ_OP_ROPE:
        return !outputs && op->vec0 && op->n_head > 0 && op->head_dim > 0 && op->n_rot > 0 && op->n_rot % 2 == 0 &&
               op->n_rot <= op->head_dim && op->width == (int64_t)op->n_head * op->head_dim;
    case AZQ_OP_ATTENTION:
        return !outputs && op->n_head > 0 && op->n_head_kv > 0 && op->head_dim > 0 && op->n_head % op->n_head_kv == 0 &&
               op->layer >= 0 && op->window >= 0 && op->softcap >= 0.0f &&
               op->width == (int64_t)op->n_head * op->head_dim && op->out != op->a &&
               has_columns(p, op->a, op->a_col, ((int64_t)op->n_head + 2 * (int64_t)op->n_head_kv) * op->head_dim) &&
               same_rows(p, op, op->a);
    case AZQ_OP_GLU:
        return has_columns(p, op->a, op->a_col, op->width) && has_columns(p, op->b, op->b_col, op->width) &&
               same_rows(p, op, op->a) && same_rows(p, op, op->b) && !overlaps(op, op->b, op->b_col) &&
               op->activation >= AZQ_ACT_NONE && op->activation <= AZQ_ACT_RELU;
    case AZQ_OP_ADD:
        return has_columns(p, op->a, op->a_col, op->width) && has_columns(p, op->b, op->b_col, op->width) &&
               same_rows(p, op, op->a) && same_rows(p, op, op->b) && aligned(op, op->a, op->a_col) &&
               aligned(op, op->b, op->b_col);
    case AZQ_OP_SOFTCAP:
        return has_columns(p, op->a, op->a_col, op->width) && same_rows(p, op, op->a) && op->softcap > 0.0f &&
               aligned(op, op->a, op->a_col);
    case AZQ_OP_EXPERTS:
        return !outputs && op->w && has_columns(p, op->a, op->a_col, op->w->k) && op->out != op->a &&
               same_rows(p, op, op->a) &&
               (op->b < 0 || (has_columns(p, op->b, op->b_col, op->width) && same_rows(p, op, op->b) &&
                              aligned(op, op->b, op->b_col))) &&
               op->activation >= AZQ_ACT_NONE && op->activation <= AZQ_ACT_RELU && azq_check_experts(p, op);
    case AZQ_OP_SELECT:
        return outputs && has_columns(p, op->a, op->a_col, op->width) && !p->buffers[op->a].outputs;
    default: return 0;
    }
}

/* ---- life --------------------------------------------------------------------------------------- */

static void free_rows(azq_program *p, int outputs) {
    for (int64_t i = 0; i < p->n_buffers; i++) {
        if ((p->buffers[i].outputs != 0) == outputs) {
            azq_free(p->data[i]);
            p->data[i] = NULL;
        }
    }
    *(outputs ? &p->output_rows : &p->token_rows) = 0;
}

azq_status azq_program_create(const azq_op *ops, int64_t n_ops, const azq_buffer *buffers, int64_t n_buffers,
                              azq_program **out) {
    if (!ops || !buffers || !out) {
        return AZQ_E_NULL;
    }
    *out = NULL;
    if (n_ops < 1 || n_ops > 1 << 20 || n_buffers < 1 || n_buffers > 1 << 16) {
        return AZQ_E_PROGRAM;
    }
    azq_program *p = calloc(1, sizeof *p);
    if (!p) {
        return AZQ_E_NOMEM;
    }
    p->n_ops = n_ops;
    p->n_buffers = n_buffers;
    p->ops = malloc((size_t)n_ops * sizeof *ops);
    p->buffers = malloc((size_t)n_buffers * sizeof *buffers);
    p->data = calloc((size_t)n_buffers, sizeof *p->data);
    p->next = calloc((size_t)n_ops, sizeof *p->next);
    if (!p->next || !p->ops || !p->buffers || !p->data) {
        azq_program_free(p);
        return AZQ_E_NOMEM;
    }
    memcpy(p->ops, ops, (size_t)n_ops * sizeof *ops);
    memcpy(p->buffers, buffers, (size_t)n_buffers * sizeof *buffers);
    int good = 1;
    for (int64_t i = 0; i < n_buffers; i++) {
        good &= p->buffers[i].width > 0 && p->buffers[i].width < 1 << 28;
    }
    for (int64_t i = 0; good && i < n_ops; i++) {
        good &= check_op(p, &p->ops[i]);
    }
    const azq_op *last = &p->ops[n_ops - 1];
    good = good && p->buffers[last->out].outputs && last->out_col == 0 && last->width == p->buffers[last->out].width;
    if (!good) {
        azq_program_free(p);
        return AZQ_E_PROGRAM;
    }
    const azq_matrix *next = NULL;
    for (int64_t i = 2 * n_ops - 1; i >= 0; i--) { /* the list begins anew with the next token */
        p->next[i % n_ops] = next;
        if (ops[i % n_ops].kind == AZQ_OP_LINEAR || ops[i % n_ops].kind == AZQ_OP_EXPERTS) { /* those by the router */
            next = ops[i % n_ops].w;
        }
    }
    *out = p;
    return AZQ_OK;
}

void azq_program_free(azq_program *p) {
    if (!p) {
        return;
    }
    if (p->data && p->buffers) {
        free_rows(p, 0);
        free_rows(p, 1);
    }
    azq_scratch_free(&p->scratch);
    azq_free(p->rope_table);
    azq_free(p->scores);
    free(p->spans);
    free(p->routes);
    free(p->next);
    free(p->ops);
    free(p->buffers);
    free(p->data);
    free(p);
}

/* ---- one step ----------------------------------------------------------------------------------- */

static azq_status reserve_rows(azq_program *p, int outputs, int64_t rows) {
    if (rows <= (outputs ? p->output_rows : p->token_rows)) {
        return AZQ_OK;
    }
    free_rows(p, outputs);
    for (int64_t i = 0; i < p->n_buffers; i++) {
        if ((p->buffers[i].outputs != 0) != outputs) {
            continue;
        }
        if (i == p->ops[p->n_ops - 1].out) {
            continue; /* lives in the caller's logits */
        }
        p->data[i] = azq_alloc((size_t)rows * (size_t)p->buffers[i].width * sizeof(float));
        if (!p->data[i]) {
            free_rows(p, outputs);
            return AZQ_E_NOMEM;
        }
    }
    if (!outputs) {
        free(p->spans);
        p->spans = malloc((size_t)rows * sizeof *p->spans);
        if (!p->spans) {
            free_rows(p, outputs);
            return AZQ_E_NOMEM;
        }
    }
    *(outputs ? &p->output_rows : &p->token_rows) = rows;
    return AZQ_OK;
}

static void find_spans(azq_program *p, const azq_step *step) {
    p->n_spans = 0;
    for (int64_t t = 0; t < step->n_tokens; t++) {
        azq_span *last = p->n_spans ? &p->spans[p->n_spans - 1] : NULL;
        if (last && last->n < AZQ_SPAN_TOKENS && step->sequence[t] == step->sequence[last->row]) {
            last->n++;
        } else {
            p->spans[p->n_spans++] = (azq_span){t, 1};
        }
    }
    enum { MOST_COMPARED = 64 };
    p->lone_spans = p->n_spans <= MOST_COMPARED;
    for (int64_t i = 0; p->lone_spans && i < p->n_spans; i++) {
        for (int64_t j = 0; j < i; j++) {
            p->lone_spans &= step->sequence[p->spans[i].row] != step->sequence[p->spans[j].row];
        }
    }
}

static azq_status check_batch(const azq_program *p, const azq_step *step) {
    int64_t vocabulary = INT64_MAX, positions = step->kv->n_ctx;
    for (int64_t i = 0; i < p->n_ops; i++) {
        if (p->ops[i].kind == AZQ_OP_EMBED) {
            vocabulary = p->ops[i].w->n < vocabulary ? p->ops[i].w->n : vocabulary;
            positions = p->ops[i].w2 && p->ops[i].w2->n < positions ? p->ops[i].w2->n : positions;
        }
    }
    for (int64_t t = 0; t < step->n_tokens; t++) {
        if (step->tokens[t] < 0 || step->tokens[t] >= vocabulary || step->sequence[t] < 0 ||
            step->sequence[t] >= step->kv->n_seq || step->position[t] < 0 || step->position[t] >= positions) {
            return AZQ_E_INDEX;
        }
    }
    for (int64_t i = 0; i < step->n_out; i++) {
        if (step->out_rows[i] < 0 || step->out_rows[i] >= step->n_tokens) {
            return AZQ_E_INDEX;
        }
    }
    return AZQ_OK;
}

azq_status azq_program_step(azq_program *p, azq_kv *kv, int compute, int64_t n_tokens, const int32_t *tokens,
                            const int32_t *sequence, const int32_t *position, int64_t n_out,
                            const int32_t *out_rows, float *logits) {
    if (!p || !kv || !tokens || !sequence || !position || (n_out > 0 && (!out_rows || !logits))) {
        return AZQ_E_NULL;
    }
    if (n_tokens < 0 || n_tokens > 1 << 20 || n_out < 0 || n_out > 1 << 20) {
        return AZQ_E_SHAPE;
    }
    if (compute < AZQ_COMPUTE_AUTO || compute > AZQ_COMPUTE_BF16) {
        return AZQ_E_TYPE;
    }
    azq_step step = {azq_active(), kv, compute, n_tokens, n_out, tokens, sequence, position, out_rows};
    azq_status status = check_batch(p, &step);
    if (status == AZQ_OK) {
        status = reserve_rows(p, 0, n_tokens);
    }
    if (status == AZQ_OK) {
        status = reserve_rows(p, 1, n_out);
    }
    if (status == AZQ_OK) {
        find_spans(p, &step);
    }
    int32_t last = p->ops[p->n_ops - 1].out;
    p->data[last] = logits;
    p->rope_of = NULL;
    p->scratch.act_of = NULL;
    for (int64_t i = 0; status == AZQ_OK && i < p->n_ops; i++) {
        int64_t rows = p->buffers[p->ops[i].out].outputs ? n_out : n_tokens;
        int64_t begun = p->seconds ? azq_nanoseconds() : 0;
        if (rows > 0) {
            status = azq_run_op(p, &p->ops[i], &step);
        }
        if (p->seconds) {
            p->seconds[i] += (double)(azq_nanoseconds() - begun) * 1e-9;
        }
    }
    p->data[last] = NULL;
    return status;
}

azq_status azq_program_measure(azq_program *p, double *seconds) {
    if (!p) {
        return AZQ_E_NULL;
    }
    p->seconds = seconds;
    return AZQ_OK;
}
