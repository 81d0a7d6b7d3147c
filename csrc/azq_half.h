#ifndef AZQ_HALF_H
#define AZQ_HALF_H
#include <stdint.h>
#include <string.h>
/* fp16 and bf16 in integer arithmetic, round to nearest even: the same bits on every machine. */

static inline uint32_t azq_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float azq_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float azq_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1fu;
    uint32_t mantissa = h & 0x3ffu;
    if (exponent == 0x1f) { /* infinity; NaN: payload kept, made quiet as hardware does */
        return azq_from_bits(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0));
    }
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24, exact in fp32 */
        float magnitude = (float)mantissa * 0x1p-24f;
        return azq_from_bits(sign | azq_bits(magnitude));
    }
    return azq_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* NaN becomes sign | 0x7e00. */
static inline uint16_t azq_f32_to_f16(float x) {
    uint32_t bits = azq_bits(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (magnitude >= 0x477ff000u) { /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) {
        /* Below 2^-14 the result is subnormal: adding 0.5 aligns the mantissa so that the FPU's own
         * round-to-nearest-even drops the bits that fp16 cannot hold. */
        float aligned = azq_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (azq_bits(aligned) - 0x3f000000u));
    }
    uint32_t odd = magnitude >> 13 & 1u;
    return (uint16_t)(sign | (magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

static inline float azq_bf16_to_f32(uint16_t h) { return azq_from_bits((uint32_t)h << 16); }

/* NaN stays NaN (its quiet bit set). */
static inline uint16_t azq_f32_to_bf16(float x) {
    uint32_t bits = azq_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif
