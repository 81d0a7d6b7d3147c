/* Products of bf16 tiles by fp32 fused multiply-adds, with the definition's bits. The including file defines vf,
 * LANES, MAX_ROWS and v_fma, v_zero, v_load, v_store, v_even and v_odd: the floats of a line's words 0, 2, .. and
 * 1, 3, .., and s_even, s_odd: one row's pair, broadcast. */

enum { PARTS = AZQ_PANEL / LANES };

/* R rows of one row tile (a constant) times one panel. */
AZQ_INLINE void gemm_tile(const uint16_t *a, int R, const uint16_t *b, int64_t n_tiles, float *c, int first) {
    vf sums[MAX_ROWS * PARTS];
    for (int i = 0; i < R * PARTS; i++) {
        sums[i] = first ? v_zero() : v_load(c + i / PARTS * AZQ_PANEL + i % PARTS * LANES);
    }
    for (int64_t t = 0; t < n_tiles; t++, a += AZQ_TILE, b += AZQ_TILE) {
        for (int i = 0; i < AZQ_TILE_K / 2; i++) {
            vf even[PARTS], odd[PARTS];
            for (int p = 0; p < PARTS; p++) {
                even[p] = v_even(b + i * 2 * AZQ_PANEL + p * 2 * LANES);
                odd[p] = v_odd(b + i * 2 * AZQ_PANEL + p * 2 * LANES);
            }
            for (int r = 0; r < R; r++) {
                const uint16_t *pair = a + r * AZQ_TILE_K + 2 * i;
                for (int p = 0; p < PARTS; p++) {
                    sums[r * PARTS + p] = v_fma(s_even(pair), even[p], sums[r * PARTS + p]);
                }
                for (int p = 0; p < PARTS; p++) {
                    sums[r * PARTS + p] = v_fma(s_odd(pair), odd[p], sums[r * PARTS + p]);
                }
            }
        }
    }
    for (int i = 0; i < R * PARTS; i++) {
        v_store(c + i / PARTS * AZQ_PANEL + i % PARTS * LANES, sums[i]);
    }
}

void AZQ_NAME(gemm_bf16)(const uint16_t *a, int64_t a_stride, int64_t rows, const uint16_t *b, int64_t b_stride,
                         int64_t n_panels, int64_t n_tiles, float *c, int64_t c_stride, int first) {
    for (int64_t p = 0; p < n_panels; p++, b += b_stride) {
        for (int64_t r = 0, n; r < rows; r += n) {
            int64_t within = r % AZQ_TILE_ROWS;
            const uint16_t *in = a + r / AZQ_TILE_ROWS * a_stride + within * AZQ_TILE_K;
            float *out = c + r / AZQ_TILE_ROWS * c_stride + p * AZQ_TILE_ROWS * AZQ_PANEL + within * AZQ_PANEL;
            n = rows - r >= MAX_ROWS ? MAX_ROWS : rows - r >= 2 ? 2 : 1;
            switch (n) {
            case MAX_ROWS: gemm_tile(in, MAX_ROWS, b, n_tiles, out, first); break;
            case 2: gemm_tile(in, 2, b, n_tiles, out, first); break;
            default: gemm_tile(in, 1, b, n_tiles, out, first); break;
            }
        }
    }
}
