#ifndef AZQ_ROUNDING_H
#define AZQ_ROUNDING_H
#include <limits.h>
#include <stdint.h>
#include "../azq_half.h"
/* Float to integer as the reference does it on x86-64, defined where C leaves it open. */

/* As cvttss2si: out of range and NaN give INT_MIN. */
static inline int32_t azq_truncate(float x) {
    return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)x : INT_MIN;
}

/* The low byte of that, as a signed one. */
static inline int8_t azq_truncate_i8(float x) {
    return (int8_t)(uint8_t)((uint32_t)azq_truncate(x) & 0xffu);
}

/* Nearest integer, halves to even, for |x| < 2^22; beyond it and for NaN some integer of 23 bits, the same
 * everywhere: adding 1.5 * 2^23 leaves the integer in the low mantissa bits. */
static inline int32_t azq_nearest(float x) {
    return (int32_t)(azq_bits(x + 12582912.0f) & 0x007fffffu) - 0x00400000;
}

static inline int32_t azq_clamp(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

/* The low 8 bits, as a store to uint8_t keeps them. */
static inline uint8_t azq_low_byte(int32_t x) { return (uint8_t)((uint32_t)x & 0xffu); }

#endif
