/* Tokens that are two other tokens joined: what SentencePiece's scores become merges of. */

#include <stdlib.h>
#include <string.h>
#include "azq.h"

typedef struct {
    uint32_t hash, index; /* index: of the token, from 1 on; 0 for an empty slot */
} slot;

typedef struct {
    const uint8_t *text;
    const int64_t *ends;
    slot *slots; /* a power of two, at least twice the tokens */
    uint64_t mask, seed;
    int backward; /* hashed from a token's last byte to its first */
} table;

static int64_t start_of(const int64_t *ends, int64_t i) { return i ? ends[i - 1] : 0; }

/* One byte more. The seed keeps a file from choosing tokens that all fall on one slot. */
static uint64_t step(uint64_t h, uint8_t byte, uint64_t seed) {
    h = (h ^ byte) * (seed | 1);
    return h ^ h >> 29;
}

static uint32_t folded(uint64_t h) {
    h *= UINT64_C(0x9e3779b97f4a7c15);
    return (uint32_t)(h >> 32);
}

static void enter(table *t, int64_t i) {
    int64_t start = start_of(t->ends, i), end = t->ends[i];
    uint64_t h = t->seed;
    for (int64_t at = start; at < end; at++) {
        h = step(h, t->text[t->backward ? start + end - 1 - at : at], t->seed);
    }
    uint32_t hash = folded(h);
    uint64_t place = hash & t->mask;
    while (t->slots[place].index) {
        place = (place + 1) & t->mask;
    }
    t->slots[place] = (slot){hash, (uint32_t)i + 1};
}

/* The token of this text and hash, or -1. */
static int64_t find(const table *t, uint64_t h, int64_t start, int64_t end) {
    uint32_t hash = folded(h);
    for (uint64_t place = hash & t->mask; t->slots[place].index; place = (place + 1) & t->mask) {
        if (t->slots[place].hash != hash) {
            continue;
        }
        int64_t i = (int64_t)t->slots[place].index - 1, from = start_of(t->ends, i);
        if (t->ends[i] - from == end - start && !memcmp(t->text + from, t->text + start, (size_t)(end - start))) {
            return i;
        }
    }
    return -1;
}

azq_status azq_vocabulary_cuts(const uint8_t *text, const int64_t *ends, int64_t count, uint64_t seed,
                               int32_t *cuts, int64_t capacity, int64_t *found) {
    if (!found || (count > 0 && (!text || !ends)) || (capacity > 0 && !cuts)) {
        return AZQ_E_NULL;
    }
    if (count < 0 || count > INT32_MAX || capacity < 0) {
        return AZQ_E_SHAPE;
    }
    int64_t longest = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t length = ends[i] - start_of(ends, i);
        if (length < 0) {
            return AZQ_E_SHAPE;
        }
        longest = length > longest ? length : longest;
    }
    uint64_t slots = 2;
    while (slots < 2 * (uint64_t)count) {
        slots *= 2;
    }
    table starts = {text, ends, calloc(slots, sizeof(slot)), slots - 1, seed, 0};
    table stops = {text, ends, calloc(slots, sizeof(slot)), slots - 1, seed, 1};
    int32_t *rights = malloc((size_t)(longest + 1) * sizeof *rights); /* what a token ends with, by its start */
    azq_status status = starts.slots && stops.slots && rights ? AZQ_OK : AZQ_E_NOMEM;
    for (int64_t i = 0; i < count && status == AZQ_OK; i++) {
        enter(&starts, i);
        enter(&stops, i);
    }
    *found = 0;
    for (int64_t i = 0; i < count && status == AZQ_OK; i++) {
        int64_t start = start_of(ends, i), end = ends[i];
        uint64_t h = seed;
        for (int64_t at = end - 1; at > start; at--) {
            h = step(h, text[at], seed);
            rights[at - start] = (int32_t)find(&stops, h, at, end);
        }
        h = seed;
        for (int64_t at = start + 1; at < end; at++) {
            h = step(h, text[at - 1], seed);
            int64_t left = rights[at - start] < 0 ? -1 : find(&starts, h, start, at);
            if (left >= 0 && (*found)++ < capacity) {
                int32_t cut[3] = {(int32_t)i, (int32_t)left, rights[at - start]};
                memcpy(cuts + 3 * (*found - 1), cut, sizeof cut);
            }
        }
    }
    free(starts.slots);
    free(stops.slots);
    free(rights);
    return status;
}

typedef struct {
    double score;
    int32_t cut[3];
} scored;

static int compare(const void *one, const void *other) {
    const scored *a = one, *b = other;
    int a_is_number = a->score == a->score, b_is_number = b->score == b->score;
    if (a_is_number != b_is_number) {
        return b_is_number - a_is_number;
    }
    if (a_is_number && a->score != b->score) {
        return a->score > b->score ? -1 : 1;
    }
    for (int i = 1; i < 3; i++) {
        if (a->cut[i] != b->cut[i]) {
            return a->cut[i] < b->cut[i] ? -1 : 1;
        }
    }
    return 0;
}

azq_status azq_vocabulary_sort(int32_t *cuts, int64_t count, const double *scores) {
    if (count < 0 || count > INT64_MAX / (int64_t)sizeof(scored)) {
        return AZQ_E_SHAPE;
    }
    if (count == 0) {
        return AZQ_OK;
    }
    if (!cuts || !scores) {
        return AZQ_E_NULL;
    }
    scored *all = malloc((size_t)count * sizeof *all);
    if (!all) {
        return AZQ_E_NOMEM;
    }
    for (int64_t i = 0; i < count; i++) {
        all[i].score = scores[cuts[3 * i]];
        memcpy(all[i].cut, cuts + 3 * i, sizeof all[i].cut);
    }
    qsort(all, (size_t)count, sizeof *all, compare);
    for (int64_t i = 0; i < count; i++) {
        memcpy(cuts + 3 * i, all[i].cut, sizeof all[i].cut);
    }
    free(all);
    return AZQ_OK;
}
