#include "kv.h"
#include <stdlib.h>
#include <string.h>

/* Five factors below 2^40 each multiply without wrapping when checked one by one. */
static int multiply(size_t *total, int64_t factor) {
    return factor > 0 && !__builtin_mul_overflow(*total, (size_t)factor, total) && *total <= PTRDIFF_MAX / 2;
}

/* Two arrays on cache lines, of zero pages: memory is taken when a position is written. Large pages would spare
 * a full batch a fifth of its attention, but cost every sequence megabytes and the time to clear them. */
static int allocate(azq_kv *kv, size_t bytes) {
    enum { LINE = 64 };
    size_t one = (bytes + LINE - 1) / LINE * LINE;
    kv->memory = calloc(2 * one + LINE, 1);
    if (!kv->memory) {
        return 0;
    }
    kv->keys = (uint8_t *)kv->memory + (LINE - (uintptr_t)kv->memory % LINE) % LINE;
    kv->values = kv->keys + one;
    return 1;
}

azq_status azq_kv_create(int64_t n_layer, int64_t n_seq, int64_t n_ctx, int64_t n_head_kv, int64_t head_dim, int type,
                         azq_kv **out) {
    if (!out) {
        return AZQ_E_NULL;
    }
    *out = NULL;
    if (type != AZQ_TYPE_F32 && type != AZQ_TYPE_F16) {
        return AZQ_E_TYPE;
    }
    size_t bytes = type == AZQ_TYPE_F32 ? 4 : 2;
    size_t element = bytes;
    int64_t room = n_ctx > INT64_MAX - AZQ_KV_TILE ? n_ctx : (n_ctx + AZQ_KV_TILE - 1) / AZQ_KV_TILE * AZQ_KV_TILE;
    if (!multiply(&bytes, n_layer) || !multiply(&bytes, n_seq) || !multiply(&bytes, room) ||
        !multiply(&bytes, n_head_kv) || !multiply(&bytes, head_dim)) {
        return AZQ_E_SHAPE;
    }
    azq_kv *kv = calloc(1, sizeof *kv);
    if (!kv) {
        return AZQ_E_NOMEM;
    }
    *kv = (azq_kv){n_layer, n_seq, n_ctx, n_head_kv, head_dim, room, type, element, NULL, NULL, NULL};
    if (!allocate(kv, bytes)) {
        azq_kv_free(kv);
        return AZQ_E_NOMEM;
    }
    *out = kv;
    return AZQ_OK;
}

void azq_kv_free(azq_kv *kv) {
    if (kv) {
        free(kv->memory);
        free(kv);
    }
}

int64_t azq_kv_bytes(const azq_kv *kv) {
    return kv ? 2 * kv->n_layer * kv->n_seq * kv->n_head_kv * kv->room * kv->head_dim * (int64_t)kv->element : 0;
}

azq_status azq_kv_copy(azq_kv *kv, int64_t from, int64_t to, int64_t n) {
    if (!kv) {
        return AZQ_E_NULL;
    }
    if (from < 0 || from >= kv->n_seq || to < 0 || to >= kv->n_seq || n < 0 || n > kv->n_ctx) {
        return AZQ_E_INDEX;
    }
    if (from == to) {
        return AZQ_OK;
    }
    /* Keys: whole tiles at once, then the first positions of each line of the last tile. */
    int64_t rest = n % AZQ_KV_TILE;
    size_t bytes = (size_t)(n * kv->head_dim) * kv->element, tiles = (size_t)((n - rest) * kv->head_dim) * kv->element;
    size_t line = AZQ_KV_TILE * kv->element;
    for (int64_t layer = 0; layer < kv->n_layer; layer++) {
        for (int64_t head = 0; head < kv->n_head_kv; head++) {
            size_t source = azq_kv_offset(kv, layer, from, head), target = azq_kv_offset(kv, layer, to, head);
            memcpy(kv->values + target, kv->values + source, bytes);
            memcpy(kv->keys + target, kv->keys + source, tiles);
            for (int64_t d = 0; rest && d < kv->head_dim; d++) {
                size_t at = tiles + (size_t)d * line;
                memcpy(kv->keys + target + at, kv->keys + source + at, (size_t)rest * kv->element);
            }
        }
    }
    return AZQ_OK;
}
