/* Softmax and activations. Compiled by every ISA file over its own vectors, which it defines beforehand:
 *
 *   vf, LANES (1, 4, 8 or 16), V_ZERO, v_set(x), v_load(p), v_store(p, v)
 *   v_add v_sub v_mul v_div, v_fma(a, b, c) = a * b + c, rounded once
 *   v_max(a, b), v_min(a, b): b when either is NaN (as x86 has it)
 *   v_scale(p, n): p * 2^n for whole n that keep it a normal number; NaN when p is
 *   v_below(x, limit, yes, no): yes where x < limit, else (NaN) no
 *
 * Every step is an exactly rounded operation on one element, so all ISAs give the same bits; sums use 16
 * lanes (element i in lane i % 16), folded 16 -> 8 -> 4 -> 2 -> 1. */
#include <math.h>
#include <string.h>

/* e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and a polynomial of degree 6 for e^r (coefficients:
 * Cephes expf). Within 2 units in the last place for -86 <= x <= 88; beyond, the value at the border. NaN
 * stays NaN. */
AZQ_INLINE vf v_exp(vf x) {
    x = v_min(v_set(88.0f), v_max(v_set(-86.0f), x));
    const vf magic = v_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vf n = v_sub(v_fma(x, v_set(1.44269504088896341f), magic), magic);
    vf r = v_fma(n, v_set(-0.693359375f), x);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vf p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    return v_scale(p, n);
}

AZQ_INLINE float fold_lanes(const float *lanes) {
    float s[8];
    for (int i = 0; i < 8; i++) {
        s[i] = lanes[i] + lanes[i + 8];
    }
    for (int half = 4; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            s[i] += s[i + half];
        }
    }
    return s[0];
}

static float softmax(float *x, int64_t n) {
    enum { V = 16 / LANES };
    float lanes[16];
    vf acc[V];
    for (int v = 0; v < V; v++) {
        acc[v] = v_set(-INFINITY);
    }
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int v = 0; v < V; v++) {
            acc[v] = v_max(v_load(x + i + v * LANES), acc[v]);
        }
    }
    for (int v = 0; v < V; v++) {
        v_store(lanes + v * LANES, acc[v]);
        acc[v] = V_ZERO;
    }
    float max = -INFINITY;
    for (int lane = 0; lane < 16; lane++) {
        max = lanes[lane] > max ? lanes[lane] : max;
    }
    for (; i < n; i++) {
        max = x[i] > max ? x[i] : max;
    }
    vf m = v_set(max);
    for (i = 0; i + 16 <= n; i += 16) {
        for (int v = 0; v < V; v++) {
            vf e = v_exp(v_sub(v_load(x + i + v * LANES), m));
            v_store(x + i + v * LANES, e);
            acc[v] = v_add(acc[v], e);
        }
    }
    for (int v = 0; v < V; v++) {
        v_store(lanes + v * LANES, acc[v]);
    }
    if (i < n) {
        float tail[16];
        for (int lane = 0; lane < 16; lane++) {
            tail[lane] = i + lane < n ? x[i + lane] - max : 0.0f;
        }
        for (int v = 0; v < V; v++) {
            v_store(tail + v * LANES, v_exp(v_load(tail + v * LANES)));
        }
        for (int lane = 0; i + lane < n; lane++) {
            x[i + lane] = tail[lane];
            lanes[lane] += tail[lane];
        }
    }
    return fold_lanes(lanes);
}

AZQ_INLINE vf v_silu(vf x) { return v_div(x, v_add(v_set(1.0f), v_exp(v_sub(V_ZERO, x)))); }

/* 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2u)). */
AZQ_INLINE vf v_gelu_tanh(vf x) {
    vf u = v_mul(v_mul(x, v_set(0.79788456080286535588f)), v_fma(v_mul(v_set(0.044715f), x), x, v_set(1.0f)));
    return v_div(x, v_add(v_set(1.0f), v_exp(v_mul(v_set(-2.0f), u))));
}

/* 1 - 2 / (e^2|x| + 1) with the sign of x; near 0, where that cancels, an odd polynomial (the least largest error
 * relative to tanh, fitted by weighted least squares). Within 2 units in the last place. */
AZQ_INLINE vf v_tanh(vf x) {
    vf minus = v_sub(V_ZERO, x), t = v_max(x, minus), s = v_mul(x, x);
    vf far = v_sub(v_set(1.0f), v_div(v_set(2.0f), v_add(v_exp(v_add(t, t)), v_set(1.0f))));
    vf p = v_fma(v_set(-5.7170367e-3f), s, v_set(2.0650579e-2f));
    p = v_fma(p, s, v_set(-5.3743497e-2f));
    p = v_fma(p, s, v_set(1.3331491e-1f));
    p = v_fma(p, s, v_set(-3.3333284e-1f));
    vf near = v_fma(v_mul(p, s), x, x);
    return v_below(t, v_set(0.625f), near, v_below(x, V_ZERO, v_sub(V_ZERO, far), far));
}

/* 1 - e^(-|x| q(|x|)) with the sign of x, q fitted to -log(erfc(t)) / t up to 4, from where erf rounds to 1; near 0
 * an odd polynomial. Within 2 units in the last place. */
AZQ_INLINE vf v_erf(vf x) {
    vf minus = v_sub(V_ZERO, x), s = v_mul(x, x);
    vf t = v_min(v_set(4.0f), v_max(x, minus));
    vf q = v_fma(v_set(4.6361092e-6f), t, v_set(-4.1880267e-5f));
    q = v_fma(q, t, v_set(-6.8559930e-5f));
    q = v_fma(q, t, v_set(2.9829347e-3f));
    q = v_fma(q, t, v_set(-2.2760197e-2f));
    q = v_fma(q, t, v_set(1.0534500e-1f));
    q = v_fma(q, t, v_set(6.3558251e-1f));
    q = v_fma(q, t, v_set(1.1285610f));
    vf far = v_sub(v_set(1.0f), v_exp(v_mul(q, v_sub(V_ZERO, t))));
    vf p = v_fma(v_set(8.2966064e-5f), s, v_set(-8.1258052e-4f));
    p = v_fma(p, s, v_set(5.1995995e-3f));
    p = v_fma(p, s, v_set(-2.6858851e-2f));
    p = v_fma(p, s, v_set(1.1283686e-1f));
    p = v_fma(p, s, v_set(-3.7612632e-1f));
    p = v_fma(p, s, v_set(1.2837917e-1f));
    vf near = v_fma(p, x, x);
    return v_below(t, v_set(0.9375f), near, v_below(x, V_ZERO, v_sub(V_ZERO, far), far));
}

AZQ_INLINE vf v_gelu_erf(vf x) {
    return v_mul(v_mul(v_set(0.5f), x), v_add(v_set(1.0f), v_erf(v_mul(x, v_set(0.70710678118654752440f)))));
}

#define AZQ_MAP(name)                                             \
    static void name(float *x, int64_t n) {                       \
        int64_t i = 0;                                            \
        for (; i + LANES <= n; i += LANES) {                      \
            v_store(x + i, v_##name(v_load(x + i)));              \
        }                                                         \
        if (i < n) {                                              \
            float tail[LANES] = {0};                              \
            memcpy(tail, x + i, (size_t)(n - i) * sizeof *x);     \
            v_store(tail, v_##name(v_load(tail)));                \
            memcpy(x + i, tail, (size_t)(n - i) * sizeof *x);     \
        }                                                         \
    }
AZQ_MAP(silu)
AZQ_MAP(gelu_tanh)
AZQ_MAP(gelu_erf)
#undef AZQ_MAP

static void softcap(float *x, int64_t n, float cap) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(x + i, v_mul(v_set(cap), v_tanh(v_div(v_load(x + i), v_set(cap)))));
    }
    if (i < n) {
        float tail[LANES] = {0};
        memcpy(tail, x + i, (size_t)(n - i) * sizeof *x);
        v_store(tail, v_mul(v_set(cap), v_tanh(v_div(v_load(tail), v_set(cap)))));
        memcpy(x + i, tail, (size_t)(n - i) * sizeof *x);
    }
}

#define AZQ_EXP_SLOTS .softmax = softmax, .silu = silu, .gelu_tanh = gelu_tanh, .gelu_erf = gelu_erf, .softcap = softcap
