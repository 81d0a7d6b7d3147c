/* The int8 matmul over 256-bit registers: tiles of R rows times one panel, whose 16 columns are two registers. The
 * including file, inside its target region, defines
 *
 *   AZQ_INLINE void block_TYPE(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines, int R,
 *                              __m256 *sums)
 *
 * which adds one block of 32 to sums[2 * r + h], half h being columns 8h to 8h + 7: row r's activations are block
 * at + r * (act->k / 32) of act. R is a constant.
 *
 * Four rows leave no room for sums in 16 registers; they are in memory between two blocks, which costs less than
 * reading and unpacking the weights for fewer rows. Prefetching is that of gemm_512.h. */

enum { MAX_ROWS = 4, ROWS_IN_REGISTERS = 2, NEAR_BLOCKS = 12 };

AZQ_INLINE __m256i loadi(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
AZQ_INLINE __m256i broadcast4(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, sizeof dword);
    return _mm256_set1_epi32(dword);
}
AZQ_INLINE __m256 load_scales(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

/* sums += dots * scales, the end of every block whose 32 weights share a scale. The callers convert the dots, each
 * in a loop of its own: done here, GCC 12 makes one row of Q8_0 on AVX2 take half as long again. */
AZQ_INLINE void add_scaled(const azq_act *act, int64_t at, const uint8_t *head, int R, const __m256 *dots, __m256 *sums) {
    int64_t n_blocks = act->k / 32;
    for (int h = 0; h < 2; h++) {
        __m256 dw = load_scales(head + 16 * h);
        for (int r = 0; r < R; r++) {
            __m256 scale = _mm256_mul_ps(dw, _mm256_broadcast_ss(act->d + at + r * n_blocks));
            sums[2 * r + h] = _mm256_fmadd_ps(dots[2 * r + h], scale, sums[2 * r + h]);
        }
    }
}

#define AZQ_GEMM_256(type, head_bytes, line_bytes)                                                               \
    /* near: to prefetch for itself; far: bytes to prefetch per block, from far_from on. */                      \
    AZQ_INLINE void gemm_##type##_tile(const azq_act *act, int64_t row, int R, const uint8_t *panel,             \
                                       int near, const uint8_t *far_from, int64_t far, float *c, int64_t ldc) {  \
        const int block_bytes = (head_bytes) + (line_bytes);                                                     \
        int64_t n_blocks = act->k / 32, at = row * n_blocks;                                                     \
        const uint8_t *fetch = panel + NEAR_BLOCKS * block_bytes;                                                \
        __m256 sums[MAX_ROWS * 2];                                                                               \
        for (int i = 0; i < 2 * R; i++) {                                                                        \
            sums[i] = _mm256_setzero_ps();                                                                       \
        }                                                                                                        \
        const uint8_t *group = panel;                                                                            \
        for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {                                                      \
            int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;                              \
            const uint8_t *head = group, *lines = group + in_group * (head_bytes);                               \
            for (int64_t b = 0; b < in_group; b++, at++, head += (head_bytes), lines += (line_bytes)) {          \
                if (near) {                                                                                      \
                    for (int i = 0; i < block_bytes; i += 64) {                                                  \
                        _mm_prefetch((const char *)fetch + i, _MM_HINT_T0);                                      \
                    }                                                                                            \
                    fetch += block_bytes;                                                                        \
                }                                                                                                \
                for (int64_t i = 0; i < far; i += 64) {                                                          \
                    _mm_prefetch((const char *)far_from + i, _MM_HINT_T1);                                       \
                }                                                                                                \
                far_from += far;                                                                                 \
                block_##type(act, at, head, lines, R, sums);                                                     \
                if (R > ROWS_IN_REGISTERS) {                                                                     \
                    __asm__ volatile("" : "+m"(sums));                                                           \
                }                                                                                                \
            }                                                                                                    \
            group += in_group * block_bytes;                                                                     \
        }                                                                                                        \
        for (int i = 0; i < 2 * R; i++) {                                                                        \
            _mm256_storeu_ps(c + i / 2 * ldc + 8 * (i % 2), sums[i]);                                            \
        }                                                                                                        \
    }                                                                                                            \
                                                                                                                 \
    static void gemm_##type(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panel,                \
                            int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                      \
        int64_t n_blocks = act->k / 32;                                                                          \
        for (int64_t p = 0; p < n_panels; p++, panel += panel_bytes, c += AZQ_PANEL) {                           \
            int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;                                                    \
            int64_t far = tiles > 1 && n_blocks > 0 ? (panel_bytes / (tiles * n_blocks) + 63) / 64 * 64 : 0;     \
            const uint8_t *f = panel + panel_bytes;                                                              \
            for (int64_t r = 0, n; r < rows; r += n, tiles--, f += far * n_blocks) {                             \
                n = (rows - r + tiles - 1) / tiles; /* tiles of about equal height: 3 + 3, not 4 + 2 */          \
                int near = r == 0 && (p == 0 || far == 0);                                                       \
                float *out = c + r * ldc;                                                                        \
                switch (n) {                                                                                     \
                case 4: gemm_##type##_tile(act, row0 + r, 4, panel, near, f, far, out, ldc); break;              \
                case 3: gemm_##type##_tile(act, row0 + r, 3, panel, near, f, far, out, ldc); break;              \
                case 2: gemm_##type##_tile(act, row0 + r, 2, panel, near, f, far, out, ldc); break;              \
                default: gemm_##type##_tile(act, row0 + r, 1, panel, near, f, far, out, ldc); break;             \
                }                                                                                                \
            }                                                                                                    \
        }                                                                                                        \
    }
