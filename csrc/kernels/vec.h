/* Dot products and norms in fp32, written once over the vectors that exp.h describes and compiled by every ISA file,
 * after exp.h, inside its target region. Multiply, then add, never fused, in a fixed order: all ISAs give the same
 * bits.
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

/* Sixteen products of x with four rows of w, added to sums[4 * v + row]. */
AZQ_INLINE void add_dot4(const float *x, const float *w0, const float *w1, const float *w2, const float *w3, vf *sums) {
    for (int v = 0; v < VECTORS; v++) {
        vf xv = v_load(x + v * LANES);
        sums[v] = v_add(sums[v], v_mul(xv, v_load(w0 + v * LANES)));
        sums[VECTORS + v] = v_add(sums[VECTORS + v], v_mul(xv, v_load(w1 + v * LANES)));
        sums[2 * VECTORS + v] = v_add(sums[2 * VECTORS + v], v_mul(xv, v_load(w2 + v * LANES)));
        sums[3 * VECTORS + v] = v_add(sums[3 * VECTORS + v], v_mul(xv, v_load(w3 + v * LANES)));
    }
}

/* Dot products of x with four rows of w at once. */
static void dot4_f32(const float *x, const float *w, int64_t ldw, int64_t k, float *out) {
    const float *w0 = w, *w1 = w + ldw, *w2 = w + 2 * ldw, *w3 = w + 3 * ldw;
    vf sums[4 * VECTORS];
    for (int i = 0; i < 4 * VECTORS; i++) {
        sums[i] = V_ZERO;
    }
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        add_dot4(x + i, w0 + i, w1 + i, w2 + i, w3 + i, sums);
    }
    if (i < k) {
        float tail[5][16] = {{0}};
        const float *rows[5] = {x, w0, w1, w2, w3};
        for (int r = 0; r < 5; r++) {
            memcpy(tail[r], rows[r] + i, (size_t)(k - i) * sizeof *x);
        }
        add_dot4(tail[0], tail[1], tail[2], tail[3], tail[4], sums);
    }
    for (int row = 0; row < 4; row++) {
        out[row] = sum_vectors(sums + row * VECTORS);
    }
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

#define AZQ_VEC_SLOTS .dot4_f32 = dot4_f32, .layer_norm = layer_norm, .rms_norm = rms_norm
