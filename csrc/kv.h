#ifndef AZQ_KV_H
#define AZQ_KV_H
#include <stddef.h>
#include "azq.h"
#include "azq_kernels.h"
/* Keys and values of past tokens: fp32, fp16, or q8_0 (blocks of 32 dimensions, the last padded). Both are
 * (layer, sequence, kv head) arrays of one head's cache: values (position, head_dim); keys in tiles of 16
 * positions, (position / 16, head_dim, 16), so that one vector holds the same dimension of 16 positions. The
 * tiles of q8_0 hold for each block 16 scales, then (32, 16) numbers. */
enum { AZQ_KV_TILE = 16 };

struct azq_kv {
    int64_t n_layer, n_seq, n_ctx, n_head_kv, head_dim;
    int64_t room; /* n_ctx rounded up to whole tiles */
    int type;
    size_t row_bytes; /* of one position of one head's values; a tile of keys takes AZQ_KV_TILE times that */
    uint8_t *keys, *values;
    void *memory; /* of both */
};

/* Byte offset of position 0 of one head. */
static inline size_t azq_kv_offset(const azq_kv *kv, int64_t layer, int64_t seq, int64_t head) {
    return (size_t)(((layer * kv->n_seq + seq) * kv->n_head_kv + head) * kv->room) * kv->row_bytes;
}

/* Puts one head's key and value (head_dim) at a position. A block of q8_0 with a non-finite number becomes NaN. */
void azq_kv_store(azq_kv *kv, const azq_kernel_slots *kernels, int64_t layer, int64_t seq, int64_t head,
                  int64_t position, const float *key, const float *value);
/* The kernel that reads it. */
azq_attend_fn *azq_kv_attend(const azq_kv *kv, const azq_kernel_slots *kernels);
#endif
