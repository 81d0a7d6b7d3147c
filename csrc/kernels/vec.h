/* Norms, sums and products in fp32, written once over the vectors that exp.h describes and compiled by every ISA
 * file, after exp.h, inside its target region. Multiply, then add, never fused, in a fixed order: all ISAs give the
 * same bits.
 *
 * Sums use 16 lanes; a tail shorter than 16 is padded with zeros, which leaves the lanes' sums as they are. */

enum { VECTORS = 16 / LANES };

AZQ_INLINE float sum_vectors(const vf *sums) {
    float lanes[16];
    for (int v = 0; v < VECTORS; v++) {
        v_store(lanes + v * LANES, sums[v]);
    }
    return fold_lanes(lanes);
}

/* Sum of (x - shift), or of its square. */
AZQ_INLINE float sum_shifted(const float *x, float shift, int64_t n, int square) {
    vf s = v_set(shift), sums[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        sums[v] = V_ZERO;
    }
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int v = 0; v < VECTORS; v++) {
            vf d = v_sub(v_load(x + i + v * LANES), s);
            sums[v] = v_add(sums[v], square ? v_mul(d, d) : d);
        }
    }
    if (i < n) {
        float pad[16];
        for (int j = 0; j < 16; j++) {
            pad[j] = i + j < n ? x[i + j] : shift; /* shift - shift adds nothing */
        }
        for (int v = 0; v < VECTORS; v++) {
            vf d = v_sub(v_load(pad + v * LANES), s);
            sums[v] = v_add(sums[v], square ? v_mul(d, d) : d);
        }
    }
    return sum_vectors(sums);
}

static void layer_norm(const float *x, const float *w, const float *b, float eps, float *y, int64_t n) {
    float mean = sum_shifted(x, 0.0f, n, 0) / (float)n;
    float variance = sum_shifted(x, mean, n, 1) / (float)n;
    float scale = 1.0f / sqrtf(variance + eps);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = v_mul(v_mul(v_sub(v_load(x + i), v_set(mean)), v_set(scale)), v_load(w + i));
        v_store(y + i, b ? v_add(v, v_load(b + i)) : v);
    }
    for (; i < n; i++) {
        float v = (x[i] - mean) * scale * w[i];
        y[i] = b ? v + b[i] : v;
    }
}

static void rms_norm(const float *x, const float *w, float eps, float *y, int64_t n) {
    float scale = 1.0f / sqrtf(sum_shifted(x, 0.0f, n, 1) / (float)n + eps);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(y + i, v_mul(v_mul(v_load(x + i), v_set(scale)), v_load(w + i)));
    }
    for (; i < n; i++) {
        y[i] = x[i] * scale * w[i];
    }
}

static void sum(const float *a, const float *b, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(y + i, v_add(v_load(a + i), v_load(b + i)));
    }
    for (; i < n; i++) {
        y[i] = a[i] + b[i];
    }
}

static void product(const float *a, const float *b, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(y + i, v_mul(v_load(a + i), v_load(b + i)));
    }
    for (; i < n; i++) {
        y[i] = a[i] * b[i];
    }
}

#define AZQ_VEC_SLOTS .layer_norm = layer_norm, .rms_norm = rms_norm, .sum = sum, .product = product
