/* Q6_K for gemm_256.h. The including file defines
 *
 *   AZQ_INLINE __m256i dot_pair(__m256i sum, __m256i low, __m256i a, __m256i high, __m256i b)
 *
 * which adds to 32 bits the products of bytes of two operands below 64 with their activations. A block's halves
 * are summed apart and meet with their scales. Column halves go one after the other: both at once would not fit. */

/* Operands 2i (low nibbles of line w) and 2i + 1 (its high ones) of a half whose high bits are `bits`. */
AZQ_INLINE void q6_k_operands(__m256i w, __m256i bits, int i, __m256i *low, __m256i *high) {
    const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(0x30);
    __m256i first = i ? bits : _mm256_slli_epi16(bits, 4);
    __m256i second = i ? _mm256_srli_epi16(bits, 2) : _mm256_slli_epi16(bits, 2);
    *low = _mm256_or_si256(_mm256_and_si256(w, nibble), _mm256_and_si256(first, upper));
    *high = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), _mm256_and_si256(second, upper));
}

AZQ_INLINE void block_q6_k(const azq_act *act, int64_t at, const uint8_t *head, const uint8_t *lines, int R,
                           __m256 *sums) {
    int64_t n_blocks = act->k / 32;
    for (int h = 0; h < 2; h++) {
        __m256 total[MAX_ROWS];
        for (int r = 0; r < R; r++) {
            total[r] = _mm256_setzero_ps();
        }
        for (int half = 0; half < 2; half++) {
            __m256i dots[MAX_ROWS], bits = loadi(lines + 256 + 64 * half + 32 * h);
            for (int r = 0; r < R; r++) {
                dots[r] = _mm256_set1_epi32(-32 * act->sum16[2 * (at + r * n_blocks) + half]);
            }
            for (int i = 0; i < 2; i++) {
                __m256i low, high;
                q6_k_operands(loadi(lines + 64 * (2 * half + i) + 32 * h), bits, i, &low, &high);
                for (int r = 0; r < R; r++) {
                    const int8_t *q = act->q + 32 * at + r * act->k + 8 * (2 * half + i);
                    dots[r] = dot_pair(dots[r], low, broadcast4(q), high, broadcast4(q + 4));
                }
            }
            const __m128i *scales = (const __m128i *)(head + 32 + 16 * half + 8 * h);
            __m256 s = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(scales)));
            for (int r = 0; r < R; r++) { /* whole numbers below 2^24: exact */
                total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), s, total[r]);
            }
        }
        __m256 dw = load_scales(head + 16 * h);
        for (int r = 0; r < R; r++) {
            __m256 scale = _mm256_mul_ps(dw, _mm256_broadcast_ss(act->d + at + r * n_blocks));
            sums[2 * r + h] = _mm256_fmadd_ps(total[r], scale, sums[2 * r + h]);
        }
    }
}
