/* Quantize and dequantize over 512-bit registers; included by avx512vnni.c inside its target region. */

enum { BATCH = 16 }; /* blocks whose scales are computed together, one lane each */

AZQ_INLINE __m512 loadf(const float *p) { return _mm512_loadu_ps(p); }
AZQ_INLINE __m512 abs16(__m512 x) { return _mm512_abs_ps(x); }
AZQ_INLINE __m512 negative16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN)));
}

/* Blocks of one tensor follow each other in memory: while one is quantized, another is fetched. Evenly, as here, not
 * many at once: Q4_0 from memory, one thread of Zen 5 whose memory gives it 32 GB/s: 27 GB/s, bytes written counted;
 * 23 when 1024 elements are fetched in a burst or only 1024 ahead, 21 when a row of 4096 ahead while scales are made. */
AZQ_INLINE void fetch_ahead(const float *x) {
    enum { AHEAD = 4096 };
    _mm_prefetch((const char *)(x + AHEAD), _MM_HINT_T0);
    _mm_prefetch((const char *)(x + AHEAD + 16), _MM_HINT_T0);
}

/* max(x) of one block of 32 in lanes 0 to 7, max(-x) in the others, eight partial ones each. */
AZQ_INLINE __m512 block_extremes(const float *x) {
    __m512 a = loadf(x), b = loadf(x + 16);
    __m512 up = _mm512_max_ps(a, b), down = negative16(_mm512_min_ps(a, b));
    return _mm512_max_ps(_mm512_shuffle_f32x4(up, down, 0x44), _mm512_shuffle_f32x4(up, down, 0xee));
}

/* Of two blocks: 128-bit lanes up, down of the first, up, down of the second, four partial ones each. */
AZQ_INLINE __m512 pair_extremes(const float *x, const float *y) {
    __m512 a = block_extremes(x), b = block_extremes(y);
    return _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Of eight blocks: up of 0, 2, 4, 6, then down of them, up of 1, 3, 5, 7, down of them. */
AZQ_INLINE __m512 octet_extremes(const float *const *x) {
    __m512 a = pair_extremes(x[0], x[1]), b = pair_extremes(x[2], x[3]);
    __m512 c = pair_extremes(x[4], x[5]), d = pair_extremes(x[6], x[7]);
    __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

/* Of a block where some x and some -x' are both the largest magnitude: the one that comes first. */
static float first_extreme(const float *x, float amax) {
    for (int j = 0; j < 32; j++) {
        if (fabsf(x[j]) == amax) {
            return x[j];
        }
    }
    return amax;
}

typedef struct {
    float inverse[BATCH];
    uint16_t d[BATCH];
} batch_scales;

/* The scales of n blocks (1 to BATCH). */
AZQ_INLINE void scales_q4_0(const float *x, int n, batch_scales *scales) {
    const float *block[BATCH];
    for (int i = 0; i < BATCH; i++) { /* a short batch ends with copies of its first block */
        block[i] = x + (i < n ? i : 0) * AZQ_QK4_0;
    }
    __m512 first = octet_extremes(block), second = octet_extremes(block + 8);
    const __m512i odd_even = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
    __m512 up = _mm512_permutex2var_ps(first, odd_even, second);
    __m512 down = _mm512_permutex2var_ps(first, _mm512_add_epi32(odd_even, _mm512_set1_epi32(4)), second);
    __m512 max = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(up, down, _CMP_GT_OQ), negative16(down), up);
    max = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(max, _mm512_setzero_ps(), _CMP_NEQ_OQ), max); /* never -0 */
    __mmask16 tie = _mm512_cmp_ps_mask(up, down, _CMP_EQ_OQ) & _mm512_cmp_ps_mask(up, _mm512_setzero_ps(), _CMP_GT_OQ);
    if (tie) {
        float most[BATCH];
        _mm512_storeu_ps(most, max);
        for (int i = 0; i < n; i++) {
            if (tie >> i & 1) {
                most[i] = first_extreme(block[i], fabsf(most[i]));
            }
        }
        max = loadf(most);
    }
    __m512 d = _mm512_mul_ps(max, _mm512_set1_ps(-0.125f)); /* exactly what dividing by -8 gives */
    __mmask16 nonzero = _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    _mm512_storeu_ps(scales->inverse, _mm512_maskz_div_ps(nonzero, _mm512_set1_ps(1.0f), d));
    _mm256_storeu_si256((__m256i *)scales->d, _mm512_cvtps_ph(d, _MM_FROUND_TO_NEAREST_INT));
}

/* Half of each of two blocks: x * inverse + 8.5 cut to whole numbers, 15 at most. There are none from 17 on whose
 * lowest byte could be less; what an infinite inverse makes is INT32_MIN, so 0 as the definition has it. */
AZQ_INLINE __m256i nibbles(const float *x, __m512 inverse, const float *x2, __m512 inverse2) {
    const __m512i lowest_bytes = _mm512_castsi256_si512(
        _mm256_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 84, 88, 92, 96,
                         100, 104, 108, 112, 116, 120, 124));
    __m512 offset = _mm512_set1_ps(8.5f);
    __m512i q = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(loadf(x), inverse), offset));
    __m512i q2 = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(loadf(x2), inverse2), offset));
    __m256i bytes = _mm512_castsi512_si256(_mm512_permutex2var_epi8(q, lowest_bytes, q2));
    return _mm256_min_epu8(bytes, _mm256_set1_epi8(15));
}

static void quantize_q4_0(const float *x, void *blocks, int64_t k) {
    azq_block_q4_0 *y = blocks;
    int64_t left = k / AZQ_QK4_0;
    batch_scales scales[2]; /* the next batch's are made before this one's are used: nothing waits for a division */
    if (left > 0) {
        scales_q4_0(x, left < BATCH ? (int)left : BATCH, &scales[0]);
    }
    for (int now = 0; left > 0; now ^= 1, left -= BATCH, x += BATCH * AZQ_QK4_0, y += BATCH) {
        int n = left < BATCH ? (int)left : BATCH;
        if (left > BATCH) {
            int64_t next = left - BATCH;
            scales_q4_0(x + BATCH * AZQ_QK4_0, next < BATCH ? (int)next : BATCH, &scales[now ^ 1]);
        }
        for (int i = 0; i < n; i += 2) {
            int j = i + 1 < n ? i + 1 : i; /* the last block of an odd number is made twice */
            fetch_ahead(x + i * 32);
            fetch_ahead(x + j * 32);
            __m512 id = _mm512_set1_ps(scales[now].inverse[i]), id2 = _mm512_set1_ps(scales[now].inverse[j]);
            __m256i low = nibbles(x + i * 32, id, x + j * 32, id2);
            __m256i high = nibbles(x + i * 32 + 16, id, x + j * 32 + 16, id2);
            __m256i both = _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
            y[i].d = scales[now].d[i];
            _mm_storeu_si128((__m128i *)y[i].qs, _mm256_castsi256_si128(both));
            y[j].d = scales[now].d[j];
            _mm_storeu_si128((__m128i *)y[j].qs, _mm256_extracti128_si256(both, 1));
        }
    }
}

static void quantize_q8_0(const float *x, void *blocks, int64_t k) {
    azq_block_q8_0 *y = blocks;
    int64_t n_blocks = k / AZQ_QK8_0;
    for (int64_t b = 0; b < n_blocks; b += BATCH, x += BATCH * AZQ_QK8_0, y += BATCH) {
        int n = n_blocks - b < BATCH ? (int)(n_blocks - b) : BATCH;
        float amax[BATCH] = {0}, inverse[BATCH];
        uint16_t scale[BATCH];
        for (int i = 0; i < n; i++) {
            amax[i] = _mm512_reduce_max_ps(_mm512_max_ps(abs16(loadf(x + i * 32)), abs16(loadf(x + i * 32 + 16))));
        }
        __m512 d = _mm512_div_ps(loadf(amax), _mm512_set1_ps(127.0f));
        __mmask16 nonzero = _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NEQ_OQ);
        _mm512_storeu_ps(inverse, _mm512_maskz_div_ps(nonzero, _mm512_set1_ps(1.0f), d));
        _mm256_storeu_si256((__m256i *)scale, _mm512_cvtps_ph(d, _MM_FROUND_TO_NEAREST_INT));
        for (int i = 0; i < n; i++) {
            fetch_ahead(x + i * 32);
            y[i].d = scale[i];
            for (int half = 0; half < 2; half++) {
                /* Half away from zero: add the float just below 0.5 with the sign of x, then truncate. */
                __m512 t = _mm512_mul_ps(loadf(x + i * 32 + 16 * half), _mm512_set1_ps(inverse[i]));
                __m512 nudge = _mm512_or_ps(_mm512_and_ps(t, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(0x1.fffffep-2f));
                __m512i q = _mm512_cvttps_epi32(_mm512_add_ps(t, nudge));
                _mm_storeu_si128((__m128i *)(y[i].qs + 16 * half), _mm512_cvtepi32_epi8(q));
            }
        }
    }
}

/* The largest magnitude of 32 floats as an integer, which orders NaN above infinity above all else. */
AZQ_INLINE int32_t largest_bits(const float *x) {
    __m512i a = _mm512_castps_si512(abs16(loadf(x))), b = _mm512_castps_si512(abs16(loadf(x + 16)));
    return _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
}

/* 16 floats to whole numbers, as bytes. */
AZQ_INLINE __m128i rounded_bytes(const float *x, __m512 factor) {
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(loadf(x), factor)));
}

/* Twice the AVX2 kernel's speed on Zen 5, whose two divisions a block wait for each other: here 16 blocks share them.
 * Rounding can reach 127 but never 128: amax * (127 / amax) is within an ulp of 127. */
static void quantize_act(const float *x, int64_t k, int8_t *q, float *d, int32_t *sum8, int32_t *sum8_pair,
                         int32_t *sum16) {
    /* Within each 8 bytes: order 0,4,1,5,2,6,3,7 (azq_lane_order). */
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    int64_t n_blocks = k / 32;
    for (int64_t b = 0; b < n_blocks; b += BATCH) {
        int n = n_blocks - b < BATCH ? (int)(n_blocks - b) : BATCH;
        int32_t bits[BATCH] = {0};
        float inverse[BATCH];
        for (int i = 0; i < n; i++) {
            bits[i] = largest_bits(x + 32 * (b + i));
        }
        __m512i most = _mm512_loadu_si512(bits);
        __mmask16 finite = _mm512_cmplt_epi32_mask(most, _mm512_set1_epi32(0x7f800000));
        __m512 amax = _mm512_castsi512_ps(most), factor = _mm512_div_ps(_mm512_set1_ps(127.0f), amax);
        __mmask16 usable = finite & _mm512_cmp_ps_mask(factor, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
        _mm512_storeu_ps(inverse, _mm512_maskz_mov_ps(usable, factor)); /* 0: NaN * 0 ends as byte 0, too */
        __m512 scale = _mm512_div_ps(amax, _mm512_set1_ps(127.0f));
        scale = _mm512_mask_mov_ps(_mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)), finite, scale);
        _mm512_mask_storeu_ps(d + b, (__mmask16)((1u << n) - 1), scale);
        for (int i = 0; i < n; i++) {
            const float *v = x + 32 * (b + i);
            __m512 f = _mm512_set1_ps(inverse[i]);
            __m256i bytes = _mm256_set_m128i(rounded_bytes(v + 16, f), rounded_bytes(v, f));
            bytes = _mm256_shuffle_epi8(bytes, order);
            _mm256_storeu_si256((__m256i *)(q + 32 * (b + i)), bytes);
            /* Pairs of bytes as 16 bits; each half of the register is a half of the block. */
            __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
            pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0x4e));
            pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0xb1));
            __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
            __m128i halves = _mm_madd_epi16(_mm_unpacklo_epi32(low, high), _mm_set1_epi16(1));
            _mm_storel_epi64((__m128i *)(sum16 + 2 * (b + i)), halves);
            __m128i both = _mm_mullo_epi16(_mm_add_epi16(low, high), _mm_set1_epi16(-8));
            sum8_pair[b + i] = _mm_cvtsi128_si32(both);
            sum8[b + i] = _mm_cvtsi128_si32(_mm_madd_epi16(both, _mm_set1_epi16(1)));
        }
    }
}

static void quantize_f16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        _mm256_storeu_si256((__m256i *)(y + i), _mm512_cvtps_ph(loadf(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < k; i++) {
        y[i] = azq_f32_to_f16(x[i]);
    }
}

static void quantize_bf16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        __m512i bits = _mm512_castps_si512(loadf(x + i));
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        __mmask16 nan = _mm512_cmp_ps_mask(loadf(x + i), loadf(x + i), _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256((__m256i *)(y + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    for (; i < k; i++) {
        y[i] = azq_f32_to_bf16(x[i]);
    }
}

/* Nearly all weights are below 2: their bit 30 is clear, which takes one `or` a register to see. n >= 16. */
static int all_below_2(const float *x, int64_t n) {
    __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + n - 16);
    /* What lies between, from one line of the cache to the next; some is seen twice. */
    int64_t i = (int64_t)(16 - (uintptr_t)x / sizeof *x % 16);
    for (; i + 32 <= n; i += 32) {
        a = _mm512_or_si512(a, _mm512_loadu_si512(x + i));
        b = _mm512_or_si512(b, _mm512_loadu_si512(x + i + 16));
    }
    if (i + 16 <= n) {
        a = _mm512_or_si512(a, _mm512_loadu_si512(x + i));
    }
    return !_mm512_test_epi32_mask(_mm512_or_si512(a, b), _mm512_set1_epi32(1 << 30));
}

static int64_t find_bad(const float *x, int64_t n, float limit) {
    if (limit >= 2 && n >= 16 && all_below_2(x, n)) {
        return -1;
    }
    __m512 bound = _mm512_set1_ps(limit);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        __mmask16 bad = 0;
        for (int j = 0; j < 64; j += 16) {
            bad |= _mm512_cmp_ps_mask(abs16(loadf(x + i + j)), bound, _CMP_NLT_UQ);
        }
        if (bad) {
            break;
        }
    }
    for (; i < n; i++) {
        if (!(fabsf(x[i]) < limit)) {
            return i;
        }
    }
    return -1;
}

/* Below this scales are finite in fp16: none exceeds twice the largest magnitude. */
#define AZQ_UNSUSPICIOUS 32752.0f
#define AZQ_CHECKED(type, limit)                                                        \
    static int quantize_checked_##type(const float *x, void *blocks, int64_t k) {       \
        if (find_bad(x, k, limit) >= 0) {                                               \
            return 0;                                                                   \
        }                                                                               \
        quantize_##type(x, blocks, k);                                                  \
        return 1;                                                                       \
    }
AZQ_CHECKED(f16, INFINITY)
AZQ_CHECKED(bf16, INFINITY)
AZQ_CHECKED(q4_0, AZQ_UNSUSPICIOUS)
AZQ_CHECKED(q8_0, AZQ_UNSUSPICIOUS)

static void dequantize_q4_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q4_0 *x = blocks;
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (int64_t b = 0; b < k / AZQ_QK4_0; b++, y += AZQ_QK4_0) {
        __m512 d = _mm512_set1_ps(_cvtsh_ss(x[b].d));
        __m128i q = _mm_loadu_si128((const __m128i *)x[b].qs);
        __m128i low = _mm_sub_epi8(_mm_and_si128(q, mask), eight);
        __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(q, 4), mask), eight);
        _mm512_storeu_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)), d));
        _mm512_storeu_ps(y + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)), d));
    }
}

static void dequantize_q8_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q8_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK8_0; b++, y += AZQ_QK8_0) {
        __m512 d = _mm512_set1_ps(_cvtsh_ss(x[b].d));
        for (int half = 0; half < 2; half++) {
            __m128i q = _mm_loadu_si128((const __m128i *)(x[b].qs + 16 * half));
            _mm512_storeu_ps(y + 16 * half, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), d));
        }
    }
}

static void dequantize_f16(const void *blocks, float *y, int64_t k) {
    const uint16_t *x = blocks;
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i))));
    }
    for (; i < k; i++) {
        y[i] = azq_f16_to_f32(x[i]);
    }
}

#define AZQ_BLOCK_SLOTS                                                                         \
    .quantize_row = {[AZQ_TYPE_F16] = quantize_f16,                                             \
                     [AZQ_TYPE_BF16] = quantize_bf16,                                           \
                     [AZQ_TYPE_Q4_0] = quantize_q4_0,                                           \
                     [AZQ_TYPE_Q8_0] = quantize_q8_0},                                          \
    .quantize_checked_row = {[AZQ_TYPE_F16] = quantize_checked_f16,                             \
                             [AZQ_TYPE_BF16] = quantize_checked_bf16,                           \
                             [AZQ_TYPE_Q4_0] = quantize_checked_q4_0,                           \
                             [AZQ_TYPE_Q8_0] = quantize_checked_q8_0},                          \
    .dequantize_row = {[AZQ_TYPE_F16] = dequantize_f16,                                         \
                       [AZQ_TYPE_Q4_0] = dequantize_q4_0,                                       \
                       [AZQ_TYPE_Q8_0] = dequantize_q8_0},                                      \
    .find_bad = find_bad,                                                                       \
    .quantize_act = quantize_act
