/* What encode.h does to 32 elements at a time, in plain C. */
#include <math.h>
#include <stdint.h>
#include "rounding.h"

/* Largest and smallest values are found in so many strands side by side. */
enum { STRANDS = 16 };

/* n: a multiple of STRANDS. */
static float magnitude_of(const float *x, int n) {
    float most[STRANDS] = {0};
    for (int i = 0; i < n; i += STRANDS) {
        for (int j = 0; j < STRANDS; j++) {
            most[j] = fabsf(x[i + j]) > most[j] ? fabsf(x[i + j]) : most[j];
        }
    }
    for (int width = STRANDS / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) {
            most[j] = most[j + width] > most[j] ? most[j + width] : most[j];
        }
    }
    return most[0];
}

/* The first element whose magnitude is largest, with its sign. */
static float extreme_32(const float *x) {
    float amax = magnitude_of(x, 32);
    uint32_t reach = 0;
    for (int j = 0; j < 32; j++) {
        reach |= (uint32_t)(fabsf(x[j]) == amax) << j;
    }
    return amax > 0.0f ? x[__builtin_ctz(reach)] : 0.0f;
}

/* Smallest and largest; the sign of a zero is any that occurs. */
static void range_32(const float *x, float *min, float *max) {
    float low[STRANDS], high[STRANDS];
    for (int j = 0; j < STRANDS; j++) {
        low[j] = x[j + STRANDS] < x[j] ? x[j + STRANDS] : x[j];
        high[j] = x[j + STRANDS] > x[j] ? x[j + STRANDS] : x[j];
    }
    for (int width = STRANDS / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) {
            low[j] = low[j + width] < low[j] ? low[j + width] : low[j];
            high[j] = high[j + width] > high[j] ? high[j + width] : high[j];
        }
    }
    *min = low[0];
    *max = high[0];
}

/* (x - shift) * id + half without its fraction, at most `most`. None of finite weights is below zero; of
 * infinite ones, from a subnormal scale, the code is 0. */
static void codes_32(const float *x, float shift, float id, float half, int most, uint8_t *q) {
    for (int j = 0; j < 32; j++) {
        int8_t l = azq_truncate_i8((x[j] - shift) * id + half);
        q[j] = (uint8_t)(l < most ? l : most);
    }
}
