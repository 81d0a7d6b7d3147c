/* attend.h for every type of cache. The vectors are the including file's; a cache whose numbers it defines no
 * loads for gets no slot. */

#define AZQ_ATTEND(part) attend_f32_##part
AZQ_INLINE int64_t attend_f32_row_bytes(int64_t dim) { return 4 * dim; }
enum { attend_f32_LINE = 64 };
AZQ_INLINE int64_t attend_f32_RUN(int64_t dim) { return dim; }
AZQ_INLINE vf attend_f32_key_scales(const uint8_t *tile, int64_t d, int lane) {
    (void)tile, (void)d, (void)lane;
    return V_ZERO;
}
AZQ_INLINE vf attend_f32_key(const uint8_t *tile, int64_t d, int lane, vf scales) {
    (void)scales;
    return v_load((const float *)(const void *)tile + 16 * d + lane);
}
AZQ_INLINE int64_t attend_f32_column(int64_t d) { return 4 * d; }
AZQ_INLINE vf attend_f32_value(const uint8_t *at, int64_t d, int i) {
    (void)d;
    return v_load((const float *)(const void *)at + i);
}
AZQ_INLINE float attend_f32_value_one(const uint8_t *at, int64_t d) {
    (void)d;
    return *(const float *)(const void *)at;
}
#include "attend.h"

#define AZQ_ATTEND(part) attend_f16_##part
AZQ_INLINE int64_t attend_f16_row_bytes(int64_t dim) { return 2 * dim; }
enum { attend_f16_LINE = 32 };
AZQ_INLINE int64_t attend_f16_RUN(int64_t dim) { return dim; }
AZQ_INLINE vf attend_f16_key_scales(const uint8_t *tile, int64_t d, int lane) {
    (void)tile, (void)d, (void)lane;
    return V_ZERO;
}
AZQ_INLINE vf attend_f16_key(const uint8_t *tile, int64_t d, int lane, vf scales) {
    (void)scales;
    return v_load_f16((const uint16_t *)(const void *)tile + 16 * d + lane);
}
AZQ_INLINE int64_t attend_f16_column(int64_t d) { return 2 * d; }
AZQ_INLINE vf attend_f16_value(const uint8_t *at, int64_t d, int i) {
    (void)d;
    return v_load_f16((const uint16_t *)(const void *)at + i);
}
AZQ_INLINE float attend_f16_value_one(const uint8_t *at, int64_t d) {
    (void)d;
    return azq_f16_to_f32(*(const uint16_t *)(const void *)at);
}
#include "attend.h"

#define AZQ_ATTEND_FLOAT_SLOTS .attend_f32 = attend_f32_rows, .attend_f16 = attend_f16_rows

/* Q8_0: the product of a scale and a number is exact in fp32, so these are attend_f32's bits over the
 * dequantized cache. A tile of keys: for every block of 32 dimensions 16 scales, then (32, 16) numbers. */
#ifdef v_load_i8
#define AZQ_ATTEND(part) attend_q8_0_##part
enum { AZQ_KV_BLOCK_KEYS = 16 * sizeof(azq_block_q8_0), attend_q8_0_LINE = AZQ_KV_BLOCK_KEYS / AZQ_QK8_0 };
AZQ_INLINE int64_t attend_q8_0_row_bytes(int64_t dim) {
    return (dim + AZQ_QK8_0 - 1) / AZQ_QK8_0 * (int64_t)sizeof(azq_block_q8_0);
}
AZQ_INLINE int64_t attend_q8_0_RUN(int64_t dim) {
    (void)dim;
    return AZQ_QK8_0;
}
AZQ_INLINE vf attend_q8_0_key_scales(const uint8_t *tile, int64_t d, int lane) {
    return v_load_f16((const uint16_t *)(const void *)(tile + d / AZQ_QK8_0 * AZQ_KV_BLOCK_KEYS) + lane);
}
AZQ_INLINE vf attend_q8_0_key(const uint8_t *tile, int64_t d, int lane, vf scales) {
    const uint8_t *block = tile + d / AZQ_QK8_0 * AZQ_KV_BLOCK_KEYS + 16 * sizeof(uint16_t);
    return v_mul(v_load_i8(block + d % AZQ_QK8_0 * 16 + lane), scales);
}
AZQ_INLINE int64_t attend_q8_0_column(int64_t d) { return d / AZQ_QK8_0 * (int64_t)sizeof(azq_block_q8_0); }
AZQ_INLINE vf attend_q8_0_value(const uint8_t *at, int64_t d, int i) {
    int64_t from = d % AZQ_QK8_0 + i; /* a vector ends with its block at the latest, but i may lie in the next */
    const azq_block_q8_0 *block = (const azq_block_q8_0 *)(const void *)at + from / AZQ_QK8_0;
    return v_mul(v_load_i8(block->qs + from % AZQ_QK8_0), v_set_f16(block->d));
}
AZQ_INLINE float attend_q8_0_value_one(const uint8_t *at, int64_t d) {
    const azq_block_q8_0 *block = (const void *)at;
    return (float)block->qs[d % AZQ_QK8_0] * azq_f16_to_f32(block->d);
}
#include "attend.h"
#define AZQ_ATTEND_SLOTS AZQ_ATTEND_FLOAT_SLOTS, .attend_q8_0 = attend_q8_0_rows
#else
#define AZQ_ATTEND_SLOTS AZQ_ATTEND_FLOAT_SLOTS
#endif
