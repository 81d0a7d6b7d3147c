/* The fp32 products (azq_gemm_fp32_fn and azq_gemm_plane_fn in azq_kernels.h), once for every ISA. The including
 * file, inside its target region, defines
 *
 *   wide                         16 fp32 numbers
 *   w_zero(), w_set(x), w_load(p), w_store(p, x), w_add(a, b), w_add_product(sum, a, b)   sum + a * b, rounded once
 *   w_load_f16(p), w_load_bf16(p)   where AZQ_FP32_HALVES is defined
 *   TILE_ROWS                    6 or 3: sums of TILE_ROWS * TILE_COLUMNS elements stay in registers
 *   TILE_COLUMNS                 4 or 2
 *   PLANE_ROWS, PLANE_WIDES      the same of a plane: sums of PLANE_ROWS * 16 * PLANE_WIDES elements
 *
 * Over W as GGUF has it a register holds the 16 lanes of one element. x is read in pieces of CHUNK columns, so that a
 * tile's rows stay in the first cache while all columns of W pass; between pieces the lanes of all sums lie in
 * memory. Over planes a register holds one lane of 16 elements. */
#include <string.h>
#include "../azq_half.h"
#include "../azq_kernels.h"

#define FP32_INLINE static inline __attribute__((always_inline, unused))

enum {
    CHUNK = 1024,
    AHEAD = 8192, /* bytes in all rows of W that are read side by side */
    X_AHEAD = 4096, W_AHEAD = 2048, /* bytes in planes */
};

FP32_INLINE int element_bytes(const int type) { return type == AZQ_TYPE_F32 ? 4 : 2; }

FP32_INLINE wide load_w(const int type, const uint8_t *p) {
#ifdef AZQ_FP32_HALVES
    if (type == AZQ_TYPE_F16) {
        return w_load_f16(p);
    }
    if (type == AZQ_TYPE_BF16) {
        return w_load_bf16(p);
    }
#endif
    (void)type;
    return w_load((const float *)(const void *)p);
}

/* The last n < 16 elements, zero-padded: they add nothing. */
FP32_INLINE wide load_x_tail(const float *x, int64_t n) {
    float pad[16] = {0};
    memcpy(pad, x, (size_t)n * sizeof *x);
    return w_load(pad);
}
FP32_INLINE wide load_w_tail(const int type, const uint8_t *p, int64_t n) {
    float pad[16] = {0};
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, p + 2 * i, sizeof half);
        if (type == AZQ_TYPE_F32) {
            memcpy(&pad[i], p + 4 * i, 4);
        } else {
            pad[i] = type == AZQ_TYPE_F16 ? azq_f16_to_f32(half) : azq_bf16_to_f32(half);
        }
    }
    return w_load(pad);
}

/* Adds elements begin .. end - 1 (whole sixteens, unless end is k) to R * C sums, `stride` apart per row. */
FP32_INLINE void tile(const int type, const float *x, int64_t ldx, const int R, const uint8_t *w, int64_t ldw,
                      const int C, int64_t begin, int64_t end, const int fetch, float *sums, int64_t stride) {
    const int bytes = element_bytes(type);
    wide sum[TILE_ROWS][4]; /* all loops over it are short enough to be unrolled: it lies in registers */
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            sum[r][c] = begin == 0 ? w_zero() : w_load(sums + r * stride + 16 * c);
        }
    }
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
        wide b[4];
        for (int c = 0; c < C; c++) {
            const uint8_t *p = w + c * ldw + i * bytes;
            b[c] = load_w(type, p);
            if (fetch && i % (64 / bytes) == 0) {
                /* Past the row's end: in the row that follows in its place. */
                __builtin_prefetch(p + AHEAD / C + (i * bytes + AHEAD / C < ldw ? 0 : (C - 1) * ldw));
            }
        }
        for (int r = 0; r < R; r++) {
            wide a = w_load(x + r * ldx + i);
            for (int c = 0; c < C; c++) {
                sum[r][c] = w_add_product(sum[r][c], a, b[c]);
            }
        }
    }
    if (i < end) {
        for (int c = 0; c < C; c++) {
            wide b = load_w_tail(type, w + c * ldw + i * bytes, end - i);
            for (int r = 0; r < R; r++) {
                sum[r][c] = w_add_product(sum[r][c], load_x_tail(x + r * ldx + i, end - i), b);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            w_store(sums + r * stride + 16 * c, sum[r][c]);
        }
    }
}

FP32_INLINE void tiles(const int type, const float *x, int64_t ldx, const int R, const uint8_t *w, int64_t ldw,
                       int64_t columns, int64_t begin, int64_t end, const int fetch, float *sums,
                       int64_t stride) {
    /* One row of x waits for memory, which likes one stream, or for the additions of a lane, which take turns. */
    const int C = R > 1 ? TILE_COLUMNS : fetch ? 1 : 4;
    int64_t j = 0;
    for (; j + C <= columns; j += C) {
        tile(type, x, ldx, R, w + j * ldw, ldw, C, begin, end, fetch, sums + 16 * j, stride);
    }
    for (; j < columns; j++) {
        tile(type, x, ldx, R, w + j * ldw, ldw, 1, begin, end, fetch, sums + 16 * j, stride);
    }
}

FP32_INLINE float fold(const float *lanes) {
    float a[8];
    for (int i = 0; i < 8; i++) {
        a[i] = lanes[i] + lanes[i + 8];
    }
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

FP32_INLINE void gemm_of(const int type, const float *x, int64_t ldx, int64_t rows, const void *w, int64_t ldw,
                         int64_t columns, int64_t k, int from_memory, float *c, int64_t ldc) {
    _Alignas(64) float sums[AZQ_FP32_ROWS * AZQ_FP32_COLUMNS * 16];
    const int64_t stride = AZQ_FP32_COLUMNS * 16;
    int64_t begin = 0;
    do {
        int64_t end = rows <= TILE_ROWS || k - begin < CHUNK ? k : begin + CHUNK;
        for (int64_t r = 0, n; r < rows; r += n) {
            int64_t count = (rows - r + TILE_ROWS - 1) / TILE_ROWS;
            n = (rows - r + count - 1) / count;
            float *to = sums + r * stride;
#define AZQ_ROWS(R)                                                                                                  \
    if (rows <= TILE_ROWS && from_memory) {                                                                          \
        tiles(type, x + r * ldx, ldx, R, w, ldw, columns, begin, end, 1, to, stride);                             \
    } else {                                                                                                         \
        tiles(type, x + r * ldx, ldx, R, w, ldw, columns, begin, end, 0, to, stride);                             \
    }                                                                                                                \
    break
            switch (n) {
#if TILE_ROWS >= 6
            case 6: AZQ_ROWS(6);
            case 5: AZQ_ROWS(5);
            case 4: AZQ_ROWS(4);
#endif
            case 3: AZQ_ROWS(3);
            case 2: AZQ_ROWS(2);
            default: AZQ_ROWS(1);
            }
#undef AZQ_ROWS
        }
        begin = end;
    } while (begin < k);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < columns; j++) {
            c[r * ldc + j] = fold(sums + r * stride + 16 * j);
        }
    }
}

/* ---- planes ---------------------------------------------------------------------------------------- */

FP32_INLINE void plane_tile(const float *x, const float *w, int64_t steps, int leaf, float *sums) {
    wide sum[PLANE_ROWS][PLANE_WIDES];
    for (int r = 0; r < PLANE_ROWS; r++) {
        for (int c = 0; c < PLANE_WIDES; c++) {
            sum[r][c] = w_zero();
        }
    }
    for (int64_t i = 0; i < steps; i++, x += AZQ_PLANE_ROWS, w += AZQ_PLANE_COLUMNS) {
        wide b[PLANE_WIDES];
        __builtin_prefetch((const char *)x + X_AHEAD);
        for (int c = 0; c < PLANE_WIDES; c++) {
            b[c] = w_load(w + 16 * c);
            __builtin_prefetch((const char *)(w + 16 * c) + W_AHEAD);
        }
        for (int r = 0; r < PLANE_ROWS; r++) {
            wide a = w_set(x[r]);
            for (int c = 0; c < PLANE_WIDES; c++) {
                sum[r][c] = w_add_product(sum[r][c], a, b[c]);
            }
        }
    }
    int level = 0;
    for (; leaf >> level & 1; level++) {
        for (int r = 0; r < PLANE_ROWS; r++) {
            for (int c = 0; c < PLANE_WIDES; c++) {
                sum[r][c] = w_add(w_load(sums + level * AZQ_PLANE_SUMS + r * AZQ_PLANE_COLUMNS + 16 * c), sum[r][c]);
            }
        }
    }
    for (int r = 0; r < PLANE_ROWS; r++) {
        for (int c = 0; c < PLANE_WIDES; c++) {
            w_store(sums + level * AZQ_PLANE_SUMS + r * AZQ_PLANE_COLUMNS + 16 * c, sum[r][c]);
        }
    }
}

void AZQ_NAME(gemm_plane)(const float *x, const float *w, int64_t steps, int leaf, float *sums) {
    for (int r = 0; r < AZQ_PLANE_ROWS; r += PLANE_ROWS) {
        for (int c = 0; c < AZQ_PLANE_COLUMNS; c += 16 * PLANE_WIDES) {
            plane_tile(x + r, w + c, steps, leaf, sums + r * AZQ_PLANE_COLUMNS + c);
        }
    }
}

/* ---- rows of W ------------------------------------------------------------------------------------- */

#define AZQ_GEMM_FP32(name, type)                                                                                 \
    void AZQ_NAME(name)(const float *x, int64_t ldx, int64_t rows, const void *w, int64_t ldw, int64_t columns,   \
                        int64_t k, int from_memory, float *c, int64_t ldc) {                                      \
        gemm_of(type, x, ldx, rows, w, ldw, columns, k, from_memory, c, ldc);                                     \
    }
AZQ_GEMM_FP32(gemm_fp32_f32, AZQ_TYPE_F32)
#ifdef AZQ_FP32_HALVES
AZQ_GEMM_FP32(gemm_fp32_f16, AZQ_TYPE_F16)
AZQ_GEMM_FP32(gemm_fp32_bf16, AZQ_TYPE_BF16)
#endif
