#ifndef AZQ_KV_H
#define AZQ_KV_H
#include <stddef.h>
#include "azq.h"
/* Keys and values of past tokens, fp32 or fp16. Both are (layer, sequence, kv head) arrays of one head's
 * cache: values (position, head_dim); keys in tiles of 16 positions, (position / 16, head_dim, 16), so that
 * one vector holds the same dimension of 16 positions. */
enum { AZQ_KV_TILE = 16 };

struct azq_kv {
    int64_t n_layer, n_seq, n_ctx, n_head_kv, head_dim;
    int64_t room; /* n_ctx rounded up to whole tiles */
    int type;
    size_t element; /* bytes of one number */
    uint8_t *keys, *values;
    void *memory; /* of both */
};

/* Byte offset of position 0 of one head. */
static inline size_t azq_kv_offset(const azq_kv *kv, int64_t layer, int64_t seq, int64_t head) {
    return (size_t)(((layer * kv->n_seq + seq) * kv->n_head_kv + head) * kv->room * kv->head_dim) * kv->element;
}
#endif
