/* The int8 matmul over 512-bit registers: tiles of R rows times P = 2 panels of 16 columns (1 at the end). The
 * including file, inside its target region, defines
 *
 *   AZQ_INLINE void block_TYPE(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines,
 *                              int64_t panel_bytes, int R, int P, __m512 *sums)
 *
 * which adds one block of 32 to sums[r * P + p]: row r's activations are block at + r * (act->k / 32) of act, and
 * panel p's head and lines lie at head + p * panel_bytes and lines + p * panel_bytes. R and P are constants.
 *
 * Weights come from memory at 5 to 10 bytes a cycle, far below what the arithmetic of a few rows eats, so tiles
 * prefetch. One that is alone on its panels fetches NEAR_BLOCKS ahead of itself; where several tiles pass over the
 * same panels, each fetches its share of the next two panels into the second-level cache, so that memory works
 * during all of the arithmetic and not only during the first tile's. The first tile of a call does both: the panels
 * before its own may have been another thread's. Q4_0 at 4096 x 4096 on Zen 5, weights in memory: 16 rows 20%, 4
 * and 8 rows 25 to 30% quicker; Q6_K the same. */

AZQ_INLINE __m512i broadcast4(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, sizeof dword);
    return _mm512_set1_epi32(dword);
}
AZQ_INLINE __m512 load_scales(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* 12 blocks: 7 and 24 are 5 to 8% slower for one row, from the third-level cache as from memory. */
enum { MAX_ROWS = 6, NEAR_BLOCKS = 12 };

#define AZQ_CASE(type, R, max_rows)                                                                              \
    case R:                                                                                                      \
        if (R <= (max_rows)) {                                                                                   \
            gemm_##type##_tile(act, row0 + r, R, panel, panel_bytes, P, near, f, far, out, ldc);                 \
        }                                                                                                        \
        break;

/* max_rows: the tallest tile, 6 or fewer. */
#define AZQ_GEMM_512(type, head_bytes, line_bytes, max_rows)                                                     \
    /* near: to prefetch for itself; far: bytes to prefetch per block, from far_from on. */                      \
    AZQ_INLINE void gemm_##type##_tile(const azq_act *act, int64_t row, int R, const uint8_t *panel,             \
                                       int64_t panel_bytes, int P, int near, const uint8_t *far_from,            \
                                       int64_t far, float *c, int64_t ldc) {                                     \
        const int block_bytes = (head_bytes) + (line_bytes);                                                     \
        int64_t n_blocks = act->k / 32, at = row * n_blocks;                                                     \
        int64_t ahead = NEAR_BLOCKS < n_blocks ? NEAR_BLOCKS : n_blocks, turn = n_blocks - ahead;                \
        const uint8_t *fetch = panel + ahead * block_bytes;                                                      \
        /* Where a panel ends its neighbour begins; when that is in this tile, go on behind it. */               \
        int64_t jump = P == 2 && panel_bytes == n_blocks * block_bytes ? panel_bytes : 0;                        \
        __m512 sums[MAX_ROWS * 2];                                                                               \
        for (int i = 0; i < R * P; i++) {                                                                        \
            sums[i] = _mm512_setzero_ps();                                                                       \
        }                                                                                                        \
        const uint8_t *group = panel;                                                                            \
        for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {                                                      \
            int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;                              \
            const uint8_t *head = group, *lines = group + in_group * (head_bytes);                               \
            for (int64_t b = 0; b < in_group; b++, at++, head += (head_bytes), lines += (line_bytes)) {          \
                if (near) {                                                                                      \
                    fetch += g + b == turn ? jump : 0;                                                           \
                    for (int p = 0; p < P; p++) {                                                                \
                        for (int i = 0; i < block_bytes; i += 64) {                                              \
                            _mm_prefetch((const char *)fetch + p * panel_bytes + i, _MM_HINT_T0);                \
                        }                                                                                        \
                    }                                                                                            \
                    fetch += block_bytes;                                                                        \
                }                                                                                                \
                for (int64_t i = 0; i < far; i += 64) {                                                          \
                    _mm_prefetch((const char *)far_from + i, _MM_HINT_T1);                                       \
                }                                                                                                \
                far_from += far;                                                                                 \
                block_##type(act, at, head, lines, panel_bytes, R, P, sums);                                     \
            }                                                                                                    \
            group += in_group * block_bytes;                                                                     \
        }                                                                                                        \
        for (int i = 0; i < R * P; i++) {                                                                        \
            _mm512_storeu_ps(c + i / P * ldc + AZQ_PANEL * (i % P), sums[i]);                                    \
        }                                                                                                        \
    }                                                                                                            \
                                                                                                                 \
    AZQ_INLINE void gemm_##type##_rows(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panel,     \
                                       int64_t panel_bytes, int P, int first, float *c, int64_t ldc) {           \
        int64_t n_blocks = act->k / 32, tiles = (rows + (max_rows) - 1) / (max_rows);                            \
        int64_t far = tiles > 1 && n_blocks > 0 ? (P * panel_bytes / (tiles * n_blocks) + 63) / 64 * 64 : 0;     \
        const uint8_t *f = panel + P * panel_bytes;                                                              \
        for (int64_t r = 0, n; r < rows; r += n, tiles--, f += far * n_blocks) {                                 \
            n = (rows - r + tiles - 1) / tiles; /* tiles of about equal height: 4 + 4, not 6 + 2 */              \
            int near = r == 0 && (first || far == 0);                                                            \
            float *out = c + r * ldc;                                                                            \
            switch (n) {                                                                                         \
            AZQ_CASE(type, 6, max_rows)                                                                          \
            AZQ_CASE(type, 5, max_rows)                                                                          \
            AZQ_CASE(type, 4, max_rows)                                                                          \
            AZQ_CASE(type, 3, max_rows)                                                                          \
            AZQ_CASE(type, 2, max_rows)                                                                          \
            default: gemm_##type##_tile(act, row0 + r, 1, panel, panel_bytes, P, near, f, far, out, ldc);        \
            }                                                                                                    \
        }                                                                                                        \
    }                                                                                                            \
                                                                                                                 \
    static void gemm_##type(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,               \
                            int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                      \
        int64_t p = 0;                                                                                           \
        for (; p + 2 <= n_panels; p += 2, panels += 2 * panel_bytes, c += 2 * AZQ_PANEL) {                       \
            gemm_##type##_rows(act, row0, rows, panels, panel_bytes, 2, p == 0, c, ldc);                         \
        }                                                                                                        \
        if (p < n_panels) {                                                                                      \
            gemm_##type##_rows(act, row0, rows, panels, panel_bytes, 1, p == 0, c, ldc);                         \
        }                                                                                                        \
    }
