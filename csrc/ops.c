/* Each op of a program, one function an op: rows (or rows x heads) over the threads. */
#include <math.h>
#include <string.h>
#include "program.h"
#include "threads.h"

typedef struct {
    azq_program *p;
    const azq_op *op;
    const azq_step *step;
    int64_t rows;
} op_job;

enum { ROWS_PER_TASK = 8, HEADS_PER_TASK = 4 };

static float *row_of(const azq_program *p, int32_t buffer, int64_t row, int64_t col) {
    return p->data[buffer] + row * p->buffers[buffer].width + col;
}

typedef void row_fn(const op_job *job, int64_t row);

typedef struct {
    op_job job;
    row_fn *fn;
} row_job;

static void row_task(void *context, int64_t task, int worker) {
    (void)worker;
    const row_job *rows = context;
    int64_t first = task * ROWS_PER_TASK;
    int64_t end = first + ROWS_PER_TASK < rows->job.rows ? first + ROWS_PER_TASK : rows->job.rows;
    for (int64_t row = first; row < end; row++) {
        rows->fn(&rows->job, row);
    }
}

static void for_each_row(azq_program *p, const azq_op *op, const azq_step *step, row_fn *fn) {
    int64_t rows = p->buffers[op->out].outputs ? step->n_out : step->n_tokens;
    row_job job = {{p, op, step, rows}, fn};
    azq_parallel((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, AZQ_MAX_THREADS, row_task, &job);
}

/* ---- embedding ---------------------------------------------------------------------------------- */

static void embed_row(const op_job *job, int64_t row) {
    const azq_op *op = job->op;
    const azq_kernel_slots *kernels = job->step->kernels;
    float *out = row_of(job->p, op->out, row, op->out_col);
    const azq_matrix *w = op->w;
    kernels->dequantize_row[w->type](w->data + job->step->tokens[row] * w->row_bytes, out, w->k);
    if (op->scale != 1.0f) {
        for (int64_t i = 0; i < w->k; i++) {
            out[i] *= op->scale;
        }
    }
    if (op->w2) {
        const uint8_t *data = op->w2->data + job->step->position[row] * op->w2->row_bytes;
        float positions[256];
        int64_t block = 256, row_bytes = azq_row_bytes(op->w2->type, block);
        for (int64_t i = 0; i < w->k; i += block, data += row_bytes) {
            int64_t n = w->k - i < block ? w->k - i : block;
            kernels->dequantize_row[op->w2->type](data, positions, n);
            for (int64_t j = 0; j < n; j++) {
                out[i + j] += positions[j];
            }
        }
    }
}

/* ---- norms -------------------------------------------------------------------------------------- */

static void norm_row(const op_job *job, int64_t row) {
    const azq_op *op = job->op;
    const float *a = row_of(job->p, op->a, row, op->a_col);
    float *out = row_of(job->p, op->out, row, op->out_col);
    int64_t width = op->n_head > 0 ? op->width / op->n_head : op->width;
    for (int64_t col = 0; col < op->width; col += width) {
        if (op->kind == AZQ_OP_LAYER_NORM) {
            job->step->kernels->layer_norm(a + col, op->vec0, op->vec1, op->eps, out + col, width);
        } else {
            job->step->kernels->rms_norm(a + col, op->vec0, op->eps, out + col, width);
        }
    }
}

/* ---- linear ------------------------------------------------------------------------------------- */

azq_map_fn *azq_activation_of(const azq_kernel_slots *kernels, int32_t activation) {
    switch (activation) {
    case AZQ_ACT_GELU_TANH: return kernels->gelu_tanh;
    case AZQ_ACT_GELU_ERF: return kernels->gelu_erf;
    case AZQ_ACT_SILU: return kernels->silu;
    case AZQ_ACT_RELU: return kernels->relu;
    default: return NULL;
    }
}

static azq_status run_linear(azq_program *p, const azq_op *op, const azq_step *step) {
    int64_t rows = p->buffers[op->out].outputs ? step->n_out : step->n_tokens;
    azq_linear layer = {.w = op->w, .bias = op->vec0, .activation = azq_activation_of(step->kernels, op->activation),
                        .next = p->next[op - p->ops]};
    if (op->b >= 0) {
        layer.residual = row_of(p, op->b, 0, op->b_col);
        layer.ld_residual = p->buffers[op->b].width;
    }
    return azq_linear_run(&layer, &p->scratch, row_of(p, op->a, 0, op->a_col), rows, p->buffers[op->a].width,
                          row_of(p, op->out, 0, op->out_col), p->buffers[op->out].width, step->compute);
}

/* ---- gated activation ---------------------------------------------------------------------------- */

static void glu_row(const op_job *job, int64_t row) {
    const azq_op *op = job->op;
    float *out = row_of(job->p, op->out, row, op->out_col);
    const float *b = row_of(job->p, op->b, row, op->b_col);
    memmove(out, row_of(job->p, op->a, row, op->a_col), (size_t)op->width * sizeof *out);
    azq_map_fn *activation = azq_activation_of(job->step->kernels, op->activation);
    if (activation) {
        activation(out, op->width);
    }
    job->step->kernels->product(out, b, out, op->width);
}

/* ---- sum, soft-cap ------------------------------------------------------------------------------- */

static void add_row(const op_job *job, int64_t row) {
    const azq_op *op = job->op;
    const float *a = row_of(job->p, op->a, row, op->a_col), *b = row_of(job->p, op->b, row, op->b_col);
    float *out = row_of(job->p, op->out, row, op->out_col);
    for (int64_t i = 0; i < op->width; i++) {
        out[i] = a[i] * op->scale + b[i];
    }
}

static void softcap_row(const op_job *job, int64_t row) {
    const azq_op *op = job->op;
    const float *a = row_of(job->p, op->a, row, op->a_col);
    float *out = row_of(job->p, op->out, row, op->out_col);
    memmove(out, a, (size_t)op->width * sizeof *out);
    job->step->kernels->softcap(out, op->width, op->softcap);
}

/* ---- rope --------------------------------------------------------------------------------------- */

/* The angle is position * frequency rounded to fp32; its cosine and sine come from double, so they are the nearest
 * fp32 numbers but for the rare ones that lie within libm's error of the middle of two. One table serves all layers
 * of a step. */
static void rope_table_row(const op_job *job, int64_t row) {
    int64_t half = job->op->n_rot / 2;
    float *cosines = job->p->rope_table + row * 2 * half, *sines = cosines + half;
    for (int64_t i = 0; i < half; i++) {
        double angle = (double)((float)job->step->position[row] * job->op->vec0[i]);
        cosines[i] = (float)cos(angle) * job->op->scale;
        sines[i] = (float)sin(angle) * job->op->scale;
    }
}

static void rope_row(const op_job *job, int64_t row) {
    const azq_op *op = job->op;
    int64_t half = op->n_rot / 2;
    const float *cosines = job->p->rope_table + row * 2 * half, *sines = cosines + half;
    int64_t step = op->rope_mode == AZQ_ROPE_NEOX ? 1 : 2, apart = op->rope_mode == AZQ_ROPE_NEOX ? half : 1;
    for (int64_t head = 0; head < op->n_head; head++) {
        float *x = row_of(job->p, op->out, row, op->out_col + head * op->head_dim);
        for (int64_t i = 0; i < half; i++) {
            float first = x[i * step], second = x[i * step + apart];
            x[i * step] = first * cosines[i] - second * sines[i];
            x[i * step + apart] = first * sines[i] + second * cosines[i];
        }
    }
}

static azq_status run_rope(azq_program *p, const azq_op *op, const azq_step *step) {
    const azq_op *made = p->rope_of;
    if (!made || made->vec0 != op->vec0 || made->n_rot != op->n_rot || made->scale != op->scale) {
        size_t floats = (size_t)(step->n_tokens * op->n_rot);
        p->rope_of = NULL;
        if (floats > p->rope_floats) {
            azq_free(p->rope_table);
            p->rope_floats = 0;
            p->rope_table = azq_alloc(floats * sizeof(float));
            if (!p->rope_table) {
                return AZQ_E_NOMEM;
            }
            p->rope_floats = floats;
        }
        for_each_row(p, op, step, rope_table_row);
        p->rope_of = op;
    }
    for_each_row(p, op, step, rope_row);
    return AZQ_OK;
}

/* ---- attention ---------------------------------------------------------------------------------- */

typedef struct {
    op_job job;
    int64_t heads_per_task, head_tasks; /* kv heads of one task; tasks of one span */
    int stores;                         /* each task stores its keys and values first */
} attention_job;

static void store_kv(const op_job *job, int64_t row, int64_t head) {
    const azq_op *op = job->op;
    const azq_step *step = job->step;
    const float *k = row_of(job->p, op->a, row, op->a_col + (op->n_head + head) * op->head_dim);
    const float *v = k + op->n_head_kv * op->head_dim;
    azq_kv_store(step->kv, step->kernels, op->layer, step->sequence[row], head, step->position[row], k, v);
}

static void store_span(const op_job *job, const azq_span *span, int64_t head) {
    for (int64_t row = span->row; row < span->row + span->n; row++) {
        store_kv(job, row, head);
    }
}

/* A span of tokens of one sequence, for one kv head: every query head that shares it. */
static void attend_span(const op_job *job, const azq_span *span, int64_t kv_head, float *scores) {
    const azq_op *op = job->op;
    const azq_step *step = job->step;
    const azq_kv *kv = step->kv;
    int64_t group = op->n_head / op->n_head_kv, dim = op->head_dim;
    size_t base = azq_kv_offset(kv, op->layer, step->sequence[span->row], kv_head);
    azq_attend_fn *attend = azq_kv_attend(kv, step->kernels);
    azq_attend_head head_cache = {kv->keys + base, kv->values + base, dim, op->scale, op->softcap};
    azq_attend_row rows[AZQ_SPAN_ROWS];
    int64_t n = 0;
    for (int64_t row = span->row; row < span->row + span->n; row++) {
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            int64_t end = step->position[row] + 1;
            rows[n++] = (azq_attend_row){row_of(job->p, op->a, row, op->a_col + head * dim),
                                         row_of(job->p, op->out, row, op->out_col + head * dim),
                                         op->window > 0 && end > op->window ? end - op->window : 0, end};
            if (n == AZQ_SPAN_ROWS) {
                attend(rows, n, &head_cache, scores, job->p->score_columns);
                n = 0;
            }
        }
    }
    attend(rows, n, &head_cache, scores, job->p->score_columns);
}

static void attention_heads(const attention_job *attention, int64_t task, const azq_span **span, int64_t *first,
                            int64_t *end) {
    int64_t n_head_kv = attention->job.op->n_head_kv;
    *span = &attention->job.p->spans[task / attention->head_tasks];
    *first = task % attention->head_tasks * attention->heads_per_task;
    *end = *first + attention->heads_per_task < n_head_kv ? *first + attention->heads_per_task : n_head_kv;
}

static void store_task(void *context, int64_t task, int worker) {
    (void)worker;
    const attention_job *attention = context;
    const azq_span *span;
    int64_t head, end;
    for (attention_heads(attention, task, &span, &head, &end); head < end; head++) {
        store_span(&attention->job, span, head);
    }
}

static void attention_task(void *context, int64_t task, int worker) {
    const attention_job *attention = context;
    const azq_program *p = attention->job.p;
    const azq_span *span;
    int64_t head, end;
    float *scores = p->scores + (size_t)worker * 4 * (size_t)p->score_columns;
    for (attention_heads(attention, task, &span, &head, &end); head < end; head++) {
        if (attention->stores) {
            store_span(&attention->job, span, head);
        }
        attend_span(&attention->job, span, head, scores);
    }
}

static azq_status run_attention(azq_program *p, const azq_op *op, const azq_step *step) {
    const azq_kv *kv = step->kv;
    if (op->layer >= kv->n_layer || op->n_head_kv != kv->n_head_kv || op->head_dim != kv->head_dim) {
        return AZQ_E_SHAPE;
    }
    int workers = azq_threads();
    if (workers > p->score_workers || kv->room > p->score_columns) {
        azq_free(p->scores);
        p->score_workers = 0;
        p->scores = azq_alloc((size_t)(4 * kv->room * workers) * sizeof(float));
        if (!p->scores) {
            return AZQ_E_NOMEM;
        }
        p->score_columns = kv->room;
        p->score_workers = workers;
    }
    /* A few heads at a time where there are many tasks: one after the other lies in memory. */
    int64_t heads = p->n_spans * op->n_head_kv / (2 * azq_threads());
    heads = heads < 1 ? 1 : heads > HEADS_PER_TASK ? HEADS_PER_TASK : heads;
    attention_job attention = {{p, op, step, step->n_tokens}, heads, (op->n_head_kv + heads - 1) / heads, p->lone_spans};
    int64_t tasks = p->n_spans * attention.head_tasks;
    if (!attention.stores) {
        azq_parallel(tasks, AZQ_MAX_THREADS, store_task, &attention);
    }
    azq_parallel(tasks, p->score_workers, attention_task, &attention);
    return AZQ_OK;
}

/* ---- select ------------------------------------------------------------------------------------- */

static void select_row(const op_job *job, int64_t row) {
    const azq_op *op = job->op;
    memcpy(row_of(job->p, op->out, row, op->out_col), row_of(job->p, op->a, job->step->out_rows[row], op->a_col),
           (size_t)op->width * sizeof(float));
}

azq_status azq_run_op(azq_program *p, const azq_op *op, const azq_step *step) {
    azq_status status = AZQ_OK;
    switch (op->kind) {
    case AZQ_OP_EMBED: for_each_row(p, op, step, embed_row); break;
    case AZQ_OP_LAYER_NORM:
    case AZQ_OP_RMS_NORM: for_each_row(p, op, step, norm_row); break;
    case AZQ_OP_LINEAR: status = run_linear(p, op, step); break;
    case AZQ_OP_EXPERTS: status = azq_run_experts(p, op, step); break;
    case AZQ_OP_ROPE: status = run_rope(p, op, step); break;
    case AZQ_OP_ATTENTION: status = run_attention(p, op, step); break;
    case AZQ_OP_GLU: for_each_row(p, op, step, glu_row); break;
    case AZQ_OP_SELECT: for_each_row(p, op, step, select_row); break;
    case AZQ_OP_ADD: for_each_row(p, op, step, add_row); break;
    case AZQ_OP_SOFTCAP: for_each_row(p, op, step, softcap_row); break;
    default: return AZQ_E_PROGRAM;
    }
    /* Quantized activations of this buffer are stale now, whatever column they began at. */
    const float *first = p->data[op->out];
    const float *cached = p->scratch.act_of;
    if (cached && cached >= first && cached < first + p->buffers[op->out].width) {
        p->scratch.act_of = NULL;
    }
    return status;
}
