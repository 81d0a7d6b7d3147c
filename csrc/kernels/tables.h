#ifndef AZQ_TABLES_H
#define AZQ_TABLES_H
#include <stdint.h>
#include "../azq_half.h"
/* Numbers that formats are defined by, and how scales are packed into super-blocks. */

/* IQ4_NL and IQ4_XS: what the 16 codes stand for. */
static const float azq_iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) times two; the scales below are halved to match. */
static const float azq_e2m1_doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 2^(e - 127) / 2. */
static inline float azq_e8m0_halved(uint8_t e) {
    return azq_from_bits(e < 2 ? UINT32_C(0x00200000) << e : (uint32_t)(e - 1) << 23);
}

/* Unsigned E4M3 of bias 7, halved; the top bit is ignored, and 0x7f (NaN in the standard) is zero, as in ggml. */
static inline float azq_ue4m3_halved(uint8_t byte) {
    if (byte == 0 || byte == 0x7f) {
        return 0.0f;
    }
    int exponent = byte >> 3 & 15, mantissa = byte & 7;
    float fraction = exponent ? 8.0f + (float)mantissa : (float)mantissa; /* in eighths */
    return fraction * azq_from_bits((uint32_t)((exponent ? exponent : 1) - 7 - 3 - 1 + 127) << 23);
}

/* Q4_K and Q5_K: the six-bit scale and minimum of group g, see azq_block_q4_k. */
static inline uint8_t azq_k4_scale(const uint8_t *packed, int g) {
    return g < 4 ? packed[g] & 63 : (uint8_t)((packed[g + 4] & 15) | packed[g - 4] >> 6 << 4);
}
static inline uint8_t azq_k4_min(const uint8_t *packed, int g) {
    return g < 4 ? packed[g + 4] & 63 : (uint8_t)(packed[g + 4] >> 4 | packed[g] >> 6 << 4);
}

/* Q3_K: the six-bit scale of group g. */
static inline uint8_t azq_q3_k_scale(const uint8_t *packed, int g) {
    uint8_t low = g < 8 ? packed[g] & 15 : packed[g - 8] >> 4;
    return (uint8_t)(low | (packed[8 + g % 4] >> g / 4 * 2 & 3) << 4);
}

#endif
