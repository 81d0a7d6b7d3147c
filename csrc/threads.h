#ifndef AZQ_THREADS_H
#define AZQ_THREADS_H
#include <stdint.h>
/* One persistent pool for the process; the caller of azq_parallel is always one of the workers. */

enum { AZQ_MAX_THREADS = 256 };

/* worker: 0 .. max_workers - 1, unique among the tasks running at once within one call. */
typedef void azq_task_fn(void *context, int64_t task, int worker);

/* Runs task 0 .. n_tasks - 1 on at most max_workers threads (and never more than azq_threads()) and returns
 * when all are done. Tasks are handed out one at a time, so make each a few microseconds at least. When
 * another thread holds the pool, the caller runs all of them itself. */
void azq_parallel(int64_t n_tasks, int max_workers, azq_task_fn *fn, void *context);

#endif
