#ifndef AZQ_KV_H
#define AZQ_KV_H
#include <stddef.h>
#include "azq.h"
/* Keys and values of past tokens: (layer, sequence, kv head, position, head_dim), fp32 or fp16. */
struct azq_kv {
    int64_t n_layer, n_seq, n_ctx, n_head_kv, head_dim;
    int type;
    size_t element; /* bytes of one number */
    uint8_t *keys, *values;
};

/* Byte offset of position 0 of one head. */
static inline size_t azq_kv_offset(const azq_kv *kv, int64_t layer, int64_t seq, int64_t head) {
    return (size_t)(((layer * kv->n_seq + seq) * kv->n_head_kv + head) * kv->n_ctx * kv->head_dim) * kv->element;
}
#endif
