#ifndef AZQ_LANES_H
#define AZQ_LANES_H
/* AZQ_LANES fp32 lanes as a compiler vector, the including file having set the number and the target. One lane
 * is one group of weights, so that sums run through it one element after the other, in the reference's order. */
#include <stdint.h>
#include <string.h>
#include "rounding.h"

typedef float vf __attribute__((vector_size(4 * AZQ_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * AZQ_LANES)));

#define LANE_INLINE static inline __attribute__((always_inline, unused))

LANE_INLINE vf splat(float x) { return (vf){0} + x; }
LANE_INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
LANE_INLINE vi choose_int(vi mask, vi yes, vi no) { return (mask & yes) | (~mask & no); }
LANE_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }
LANE_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
LANE_INLINE int any_lane(vi mask) {
    int32_t seen = 0;
    for (int l = 0; l < AZQ_LANES; l++) {
        seen |= mask[l];
    }
    return seen != 0;
}

/* azq_nearest in every lane. */
LANE_INLINE vi nearest(vf x) { return ((vi)(x + 12582912.0f) & 0x007fffff) - 0x00400000; }
LANE_INLINE vi clamp(vi x, int32_t low, int32_t high) {
    x = choose_int(x < low, (vi){0} + low, x);
    return choose_int(x > high, (vi){0} + high, x);
}

/* The nearest whole number, ties to even, of |x| < 2^22; never -0. */
LANE_INLINE vf whole(vf x) { return x + 12582912.0f - 12582912.0f; }

/* Numbers brought into low .. high; what becomes of a NaN differs. Compilers make selections of a comparison,
 * so an ISA with instructions for it says so: LANE_MIN and LANE_MAX. */
#ifndef LANE_MIN
#define LANE_MIN(a, b) choose((a) < (b), a, b)
#define LANE_MAX(a, b) choose((a) > (b), a, b)
#endif
LANE_INLINE vf limit(vf x, float low, float high) {
    vf raised = LANE_MAX(x, splat(low));
    return LANE_MIN(raised, splat(high));
}

/* Groups of n consecutive elements into lanes: t[i][l] = x[l * n + i]; lanes from count on are zero. */
LANE_INLINE void to_lanes(int n, int count, const float *x, vf *t) {
    float at[32 * AZQ_LANES];
    for (int l = 0; l < AZQ_LANES; l++) {
        for (int i = 0; i < n; i++) {
            at[i * AZQ_LANES + l] = l < count ? x[l * n + i] : 0.0f;
        }
    }
    memcpy(t, at, (size_t)n * sizeof *t);
}

/* And back, the low byte of each. */
LANE_INLINE void from_lanes(int n, int count, const vi *t, uint8_t *q) {
    for (int l = 0; l < count; l++) {
        for (int i = 0; i < n; i++) {
            q[l * n + i] = (uint8_t)(t[i][l] & 0xff);
        }
    }
}

#endif
