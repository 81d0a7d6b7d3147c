/* Floats and packed blocks to tiles of bf16: the definition, in loops that a compiler makes vectors of.
 * Included by bf16_<isa>.c, which defines AZQ_NAME. */

/* To nearest even; zero for what is subnormal; NaN stays NaN. */
static inline uint16_t round_one(float x) {
    uint32_t bits = azq_bits(x), magnitude = bits & 0x7fffffffu;
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    rounded = magnitude > 0x7f800000u ? bits >> 16 | 0x40u : rounded;
    rounded = magnitude < 0x00800000u ? bits >> 16 & 0x8000u : rounded;
    return (uint16_t)rounded;
}

void AZQ_NAME(round_bf16)(const float *x, int64_t ldx, int64_t rows, int64_t k, uint16_t *tiles) {
    assert(rows >= 0 && rows <= AZQ_TILE_ROWS);
    for (int64_t first = 0; first < k; first += AZQ_TILE_K) {
        int64_t n = k - first < AZQ_TILE_K ? k - first : AZQ_TILE_K;
        for (int64_t r = 0; r < AZQ_TILE_ROWS; r++, tiles += AZQ_TILE_K) {
            if (r < rows && n == AZQ_TILE_K) {
                const float *row = x + r * ldx + first;
                for (int i = 0; i < AZQ_TILE_K; i++) {
                    tiles[i] = round_one(row[i]);
                }
                continue;
            }
            for (int64_t i = 0; i < AZQ_TILE_K; i++) {
                tiles[i] = r < rows && i < n ? round_one(x[r * ldx + first + i]) : 0;
            }
        }
    }
}

/* A line of a packed block is 32 words, two for each column; word w of line `line` belongs to column w / 2 and
 * holds weights of k (w even) and k + 1 (w odd). So what shifting makes of the words of a line is a tile's line
 * already, in the order of k. */
enum { WORDS = 32 };

static inline void load_words(const uint8_t *line, uint16_t *words) { memcpy(words, line, WORDS * sizeof *words); }

/* Each column's fp16 number twice. */
static inline void load_scales(const uint8_t *head, float *scales) {
    for (int n = 0; n < AZQ_PANEL; n++) {
        uint16_t half;
        memcpy(&half, head + 2 * n, sizeof half);
        scales[2 * n] = scales[2 * n + 1] = azq_f16_to_f32(half);
    }
}

static inline void block_q4_0(const uint8_t *head, const uint8_t *lines, uint16_t *tile) {
    float scales[WORDS];
    load_scales(head, scales);
    for (int i = 0; i < 4; i++) {
        uint16_t words[WORDS];
        load_words(lines + 64 * i, words);
        for (int s = 0; s < 4; s++) { /* k = 8i + 2s, 8i + 2s + 1 */
            for (int w = 0; w < WORDS; w++) {
                tile[(4 * i + s) * WORDS + w] = round_one((float)((words[w] >> 4 * s & 15) - 8) * scales[w]);
            }
        }
    }
}

/* Operand o: its low bytes are k = 4o .. of even o, its high bytes those four further on; see azq_lane_order. */
static inline int byte_line(int o, int high) { return 4 * (o / 2) + o % 2 + 2 * high; }

static inline void block_q8_0(const uint8_t *head, const uint8_t *lines, uint16_t *tile) {
    float scales[WORDS];
    load_scales(head, scales);
    for (int o = 0; o < 8; o++) {
        uint16_t words[WORDS];
        load_words(lines + 64 * o, words);
        for (int high = 0; high < 2; high++) {
            uint16_t *out = tile + byte_line(o, high) * WORDS;
            for (int w = 0; w < WORDS; w++) {
                int8_t q = (int8_t)(uint8_t)(words[w] >> 8 * high);
                out[w] = round_one((float)q * scales[w]);
            }
        }
    }
}

static inline void block_q6_k(const uint8_t *head, const uint8_t *lines, uint16_t *tile) {
    float scales[2][WORDS];
    load_scales(head, scales[0]);
    for (int w = 0; w < WORDS; w++) { /* exact: 11 bits times 8 */
        float d = scales[0][w];
        scales[0][w] = d * (float)(int8_t)head[32 + w / 2];
        scales[1][w] = d * (float)(int8_t)head[48 + w / 2];
    }
    for (int o = 0; o < 8; o++) {
        uint16_t nibbles[WORDS], bits[WORDS];
        load_words(lines + 64 * (o / 2), nibbles);
        load_words(lines + 256 + 64 * (o / 4), bits);
        for (int high = 0; high < 2; high++) {
            int low_at = 8 * high + 4 * (o % 2), high_at = 8 * high + 2 * (o % 4);
            uint16_t *out = tile + byte_line(o, high) * WORDS;
            for (int w = 0; w < WORDS; w++) {
                int q = ((nibbles[w] >> low_at & 15) | (bits[w] >> high_at & 3) << 4) - 32;
                out[w] = round_one((float)q * scales[o / 4][w]);
            }
        }
    }
}

AZQ_DEQUANTIZE_BF16(AZQ_NAME(dequantize_bf16_q4_0), q4_0, 32, 256)
AZQ_DEQUANTIZE_BF16(AZQ_NAME(dequantize_bf16_q8_0), q8_0, 32, 512)
AZQ_DEQUANTIZE_BF16(AZQ_NAME(dequantize_bf16_q6_k), q6_k, 64, 384)
