/* The pool: several threads calling at once, life after fork, and another library's threads. */
#include "check.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 512, K = 256, M = 24, CALLERS = 8, CALLS = 30 }; /* several tasks for each of four threads */

static struct {
    float weights[N * K], x[M * K], y[M * N], values[N * K];
    uint8_t blocks[N * K / 32 * 18];
    azq_matrix *shared; /* packed by whichever call comes first */
} work;

/* Everything once; 1 when all results are the expected ones. */
static int compute_all(azq_matrix *w) {
    enum { BLOCKS = sizeof work.blocks, VALUES = sizeof work.values };
    uint8_t *blocks = malloc(BLOCKS);
    float *values = malloc(VALUES);
    float y[M * N];
    int64_t bad;
    int good = azq_quantize(AZQ_TYPE_Q4_0, work.weights, N, K, blocks, &bad) == AZQ_OK &&
               memcmp(blocks, work.blocks, BLOCKS) == 0;
    good &= azq_dequantize(AZQ_TYPE_Q4_0, work.blocks, N, K, values) == AZQ_OK &&
            memcmp(values, work.values, VALUES) == 0;
    good &= azq_matmul(w, work.x, M, K, y, N, AZQ_COMPUTE_INT8) == AZQ_OK && memcmp(y, work.y, sizeof y) == 0;
    free(blocks);
    free(values);
    return good;
}

static void *caller(void *argument) {
    (void)argument;
    intptr_t good = 0;
    for (int i = 0; i < CALLS; i++) {
        azq_matrix *own;
        if (azq_matrix_create(AZQ_TYPE_Q4_0, work.blocks, N, K, &own) == AZQ_OK) {
            good += compute_all(own) && compute_all(work.shared);
            azq_matrix_free(own);
        }
    }
    return (void *)good;
}

static void check_callers(int threads) {
    azq_threads_set(threads);
    expect(azq_matrix_create(AZQ_TYPE_Q4_0, work.blocks, N, K, &work.shared) == AZQ_OK, "create");
    pthread_t callers[CALLERS];
    int started = 0;
    while (started < CALLERS && pthread_create(&callers[started], NULL, caller, NULL) == 0) {
        started++;
    }
    expect(started == CALLERS, "only %d threads could be started", started);
    for (int i = 0; i < started; i++) {
        void *good;
        pthread_join(callers[i], &good);
        expect((intptr_t)good == CALLS, "caller %d of 8, %d threads each: %d of %d calls right", i, threads,
               (int)(intptr_t)good, (int)CALLS);
    }
    azq_matrix_free(work.shared);
}

/* ---- another library's threads ---- */

static int team_calls, team_size;

typedef struct {
    void (*body)(void *);
    void *context;
} team_member;

static void *team_main(void *argument) {
    team_member *member = argument;
    member->body(member->context);
    return NULL;
}

/* The contract of GOMP_parallel, on threads made for each call. */
static void team(void (*body)(void *), void *context, unsigned threads, unsigned flags) {
    (void)flags;
    team_calls++;
    team_size = (int)threads;
    team_member member = {body, context};
    pthread_t others[8];
    unsigned started = 0;
    while (started < threads - 1 && started < 8 && pthread_create(&others[started], NULL, team_main, &member) == 0) {
        started++;
    }
    body(context);
    while (started > 0) {
        pthread_join(others[--started], NULL);
    }
}

static int packed_product(const void *packed, int threads) {
    float y[M * N];
    return azq_matmul_packed(AZQ_TYPE_Q4_0, packed, N, K, NULL, work.x, M, y, AZQ_COMPUTE_INT8, threads) == AZQ_OK &&
           memcmp(y, work.y, sizeof y) == 0;
}

static void check_team(void) {
    int64_t bytes = azq_packed_bytes(AZQ_TYPE_Q4_0, N, K);
    void *packed = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    azq_threads_set(2);
    azq_team_set(team);
    expect(azq_pack(AZQ_TYPE_Q4_0, work.blocks, N, K, packed, 1) == AZQ_OK, "pack");
    expect(packed_product(packed, 1) && team_calls == 0, "one thread needs no team, but %d were called", team_calls);
    expect(packed_product(packed, 3), "a product on a team of 3");
    expect(team_calls > 0 && team_size == 3, "%d calls of a team of %d", team_calls, team_size);
    team_calls = 0;
    expect(packed_product(packed, 0) && team_calls == 0, "without a number of threads the pool works");
    if (!getenv("CHECK_NO_FORK")) {
        pid_t child = fork();
        if (child == 0) {
            alarm(60);
            _exit(packed_product(packed, 3) && team_calls == 0 ? 0 : 1);
        }
        int status = -1;
        expect(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
               "a child has no team: wait status %d", status);
    }
    azq_team_set(NULL);
    expect(packed_product(packed, 3) && team_calls == 0, "no team any more");
    free(packed);
}

/* A child inherits the pool's state but none of its threads. */
static void check_fork(void) {
    azq_threads_set(4);
    expect(azq_matrix_create(AZQ_TYPE_Q4_0, work.blocks, N, K, &work.shared) == AZQ_OK, "create");
    expect(compute_all(work.shared), "before the fork");
    for (int i = 0; i < 5; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(60); /* a child that waits for threads it has not must not wait for ever */
            _exit(compute_all(work.shared) && compute_all(work.shared) ? 0 : 1);
        }
        int status = -1;
        expect(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
               "child %d: wait status %d", i, status);
        expect(compute_all(work.shared), "the parent after fork %d", i);
    }
    azq_matrix_free(work.shared);
}

void check_threads(void) {
    random_state r = {400};
    for (int i = 0; i < N * K; i++) {
        work.weights[i] = random_float(&r);
    }
    for (int i = 0; i < M * K; i++) {
        work.x[i] = random_float(&r);
    }
    azq_threads_set(1);
    int64_t bad;
    azq_matrix *w;
    group_begin("-", "8 callers at once");
    expect(azq_quantize(AZQ_TYPE_Q4_0, work.weights, N, K, work.blocks, &bad) == AZQ_OK, "quantize");
    expect(azq_dequantize(AZQ_TYPE_Q4_0, work.blocks, N, K, work.values) == AZQ_OK, "dequantize");
    expect(azq_matrix_create(AZQ_TYPE_Q4_0, work.blocks, N, K, &w) == AZQ_OK, "create");
    expect(azq_matmul(w, work.x, M, K, work.y, N, AZQ_COMPUTE_INT8) == AZQ_OK, "matmul");
    azq_matrix_free(w);
    for (int threads = 1; threads <= 4; threads++) {
        check_callers(threads);
    }
    group_end();
    if (getenv("CHECK_NO_FORK")) { /* user-mode qemu does not survive the fork of a threaded process */
        printf("%-12s fork: skipped, CHECK_NO_FORK is set\n", "-");
    } else {
        group_begin("-", "fork");
        check_fork();
        group_end();
    }
    group_begin("-", "another library's threads");
    check_team();
    group_end();
    azq_threads_set(1);
}
