#include "kv.h"
#include <math.h>
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
    if (type != AZQ_TYPE_F32 && type != AZQ_TYPE_F16 && type != AZQ_TYPE_Q8_0) {
        return AZQ_E_TYPE;
    }
    int64_t numbers = head_dim;
    size_t bytes = type == AZQ_TYPE_F32 ? 4 : 2;
    if (type == AZQ_TYPE_Q8_0) {
        numbers = head_dim / AZQ_QK8_0 + (head_dim % AZQ_QK8_0 > 0);
        bytes = sizeof(azq_block_q8_0);
    }
    if (!multiply(&bytes, numbers)) {
        return AZQ_E_SHAPE;
    }
    size_t row_bytes = bytes;
    int64_t room = n_ctx > INT64_MAX - AZQ_KV_TILE ? n_ctx : (n_ctx + AZQ_KV_TILE - 1) / AZQ_KV_TILE * AZQ_KV_TILE;
    if (!multiply(&bytes, n_layer) || !multiply(&bytes, n_seq) || !multiply(&bytes, room) ||
        !multiply(&bytes, n_head_kv)) {
        return AZQ_E_SHAPE;
    }
    azq_kv *kv = calloc(1, sizeof *kv);
    if (!kv) {
        return AZQ_E_NOMEM;
    }
    *kv = (azq_kv){n_layer, n_seq, n_ctx, n_head_kv, head_dim, room, type, row_bytes, NULL, NULL, NULL};
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
    return kv ? 2 * kv->n_layer * kv->n_seq * kv->n_head_kv * kv->room * (int64_t)kv->row_bytes : 0;
}

/* The first n positions of each of the lines of a tile. */
static void copy_lines(uint8_t *to, const uint8_t *from, size_t n, size_t element, int64_t lines) {
    for (int64_t i = 0; i < lines; i++) {
        memcpy(to, from, n * element);
        to += AZQ_KV_TILE * element;
        from += AZQ_KV_TILE * element;
    }
}

static void copy_tile(const azq_kv *kv, uint8_t *to, const uint8_t *from, size_t n) {
    if (kv->type != AZQ_TYPE_Q8_0) {
        copy_lines(to, from, n, kv->row_bytes / (size_t)kv->head_dim, kv->head_dim);
        return;
    }
    size_t block = AZQ_KV_TILE * sizeof(azq_block_q8_0);
    for (size_t at = 0; at < AZQ_KV_TILE * kv->row_bytes; at += block) {
        copy_lines(to + at, from + at, n, sizeof(uint16_t), 1);
        size_t numbers = at + AZQ_KV_TILE * sizeof(uint16_t);
        copy_lines(to + numbers, from + numbers, n, 1, AZQ_QK8_0);
    }
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
    size_t bytes = (size_t)n * kv->row_bytes, tiles = (size_t)(n - rest) * kv->row_bytes;
    for (int64_t layer = 0; layer < kv->n_layer; layer++) {
        for (int64_t head = 0; head < kv->n_head_kv; head++) {
            size_t source = azq_kv_offset(kv, layer, from, head), target = azq_kv_offset(kv, layer, to, head);
            memcpy(kv->values + target, kv->values + source, bytes);
            memcpy(kv->keys + target, kv->keys + source, tiles);
            if (rest) {
                copy_tile(kv, kv->keys + target + tiles, kv->keys + source + tiles, (size_t)rest);
            }
        }
    }
    return AZQ_OK;
}

static void store_f32(const azq_kv *kv, uint8_t *tile, uint8_t *row, const float *key, const float *value) {
    memcpy(row, value, kv->row_bytes);
    for (int64_t d = 0; d < kv->head_dim; d++) {
        ((float *)(void *)tile)[d * AZQ_KV_TILE] = key[d];
    }
}

static void store_f16(const azq_kv *kv, azq_quantize_row_fn *store, uint8_t *tile, uint8_t *row, const float *key,
                      const float *value) {
    uint16_t halves[64];
    store(value, row, kv->head_dim);
    for (int64_t d = 0; d < kv->head_dim; d += 64) {
        int64_t n = kv->head_dim - d < 64 ? kv->head_dim - d : 64;
        store(key + d, halves, n);
        for (int64_t i = 0; i < n; i++) {
            ((uint16_t *)(void *)tile)[(d + i) * AZQ_KV_TILE] = halves[i];
        }
    }
}

static void quantize_block(const azq_kernel_slots *kernels, const float *x, int64_t n, azq_block_q8_0 *block) {
    float padded[AZQ_QK8_0] = {0};
    if (n < AZQ_QK8_0) {
        memcpy(padded, x, (size_t)n * sizeof *x);
        x = padded;
    }
    if (kernels->find_bad(x, AZQ_QK8_0, INFINITY) >= 0) {
        memset(block, 0, sizeof *block);
        block->d = 0x7e00; /* NaN: what it was computed from must not pass for numbers */
        return;
    }
    kernels->quantize_row[AZQ_TYPE_Q8_0](x, block, AZQ_QK8_0);
}

static void store_q8_0(const azq_kv *kv, const azq_kernel_slots *kernels, uint8_t *tile, int64_t lane, uint8_t *row,
                       const float *key, const float *value) {
    for (int64_t d = 0; d < kv->head_dim; d += AZQ_QK8_0) {
        int64_t n = kv->head_dim - d < AZQ_QK8_0 ? kv->head_dim - d : AZQ_QK8_0;
        azq_block_q8_0 block;
        quantize_block(kernels, value + d, n, &block);
        memcpy(row, &block, sizeof block);
        quantize_block(kernels, key + d, n, &block);
        ((uint16_t *)(void *)tile)[lane] = block.d;
        uint8_t *numbers = tile + AZQ_KV_TILE * sizeof block.d + lane;
        for (int i = 0; i < AZQ_QK8_0; i++) {
            numbers[i * AZQ_KV_TILE] = (uint8_t)block.qs[i];
        }
        row += sizeof block;
        tile += AZQ_KV_TILE * sizeof block;
    }
}

void azq_kv_store(azq_kv *kv, const azq_kernel_slots *kernels, int64_t layer, int64_t seq, int64_t head,
                  int64_t position, const float *key, const float *value) {
    size_t base = azq_kv_offset(kv, layer, seq, head), lane = (size_t)(position % AZQ_KV_TILE);
    uint8_t *row = kv->values + base + (size_t)position * kv->row_bytes;
    uint8_t *tile = kv->keys + base + ((size_t)position - lane) * kv->row_bytes;
    switch (kv->type) {
    case AZQ_TYPE_F32: store_f32(kv, tile + lane * sizeof(float), row, key, value); break;
    case AZQ_TYPE_F16:
        store_f16(kv, kernels->quantize_row[AZQ_TYPE_F16], tile + lane * sizeof(uint16_t), row, key, value);
        break;
    default: store_q8_0(kv, kernels, tile, (int64_t)lane, row, key, value); break;
    }
}

azq_attend_fn *azq_kv_attend(const azq_kv *kv, const azq_kernel_slots *kernels) {
    return kv->type == AZQ_TYPE_F32   ? kernels->attend_f32
           : kv->type == AZQ_TYPE_F16 ? kernels->attend_f16
                                      : kernels->attend_q8_0;
}
