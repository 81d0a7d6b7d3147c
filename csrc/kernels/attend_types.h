/* attend.h for every type of cache. The vectors are the including file's; a cache whose numbers it defines no
 * loads for gets no slot. */

/* The parts of attend.h for numbers that need no scale: their C type, a load of a vector, one of them in fp32. */
#define AZQ_ATTEND_NUMBERS(type, number, load, value)                                                    \
    AZQ_INLINE int64_t attend_##type##_row_bytes(int64_t dim) { return (int64_t)sizeof(number) * dim; }    \
    enum { attend_##type##_LINE = 16 * sizeof(number) };                                                 \
    AZQ_INLINE int64_t attend_##type##_RUN(int64_t dim) { return dim; }                                  \
    AZQ_INLINE vf attend_##type##_key_scales(const uint8_t *tile, int64_t d, int lane) {                 \
        (void)tile, (void)d, (void)lane;                                                                 \
        return V_ZERO;                                                                                   \
    }                                                                                                    \
    AZQ_INLINE vf attend_##type##_key(const uint8_t *tile, int64_t d, int lane, vf scales) {             \
        (void)scales;                                                                                    \
        return load((const number *)(const void *)tile + 16 * d + lane);                                 \
    }                                                                                                    \
    AZQ_INLINE int64_t attend_##type##_column(int64_t d) { return (int64_t)sizeof(number) * d; }           \
    AZQ_INLINE vf attend_##type##_value(const uint8_t *at, int64_t d, int i) {                           \
        (void)d;                                                                                         \
        return load((const number *)(const void *)at + i);                                               \
    }                                                                                                    \
    AZQ_INLINE float attend_##type##_value_one(const uint8_t *at, int64_t d) {                           \
        (void)d;                                                                                         \
        return value(*(const number *)(const void *)at);                                                 \
    }

AZQ_ATTEND_NUMBERS(f32, float, v_load, )
#define AZQ_ATTEND(part) attend_f32_##part
#include "attend.h"

AZQ_ATTEND_NUMBERS(f16, uint16_t, v_load_f16, azq_f16_to_f32)
#define AZQ_ATTEND(part) attend_f16_##part
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
