/* Softmax and activations. Compiled by every ISA file over its own vectors, which it defines beforehand:
 *
 *   vf, LANES (1, 4, 8 or 16), V_ZERO, v_set(x), v_load(p), v_store(p, v)
 *   v_add v_sub v_mul v_div, v_fma(a, b, c) = a * b + c, rounded once
 *   v_max(a, b), v_min(a, b): b when either is NaN (as x86 has it)
 *   v_scale(p, n): p * 2^n for whole n that keep it a normal number; NaN when p is
 *
 * Every step is an exactly rounded operation on one element, so all ISAs give the same bits; sums use 16
 * lanes (element i in lane i % 16), folded 16 -> 8 -> 4 -> 2 -> 1. */

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
#undef AZQ_MAP

#define AZQ_EXP_SLOTS .softmax = softmax, .silu = silu, .gelu_tanh = gelu_tanh
