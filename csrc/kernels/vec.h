/* Norms in fp32, written once over 8-lane vectors and compiled by every ISA file inside its
 * target region. Multiply, then add, never fused, in a fixed order: all ISAs give the same bits.
 *
 * Sums use 16 lanes (acc[0], acc[1]); a tail shorter than 16 is padded
 * with zeros, which leaves the lanes' sums as they are. */
#include <math.h>
#include <string.h>
#include "vec_types.h"

static inline __attribute__((always_inline)) float sum_lanes(v8 low, v8 high) {
    v8 s = low + high;
    float a[8];
    store8(a, s);
    float b0 = a[0] + a[4], b1 = a[1] + a[5], b2 = a[2] + a[6], b3 = a[3] + a[7];
    return (b0 + b2) + (b1 + b3);
}

/* Sum of (x - shift), or of its square. */
static inline __attribute__((always_inline)) float sum_shifted(const float *x, float shift, int64_t n, int square) {
    v8 s = set8(shift), acc0 = zero8(), acc1 = zero8();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v8 d0 = load8(x + i) - s, d1 = load8(x + i + 8) - s;
        acc0 += square ? d0 * d0 : d0;
        acc1 += square ? d1 * d1 : d1;
    }
    if (i < n) {
        float pad[16];
        for (int j = 0; j < 16; j++) {
            pad[j] = i + j < n ? x[i + j] : shift; /* shift - shift adds nothing */
        }
        v8 d0 = load8(pad) - s, d1 = load8(pad + 8) - s;
        acc0 += square ? d0 * d0 : d0;
        acc1 += square ? d1 * d1 : d1;
    }
    return sum_lanes(acc0, acc1);
}

static void layer_norm(const float *x, const float *w, const float *b, float eps, float *y, int64_t n) {
    float mean = sum_shifted(x, 0.0f, n, 0) / (float)n;
    float variance = sum_shifted(x, mean, n, 1) / (float)n;
    float scale = 1.0f / sqrtf(variance + eps);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        v8 v = (load8(x + i) - set8(mean)) * set8(scale) * load8(w + i);
        store8(y + i, b ? v + load8(b + i) : v);
    }
    for (; i < n; i++) {
        float v = (x[i] - mean) * scale * w[i];
        y[i] = b ? v + b[i] : v;
    }
}

static void rms_norm(const float *x, const float *w, float eps, float *y, int64_t n) {
    float scale = 1.0f / sqrtf(sum_shifted(x, 0.0f, n, 1) / (float)n + eps);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        store8(y + i, load8(x + i) * set8(scale) * load8(w + i));
    }
    for (; i < n; i++) {
        y[i] = x[i] * scale * w[i];
    }
}

#define AZQ_VEC_SLOTS .layer_norm = layer_norm, .rms_norm = rms_norm
