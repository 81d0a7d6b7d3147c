/* The likeliest token of each row of logits. */
#include <math.h>
#include "azq.h"
#include "threads.h"

/* A row is read in blocks, so that only one of them is read again to find where its largest number lies, and few
 * rows in several pieces, by as many threads. */
enum { LANES = 16, BLOCK = 1024, MOST_PIECES = 64, PIECE_LEAST = 8 * BLOCK };

typedef struct {
    float top;
    int bad;    /* whether there is a NaN; then top counts for nothing */
    int64_t at; /* where the first block begins that holds the top, or a NaN */
} finding;

typedef struct {
    const float *logits;
    int64_t n, pieces;
    int32_t *ids;
    finding *findings; /* (rows * pieces), or NULL for a piece a row */
} choose_job;

static finding search_block(const float *x, int64_t n) {
    float best[LANES];
    int32_t bad[LANES];
    for (int j = 0; j < LANES; j++) {
        best[j] = -INFINITY;
        bad[j] = 0;
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
            bad[j] |= x[i + j] != x[i + j];
        }
    }
    finding found = {-INFINITY, 0, 0};
    for (int j = 0; j < LANES; j++) {
        found.top = best[j] > found.top ? best[j] : found.top;
        found.bad |= bad[j];
    }
    for (; i < n; i++) {
        found.top = x[i] > found.top ? x[i] : found.top;
        found.bad |= x[i] != x[i];
    }
    return found;
}

/* `next` lies behind `found`: of equals the first counts. */
static finding merge(finding found, finding next) {
    int later = found.bad ? 0 : next.bad || next.top > found.top;
    return later ? next : found;
}

static finding search(const float *x, int64_t from, int64_t to) {
    finding found = {-INFINITY, 0, from};
    for (int64_t at = from; at < to; at += BLOCK) {
        finding next = search_block(x + at, to - at < BLOCK ? to - at : BLOCK);
        next.at = at;
        found = merge(found, next);
    }
    return found;
}

static int32_t place(const float *x, finding found) {
    int64_t at = found.at;
    while (found.bad ? x[at] == x[at] : x[at] != found.top) { /* it is there: found above */
        at++;
    }
    return (int32_t)at;
}

static void choose_task(void *context, int64_t task, int worker) {
    (void)worker;
    const choose_job *job = context;
    int64_t row = task / job->pieces, piece = task % job->pieces;
    const float *x = job->logits + row * job->n;
    finding found = search(x, job->n * piece / job->pieces, job->n * (piece + 1) / job->pieces);
    if (job->findings) {
        job->findings[task] = found;
    } else {
        job->ids[row] = place(x, found);
    }
}

azq_status azq_likeliest(const float *logits, int64_t rows, int64_t n, int32_t *ids) {
    if (rows > 0 && (!logits || !ids)) {
        return AZQ_E_NULL;
    }
    if (rows < 0 || n < 1 || n > INT32_MAX) {
        return AZQ_E_SHAPE;
    }
    finding findings[MOST_PIECES];
    choose_job job = {logits, n, 1, ids, NULL};
    int64_t threads = azq_threads();
    if (rows > 0 && rows < threads) {
        int64_t pieces = threads < MOST_PIECES / rows ? threads : MOST_PIECES / rows;
        job.pieces = pieces < n / PIECE_LEAST ? pieces : n / PIECE_LEAST;
        job.pieces = job.pieces < 1 ? 1 : job.pieces;
        job.findings = job.pieces > 1 ? findings : NULL;
    }
    azq_parallel(rows * job.pieces, AZQ_MAX_THREADS, choose_task, &job);
    for (int64_t row = 0; job.findings && row < rows; row++) {
        finding found = findings[row * job.pieces];
        for (int64_t i = 1; i < job.pieces; i++) {
            found = merge(found, findings[row * job.pieces + i]);
        }
        ids[row] = place(logits + row * n, found);
    }
    return AZQ_OK;
}
