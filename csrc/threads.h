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

/* Calls of this thread use n threads instead of azq_threads_set's number, until n = 0. */
void azq_threads_here(int n);

/* What this thread will read next: lines of 64 bytes at either address, fetched while it waits for other threads
 * or for a job. A hint: the memory may be gone by then. */
void azq_fetch_ahead(const void *first, const void *second, int64_t lines);

int64_t azq_nanoseconds(void); /* of a clock that only goes forward */

#endif
