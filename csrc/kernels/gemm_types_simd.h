/* The int8 products of gemm_types.h, written once for registers of 512, 256 and 128 bits. The including file, inside
 * its target region, defines the register's shape and the few operations that C has no notation for:
 *
 *   V_BYTES                     64, 32 or 16; a panel's 16 columns are one register, two or four
 *   i_dot(sum, w, a)            adds four products u8 * s8 to each 32-bit lane; without AZQ_MADDUBS. With
 *                               AZQ_SIGNED_DOT they are s8 * s8
 *   i_maddubs(w, a), i_madd(x)  AZQ_MADDUBS: pairs of products in 16 bits; pairs of those added in 32
 *   i_abs(x), i_sign(a, w)      AZQ_MADDUBS: in bytes
 *   i_pairs(x, y)               x0 * y0 + x1 * y1 of 16-bit pairs
 *   i_shuffle(table, x)         16 bytes looked up by 4-bit codes
 *   i_bytes(p), f_int(x), f_halves(p), f_fma(a, b, c)
 *
 * Few rows: a block is unpacked in registers and multiplied at once ("fused"). Many: CHUNK blocks of two
 * registers' columns are unpacked to a buffer that stays in the first cache, and all rows pass over it. Either
 * way an element's sum goes through the blocks in order. */
#include <string.h>
#include "../packed_types.h"
#include "gemm_types.h"

typedef int32_t vi __attribute__((vector_size(V_BYTES)));
typedef uint16_t vi16 __attribute__((vector_size(V_BYTES)));
typedef float vf __attribute__((vector_size(V_BYTES)));
typedef int32_t vi_unaligned __attribute__((vector_size(V_BYTES), aligned(1), may_alias));
typedef float vf_unaligned __attribute__((vector_size(V_BYTES), aligned(1), may_alias));

#define GEMM_INLINE static inline __attribute__((always_inline, unused))

enum {
    COLUMNS = V_BYTES / 4,                    /* of a panel in a register */
    PER_PANEL = AZQ_PANEL / COLUMNS,          /* registers of a panel */
    CHUNK = 16,                               /* blocks unpacked at a time */
    DENSE_VECTORS = 8 + 3,                    /* a block unpacked: operands, then its head */
    AHEAD = 12288,                            /* bytes prefetched ahead by the first pass over a panel: memory is far */
};

GEMM_INLINE vi set32(int32_t x) { return (vi){0} + x; }
GEMM_INLINE vf setf(float x) { return x - (vf){0}; } /* x + 0 would not be x for -0 */
GEMM_INLINE vi load_i(const void *p) { return *(const vi_unaligned *)p; }
GEMM_INLINE vf load_f(const void *p) { return *(const vf_unaligned *)p; }
GEMM_INLINE void store_i(void *p, vi x) { *(vi_unaligned *)p = x; }
GEMM_INLINE void store_f(void *p, vf x) { *(vf_unaligned *)p = x; }
GEMM_INLINE vi set8(int x) { return set32((int)((unsigned)x * 0x01010101u)); }
GEMM_INLINE vi broadcast4(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, sizeof dword);
    return set32(dword);
}

/* ---- a block's head ---------------------------------------------------------------------------------- */

typedef struct {
    vf scale;
    vf first;  /* the minimum; of Q2_K -dmin; of Q3_K the first half's scale */
    vf second; /* of Q3_K the second half's scale; of Q2_K the bits of two 16-bit minima */
    vi factor[2]; /* Q2_K: 16-bit scales of the halves */
} block_head;

GEMM_INLINE block_head read_head(const int type, azq_packed_place at, int column) {
    const uint8_t *head = at.head + column;
    block_head h = {.scale = setf(0.0f)};
    h.first = h.second = h.scale;
    h.factor[0] = h.factor[1] = set32(0);
    if (azq_packed_type_of(type).super_bytes) {
        h.scale = f_halves(at.super + 2 * column);
    }
    switch (type) {
    case AZQ_TYPE_Q4_K:
    case AZQ_TYPE_Q5_K:
        h.scale = h.scale * f_int(i_bytes(head));
        h.first = -f_halves(at.super + 2 * AZQ_PANEL + 2 * column) * f_int(i_bytes(head + AZQ_PANEL));
        break;
    case AZQ_TYPE_Q2_K: {
        vi a = i_bytes(head), b = i_bytes(head + AZQ_PANEL);
        h.first = -f_halves(at.super + 2 * AZQ_PANEL + 2 * column);
        h.second = (vf)(a >> 4 | b >> 4 << 16);
        h.factor[0] = (a & 15) * 0x10001;
        h.factor[1] = (b & 15) * 0x10001;
        break;
    }
    case AZQ_TYPE_Q3_K:
        h.first = f_int(i_bytes(head) - 32);
        h.second = f_int(i_bytes(head + AZQ_PANEL) - 32);
        break;
    case AZQ_TYPE_IQ4_XS: h.scale = h.scale * f_int(i_bytes(head) - 32); break;
    case AZQ_TYPE_MXFP4: {
        vi e = i_bytes(head), subnormal = (e + 1) << 21, normal = (e - 1) << 23, is = e < 2;
        h.scale = (vf)((subnormal & is) | (normal & ~is));
        break;
    }
    case AZQ_TYPE_Q4_1:
    case AZQ_TYPE_Q5_1: h.first = f_halves(at.head + 2 * AZQ_PANEL + 2 * column); /* fall through */
    default: h.scale = f_halves(at.head + 2 * column);
    }
    return h;
}

/* ---- a block's operands ------------------------------------------------------------------------------ */

/* Where u8 x s8 products go through 16 bits, or are s8 x s8, numbers that need all of a byte are kept signed. */
#if defined(AZQ_MADDUBS) || defined(AZQ_SIGNED_DOT)
enum { KEEP_SIGNED = 1 };
#else
enum { KEEP_SIGNED = 0 };
#endif
GEMM_INLINE int is_signed(const int type) { return KEEP_SIGNED && azq_packed_type_of(type).offset == 128; }

GEMM_INLINE vi operand(const int type, azq_packed_place at, int column, const int o, const block_head *h) {
    azq_packed_type shape = azq_packed_type_of(type);
    const uint8_t *lines = at.lines + 4 * column;
    const int per_line = 8 / shape.low_bits;
    vi16 x = (vi16)load_i(lines + 64 * (o / per_line)) >> shape.low_bits * (o % per_line);
    vi code = (vi)x & set8((1 << shape.low_bits) - 1);
    if (shape.high_bit) {
        vi16 bits = (vi16)load_i(lines + 64 * (8 / per_line));
        const int to = shape.high_bit == 16 ? 4 : 2;
        bits = o < to ? bits << (o < to ? to - o : 0) : bits >> (o < to ? 0 : o - to);
        code |= (vi)bits & set8(shape.high_bit);
    }
    if (azq_packed_table(type)) {
        code = i_shuffle(azq_packed_table(type), code);
        code = is_signed(type) ? code ^ set8(-128 & 0xff) : code;
    }
    if (shape.kind == AZQ_HALVES_MIN) { /* at most 3 * 15: no carry into the next byte */
        code = (vi)((vi16)code * (vi16)h->factor[o / 4]);
    }
    return code;
}

/* ---- sums ---------------------------------------------------------------------------------------------- */

/* How many u8 x s8 products of two fit 16 bits: codes up to 31 four times, 45 twice, signed bytes once. */
GEMM_INLINE int depth_of(const azq_packed_kind kind, const int signed_weights) {
    return signed_weights ? 1 : kind == AZQ_HALVES_MIN ? 2 : 4;
}

/* Adds operand o times its four activations to a row's sum. */
GEMM_INLINE void add_products(const azq_packed_kind kind, const int signed_weights, const int o, vi w, vi a, vi *part,
                              vi *dot) {
#ifdef AZQ_MADDUBS
    const int depth = depth_of(kind, signed_weights);
    vi products = signed_weights ? i_maddubs(i_abs(w), i_sign(a, w)) : i_maddubs(w, a);
    *part = o % depth ? (vi)((vi16)*part + (vi16)products) : products;
    if (o % depth == depth - 1) {
        *dot += i_madd(*part);
    }
#else
    (void)kind, (void)signed_weights, (void)o, (void)part;
    *dot = i_dot(*dot, w, a);
#endif
}

/* What the dot products of half `half` begin with. */
GEMM_INLINE vi first_sum(const azq_packed_kind kind, const int offset, const azq_act *act, int64_t at, const int half) {
    if (kind == AZQ_HALVES) {
        return set32(-offset * act->sum16[2 * at + half]);
    }
    return kind == AZQ_ONE_DOT && offset ? set32(offset / 8 * act->sum8[at]) : set32(0);
}

/* The block's part of an element's sum. */
GEMM_INLINE vf add_block(const azq_packed_kind kind, const block_head *h, vi dot0, vi dot1, const azq_act *act,
                         int64_t at, vf sum) {
    vf d = setf(act->d[at]), dot = f_int(dot0);
    if (kind == AZQ_HALVES) { /* whole numbers below 2^24: exact */
        dot = f_fma(f_int(dot1), h->second, dot * h->first);
    }
    sum = f_fma(dot, h->scale * d, sum);
    if (kind == AZQ_WITH_MIN) {
        sum = f_fma(h->first, setf(act->dsum[at]), sum);
    } else if (kind == AZQ_HALVES_MIN) {
        uint32_t pair = ((uint32_t)act->sum16[2 * at] & 0xffffu) | (uint32_t)act->sum16[2 * at + 1] << 16;
        sum = f_fma(f_int(i_pairs((vi)h->second, set32((int32_t)pair))), h->first * d, sum);
    }
    return sum;
}

/* ---- few rows ---------------------------------------------------------------------------------------- */

#define AZQ_EACH_OPERAND(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7)

GEMM_INLINE void fused_tile(const int type, const azq_act *act, int64_t row, const int R, const uint8_t *panel,
                            const int fetch, float *c, int64_t ldc) {
    const azq_packed_type shape = azq_packed_type_of(type);
    const azq_packed_kind kind = shape.kind;
    const int offset = is_signed(type) ? 0 : shape.offset, halves = kind == AZQ_HALVES ? 2 : 1;
    const int64_t n_blocks = act->k / 32, bytes = AZQ_PANEL * shape.head_bytes + 64 * (shape.low_bits + !!shape.high_bit);
    vf sums[FUSED_ROWS * PER_PANEL];
    for (int i = 0; i < R * PER_PANEL; i++) {
        sums[i] = setf(0.0f);
    }
    for (int64_t b = 0; b < n_blocks; b++) {
        azq_packed_place at = azq_packed_block(type, panel, n_blocks, b);
        const int8_t *q = act->q + row * act->k + 32 * b;
        int64_t place = row * n_blocks + b;
        if (fetch) {
            for (int64_t i = 0; i < bytes; i += 64) {
                __builtin_prefetch(at.lines + i + AHEAD);
            }
        }
        block_head h[PER_PANEL];
        vi dots[2][FUSED_ROWS * PER_PANEL], part[FUSED_ROWS * PER_PANEL];
        for (int p = 0; p < PER_PANEL; p++) {
            h[p] = read_head(type, at, p * COLUMNS);
            for (int r = 0; r < R; r++) {
                for (int half = 0; half < halves; half++) {
                    dots[half][r * PER_PANEL + p] = first_sum(kind, offset, act, place + r * n_blocks, half);
                }
            }
        }
#define AZQ_STEP(o)                                                                                               \
    for (int p = 0; p < PER_PANEL; p++) {                                                                         \
        vi w = operand(type, at, p * COLUMNS, o, &h[p]);                                                          \
        for (int r = 0; r < R; r++) {                                                                             \
            int i = r * PER_PANEL + p;                                                                            \
            add_products(kind, is_signed(type), o, w, broadcast4(q + r * act->k + 4 * (o)), &part[i],             \
                         &dots[(o) / 4 * (halves - 1)][i]);                                                       \
        }                                                                                                         \
    }
        AZQ_EACH_OPERAND(AZQ_STEP)
#undef AZQ_STEP
        for (int i = 0; i < R * PER_PANEL; i++) {
            int64_t a = place + i / PER_PANEL * n_blocks;
            sums[i] = add_block(kind, &h[i % PER_PANEL], dots[0][i], dots[halves - 1][i], act, a, sums[i]);
        }
    }
    for (int i = 0; i < R * PER_PANEL; i++) {
        store_f(c + i / PER_PANEL * ldc + i % PER_PANEL * COLUMNS, sums[i]);
    }
}

GEMM_INLINE void fused_rows(const int type, const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panel,
                            float *c, int64_t ldc) {
    for (int64_t r = 0, n; r < rows; r += n) {
        int64_t tiles = (rows - r + FUSED_ROWS - 1) / FUSED_ROWS;
        n = (rows - r + tiles - 1) / tiles; /* tiles of about equal height */
        float *out = c + r * ldc;
        switch (n) {
#if FUSED_ROWS >= 4
        case 4: fused_tile(type, act, row0 + r, 4, panel, r == 0, out, ldc); break;
        case 3: fused_tile(type, act, row0 + r, 3, panel, r == 0, out, ldc); break;
#endif
        case 2: fused_tile(type, act, row0 + r, 2, panel, r == 0, out, ldc); break;
        default: fused_tile(type, act, row0 + r, 1, panel, r == 0, out, ldc); break;
        }
    }
}

/* ---- many rows --------------------------------------------------------------------------------------- */

/* Blocks b .. b + n - 1 of P registers' columns, register p at panel[p], columns[p] of it on. */
GEMM_INLINE void unpack_dense(const int type, const uint8_t *const *panel, const int *columns, const int P,
                              int64_t n_blocks, int64_t b, int64_t n, uint8_t *dense) {
    for (int64_t i = 0; i < n * P; i++, dense += DENSE_VECTORS * V_BYTES) {
        azq_packed_place at = azq_packed_block(type, panel[i % P], n_blocks, b + i / P);
        int column = columns[i % P];
        block_head h = read_head(type, at, column);
#define AZQ_STEP(o) store_i(dense + V_BYTES * (o), operand(type, at, column, o, &h));
        AZQ_EACH_OPERAND(AZQ_STEP)
#undef AZQ_STEP
        store_f(dense + 8 * V_BYTES, h.scale);
        if (azq_packed_type_of(type).kind != AZQ_ONE_DOT) {
            store_f(dense + 9 * V_BYTES, h.first);
        }
        if (azq_packed_type_of(type).kind >= AZQ_HALVES) {
            store_f(dense + 10 * V_BYTES, h.second);
        }
    }
}

/* Rows row .. row + R - 1 over n unpacked blocks, the first of which is block b. */
GEMM_INLINE void dense_tile(const azq_packed_kind kind, const int signed_weights, int offset, const azq_act *act,
                            int64_t row, const int R, const int P, int64_t b, int64_t n, const uint8_t *dense, float *c,
                            int64_t ldc) {
    const int halves = kind == AZQ_HALVES ? 2 : 1;
    const int64_t n_blocks = act->k / 32;
    vf sums[DENSE_ROWS * 2];
    for (int i = 0; i < R * P; i++) {
        sums[i] = b == 0 ? setf(0.0f) : load_f(c + i / P * ldc + i % P * COLUMNS);
    }
    const int8_t *q = act->q + row * act->k + 32 * b;
    int64_t place = row * n_blocks + b;
    for (int64_t end = b + n; b < end; b++, q += 32, place++, dense += P * DENSE_VECTORS * V_BYTES) {
        vi dots[2][DENSE_ROWS * 2], part[DENSE_ROWS * 2];
        for (int i = 0; i < R * P; i++) {
            for (int half = 0; half < halves; half++) {
                dots[half][i] = first_sum(kind, offset, act, place + i / P * n_blocks, half);
            }
        }
#define AZQ_STEP(o)                                                                                               \
    {                                                                                                             \
        vi w[2];                                                                                                  \
        for (int p = 0; p < P; p++) {                                                                             \
            w[p] = load_i(dense + (p * DENSE_VECTORS + (o)) * V_BYTES);                                           \
        }                                                                                                         \
        for (int r = 0; r < R; r++) {                                                                             \
            vi a = broadcast4(q + r * act->k + 4 * (o));                                                          \
            for (int p = 0; p < P; p++) {                                                                         \
                int i = r * P + p;                                                                                \
                add_products(kind, signed_weights, o, w[p], a, &part[i], &dots[(o) / 4 * (halves - 1)][i]);       \
            }                                                                                                     \
        }                                                                                                         \
    }
        AZQ_EACH_OPERAND(AZQ_STEP)
#undef AZQ_STEP
        for (int p = 0; p < P; p++) {
            const uint8_t *from = dense + p * DENSE_VECTORS * V_BYTES;
            block_head h = {.scale = load_f(from + 8 * V_BYTES)};
            h.first = kind == AZQ_ONE_DOT ? h.scale : load_f(from + 9 * V_BYTES);
            h.second = kind < AZQ_HALVES ? h.scale : load_f(from + 10 * V_BYTES);
            for (int r = 0; r < R; r++) {
                int i = r * P + p;
                sums[i] = add_block(kind, &h, dots[0][i], dots[halves - 1][i], act, place + r * n_blocks, sums[i]);
            }
        }
    }
    for (int i = 0; i < R * P; i++) {
        store_f(c + i / P * ldc + i % P * COLUMNS, sums[i]);
    }
}

GEMM_INLINE void dense_rows(const azq_packed_kind kind, const int signed_weights, int offset, const azq_act *act,
                            int64_t row0, int64_t rows, const int P, int64_t b, int64_t n, const uint8_t *dense,
                            float *c, int64_t ldc) {
    const int most = kind == AZQ_HALVES ? DENSE_ROWS / 2 : DENSE_ROWS; /* halves need twice the sums */
#define AZQ_TILE(R) dense_tile(kind, signed_weights, offset, act, row0 + r, R, P, b, n, dense, c + r * ldc, ldc)
    for (int64_t r = 0, height; r < rows; r += height) {
        int64_t tiles = (rows - r + most - 1) / most;
        height = (rows - r + tiles - 1) / tiles;
        switch (height) {
#if DENSE_ROWS >= 6
        case 6: AZQ_TILE(kind == AZQ_HALVES ? 1 : 6); break;
        case 5: AZQ_TILE(kind == AZQ_HALVES ? 1 : 5); break;
        case 4: AZQ_TILE(kind == AZQ_HALVES ? 1 : 4); break;
#endif
#if DENSE_ROWS >= 3
        case 3: AZQ_TILE(3); break;
#endif
        case 2: AZQ_TILE(2); break;
        default: AZQ_TILE(1); break;
        }
    }
#undef AZQ_TILE
}

/* One function per kind, so that types share them. */
typedef void dense_fn(int offset, const azq_act *act, int64_t row0, int64_t rows, int P, int64_t b, int64_t n,
                      const uint8_t *dense, float *c, int64_t ldc);
#define AZQ_DENSE(name, kind, signed_weights)                                                                        \
    static __attribute__((noinline)) void name(int offset, const azq_act *act, int64_t row0, int64_t rows, int P,   \
                                               int64_t b, int64_t n, const uint8_t *dense, float *c, int64_t ldc) { \
        if (P == 2) {                                                                                               \
            dense_rows(kind, signed_weights, offset, act, row0, rows, 2, b, n, dense, c, ldc);                      \
        } else {                                                                                                    \
            dense_rows(kind, signed_weights, offset, act, row0, rows, 1, b, n, dense, c, ldc);                      \
        }                                                                                                           \
    }
AZQ_DENSE(dense_one_dot, AZQ_ONE_DOT, 0)
#ifdef AZQ_MADDUBS
AZQ_DENSE(dense_signed, AZQ_ONE_DOT, 1)
#else
#define dense_signed dense_one_dot
#endif
AZQ_DENSE(dense_with_min, AZQ_WITH_MIN, 0)
AZQ_DENSE(dense_halves, AZQ_HALVES, 0)
AZQ_DENSE(dense_halves_min, AZQ_HALVES_MIN, 0)

GEMM_INLINE dense_fn *dense_of(const int type) {
    switch (azq_packed_type_of(type).kind) {
    case AZQ_ONE_DOT: return is_signed(type) ? dense_signed : dense_one_dot;
    case AZQ_WITH_MIN: return dense_with_min;
    case AZQ_HALVES: return dense_halves;
    default: return dense_halves_min;
    }
}

/* One or two registers' columns. */
GEMM_INLINE void dense_columns(const int type, const azq_act *act, int64_t row0, int64_t rows,
                               const uint8_t *const *panel, const int *columns, const int P, float *c, int64_t ldc) {
    _Alignas(64) uint8_t dense[CHUNK * 2 * DENSE_VECTORS * V_BYTES];
    const int offset = is_signed(type) ? 0 : azq_packed_type_of(type).offset;
    int64_t n_blocks = act->k / 32, b = 0;
    do {
        int64_t n = n_blocks - b < CHUNK ? n_blocks - b : CHUNK;
        unpack_dense(type, panel, columns, P, n_blocks, b, n, dense);
        dense_of(type)(offset, act, row0, rows, P, b, n, dense, c, ldc);
        b += CHUNK;
    } while (b < n_blocks);
}

GEMM_INLINE void gemm_type(const int type, const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,
                           int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {
    if (rows < DENSE_FROM) {
        for (int64_t p = 0; p < n_panels; p++) {
            fused_rows(type, act, row0, rows, panels + p * panel_bytes, c + p * AZQ_PANEL, ldc);
        }
        return;
    }
    for (int64_t p = 0; p < n_panels; p += PER_PANEL == 1 ? 2 : 1) {
        const uint8_t *panel = panels + p * panel_bytes;
        const uint8_t *both[2] = {panel, PER_PANEL == 1 ? panel + panel_bytes : panel};
        for (int column = 0; column < AZQ_PANEL; column += 2 * COLUMNS) {
            const int columns[2] = {column, PER_PANEL == 1 ? 0 : column + COLUMNS};
            float *out = c + p * AZQ_PANEL + column;
            if (PER_PANEL > 1 || p + 1 < n_panels) {
                dense_columns(type, act, row0, rows, both, columns, 2, out, ldc);
            } else {
                dense_columns(type, act, row0, rows, both, columns, 1, out, ldc);
            }
        }
    }
}

#define AZQ_GEMM_TYPE(name, type)                                                                                \
    void AZQ_NAME(gemm_##name)(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,            \
                               int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                   \
        gemm_type(AZQ_TYPE_##type, act, row0, rows, panels, panel_bytes, n_panels, c, ldc);                      \
    }
AZQ_GEMM_TYPES_ALL
