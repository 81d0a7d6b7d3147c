/* Op AZQ_OP_EXPERTS: each token goes to the few experts that its router rates highest. Tokens are sorted by expert, so
 * that an expert's matrices are read once for all its tokens and those of an expert without any not at all. A token's
 * result is summed in the order of its own ratings: it depends on nothing but the token. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "program.h"
#include "threads.h"

enum { GATE, UP, DOWN, MATRICES, COLUMNS_PER_TASK = 4096 };

/* A pair is a token and one of its experts; pairs are numbered by expert, then by token. */
typedef struct {
    const azq_op *op;
    const azq_kernel_slots *kernels;
    int64_t n_tokens, n_pairs, inner, ld_rows;
    const float *a, *b; /* (n_tokens, lda), (n_tokens, ldb) or NULL */
    float *out;         /* (n_tokens, ld_out) */
    int64_t lda, ldb, ld_out;
    float *ratings; /* (n_tokens, n_expert); then the shares of its experts begin each row */
    float *gate_up; /* (n_pairs, 2, inner) */
    float *rows;    /* (n_pairs, ld_rows): what enters an expert, then what leaves it */
    int32_t *chosen, *pair; /* (n_tokens, n_used): the experts, best first; their pairs' numbers */
    int32_t *first;         /* (n_expert + 1): each expert's first pair, and their end */
} experts_job;

static const azq_matrix *matrix_of(const azq_op *op, int64_t expert, int which) {
    return op->experts[expert * MATRICES + which];
}

/* ---- checks ------------------------------------------------------------------------------------- */

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int azq_check_experts(const azq_program *p, const azq_op *op) {
    if (op->n_expert < 1 || op->n_expert > AZQ_MAX_EXPERTS || op->n_used < 1 || op->n_used > op->n_expert ||
        op->w->n != op->n_expert || !op->experts) {
        return 0;
    }
    if (op->work < 0 || op->work >= p->n_buffers || p->buffers[op->work].outputs || op->work == op->out ||
        op->work == op->a || op->work == op->b) {
        return 0;
    }
    for (int64_t i = 0; i < (int64_t)op->n_expert * MATRICES; i++) {
        if (!op->experts[i]) {
            return 0;
        }
    }
    int64_t inner = matrix_of(op, 0, GATE)->n;
    for (int64_t e = 0; e < op->n_expert; e++) {
        const azq_matrix *gate = matrix_of(op, e, GATE), *up = matrix_of(op, e, UP), *down = matrix_of(op, e, DOWN);
        if (gate->n != inner || up->n != inner || down->k != inner || gate->k != op->w->k || up->k != op->w->k ||
            down->n != op->width) {
            return 0;
        }
    }
    int64_t room = p->buffers[op->work].width;
    return inner > 0 && inner <= room && op->n_expert + op->n_used * (2 * inner + larger(op->w->k, op->width)) <= room;
}

/* ---- choosing ----------------------------------------------------------------------------------- */

/* Among equals the first. Shares are NaN where a softmax over all ratings would be. */
static void choose_experts(const experts_job *job, int64_t token) {
    int64_t n_expert = job->op->n_expert, n_used = job->op->n_used;
    float *ratings = job->ratings + token * n_expert, shares[AZQ_MAX_EXPERTS];
    int32_t *chosen = job->chosen + token * n_used;
    uint8_t taken[AZQ_MAX_EXPERTS] = {0};
    int broken = 0;
    for (int64_t i = 0; i < n_expert; i++) {
        broken |= !(ratings[i] < INFINITY);
    }
    for (int64_t j = 0; j < n_used; j++) {
        int64_t best = -1;
        for (int64_t i = 0; i < n_expert; i++) {
            if (!taken[i] && (best < 0 || ratings[i] > ratings[best])) {
                best = i;
            }
        }
        taken[best] = 1;
        chosen[j] = (int32_t)best;
        shares[j] = ratings[best];
    }
    broken |= !(shares[0] > -INFINITY);
    float sum = job->kernels->softmax(shares, n_used);
    for (int64_t j = 0; j < n_used; j++) {
        ratings[j] = broken ? NAN : shares[j] / sum;
    }
}

/* Numbers the pairs; a few thousand steps that no thread is worth waking for. */
static void number_pairs(const experts_job *job) {
    int32_t *first = job->first;
    memset(first, 0, ((size_t)job->op->n_expert + 1) * sizeof *first);
    for (int64_t i = 0; i < job->n_pairs; i++) {
        first[job->chosen[i] + 1]++;
    }
    for (int64_t e = 0; e < job->op->n_expert; e++) {
        first[e + 1] += first[e];
    }
    for (int64_t i = 0; i < job->n_pairs; i++) {
        job->pair[i] = first[job->chosen[i]]++;
    }
    memmove(first + 1, first, (size_t)job->op->n_expert * sizeof *first); /* each now stands at its end */
    first[0] = 0;
}

/* ---- rows over the threads ---------------------------------------------------------------------- */

typedef void experts_row_fn(const experts_job *job, int64_t row);

typedef struct {
    const experts_job *job;
    experts_row_fn *fn;
    int64_t rows, rows_per_task;
} rows_job;

static void rows_task(void *context, int64_t task, int worker) {
    (void)worker;
    const rows_job *rows = context;
    int64_t end = (task + 1) * rows->rows_per_task;
    for (int64_t row = task * rows->rows_per_task; row < end && row < rows->rows; row++) {
        rows->fn(rows->job, row);
    }
}

static void for_rows(const experts_job *job, int64_t rows, int64_t columns, experts_row_fn *fn) {
    rows_job each = {job, fn, rows, COLUMNS_PER_TASK / columns + 1};
    azq_parallel((rows + each.rows_per_task - 1) / each.rows_per_task, AZQ_MAX_THREADS, rows_task, &each);
}

static void gather_token(const experts_job *job, int64_t token) {
    for (int64_t i = token * job->op->n_used; i < (token + 1) * job->op->n_used; i++) {
        memcpy(job->rows + job->pair[i] * job->ld_rows, job->a + token * job->lda,
               (size_t)job->op->w->k * sizeof(float));
    }
}

static void activate_pair(const experts_job *job, int64_t pair) {
    float *gate = job->gate_up + pair * 2 * job->inner;
    azq_map_fn *activation = azq_activation_of(job->kernels, job->op->activation);
    if (activation) {
        activation(gate, job->inner);
    }
    job->kernels->product(gate, gate + job->inner, gate, job->inner);
}

static void sum_token(const experts_job *job, int64_t token) {
    int64_t n_used = job->op->n_used, width = job->op->width;
    const float *shares = job->ratings + token * job->op->n_expert;
    const int32_t *pair = job->pair + token * n_used;
    float *sum = job->rows + pair[0] * job->ld_rows; /* no other token's */
    for (int64_t i = 0; i < width; i++) {
        sum[i] *= shares[0];
    }
    for (int64_t j = 1; j < n_used; j++) {
        const float *row = job->rows + pair[j] * job->ld_rows;
        for (int64_t i = 0; i < width; i++) {
            sum[i] += shares[j] * row[i];
        }
    }
    float *out = job->out + token * job->ld_out;
    if (job->b) {
        job->kernels->sum(sum, job->b + token * job->ldb, out, width);
    } else {
        memcpy(out, sum, (size_t)width * sizeof *out);
    }
}

/* ---- products ----------------------------------------------------------------------------------- */

/* The next expert after e that has tokens, or n_expert. */
static int64_t next_expert(const experts_job *job, int64_t e) {
    do {
        e++;
    } while (e < job->op->n_expert && job->first[e] == job->first[e + 1]);
    return e;
}

/* All gates and ups come before all downs: one token's activations, quantized, then serve all its experts. */
static azq_status multiply(azq_program *p, const experts_job *job, int compute) {
    const azq_op *op = job->op;
    azq_status status = AZQ_OK;
    int64_t n_expert = op->n_expert, begin = next_expert(job, -1);
    for (int64_t e = begin, after; status == AZQ_OK && e < n_expert; e = after) {
        after = next_expert(job, e);
        int64_t pair = job->first[e], n = job->first[e + 1] - pair;
        const float *x = job->n_tokens == 1 ? job->a : job->rows + pair * job->ld_rows;
        float *gate = job->gate_up + pair * 2 * job->inner;
        azq_linear first = {.w = op->experts[e * MATRICES + GATE], .next = matrix_of(op, e, UP)};
        azq_linear second = {.w = op->experts[e * MATRICES + UP],
                             .next = after < n_expert ? matrix_of(op, after, GATE) : matrix_of(op, begin, DOWN)};
        int64_t ldx = job->ld_rows, ldy = 2 * job->inner;
        status = azq_linear_run(&first, &p->scratch, x, n, ldx, gate, ldy, compute);
        if (status == AZQ_OK) {
            status = azq_linear_run(&second, &p->scratch, x, n, ldx, gate + job->inner, ldy, compute);
        }
    }
    if (status != AZQ_OK) {
        return status;
    }
    for_rows(job, job->n_pairs, job->inner, activate_pair);
    p->scratch.act_of = NULL; /* rows, gate_up: other numbers at the same addresses */
    for (int64_t e = begin, after; status == AZQ_OK && e < n_expert; e = after) {
        after = next_expert(job, e);
        int64_t pair = job->first[e], n = job->first[e + 1] - pair;
        azq_linear down = {.w = op->experts[e * MATRICES + DOWN],
                           .next = after < n_expert ? matrix_of(op, after, DOWN) : p->next[op - p->ops]};
        status = azq_linear_run(&down, &p->scratch, job->gate_up + pair * 2 * job->inner, n, 2 * job->inner,
                                job->rows + pair * job->ld_rows, job->ld_rows, compute);
    }
    p->scratch.act_of = NULL;
    return status;
}

static azq_status reserve_routes(azq_program *p, size_t ints) {
    if (ints > p->route_ints) {
        free(p->routes);
        p->route_ints = 0;
        p->routes = malloc(ints * sizeof *p->routes);
        if (!p->routes) {
            return AZQ_E_NOMEM;
        }
        p->route_ints = ints;
    }
    return AZQ_OK;
}

azq_status azq_run_experts(azq_program *p, const azq_op *op, const azq_step *step) {
    int64_t n_tokens = step->n_tokens, n_pairs = n_tokens * op->n_used;
    azq_status status = reserve_routes(p, (size_t)(2 * n_pairs + op->n_expert + 1));
    if (status != AZQ_OK) {
        return status;
    }
    experts_job job = {.op = op,
                       .kernels = step->kernels,
                       .n_tokens = n_tokens,
                       .n_pairs = n_pairs,
                       .inner = matrix_of(op, 0, GATE)->n,
                       .ld_rows = larger(op->w->k, op->width),
                       .a = p->data[op->a] + op->a_col,
                       .lda = p->buffers[op->a].width,
                       .out = p->data[op->out] + op->out_col,
                       .ld_out = p->buffers[op->out].width,
                       .ratings = p->data[op->work],
                       .chosen = p->routes,
                       .pair = p->routes + n_pairs,
                       .first = p->routes + 2 * n_pairs};
    job.gate_up = job.ratings + n_tokens * op->n_expert;
    job.rows = job.gate_up + n_pairs * 2 * job.inner;
    if (op->b >= 0) {
        job.b = p->data[op->b] + op->b_col;
        job.ldb = p->buffers[op->b].width;
    }
    azq_linear router = {.w = op->w};
    status = azq_linear_run(&router, &p->scratch, job.a, n_tokens, job.lda, job.ratings, op->n_expert,
                            AZQ_COMPUTE_FP32);
    if (status != AZQ_OK) {
        return status;
    }
    for_rows(&job, n_tokens, op->n_expert, choose_experts);
    number_pairs(&job);
    if (n_tokens > 1) {
        for_rows(&job, n_tokens, op->n_used * op->w->k, gather_token);
        p->scratch.act_of = NULL;
    }
    status = multiply(p, &job, step->compute);
    if (status == AZQ_OK) {
        for_rows(&job, n_tokens, op->n_used * op->width, sum_token);
    }
    return status;
}
