/* Attention of a few query rows over one head's cache, for one type of cache. Included once per type by every
 * ISA file, which defines before
 *
 *   vf, LANES, V_ZERO, v_set(x), v_load(p), v_store(p, v), v_fma(a, b, c), v_mul, v_add, v_div   its vectors
 *   AZQ_TILES_1, AZQ_TILES_4          tiles of 16 positions at once for one row and for four rows
 *   AZQ_CHAINS                        1 where eight sums are all that registers hold, 2 where there is room for twice
 *   AZQ_ATTEND(part)                  names; and of the cache's type these parts:
 *     row_bytes(dim)                  bytes of one position: a tile of keys has 16 times that
 *     LINE                            bytes of one dimension of 16 positions
 *     RUN(dim)                        dimensions of a key that share a scale
 *     key_scales(tile, d, lane)       the scales, at dimension d, of the positions from lane on in a tile
 *     key(tile, d, lane, scales)      dimension d of these positions, in fp32
 *     column(d)                       where a position's numbers from d on lie, in bytes; values there:
 *     value(at, d, i), value_one(at, d)   dimensions d + i ..., or d alone
 *
 * The order of every sum is fixed: scores over the head's dimensions from 0 up, results over positions in two
 * interleaved chains (even, odd) that are added at the end; each step is one fused multiply-add. So every ISA
 * gives the same bits, whichever rows are computed together. */

enum { AZQ_ATTEND(VECTORS) = 16 / LANES }; /* vectors per tile of positions */

/* scores (R, ld) of R rows against tiles tile .. tile + B - 1; returns the next one. A row by itself waits for
 * memory: the values of the same positions are fetched meanwhile. */
AZQ_INLINE int64_t AZQ_ATTEND(some)(const azq_attend_row *rows, int R, const azq_attend_head *head, int64_t tile, int B,
                                    float *scores, int64_t ld) {
    enum { V = AZQ_ATTEND(VECTORS), AHEAD = AZQ_ATTEND(LINE) };
    int64_t dim = head->dim, tile_bytes = 16 * AZQ_ATTEND(row_bytes)(dim);
    const uint8_t *keys = (const uint8_t *)head->keys + tile * tile_bytes;
    const uint8_t *values = (const uint8_t *)head->values + tile * tile_bytes;
    vf acc[4 * AZQ_TILES_1 * V];
    for (int i = 0; i < R * B * V; i++) {
        acc[i] = V_ZERO;
    }
    for (int64_t from = 0; from < dim; from += AZQ_ATTEND(RUN)(dim)) {
        int64_t to = from + AZQ_ATTEND(RUN)(dim) < dim ? from + AZQ_ATTEND(RUN)(dim) : dim;
        vf scales[AZQ_TILES_1 * V];
        for (int i = 0; i < B * V; i++) {
            scales[i] = AZQ_ATTEND(key_scales)(keys + i / V * tile_bytes, from, i % V * LANES);
        }
        for (int64_t d = from; d < to; d++) {
            for (int i = 0; R == 1 && i < B * AHEAD; i += 64) {
                __builtin_prefetch(values + d * B * AHEAD + i, 0, 2);
            }
            vf k[AZQ_TILES_1 * V];
            for (int i = 0; i < B * V; i++) {
                k[i] = AZQ_ATTEND(key)(keys + i / V * tile_bytes, d, i % V * LANES, scales[i]);
            }
            for (int r = 0; r < R; r++) {
                vf q = v_set(rows[r].query[d]);
                for (int i = 0; i < B * V; i++) {
                    acc[r * B * V + i] = v_fma(q, k[i], acc[r * B * V + i]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < B * V; i++) {
            v_store(scores + r * ld + 16 * tile + i * LANES, v_mul(acc[r * B * V + i], v_set(head->scale)));
        }
    }
    return tile + B;
}

/* Positions from .. to - 1 of one row, added to n chains of C vectors: both (even positions, odd ones), or `first`. */
AZQ_INLINE void AZQ_ATTEND(chain)(const uint8_t *column, int64_t row_bytes, int64_t d, int C, int64_t from, int64_t to,
                                  const float *scores, int first, int n, vf *even, vf *odd) {
    for (int64_t p = from + (n == 1 && (from & 1) != first); p < to; p += 3 - n) {
        for (int c = 0; c < C; c++) {
            vf v = AZQ_ATTEND(value)(column + p * row_bytes, d, c * LANES), s = v_set(scores[p]);
            if (n == 2 && (p & 1)) {
                odd[c] = v_fma(s, v, odd[c]);
            } else {
                even[c] = v_fma(s, v, even[c]);
            }
        }
    }
}

/* Columns d .. d + C * LANES - 1 of R rows, n chains (both, or `first` alone) to sums (n, R * C). All rows see
 * positions low .. high - 1 (low even). */
AZQ_INLINE void AZQ_ATTEND(mix_chains)(const azq_attend_row *rows, int R, const uint8_t *values, int64_t row_bytes,
                                       int64_t d, int C, int64_t low, int64_t high, const float *scores, int64_t ld,
                                       int first, int n, vf *sums) {
    vf acc[2][8]; /* R * C at most */
    const uint8_t *column = values + AZQ_ATTEND(column)(d);
    for (int i = 0; i < R * C; i++) {
        acc[0][i] = acc[1][i] = V_ZERO;
    }
    for (int r = 0; r < R; r++) {
        int64_t stop = low < rows[r].end ? low : rows[r].end;
        AZQ_ATTEND(chain)(column, row_bytes, d, C, rows[r].first, stop, scores + r * ld, first, n, acc[0] + r * C,
                          acc[1] + r * C);
    }
    int64_t p = low;
    const uint8_t *at = column + (low + first) * row_bytes;
    for (; p + 2 <= high; p += 2, at += 2 * row_bytes) {
        for (int c = 0; c < C; c++) {
            vf v[2];
            for (int j = 0; j < n; j++) {
                v[j] = AZQ_ATTEND(value)(at + j * row_bytes, d, c * LANES);
            }
            for (int r = 0; r < R; r++) {
                for (int j = 0; j < n; j++) {
                    acc[j][r * C + c] = v_fma(v_set(scores[r * ld + p + first + j]), v[j], acc[j][r * C + c]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        AZQ_ATTEND(chain)(column, row_bytes, d, C, p, rows[r].end, scores + r * ld, first, n, acc[0] + r * C,
                          acc[1] + r * C);
    }
    for (int i = 0; i < n * R * C; i++) {
        sums[i] = acc[i / (R * C)][i % (R * C)];
    }
}

/* The results of R rows in these columns. */
AZQ_INLINE void AZQ_ATTEND(mix)(const azq_attend_row *rows, int R, const uint8_t *values, int64_t row_bytes, int64_t d,
                                int C, int64_t low, int64_t high, const float *scores, int64_t ld, const float *sums) {
    vf chains[2 * 8];
    if (R * C > 4 && AZQ_CHAINS == 1) {
        for (int first = 0; first < 2; first++) {
            AZQ_ATTEND(mix_chains)(rows, R, values, row_bytes, d, C, low, high, scores, ld, first, 1,
                                   chains + first * R * C);
        }
    } else {
        AZQ_ATTEND(mix_chains)(rows, R, values, row_bytes, d, C, low, high, scores, ld, 0, 2, chains);
    }
    for (int i = 0; i < R * C; i++) {
        vf sum = v_add(chains[i], chains[R * C + i]);
        v_store(rows[i / C].out + d + i % C * LANES, v_div(sum, v_set(sums[i / C])));
    }
}

/* Columns that fill no vector. */
AZQ_INLINE void AZQ_ATTEND(mix_one)(const azq_attend_row *row, const uint8_t *values, int64_t row_bytes, int64_t d,
                                    const float *scores, float sum) {
    const uint8_t *column = values + AZQ_ATTEND(column)(d);
    float chains[2] = {0.0f, 0.0f};
    for (int64_t p = row->first; p < row->end; p++) {
        chains[p & 1] = fmaf(scores[p], AZQ_ATTEND(value_one)(column + p * row_bytes, d), chains[p & 1]);
    }
    row->out[d] = (chains[0] + chains[1]) / sum;
}

/* R rows: scores, softmax, results. */
AZQ_INLINE void AZQ_ATTEND(group)(const azq_attend_row *rows, int R, const azq_attend_head *head, float *scores,
                                  int64_t ld) {
    const int C = R == 1 ? 4 : 2;
    const uint8_t *values = head->values;
    int64_t dim = head->dim, row_bytes = AZQ_ATTEND(row_bytes)(dim);
    int B = R == 1 ? AZQ_TILES_1 : AZQ_TILES_4;
    int64_t first = rows[0].first, end = rows[0].end, low = first, high = end;
    for (int r = 1; r < R; r++) {
        first = rows[r].first < first ? rows[r].first : first;
        end = rows[r].end > end ? rows[r].end : end;
        low = rows[r].first > low ? rows[r].first : low;
        high = rows[r].end < high ? rows[r].end : high;
    }
    low += low & 1;
    int64_t tile = first / 16, tiles = (end + 15) / 16;
    while (tile < tiles) {
        int64_t n = tiles - tile;
        if (n >= B) {
            tile = AZQ_ATTEND(some)(rows, R, head, tile, B, scores, ld);
        } else if (4 < B && n >= 4) {
            tile = AZQ_ATTEND(some)(rows, R, head, tile, 4, scores, ld);
        } else if (2 < B && n >= 2) {
            tile = AZQ_ATTEND(some)(rows, R, head, tile, 2, scores, ld);
        } else {
            tile = AZQ_ATTEND(some)(rows, R, head, tile, 1, scores, ld);
        }
    }
    float sums[4];
    for (int r = 0; r < R; r++) {
        float *seen = scores + r * ld + rows[r].first;
        int64_t n = rows[r].end - rows[r].first;
        if (head->softcap > 0.0f) {
            softcap(seen, n, head->softcap);
        }
        sums[r] = softmax(seen, n);
    }
    if (high < low) { /* rows so far apart that they share nothing: each by itself */
        low = high = end;
    }
    int64_t d = 0;
    for (; d + C * LANES <= dim; d += C * LANES) {
        AZQ_ATTEND(mix)(rows, R, values, row_bytes, d, C, low, high, scores, ld, sums);
    }
    if (C == 4 && d + 2 * LANES <= dim) {
        AZQ_ATTEND(mix)(rows, R, values, row_bytes, d, 2, low, high, scores, ld, sums);
        d += 2 * LANES;
    }
    for (; d + LANES <= dim; d += LANES) {
        AZQ_ATTEND(mix)(rows, R, values, row_bytes, d, 1, low, high, scores, ld, sums);
    }
    for (; d < dim; d++) {
        for (int r = 0; r < R; r++) {
            AZQ_ATTEND(mix_one)(&rows[r], values, row_bytes, d, scores + r * ld, sums[r]);
        }
    }
}

static void AZQ_ATTEND(rows)(const azq_attend_row *rows, int64_t n_rows, const azq_attend_head *head, float *scores,
                             int64_t ld) {
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        AZQ_ATTEND(group)(rows + r, 4, head, scores, ld);
    }
    for (; r < n_rows; r++) {
        AZQ_ATTEND(group)(rows + r, 1, head, scores, ld);
    }
}

#undef AZQ_ATTEND
