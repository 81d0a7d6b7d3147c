/* The likeliest token of each row of logits. */
#include <math.h>
#include "azq.h"
#include "threads.h"

enum { LANES = 16 };

typedef struct {
    const float *logits;
    int64_t n;
    int32_t *ids;
} choose_job;

static void choose_task(void *context, int64_t row, int worker) {
    (void)worker;
    const choose_job *job = context;
    const float *x = job->logits + row * job->n;
    int64_t n = job->n, whole = n / LANES * LANES;
    float best[LANES];
    int32_t bad[LANES];
    for (int j = 0; j < LANES; j++) {
        best[j] = -INFINITY;
        bad[j] = 0;
    }
    for (int64_t i = 0; i < whole; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
            bad[j] |= x[i + j] != x[i + j];
        }
    }
    float top = -INFINITY;
    int any_bad = 0;
    for (int j = 0; j < LANES; j++) {
        top = best[j] > top ? best[j] : top;
        any_bad |= bad[j];
    }
    for (int64_t i = whole; i < n; i++) {
        top = x[i] > top ? x[i] : top;
        any_bad |= x[i] != x[i];
    }
    int64_t at = 0;
    while (any_bad ? x[at] == x[at] : x[at] != top) { /* it is there: found above */
        at++;
    }
    job->ids[row] = (int32_t)at;
}

azq_status azq_likeliest(const float *logits, int64_t rows, int64_t n, int32_t *ids) {
    if (rows > 0 && (!logits || !ids)) {
        return AZQ_E_NULL;
    }
    if (rows < 0 || n < 1 || n > INT32_MAX) {
        return AZQ_E_SHAPE;
    }
    choose_job job = {logits, n, ids};
    azq_parallel(rows, AZQ_MAX_THREADS, choose_task, &job);
    return AZQ_OK;
}
