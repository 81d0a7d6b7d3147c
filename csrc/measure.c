/* What this machine can do at best, for benchmarks to compare with. */
#include <stdatomic.h>
#include "azq.h"
#include "azq_kernels.h"
#include "threads.h"

enum { LINE = 64, LINES_PER_TASK = 1 << 14 };

typedef struct {
    const uint8_t *data;
    int64_t lines, rounds;
    _Atomic uint64_t total;
} measure_job;

static void stream_task(void *context, int64_t task, int worker) {
    (void)worker;
    measure_job *job = context;
    int64_t first = task * LINES_PER_TASK;
    int64_t n = job->lines - first < LINES_PER_TASK ? job->lines - first : LINES_PER_TASK;
    atomic_fetch_add(&job->total, azq_active()->stream_read(job->data + first * LINE, n));
}

uint64_t azq_stream_read(const void *data, int64_t bytes) {
    if (!data || bytes < LINE) {
        return 0;
    }
    measure_job job = {.data = data, .lines = bytes / LINE};
    azq_parallel((job.lines + LINES_PER_TASK - 1) / LINES_PER_TASK, AZQ_MAX_THREADS, stream_task, &job);
    return atomic_load(&job.total);
}

static void int8_task(void *context, int64_t task, int worker) {
    (void)task;
    (void)worker;
    measure_job *job = context;
    atomic_fetch_add(&job->total, (uint64_t)azq_active()->peak_int8(job->rounds));
}

static void bf16_task(void *context, int64_t task, int worker) {
    (void)task;
    (void)worker;
    measure_job *job = context;
    atomic_fetch_add(&job->total, (uint64_t)azq_active()->peak_bf16(job->rounds));
}

static int64_t peak(int64_t rounds, azq_task_fn *fn) {
    measure_job job = {.rounds = rounds > 0 ? rounds : 0};
    azq_parallel(azq_threads(), AZQ_MAX_THREADS, fn, &job);
    return (int64_t)atomic_load(&job.total);
}

int64_t azq_peak_int8(int64_t rounds) { return peak(rounds, int8_task); }

int64_t azq_peak_bf16(int64_t rounds) { return azq_active()->peak_bf16 ? peak(rounds, bf16_task) : 0; }
