#ifndef AZQ_KERNELS_H
#define AZQ_KERNELS_H
#include <stdint.h>
#include "azq_blocks.h"
/* Kernel signatures, each written once, and the table that every ISA file fills. Kernels assert; they
 * know nothing of status codes, threads or dispatch. An empty slot falls to the next lower ISA. */

/* ---- packed weights ---------------------------------------------------------------------------
 * One layout for every kernel. 16 columns (rows of W) make a panel; a panel runs along K in groups
 * of four blocks (128 of K; the last group may have fewer):
 *
 *   Q4_0 group of b blocks: b heads of 16 fp16 scales, then b * 256 bytes of nibbles   (b = 4: 1152 bytes)
 *   Q8_0 group of b blocks: b heads of 16 fp16 scales, then b * 512 bytes              (b = 4: 2176 bytes)
 *   Q6_K group of b blocks: b heads of 16 fp16 super-scales, 16 int8 scales of the block's first 16 weights
 *                           and 16 of its last, then b * 384 bytes                     (b = 4: 1792 bytes)
 *
 * Nibbles of one block: four 64-byte lines i = 0..3, each 16 dwords, dword n = column n and k = 8i..8i+7:
 *
 *   byte of the dword      0         1         2         3
 *   low  nibble          k+0       k+4       k+1       k+5
 *   high nibble          k+2       k+6       k+3       k+7
 *
 * so `line & 0x0f` and `line >> 4 & 0x0f` are two operands of a four-byte dot product (VNNI, sdot), whose bytes
 * are (0,4,1,5) and (2,6,3,7); interleaved by dwords they are smmla's, two columns of eight k.
 * Q8_0 stores those two operands as two lines. Q6_K stores q + 32, low four bits as Q4_0 does; two more lines
 * hold the high bits: operand o (line o / 2, low nibbles first) in bits 2 * (o % 4) of line o / 4. Activations are laid down in the same order, so a dot
 * product never shuffles. Columns past n hold scale 0 and weight 0.
 *
 * The other types lie in the same groups (packed_types.h has the sizes). Their codes are cut into the low bits,
 * four a line as in Q4_0 or two (operand o in bits 2 * (o % 4) of line o / 4), and then, for codes of five or
 * three bits, one line of the bit that is left (bit o: operand o). Heads, 16 columns of each:
 *
 *   Q4_1, Q5_1      d, m fp16                  Q5_0, IQ4_NL    d fp16
 *   Q4_K, Q5_K      scale, minimum, a byte     IQ4_XS          scale, six bits in a byte
 *   Q2_K            scale and minimum in a byte, first half of the block; the second half's
 *   Q3_K            scale, six bits in a byte, first half; second half     MXFP4   e
 *
 * and where 256 weights share fp16 numbers (d; with minima d, dmin), those stand before all groups of the
 * panel, 16 columns of each per super-block, the whole padded to 64 bytes. */
enum { AZQ_PANEL = 16, AZQ_GROUP = 4, AZQ_LANE_ORDER = 8 };

/* Which k of a run of eight stands at byte i. */
static const uint8_t azq_lane_order[AZQ_LANE_ORDER] = {0, 4, 1, 5, 2, 6, 3, 7};

/* ---- quantized activations --------------------------------------------------------------------
 * Per block of 32: amax, d = amax / 127, q = RNE(x * (127 / amax)) clamped to +-127. All q = 0 when amax
 * is 0 or 127 / amax overflows. d is NaN when any x is NaN or infinite, which makes the row NaN. */
typedef struct {
    const int8_t *q;         /* (rows, k), runs of eight in azq_lane_order */
    const float *d;          /* (rows, k / 32) */
    const int32_t *sum8;     /* (rows, k / 32): -8 * sum of q */
    const int32_t *sum16;     /* (rows, k / 16): sum of q over each half of a block */
    const int32_t *sum8_pair; /* (rows, k / 32): two int16, -8 * sum over bytes 0,1 and over bytes 2,3 of each dword */
    const float *dsum;        /* (rows, k / 32): d * (float)(sum of q) */
    int64_t k;               /* elements per row of q */
} azq_act;

/* ---- bf16 ---------------------------------------------------------------------------------------
 * Tiles of bf16, 1 KB each, 64-byte aligned, the shape that AMX multiplies and AVX512-BF16 is fed with.
 * Activations: (row tiles of 16, k / 32 rounded up, 16 rows, 32 of k); weights: (panels, k / 32 rounded up,
 * 16 pairs of k, 16 columns, 2), so that dword n of line i holds k = 2i, 2i + 1 of column n; sums: fp32
 * (16 rows, 16 columns). What is past the last row, column or k is 0.
 * Rounding is to nearest even; numbers below fp32's normal range become 0 and NaN stays NaN, as the bf16
 * instructions have it. Tiles are the same on every ISA; sums are not: the definition adds one fused
 * product after the other in k order, AVX512-BF16 the second of each pair before the first, AMX the first
 * of all pairs of a tile beside the second of all. On each ISA a row's sums depend on nothing but the row. */
enum { AZQ_TILE_ROWS = 16, AZQ_TILE_K = 32, AZQ_TILE = AZQ_TILE_ROWS * AZQ_TILE_K };

/* ---- signatures ------------------------------------------------------------------------------- */

typedef void azq_quantize_row_fn(const float *x /* (k) */, void *blocks, int64_t k);
/* The same for tensors not looked at before: true when every x is finite and every fp16 scale, too. Where one is not,
 * and in case of doubt, it returns false and the blocks may be anything. */
typedef int azq_quantize_checked_row_fn(const float *x /* (k) */, void *blocks, int64_t k);
/* importance (k): how much each column's error counts; see azq_quantize. */
typedef void azq_quantize_weighted_row_fn(const float *x /* (k) */, const float *importance, void *blocks, int64_t k);
typedef void azq_dequantize_row_fn(const void *blocks, float *y /* (k) */, int64_t k);
/* Index of the first x that is not below limit in magnitude (NaN is not); -1 when all are. */
typedef int64_t azq_find_bad_fn(const float *x /* (n) */, int64_t n, float limit);
typedef void azq_quantize_act_fn(const float *x /* (k) */, int64_t k, int8_t *q, float *d, int32_t *sum8,
                                 int32_t *sum8_pair, int32_t *sum16);
/* c (rows, ldc) = activations row0 .. row0 + rows - 1 times n_panels panels, panel_bytes apart; writes
 * n_panels * AZQ_PANEL columns. Per element, over blocks in K order: c = fma((float)isum, d_w * d_a, c). The
 * isum of Q6_K is scale_0 * dot_0 + scale_1 * dot_1 over the block's halves, below 2^24 and so exact in fp32;
 * so are those of Q3_K (scales less 32) and Q2_K. d_w of Q4_K and Q5_K is d * scale, of IQ4_XS d * (scale - 32),
 * exact products; of MXFP4 2^(e - 128), its dots being over doubled numbers.
 * Types with minima add, after each block, c = fma(m_w, dsum, c): m_w is m of Q4_1 and Q5_1, -dmin * minimum of
 * Q4_K and Q5_K (exact). Q2_K adds c = fma((float)(min_0 * sum_0 + min_1 * sum_1), -dmin * d_a, c). */
typedef void azq_gemm_fn(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels, int64_t panel_bytes,
                         int64_t n_panels, float *c, int64_t ldc);

/* x (rows <= 16, ldx) -> tiles of one row tile over k. */
typedef void azq_round_bf16_fn(const float *x, int64_t ldx, int64_t rows, int64_t k, uint16_t *tiles);
/* n_blocks blocks of one packed panel, from the beginning of a group to the end of a group -> tiles. */
typedef void azq_dequantize_bf16_fn(const uint8_t *groups, int64_t n_blocks, uint16_t *tiles);
/* c = a * b, or c += a * b unless `first`, over n_tiles tiles of k, for `rows` rows (the tile's other rows of c
 * are unspecified) and 1 or 2 panels. Row tiles of a and c are a_stride and c_stride elements apart, panels of
 * b b_stride elements; panels of c stand side by side. */
typedef void azq_gemm_bf16_fn(const uint16_t *a, int64_t a_stride, int64_t rows, const uint16_t *b, int64_t b_stride,
                              int64_t n_panels, int64_t n_tiles, float *c, int64_t c_stride, int first);
/* Called on a thread before its first gemm_bf16 and after its last: AMX's tile registers cost every switch of
 * threads while they are in use. */
typedef void azq_bf16_region_fn(void);

/* fp32 vector work. But for attention, sums run in 16 lanes (element i in lane i % 16) and the lanes are folded
 * 16 -> 8 -> 4 -> 2 -> 1; so every ISA gives the same bits. Norms multiply, then add. The products of matmul fuse
 * both: lane = fma(x_i, w_i, lane) from 0, in order of i; k not divisible by 16 is filled up with zeros. */
/* c (rows, ldc) = x (rows, ldx) times `columns` rows of W, ldw bytes apart, whose k elements are fp32, fp16 or bf16;
 * from_memory: W is too large for a near cache. */
enum { AZQ_FP32_ROWS = 24, AZQ_FP32_COLUMNS = 32 }; /* at most, of one call */
typedef void azq_gemm_fp32_fn(const float *x, int64_t ldx, int64_t rows, const void *w, int64_t ldw, int64_t columns,
                              int64_t k, int from_memory, float *c, int64_t ldc);
/* The same sums for many rows, one lane of all at a time. A plane has what belongs to the lane: x (steps,
 * AZQ_PLANE_ROWS), w (steps, AZQ_PLANE_COLUMNS), step s being element 16 s + lane. Called with leaf 0 .. 15 for the
 * lanes in azq_fold_order, which makes a binary counter of the folding: sums (5, AZQ_PLANE_ROWS, AZQ_PLANE_COLUMNS)
 * takes lane + sums[0] + sums[1] + .. at the level of leaf's lowest 0 bit, and sums[4] is the product in the end. */
enum {
    AZQ_SUM_LANES = 16,
    AZQ_PLANE_ROWS = 12,
    AZQ_PLANE_COLUMNS = 32,
    AZQ_PLANE_SUMS = AZQ_PLANE_ROWS * AZQ_PLANE_COLUMNS,
    AZQ_PLANE_LEVELS = 5,
};
static const uint8_t azq_fold_order[AZQ_SUM_LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
typedef void azq_gemm_plane_fn(const float *x, const float *w, int64_t steps, int leaf, float *sums);
/* Held to by tests/c/check_vectors.c, in units of 2^-24 of the exact result: norms n / 16 + 8, exp 8, activations
 * 16 of max(|x|, 1); attention's bound stands there. */
typedef void azq_layer_norm_fn(const float *x, const float *w, const float *b, float eps, float *y, int64_t n);
typedef void azq_rms_norm_fn(const float *x, const float *w, float eps, float *y, int64_t n);
/* One query row: out (dim) = softmax(scale * query . keys) . values over positions first .. end - 1. */
typedef struct {
    const float *query; /* (dim) */
    float *out;         /* (dim) */
    int64_t first, end;
} azq_attend_row;
/* One head's cache: keys (tiles of 16 positions, dim, 16), values (positions, dim), fp32 or fp16. Of q8_0: values
 * are rows of blocks, the last padded; tiles of keys are (blocks of dim, 16 fp16 scales, 32 x 16 int8). Its numbers
 * are scale * int8, exact in fp32, and take part as those of an fp32 cache do: attend_q8_0 gives the bits of
 * attend_f32 over the dequantized cache. */
typedef struct {
    const void *keys, *values;
    int64_t dim;
    float scale, softcap; /* softcap > 0: scores become softcap * tanh(score / softcap) */
} azq_attend_head;
/* scores: scratch (4, ld), ld >= the largest end, rounded up to 16. The order of sums is that of attend.h. */
typedef void azq_attend_fn(const azq_attend_row *rows, int64_t n_rows, const azq_attend_head *head, float *scores,
                           int64_t ld);
/* x = exp(x - max(x)) in place; returns the sum. Up to n is read and written. */
typedef float azq_softmax_fn(float *x, int64_t n);
typedef void azq_map_fn(float *x, int64_t n);
/* y = a + b, or a * b, element by element; y may be a or b. */
typedef void azq_pairs_fn(const float *a, const float *b, float *y, int64_t n);
/* x = cap * tanh(x / cap) in place. */
typedef void azq_softcap_fn(float *x, int64_t n, float cap);

/* For measuring: reads n 64-byte lines; does rounds of multiply-adds as the int8 (bf16) matmul does them, out of
 * registers (AMX: with operands loaded from the first-level cache), and returns their number. */
typedef uint64_t azq_stream_fn(const void *lines, int64_t n);
typedef int64_t azq_peak_fn(int64_t rounds);

typedef struct {
    azq_quantize_row_fn *quantize_row[AZQ_TYPE_COUNT];
    azq_quantize_checked_row_fn *quantize_checked_row[AZQ_TYPE_COUNT]; /* NULL where nothing is gained */
    azq_quantize_weighted_row_fn *quantize_weighted_row[AZQ_TYPE_COUNT];
    azq_dequantize_row_fn *dequantize_row[AZQ_TYPE_COUNT];
    azq_find_bad_fn *find_bad;
    azq_quantize_act_fn *quantize_act;
    azq_gemm_fn *gemm[AZQ_TYPE_COUNT];
    azq_round_bf16_fn *round_bf16;
    azq_dequantize_bf16_fn *dequantize_bf16[AZQ_TYPE_COUNT];
    azq_gemm_bf16_fn *gemm_bf16;
    azq_bf16_region_fn *bf16_begin, *bf16_end; /* NULL where there is nothing to do */
    azq_gemm_fp32_fn *gemm_fp32[AZQ_TYPE_COUNT]; /* F32 always; where there is none, rows are dequantized first */
    azq_gemm_plane_fn *gemm_plane;
    azq_attend_fn *attend_f32, *attend_f16, *attend_q8_0;
    azq_layer_norm_fn *layer_norm;
    azq_rms_norm_fn *rms_norm;
    azq_softmax_fn *softmax;
    azq_map_fn *gelu_tanh, *gelu_erf, *silu, *relu;
    azq_softcap_fn *softcap;
    azq_pairs_fn *sum, *product;
    azq_stream_fn *stream_read;
    azq_peak_fn *peak_int8;
    azq_peak_fn *peak_bf16; /* NULL below AVX512-BF16 */
} azq_kernel_slots;

typedef struct {
    const char *isa;
    uint32_t needs; /* AZQ_CPU_* bits, see cpu.h */
    azq_kernel_slots slots;
    /* Fewest rows of activations from which compute "auto" means bf16, by type of weights; 0: never. */
    int16_t bf16_rows[AZQ_TYPE_COUNT];
    /* Types whose int8 kernel reads two panels side by side: for few rows, two that lie far apart. */
    uint8_t paired_panels[AZQ_TYPE_COUNT];
} azq_kernels;
#define AZQ_PAIRED_PANELS_512 .paired_panels = {[AZQ_TYPE_Q4_0] = 1, [AZQ_TYPE_Q8_0] = 1, [AZQ_TYPE_Q6_K] = 1}

/* The slots in use: those of the active ISA, holes filled from below. */
const azq_kernel_slots *azq_active(void);
/* The table of the active ISA itself. */
const azq_kernels *azq_active_isa(void);

/* Tables, plainest first; NULL-terminated. */
extern const azq_kernels azq_kernels_scalar;
extern const azq_kernels azq_kernels_avx2;
extern const azq_kernels azq_kernels_avxvnni;
extern const azq_kernels azq_kernels_avx512vnni;
extern const azq_kernels azq_kernels_avx512bf16;
extern const azq_kernels azq_kernels_amx;
extern const azq_kernels azq_kernels_neon;
extern const azq_kernels azq_kernels_dotprod;
extern const azq_kernels azq_kernels_i8mm;

/* Bytes of one block in a packed panel, its head and its lines; 0 when the type has no packed form. */
int64_t azq_head_bytes(int type);
int64_t azq_line_bytes(int type);
/* Bytes before the groups of a panel over k. */
int64_t azq_super_bytes(int type, int64_t k);
/* Bytes of a panel over k. */
int64_t azq_panel_bytes(int type, int64_t k);

#endif
