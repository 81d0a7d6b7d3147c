/* Quantize and dequantize over 256-bit registers; included by avx2.c inside its target region.
 *
 * Eight blocks make a batch, one lane each: their scales are computed together, and before those of the batch in
 * front are used, so that nothing waits for a division. */

enum { BATCH = 8 };

AZQ_INLINE __m256 loadf(const float *p) { return _mm256_loadu_ps(p); }
AZQ_INLINE __m256 abs8(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
AZQ_INLINE float max_lane(__m256 x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
/* The low bytes of 4 x 8 dwords, in order. */
AZQ_INLINE __m256i pack_bytes(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i low = _mm256_set1_epi32(0xff);
    __m256i ab = _mm256_packus_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    __m256i cd = _mm256_packus_epi32(_mm256_and_si256(c, low), _mm256_and_si256(d, low));
    __m256i bytes = _mm256_packus_epi16(ab, cd); /* per 128-bit half: 4 of each */
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* While one block is quantized, a later one of the tensor is fetched. */
AZQ_INLINE void fetch_ahead(const float *x) {
    enum { AHEAD = 16384, LINE = 64 };
    uintptr_t at = (uintptr_t)x + AHEAD; /* which may lie behind the tensor */
    _mm_prefetch((const char *)at, _MM_HINT_T0);
    _mm_prefetch((const char *)(at + LINE), _MM_HINT_T0);
}

/* Of eight registers, one a block: the largest lane of each. */
#define AZQ_LANE_OF_EACH(name, op)                                                                  \
    AZQ_INLINE __m256 name##_of_4(__m256 a, __m256 b, __m256 c, __m256 d) {                         \
        __m256 ab = op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));                         \
        __m256 cd = op(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));                         \
        return op(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));                \
    }                                                                                               \
    AZQ_INLINE __m256 name##_of_halves(__m256 a, __m256 b) {                                        \
        return op(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));                 \
    }
AZQ_LANE_OF_EACH(largest, _mm256_max_ps)
AZQ_LANE_OF_EACH(smallest, _mm256_min_ps)

/* ---- quantize ------------------------------------------------------------------------------------ */

static int64_t find_bad(const float *x, int64_t n, float limit) {
    __m256 bound = _mm256_set1_ps(limit);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256 good = _mm256_and_ps(_mm256_and_ps(_mm256_cmp_ps(abs8(loadf(x + i)), bound, _CMP_LT_OQ),
                                                  _mm256_cmp_ps(abs8(loadf(x + i + 8)), bound, _CMP_LT_OQ)),
                                    _mm256_and_ps(_mm256_cmp_ps(abs8(loadf(x + i + 16)), bound, _CMP_LT_OQ),
                                                  _mm256_cmp_ps(abs8(loadf(x + i + 24)), bound, _CMP_LT_OQ)));
        if (_mm256_movemask_ps(good) != 0xff) {
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

/* Weights and scales below this make fp16 scales that are finite, with room to spare. */
#define AZQ_UNSUSPICIOUS 32768.0f

/* One block as the definition has it, whatever its numbers. */
static void one_q4_0(const float *x, azq_block_q4_0 *y) {
    __m256 v[4];
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        v[i] = loadf(x + 8 * i);
        most = _mm256_max_ps(abs8(v[i]), most);
    }
    float amax = max_lane(most);
    /* The sign of the first element that reaches amax: compare, then the lowest set bit. */
    uint32_t reach = 0, negative = 0;
    __m256 target = _mm256_set1_ps(amax);
    for (int i = 0; i < 4; i++) {
        reach |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(abs8(v[i]), target, _CMP_EQ_OQ)) << 8 * i;
        negative |= (uint32_t)_mm256_movemask_ps(v[i]) << 8 * i;
    }
    float max = amax > 0.0f && (negative & (reach & (~reach + 1u))) ? -amax : amax;
    float d = max / -8.0f;
    float id = d != 0.0f ? 1.0f / d : 0.0f;
    y->d = azq_f32_to_f16(d);
    __m256i q[4];
    for (int i = 0; i < 4; i++) {
        __m256 t = _mm256_add_ps(_mm256_mul_ps(v[i], _mm256_set1_ps(id)), _mm256_set1_ps(8.5f));
        q[i] = _mm256_min_epi32(_mm256_cvttps_epi32(t), _mm256_set1_epi32(15));
    }
    __m256i bytes = pack_bytes(q[0], q[1], q[2], q[3]);
    __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storeu_si128((__m128i *)y->qs, _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

typedef struct {
    float inverse[BATCH];
    uint16_t d[BATCH];
} batch_scales;

AZQ_INLINE void store_scales(__m256 d, batch_scales *scales) {
    __m256 nonzero = _mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    _mm256_storeu_ps(scales->inverse, _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(1.0f), d), nonzero));
    _mm_storeu_si128((__m128i *)scales->d, _mm256_cvtps_ph(d, _MM_FROUND_TO_NEAREST_INT));
}

AZQ_INLINE int below_fp16_limit(__m256 d) {
    return _mm256_movemask_ps(_mm256_cmp_ps(d, _mm256_set1_ps(AZQ_UNSUSPICIOUS), _CMP_LT_OQ)) == 0xff;
}

/* Largest and smallest of four blocks, in partial ones. */
AZQ_INLINE void extremes_of_4(const float *x, __m256 *up, __m256 *down) {
    __m256 most[4], least[4];
    for (int i = 0; i < 4; i++, x += 32) {
        __m256 a = loadf(x), b = loadf(x + 8), c = loadf(x + 16), d = loadf(x + 24);
        most[i] = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
        least[i] = _mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d));
    }
    *up = largest_of_4(most[0], most[1], most[2], most[3]);
    *down = smallest_of_4(least[0], least[1], least[2], least[3]);
}

/* Where some x and some -x' are both the largest magnitude, or all are 0: the one that comes first, never -0. */
static __attribute__((noinline)) __m256 first_extremes(const float *x, __m256 max, int tied) {
    float most[BATCH];
    _mm256_storeu_ps(most, max);
    for (int i = 0; i < BATCH; i++, x += 32) {
        for (int j = 0; j < 32 && tied >> i & 1; j++) {
            if (fabsf(x[j]) == fabsf(most[i])) {
                most[i] = most[i] == 0.0f ? 0.0f : x[j];
                break;
            }
        }
    }
    return loadf(most);
}

AZQ_INLINE void scales_q4_0(const float *x, batch_scales *scales, __m256 *most_d) {
    __m256 up[2], down[2];
    extremes_of_4(x, &up[0], &down[0]);
    extremes_of_4(x + 4 * 32, &up[1], &down[1]);
    __m256 most = largest_of_halves(up[0], up[1]), least = smallest_of_halves(down[0], down[1]);
    __m256 opposite = _mm256_xor_ps(least, _mm256_set1_ps(-0.0f));
    __m256 max = _mm256_blendv_ps(least, most, _mm256_cmp_ps(most, opposite, _CMP_GT_OQ));
    int tied = _mm256_movemask_ps(_mm256_cmp_ps(most, opposite, _CMP_EQ_OQ));
    if (tied) {
        max = first_extremes(x, max, tied);
    }
    __m256 d = _mm256_mul_ps(max, _mm256_set1_ps(-0.125f)); /* exactly what dividing by -8 gives */
    *most_d = _mm256_max_ps(abs8(d), *most_d);
    store_scales(d, scales);
}

AZQ_INLINE __m256i codes_q4_0(const float *x, __m256 inverse) {
    return _mm256_cvttps_epi32(_mm256_add_ps(_mm256_mul_ps(loadf(x), inverse), _mm256_set1_ps(8.5f)));
}

/* 32 codes as bytes; per 128-bit half: 4 of each 8. Those of NaN and infinity are -128, of other numbers 0 to 16. */
AZQ_INLINE __m256i bytes_q4_0(const float *x, float inverse) {
    __m256 factor = _mm256_set1_ps(inverse);
    __m256i low = _mm256_packs_epi32(codes_q4_0(x, factor), codes_q4_0(x + 8, factor));
    __m256i high = _mm256_packs_epi32(codes_q4_0(x + 16, factor), codes_q4_0(x + 24, factor));
    return _mm256_packs_epi16(low, high);
}

/* Two blocks; their codes are added to `seen`. */
AZQ_INLINE void pair_q4_0(const float *x, const float *inverse, azq_block_q4_0 *y, __m256i *seen) {
    const __m256i most = _mm256_set1_epi8(15);
    __m256i a = bytes_q4_0(x, inverse[0]), b = bytes_q4_0(x + 32, inverse[1]);
    *seen = _mm256_or_si256(*seen, _mm256_or_si256(a, b));
    a = _mm256_min_epu8(a, most);
    b = _mm256_min_epu8(b, most);
    __m256i high = _mm256_slli_epi16(_mm256_unpackhi_epi64(a, b), 4);
    __m256i both = _mm256_or_si256(_mm256_unpacklo_epi64(a, b), high);
    both = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm_storeu_si128((__m128i *)y[0].qs, _mm256_castsi256_si128(both));
    _mm_storeu_si128((__m128i *)y[1].qs, _mm256_extracti128_si256(both, 1));
}

/* Blocks with a number that is not finite or a scale that has no inverse, or too few for a batch. */
static __attribute__((noinline)) int some_q4_0(const float *x, azq_block_q4_0 *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        one_q4_0(x + i * AZQ_QK4_0, y + i);
    }
    return find_bad(x, n * AZQ_QK4_0, AZQ_UNSUSPICIOUS) < 0;
}

static int quantize_checked_q4_0(const float *x, void *blocks, int64_t k) {
    azq_block_q4_0 *y = blocks;
    int64_t left = k / AZQ_QK4_0;
    int good = 1;
    batch_scales scales[2];
    __m256 most_d = _mm256_setzero_ps();
    if (left >= BATCH) {
        scales_q4_0(x, &scales[0], &most_d);
    }
    for (int now = 0; left >= BATCH; now ^= 1, left -= BATCH, x += BATCH * AZQ_QK4_0, y += BATCH) {
        if (left >= 2 * BATCH) {
            scales_q4_0(x + BATCH * AZQ_QK4_0, &scales[now ^ 1], &most_d);
        }
        __m256i seen = _mm256_setzero_si256();
        for (int i = 0; i < BATCH; i += 2) {
            fetch_ahead(x + i * 32);
            fetch_ahead(x + i * 32 + 32);
            y[i].d = scales[now].d[i];
            y[i + 1].d = scales[now].d[i + 1];
            pair_q4_0(x + i * 32, scales[now].inverse + i, y + i, &seen);
        }
        if (_mm256_movemask_epi8(seen)) {
            good &= some_q4_0(x, y, BATCH);
        }
    }
    if (left > 0) {
        good &= some_q4_0(x, y, left);
    }
    return good && below_fp16_limit(most_d);
}

static void quantize_q4_0(const float *x, void *blocks, int64_t k) { (void)quantize_checked_q4_0(x, blocks, k); }

/* Half away from zero: the float just below 0.5 is added with the sign of x, then what is past the point cut off. */
AZQ_INLINE __m256i codes_q8_0(const float *x, __m256 inverse) {
    __m256 t = _mm256_mul_ps(loadf(x), inverse);
    __m256 half = _mm256_or_ps(_mm256_and_ps(t, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(0x1.fffffep-2f));
    return _mm256_cvttps_epi32(_mm256_add_ps(t, half));
}

/* One block as the definition has it, whatever its numbers. */
static void one_q8_0(const float *x, azq_block_q8_0 *y) {
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        most = _mm256_max_ps(abs8(loadf(x + 8 * i)), most);
    }
    float d = max_lane(most) / 127.0f;
    float id = d != 0.0f ? 1.0f / d : 0.0f;
    y->d = azq_f32_to_f16(d);
    __m256i q[4];
    for (int i = 0; i < 4; i++) {
        q[i] = codes_q8_0(x + 8 * i, _mm256_set1_ps(id));
    }
    _mm256_storeu_si256((__m256i *)y->qs, pack_bytes(q[0], q[1], q[2], q[3]));
}

static __attribute__((noinline)) int some_q8_0(const float *x, azq_block_q8_0 *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        one_q8_0(x + i * AZQ_QK8_0, y + i);
    }
    return find_bad(x, n * AZQ_QK8_0, AZQ_UNSUSPICIOUS) < 0;
}

AZQ_INLINE __m256 largest_magnitudes_of_4(const float *x) {
    __m256 most[4];
    for (int i = 0; i < 4; i++, x += 32) {
        most[i] = _mm256_max_ps(_mm256_max_ps(abs8(loadf(x)), abs8(loadf(x + 8))),
                                _mm256_max_ps(abs8(loadf(x + 16)), abs8(loadf(x + 24))));
    }
    return largest_of_4(most[0], most[1], most[2], most[3]);
}

AZQ_INLINE void scales_q8_0(const float *x, batch_scales *scales, __m256 *most_d) {
    __m256 amax = largest_of_halves(largest_magnitudes_of_4(x), largest_magnitudes_of_4(x + 4 * 32));
    __m256 d = _mm256_div_ps(amax, _mm256_set1_ps(127.0f));
    *most_d = _mm256_max_ps(d, *most_d);
    store_scales(d, scales);
}

static int quantize_checked_q8_0(const float *x, void *blocks, int64_t k) {
    const __m256i dword_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    azq_block_q8_0 *y = blocks;
    int64_t left = k / AZQ_QK8_0;
    int good = 1;
    batch_scales scales[2];
    __m256 most_d = _mm256_setzero_ps();
    if (left >= BATCH) {
        scales_q8_0(x, &scales[0], &most_d);
    }
    for (int now = 0; left >= BATCH; now ^= 1, left -= BATCH, x += BATCH * AZQ_QK8_0, y += BATCH) {
        if (left >= 2 * BATCH) {
            scales_q8_0(x + BATCH * AZQ_QK8_0, &scales[now ^ 1], &most_d);
        }
        __m256i least = _mm256_setzero_si256();
        for (int i = 0; i < BATCH; i++) {
            const float *from = x + i * AZQ_QK8_0;
            __m256 inverse = _mm256_set1_ps(scales[now].inverse[i]);
            fetch_ahead(from);
            /* Saturation leaves -128 where there was no number, and only there. */
            __m256i low = _mm256_packs_epi32(codes_q8_0(from, inverse), codes_q8_0(from + 8, inverse));
            __m256i high = _mm256_packs_epi32(codes_q8_0(from + 16, inverse), codes_q8_0(from + 24, inverse));
            __m256i bytes = _mm256_packs_epi16(low, high);
            least = _mm256_min_epi8(least, bytes);
            y[i].d = scales[now].d[i];
            _mm256_storeu_si256((__m256i *)y[i].qs, _mm256_permutevar8x32_epi32(bytes, dword_order));
        }
        if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_set1_epi8(-128)))) {
            good &= some_q8_0(x, y, BATCH);
        }
    }
    if (left > 0) {
        good &= some_q8_0(x, y, left);
    }
    return good && below_fp16_limit(most_d);
}

static void quantize_q8_0(const float *x, void *blocks, int64_t k) { (void)quantize_checked_q8_0(x, blocks, k); }

/* The largest magnitude as an integer, which orders infinity and NaN above all else. */
AZQ_INLINE int all_finite(__m256i largest) {
    return !_mm256_movemask_epi8(_mm256_cmpgt_epi32(largest, _mm256_set1_epi32(0x7f7fffff)));
}
AZQ_INLINE __m256i magnitude_bits(__m256i bits) { return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)); }

static int quantize_checked_f16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0;
    int finite = 1;
    for (; i + 32 <= k; i += 32) {
        fetch_ahead(x + i);
        for (int j = 0; j < 32; j += 8) {
            __m256 v = loadf(x + i + j);
            largest = _mm256_max_epi32(largest, magnitude_bits(_mm256_castps_si256(v)));
            _mm_storeu_si128((__m128i *)(y + i + j), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        }
    }
    for (; i < k; i++) {
        y[i] = azq_f32_to_f16(x[i]);
        finite &= fabsf(x[i]) < INFINITY;
    }
    return finite && all_finite(largest);
}

static void quantize_f16(const float *x, void *blocks, int64_t k) { (void)quantize_checked_f16(x, blocks, k); }

/* As azq_f32_to_bf16, in the low 16 bits of each lane. */
AZQ_INLINE __m256i to_bf16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

static int quantize_checked_bf16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0;
    int finite = 1;
    for (; i + 32 <= k; i += 32) {
        fetch_ahead(x + i);
        for (int j = 0; j < 32; j += 16) {
            __m256 a = loadf(x + i + j), b = loadf(x + i + j + 8);
            largest = _mm256_max_epi32(largest, magnitude_bits(_mm256_castps_si256(a)));
            largest = _mm256_max_epi32(largest, magnitude_bits(_mm256_castps_si256(b)));
            __m256i both = _mm256_packus_epi32(to_bf16(a), to_bf16(b)); /* per 128-bit half: 4 of each */
            _mm256_storeu_si256((__m256i *)(y + i + j), _mm256_permute4x64_epi64(both, 0xd8));
        }
    }
    for (; i < k; i++) {
        y[i] = azq_f32_to_bf16(x[i]);
        finite &= fabsf(x[i]) < INFINITY;
    }
    return finite && all_finite(largest);
}

static void quantize_bf16(const float *x, void *blocks, int64_t k) { (void)quantize_checked_bf16(x, blocks, k); }

/* ---- dequantize ---------------------------------------------------------------------------------- */

AZQ_INLINE void store_scaled(float *y, __m128i bytes, __m256 d) {
    _mm256_storeu_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), d));
}

static void dequantize_q4_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q4_0 *x = blocks;
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (int64_t b = 0; b < k / AZQ_QK4_0; b++, y += AZQ_QK4_0) {
        __m256 d = _mm256_set1_ps(azq_f16_to_f32(x[b].d));
        __m128i q = _mm_loadu_si128((const __m128i *)x[b].qs);
        __m128i low = _mm_sub_epi8(_mm_and_si128(q, mask), eight);
        __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(q, 4), mask), eight);
        store_scaled(y, low, d);
        store_scaled(y + 8, _mm_srli_si128(low, 8), d);
        store_scaled(y + 16, high, d);
        store_scaled(y + 24, _mm_srli_si128(high, 8), d);
    }
}

static void dequantize_q8_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q8_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK8_0; b++, y += AZQ_QK8_0) {
        __m256 d = _mm256_set1_ps(azq_f16_to_f32(x[b].d));
        for (int i = 0; i < 4; i++) {
            store_scaled(y + 8 * i, _mm_loadl_epi64((const __m128i *)(x[b].qs + 8 * i)), d);
        }
    }
}

static void dequantize_f16(const void *blocks, float *y, int64_t k) {
    const uint16_t *x = blocks;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    }
    for (; i < k; i++) {
        y[i] = azq_f16_to_f32(x[i]);
    }
}

static void dequantize_bf16(const void *blocks, float *y, int64_t k) {
    const uint16_t *x = blocks;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(x + i)));
        _mm256_storeu_ps(y + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
    }
    for (; i < k; i++) {
        y[i] = azq_bf16_to_f32(x[i]);
    }
}
