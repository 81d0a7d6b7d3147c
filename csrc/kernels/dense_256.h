/* Int8 products of many rows with AVX2: what gemm_256.h unpacks anew for every four rows is unpacked once for all of
 * them. Blocks go in chunks whose operands stay in the first-level cache:
 *
 *   for each chunk of blocks, for each panel: unpack the chunk; for every four rows: add the chunk's blocks
 *
 * Sums lie in the result between two blocks, so each still goes through its blocks in order. Weights are unsigned,
 * u = q + offset, and every 16-bit lane begins with -offset times the sum of its own activations: whatever wraps on
 * the way, the end is sum q a, and that fits 16 bits (Q4_0: 16 products of at most 8 * 127; Q6_K: 8 of 32 * 127). */

enum { DENSE_CHUNK = 16, DENSE_ROWS = 64 };

typedef struct {
    __m256i operands[8][2]; /* of four k and eight columns each */
    __m256 scales[2];
    __m256i factors[2][2]; /* of Q6_K: by half of the block and of the columns, each scale twice, in 16 bits */
} dense_block;

/* -32 * (sum over bytes 0, 1 of each dword; sum over bytes 2, 3), by row, block and half of the block. */
typedef int32_t dense_pairs[DENSE_ROWS][DENSE_CHUNK][2];

AZQ_INLINE void dense_pair_sums(const azq_act *act, int64_t row0, int64_t rows, int64_t b, int64_t n,
                                dense_pairs pairs) {
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *q = act->q + (row0 + r) * act->k + 32 * b;
        for (int64_t i = 0; i < n; i++) {
            __m256i p = _mm256_maddubs_epi16(_mm256_set1_epi8(1), loadi(q + 32 * i));
            p = _mm256_add_epi16(p, _mm256_shuffle_epi32(p, 0x4e));
            p = _mm256_add_epi16(p, _mm256_shuffle_epi32(p, 0xb1));
            p = _mm256_mullo_epi16(p, _mm256_set1_epi16(-32));
            pairs[r][i][0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(p));
            pairs[r][i][1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(p, 1));
        }
    }
}

AZQ_INLINE void dense_unpack_q4_0(const uint8_t *head, const uint8_t *lines, dense_block *out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < 4; i++) {
            __m256i w = loadi(lines + 64 * i + 32 * h);
            out->operands[2 * i][h] = _mm256_and_si256(w, nibble);
            out->operands[2 * i + 1][h] = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
        }
        out->scales[h] = load_scales(head + 16 * h);
    }
}

AZQ_INLINE void dense_unpack_q6_k(const uint8_t *head, const uint8_t *lines, dense_block *out) {
    for (int h = 0; h < 2; h++) {
        for (int half = 0; half < 2; half++) {
            __m256i bits = loadi(lines + 256 + 64 * half + 32 * h);
            for (int i = 0; i < 2; i++) {
                q6_k_operands(loadi(lines + 64 * (2 * half + i) + 32 * h), bits, i, &out->operands[4 * half + 2 * i][h],
                              &out->operands[4 * half + 2 * i + 1][h]);
            }
            const __m128i *scales = (const __m128i *)(head + 32 + 16 * half + 8 * h);
            __m256i s = _mm256_cvtepi8_epi32(_mm_loadl_epi64(scales));
            out->factors[half][h] =
                _mm256_or_si256(_mm256_slli_epi32(s, 16), _mm256_and_si256(s, _mm256_set1_epi32(0xffff)));
        }
        out->scales[h] = load_scales(head + 16 * h);
    }
}

/* Adds the products of operands from .. to - 1 with R rows to dots[2 * r + h]. */
AZQ_INLINE void dense_products(const dense_block *w, const int8_t *q, int64_t k, int from, int to, int R,
                               __m256i *dots) {
#pragma GCC unroll 8
    for (int o = from; o < to; o++) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            __m256i a = broadcast4(q + r * k + 4 * o);
            for (int h = 0; h < 2; h++) {
                dots[2 * r + h] = _mm256_add_epi16(dots[2 * r + h], _mm256_maddubs_epi16(w->operands[o][h], a));
                AZQ_PIN(dots[2 * r + h]);
            }
        }
    }
}

/* Whole numbers: a block's products, each below 2^24. */
AZQ_INLINE void dense_dots(int type, const dense_block *w, const azq_act *act, int64_t at,
                           const int32_t (*pairs)[DENSE_CHUNK][2], int64_t i, int R, __m256i *dots) {
    const int8_t *q = act->q + 32 * at;
    if (type == AZQ_TYPE_Q4_0) {
        int64_t n_blocks = act->k / 32;
        for (int j = 0; j < 2 * R; j++) {
            dots[j] = _mm256_set1_epi32(act->sum8_pair[at + j / 2 * n_blocks]);
        }
        dense_products(w, q, act->k, 0, 8, R, dots);
        for (int j = 0; j < 2 * R; j++) {
            dots[j] = _mm256_madd_epi16(dots[j], _mm256_set1_epi16(1));
        }
        return;
    }
    __m256i first[2 * MAX_ROWS];
    for (int half = 0; half < 2; half++) {
        for (int j = 0; j < 2 * R; j++) {
            dots[j] = _mm256_set1_epi32(pairs[j / 2][i][half]);
        }
        dense_products(w, q, act->k, 4 * half, 4 * half + 4, R, dots);
        for (int j = 0; j < 2 * R; j++) {
            dots[j] = _mm256_madd_epi16(dots[j], w->factors[half][j % 2]);
            if (half) {
                dots[j] = _mm256_add_epi32(dots[j], first[j]);
            } else {
                first[j] = dots[j];
            }
        }
        __asm__ volatile("" : "+m"(first)); /* no room for these in registers */
    }
}

/* R rows over n blocks, the first of which is block b; far: bytes to fetch per block, from `fetch` on. */
AZQ_INLINE void dense_tile(int type, const azq_act *act, int64_t row, int R, int64_t b, int64_t n, const dense_block *w,
                           const int32_t (*pairs)[DENSE_CHUNK][2], uintptr_t fetch, int64_t far, float *c,
                           int64_t ldc) {
    int64_t n_blocks = act->k / 32, at = row * n_blocks + b;
    __m256 sums[2 * MAX_ROWS];
    for (int j = 0; j < 2 * R; j++) {
        sums[j] = b ? loadf(c + j / 2 * ldc + 8 * (j % 2)) : _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < n; i++, at++, w++) {
        for (int64_t j = 0; j < far; j += 64) {
            _mm_prefetch((const char *)(fetch + (uintptr_t)j), _MM_HINT_T1);
        }
        fetch += (uintptr_t)far;
        __m256i dots[2 * MAX_ROWS];
        dense_dots(type, w, act, at, pairs, i, R, dots);
        for (int r = 0; r < R; r++) {
            __m256 d = _mm256_broadcast_ss(act->d + at + r * n_blocks);
            for (int h = 0; h < 2; h++) {
                int j = 2 * r + h;
                sums[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[j]), _mm256_mul_ps(w->scales[h], d), sums[j]);
            }
        }
        if (R > ROWS_IN_REGISTERS) {
            __asm__ volatile("" : "+m"(sums));
        }
    }
    for (int j = 0; j < 2 * R; j++) {
        _mm256_storeu_ps(c + j / 2 * ldc + 8 * (j % 2), sums[j]);
    }
}

/* At most DENSE_ROWS rows. */
AZQ_INLINE void dense_panels(int type, int head_bytes, int line_bytes, const azq_act *act, int64_t row0, int64_t rows,
                             const uint8_t *panels, int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {
    dense_block blocks[DENSE_CHUNK];
    dense_pairs pairs;
    const int block_bytes = head_bytes + line_bytes;
    int64_t n_blocks = act->k / 32;
    for (int64_t b = 0; b < n_blocks; b += DENSE_CHUNK) {
        int64_t n = n_blocks - b < DENSE_CHUNK ? n_blocks - b : DENSE_CHUNK;
        if (type == AZQ_TYPE_Q6_K) {
            dense_pair_sums(act, row0, rows, b, n, pairs);
        }
        for (int64_t p = 0; p < n_panels; p++) {
            const uint8_t *group = panels + p * panel_bytes + b * block_bytes;
            /* What this panel's next chunk will be, or that of the panel in its place at the next call, which may lie
             * behind the matrix: a number, as no pointer may stand there. */
            int64_t ahead = b + DENSE_CHUNK < n_blocks ? p * panel_bytes + (b + DENSE_CHUNK) * block_bytes
                                                       : (n_panels + p) * panel_bytes;
            uintptr_t fetch = (uintptr_t)panels + (uintptr_t)ahead;
            int64_t far = (DENSE_CHUNK * block_bytes / ((rows + MAX_ROWS - 1) / MAX_ROWS * n) + 63) / 64 * 64;
            for (int64_t i = 0; i < n; group += AZQ_GROUP * block_bytes) {
                int64_t in_group = n - i < AZQ_GROUP ? n - i : AZQ_GROUP;
                for (int64_t j = 0; j < in_group; j++, i++) {
                    const uint8_t *head = group + j * head_bytes;
                    const uint8_t *lines = group + in_group * head_bytes + j * line_bytes;
                    if (type == AZQ_TYPE_Q6_K) {
                        dense_unpack_q6_k(head, lines, &blocks[i]);
                    } else {
                        dense_unpack_q4_0(head, lines, &blocks[i]);
                    }
                }
            }
            float *out = c + p * AZQ_PANEL;
            for (int64_t r = 0, height; r < rows; r += height, fetch += (uintptr_t)(far * n)) {
                const int32_t(*sums)[DENSE_CHUNK][2] = (const int32_t(*)[DENSE_CHUNK][2])pairs + r;
                int64_t tiles = (rows - r + MAX_ROWS - 1) / MAX_ROWS;
                height = (rows - r + tiles - 1) / tiles; /* tiles of about equal height */
                float *to = out + r * ldc;
                switch (height) {
                case 4: dense_tile(type, act, row0 + r, 4, b, n, blocks, sums, fetch, far, to, ldc); break;
                case 3: dense_tile(type, act, row0 + r, 3, b, n, blocks, sums, fetch, far, to, ldc); break;
                case 2: dense_tile(type, act, row0 + r, 2, b, n, blocks, sums, fetch, far, to, ldc); break;
                default: dense_tile(type, act, row0 + r, 1, b, n, blocks, sums, fetch, far, to, ldc); break;
                }
            }
        }
    }
}
