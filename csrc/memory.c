/* Aligned memory on huge pages. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* MADV_HUGEPAGE */
#endif
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include "matrix.h"

/* Every block starts with 64 bytes of ours; what is handed out comes after them. */
enum { HEADER = 64, HUGE_PAGE = 2 << 20, RUN = 16 << 20 };

static uint8_t *take(size_t bytes) {
    if (bytes > SIZE_MAX - HEADER - HUGE_PAGE) {
        return NULL;
    }
    size_t total = bytes + HEADER;
    size_t alignment = total >= HUGE_PAGE ? HUGE_PAGE : 64;
    total = (total + alignment - 1) / alignment * alignment;
    uint8_t *p = aligned_alloc(alignment, total);
#ifdef MADV_HUGEPAGE
    if (p && alignment == HUGE_PAGE) {
        (void)madvise(p, total, MADV_HUGEPAGE); /* a wish; refusal changes nothing */
    }
#endif
    return p;
}

void *azq_alloc(size_t bytes) {
    uint8_t *p = take(bytes);
    return p ? p + HEADER : NULL;
}

void azq_free(void *p) {
    if (p) {
        free((uint8_t *)p - HEADER);
    }
}

/* ---- weights ------------------------------------------------------------------------------------ */

/* A run of huge pages, filled from its start; what is freed within is not used again before all of it is free. */
typedef struct {
    size_t used;
    int64_t live; /* blocks */
} run;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static run *filling; /* the one that blocks are taken from; at most this one is kept empty */

static void acquire(void) { pthread_mutex_lock(&lock); }
static void release(void) { pthread_mutex_unlock(&lock); }
static void at_fork(void) { pthread_atfork(acquire, release, release); }

void *azq_weights_alloc(size_t bytes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, at_fork);
    uint8_t *block = NULL;
    run *owner = NULL;
    if (bytes < RUN / 2) {
        size_t total = HEADER + (bytes + 63) / 64 * 64;
        acquire();
        if (!filling || filling->used + total > RUN - HEADER) {
            run *fresh = (run *)(void *)take(RUN - HEADER);
            if (fresh) {
                *fresh = (run){HEADER, 0};
                if (filling && filling->live == 0) {
                    free(filling);
                }
                filling = fresh;
            } else {
                total = 0;
            }
        }
        if (total) {
            owner = filling;
            block = (uint8_t *)owner + owner->used;
            owner->used += total;
            owner->live++;
        }
        release();
    } else {
        block = take(bytes);
    }
    if (!block) {
        return NULL;
    }
    *(run **)(void *)block = owner;
    return block + HEADER;
}

void azq_weights_free(void *p) {
    if (!p) {
        return;
    }
    uint8_t *block = (uint8_t *)p - HEADER;
    run *owner = *(run **)(void *)block;
    if (!owner) {
        free(block);
        return;
    }
    acquire();
    if (--owner->live == 0) {
        if (owner == filling) {
            owner->used = HEADER;
        } else {
            free(owner);
        }
    }
    release();
}
