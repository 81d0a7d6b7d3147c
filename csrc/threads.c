#ifdef __linux__
#define _GNU_SOURCE /* sched_getcpu, sched_setaffinity */
#elif !defined _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* clock_gettime, with -std=c11 */
#endif
#include "threads.h"
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include "azq.h"
#include "azq_target.h"

/* A job is published through one 64-bit ticket: generation in the high half, tasks left in the low half.
 * A worker takes a task by compare-and-swap on the ticket, so one that slept through a job cannot take a
 * task of the next by mistake, and the caller waits for tasks, never for workers: a worker that the system
 * does not schedule costs nothing. */
static struct {
    pthread_mutex_t owner; /* held by the thread whose job runs */
    pthread_mutex_t sleep;
    pthread_cond_t wake;
    _Atomic uint64_t ticket;
    _Atomic uint32_t done;
    _Atomic int sleepers;
    int n_started;         /* workers 1 .. n_started exist; owner's */
    _Atomic int n_threads; /* wanted, the caller included */
    _Atomic int n_active;  /* workers with a number >= this stay out of the current job */
    azq_task_fn *fn;
    void *context;
    uint32_t n_tasks;
    _Atomic int owner_cpu; /* where the owner was when it published the job; -1 when the system does not say */
    _Atomic(azq_team_fn *) team; /* the threads of calls that say how many they want; NULL: workers of ours */
} pool = {
    .owner = PTHREAD_MUTEX_INITIALIZER,
    .sleep = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .n_threads = 1,
};

/* What calls of this thread use instead of pool.n_threads; 0 for that. */
static _Thread_local int threads_here;

/* How long an idle worker stays awake: longer than what lies between two steps of a batch or of a sampled answer
 * (some 300 us of Python), so that the next job finds it at once. For the latter part it gives its processor to anyone who wants it. */
enum { AWAKE_MICROSECONDS = 500, ALONE_MICROSECONDS = 50, PAUSES_PER_LOOK = 64 };

int64_t azq_nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t microseconds(void) { return azq_nanoseconds() / 1000; }

static inline void relax(void) {
#if AZQ_X86
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* What this thread will read next; addresses, since nobody keeps that memory for it. */
static _Thread_local struct {
    uintptr_t at[2];
    int64_t lines;
} ahead;

void azq_fetch_ahead(const void *first, const void *second, int64_t lines) {
    ahead.at[0] = (uintptr_t)first;
    ahead.at[1] = (uintptr_t)second;
    ahead.lines = lines;
}

/* A moment of waiting. */
static inline void pass_time(void) {
    enum { LINE = 64, SECOND_CACHE = 2 };
    if (ahead.lines <= 0) {
        relax();
        return;
    }
    for (int i = 0; i < 2; i++) {
        __builtin_prefetch((const void *)ahead.at[i], 0, SECOND_CACHE);
        ahead.at[i] += LINE;
    }
    ahead.lines--;
}

/* Takes one task of generation `generation`; returns how many were left (>= 1), or 0 when none is. */
static uint32_t take(uint32_t generation) {
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    for (;;) {
        uint32_t left = (uint32_t)ticket;
        if (ticket >> 32 != generation || left == 0) {
            return 0;
        }
        if (atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - 1, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            return left;
        }
    }
}

static void work(uint32_t generation, int worker) {
    uint32_t left;
    while ((left = take(generation)) != 0) {
        /* fn, context and n_tasks cannot change before this task is counted as done. */
        pool.fn(pool.context, (int64_t)(pool.n_tasks - left), worker);
        atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
    }
}

/* ---- one processor each ---------------------------------------------------------------------------
 * A system with other work to do may wake a worker on the processor of the thread that woke it, and leave it
 * there for many jobs: the two then take turns. A worker that finds itself beside the owner moves away once
 * and is free to be moved again. */

#ifdef __linux__
enum { MOVE_MICROSECONDS = 2000 }; /* not more often than this */

static int this_cpu(void) { return sched_getcpu(); }

static void keep_apart(int64_t *last_move) {
    int cpu = sched_getcpu();
    if (cpu < 0 || cpu != atomic_load_explicit(&pool.owner_cpu, memory_order_relaxed) || cpu >= CPU_SETSIZE) {
        return;
    }
    int64_t now = microseconds();
    cpu_set_t allowed, others;
    if (now - *last_move < MOVE_MICROSECONDS || sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
        return;
    }
    *last_move = now;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) {
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
}
#else
static int this_cpu(void) { return -1; }
static void keep_apart(int64_t *last_move) { (void)last_move; }
#endif

static uint32_t current_generation(void) {
    return (uint32_t)(atomic_load_explicit(&pool.ticket, memory_order_acquire) >> 32);
}

/* Waits a short while for a generation other than `seen`; returns the latest one. */
static uint32_t stay_awake(uint32_t seen) {
    int64_t start = microseconds();
    for (;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            uint32_t generation = current_generation();
            if (generation != seen) {
                return generation;
            }
            pass_time();
        }
        int64_t waited = microseconds() - start;
        if (waited >= AWAKE_MICROSECONDS) {
            return seen;
        }
        if (waited >= ALONE_MICROSECONDS) {
            sched_yield();
        }
    }
}

static void *worker_main(void *argument) {
    int worker = (int)(intptr_t)argument;
    uint32_t seen = 0;
    int64_t last_move = 0;
    for (;;) {
        uint32_t generation = stay_awake(seen);
        if (generation == seen) {
            pthread_mutex_lock(&pool.sleep);
            atomic_fetch_add(&pool.sleepers, 1);
            while ((generation = (uint32_t)(atomic_load(&pool.ticket) >> 32)) == seen) {
                pthread_cond_wait(&pool.wake, &pool.sleep);
            }
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.sleep);
        }
        seen = generation;
        if (worker < atomic_load(&pool.n_active)) {
            keep_apart(&last_move);
            work(generation, worker);
        }
    }
    return NULL;
}

/* Only the forking thread lives on in the child: forget the workers and start anew when asked. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.sleepers, 0);
    pool.n_started = 0;
    atomic_store(&pool.team, NULL); /* OpenMP's threads are gone too, and GNU's would be waited for */
    /* A job of another thread may have been cut in two by the fork: leave nothing of it to take. */
    atomic_store(&pool.ticket, atomic_load(&pool.ticket) & ~(uint64_t)UINT32_MAX);
}

static void at_fork(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

static void register_fork_handler(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, at_fork);
}

static void start_workers(int n) {
    register_fork_handler();
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.n_started < n - 1) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker_main, (void *)(intptr_t)(pool.n_started + 1)) != 0) {
            break; /* fewer workers: slower, still right */
        }
        pool.n_started++;
    }
    pthread_attr_destroy(&attributes);
}

/* ---- another library's threads --------------------------------------------------------------------- */

typedef struct {
    azq_task_fn *fn;
    void *context;
    int64_t n_tasks;
    _Atomic int64_t next;
    _Atomic int workers;
} team_job;

static void team_body(void *argument) {
    team_job *job = argument;
    int worker = atomic_fetch_add_explicit(&job->workers, 1, memory_order_relaxed);
    int64_t task;
    while ((task = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->n_tasks) {
        job->fn(job->context, task, worker);
    }
}

static int run_on_team(int64_t n_tasks, int n, azq_task_fn *fn, void *context) {
    azq_team_fn *team = atomic_load(&pool.team);
    if (!team || !threads_here || n < 2 || n_tasks < 2) {
        return 0;
    }
    team_job job = {.fn = fn, .context = context, .n_tasks = n_tasks};
    team(team_body, &job, (unsigned)n, 0); /* returns when every thread is through, as a barrier */
    return 1;
}

void azq_team_set(azq_team_fn *team) {
    register_fork_handler();
    atomic_store(&pool.team, team);
}

/* ---- jobs ------------------------------------------------------------------------------------------ */

void azq_parallel(int64_t n_tasks, int max_workers, azq_task_fn *fn, void *context) {
    int n = azq_threads();
    n = n < max_workers ? n : max_workers;
    if (run_on_team(n_tasks, n, fn, context)) {
        return;
    }
    if (n < 2 || n_tasks < 2 || n_tasks > (int64_t)UINT32_MAX || pthread_mutex_trylock(&pool.owner) != 0) {
        for (int64_t task = 0; task < n_tasks; task++) {
            fn(context, task, 0);
        }
        return;
    }
    if (pool.n_started < n - 1) {
        start_workers(n);
    }
    pool.fn = fn;
    pool.context = context;
    pool.n_tasks = (uint32_t)n_tasks;
    atomic_store_explicit(&pool.owner_cpu, this_cpu(), memory_order_relaxed);
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    atomic_store(&pool.n_active, n);
    uint32_t generation = (uint32_t)(atomic_load_explicit(&pool.ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&pool.ticket, (uint64_t)generation << 32 | (uint32_t)n_tasks);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    work(generation, 0);
    for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) != (uint32_t)n_tasks; spins++) {
        if (spins < 1000) {
            pass_time();
        } else {
            sched_yield(); /* a worker was descheduled in the middle of a task */
        }
    }
    pthread_mutex_unlock(&pool.owner);
}

int azq_threads_max(void) { return AZQ_MAX_THREADS; }

static int clamped(int n) { return n < 1 ? 1 : n > AZQ_MAX_THREADS ? AZQ_MAX_THREADS : n; }

int azq_threads(void) { return threads_here ? threads_here : atomic_load(&pool.n_threads); }

void azq_threads_set(int n) { atomic_store(&pool.n_threads, clamped(n)); }

void azq_threads_here(int n) { threads_here = n > 0 ? clamped(n) : 0; }
