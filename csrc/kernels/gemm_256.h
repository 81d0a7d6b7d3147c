/* The int8 matmul over 256-bit registers: R rows times H halves of a panel (8 columns each), 4 x 1, 3 x 1,
 * 2 x 2 or 1 x 2, so that sums and operands fit 16 registers. The including file, inside its target region,
 * defines AZQ_INIT(act), the array that dot products start from, and hands in
 *
 *   AZQ_INLINE void dots_of(const int8_t *q, int64_t q_stride, const int32_t *init, int64_t init_stride,
 *                           const uint8_t *lines, int R, int H, __m256i *dots)
 *
 * which sums one block into dots[r * H + h]: row r's 32 activations lie at q + r * q_stride, its start value
 * at init[r * init_stride], half h of the block's first line at lines + 32 * h. */

#define AZQ_GEMM_256(type, dots_of, block_bytes)                                                                \
    AZQ_INLINE void gemm_##type##_tile(const azq_act *act, int64_t row, int R, int H, const uint8_t *panel,     \
                                       int half, float *c, int64_t ldc) {                                       \
        int64_t n_blocks = act->k / 32, first = row * n_blocks;                                                 \
        const int8_t *q = act->q + row * act->k;                                                                \
        const float *d = act->d + first;                                                                        \
        const int32_t *init = AZQ_INIT(act) + first;                                                            \
        __m256 sums[4];                                                                                         \
        for (int i = 0; i < R * H; i++) {                                                                       \
            sums[i] = _mm256_setzero_ps();                                                                      \
        }                                                                                                       \
        const uint8_t *group = panel;                                                                           \
        for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {                                                     \
            int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;                             \
            const uint8_t *scales = group + 16 * half, *lines = group + in_group * AZQ_PANEL * 2 + 32 * half;   \
            for (int64_t b = 0; b < in_group; b++, lines += (block_bytes), scales += AZQ_PANEL * 2) {           \
                __m256i dots[4];                                                                                \
                dots_of(q, act->k, init, n_blocks, lines, R, H, dots);                                          \
                for (int h = 0; h < H; h++) {                                                                   \
                    __m256 dw = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 16 * h)));           \
                    for (int r = 0; r < R; r++) {                                                               \
                        __m256 scale = _mm256_mul_ps(dw, _mm256_broadcast_ss(d + r * n_blocks));                \
                        int i = r * H + h;                                                                      \
                        sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[i]), scale, sums[i]);                 \
                    }                                                                                           \
                }                                                                                               \
                q += 32;                                                                                        \
                d++;                                                                                            \
                init++;                                                                                         \
            }                                                                                                   \
            group += in_group * (AZQ_PANEL * 2 + (block_bytes));                                                \
        }                                                                                                       \
        for (int i = 0; i < R * H; i++) {                                                                       \
            _mm256_storeu_ps(c + i / H * ldc + 8 * (half + i % H), sums[i]);                                    \
        }                                                                                                       \
    }                                                                                                           \
                                                                                                                \
    static void gemm_##type(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,              \
                            int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                     \
        for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes, c += AZQ_PANEL) {                         \
            int64_t r = 0;                                                                                      \
            for (; r + 4 <= rows; r += 4) {                                                                     \
                gemm_##type##_tile(act, row0 + r, 4, 1, panels, 0, c + r * ldc, ldc);                           \
                gemm_##type##_tile(act, row0 + r, 4, 1, panels, 1, c + r * ldc, ldc);                           \
            }                                                                                                   \
            switch (rows - r) {                                                                                 \
            case 3:                                                                                             \
                gemm_##type##_tile(act, row0 + r, 3, 1, panels, 0, c + r * ldc, ldc);                           \
                gemm_##type##_tile(act, row0 + r, 3, 1, panels, 1, c + r * ldc, ldc);                           \
                break;                                                                                          \
            case 2: gemm_##type##_tile(act, row0 + r, 2, 2, panels, 0, c + r * ldc, ldc); break;                \
            case 1: gemm_##type##_tile(act, row0 + r, 1, 2, panels, 0, c + r * ldc, ldc); break;                \
            default: break;                                                                                     \
            }                                                                                                   \
        }                                                                                                       \
    }
