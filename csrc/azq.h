#ifndef AZQ_H
#define AZQ_H
#include <stddef.h>
#include <stdint.h>
#include "azq_blocks.h"
/* azquant's C interface. This header is its manual; the build script hands it to cffi after dropping
 * the include and guard lines. Matrices are row-major; shapes stand in comments, outermost first.
 * No function prints or aborts. Every azq_status that is not AZQ_OK leaves outputs unspecified but
 * writes nothing outside them. */

/* ---- status ---------------------------------------------------------------------------------- */

typedef enum {
    AZQ_OK = 0,
    /* 10-19: arguments */
    AZQ_E_NULL = 10,    /* a pointer that is needed is NULL */
    AZQ_E_SHAPE = 11,   /* a size is negative, too large, or no whole number of blocks */
    AZQ_E_TYPE = 12,    /* a type that cannot do what was asked */
    AZQ_E_ISA = 13,     /* an instruction set that is unknown, or that this machine lacks */
    AZQ_E_INDEX = 14,   /* a token, position, sequence or row index out of range */
    AZQ_E_PROGRAM = 15, /* an op that contradicts its buffers or weights */
    /* 20-29: data */
    AZQ_E_NONFINITE = 20, /* NaN or infinity in weights to be quantized */
    AZQ_E_RANGE = 21,     /* a finite weight too large for its block's fp16 scale */
    /* 30-39: resources */
    AZQ_E_NOMEM = 30
} azq_status;

/* Name of a status, "AZQ_E_SHAPE"; never NULL. */
const char *azq_status_name(int status);

/* ---- processor ------------------------------------------------------------------------------- */

/* The instruction sets azquant has kernels for, from the plainest (0, "scalar") to the best.
 * azq_isa_usable: compiled in, offered by the processor and enabled by the operating system. */
int azq_isa_count(void);
const char *azq_isa_name(int index); /* NULL when out of range */
int azq_isa_usable(int index);
/* Why it cannot be used, in words; NULL when it can. */
const char *azq_isa_refusal(int index);

/* The set in use. At start the best usable one. Not to be changed while other calls run. */
const char *azq_isa_active(void);
azq_status azq_isa_use(const char *name);

/* Threads used by each call, the caller included; 1 at start. Clamped to [1, azq_threads_max()]. */
int azq_threads_max(void);
int azq_threads(void);
void azq_threads_set(int n);

/* Calls of this thread use n threads instead, until n = 0. */
void azq_threads_here(int n);

/* ---- rows of blocks -------------------------------------------------------------------------- */

/* Bytes of one row of k elements; -1 when the type is unknown or k is no whole number of blocks. */
int64_t azq_row_bytes(int type, int64_t k);

/* x (rows, k) fp32 -> dst (rows, azq_row_bytes(type, k)), the bytes ggml's reference quantizer makes.
 * importance (k): how much an error in each column counts, or NULL for azq_quantize's bytes; finite, not negative; f32, f16, bf16, q8_0,
 * mxfp4, tq1_0 and tq2_0 take no notice of it, as in ggml. AZQ_E_TYPE: a type that cannot be quantized to.
 * AZQ_E_NONFINITE and AZQ_E_RANGE set *bad_index to the flat index of the first NaN or infinity, or of the
 * largest element of the first block whose scale overflows. */
azq_status azq_quantize(int type, const float *x, int64_t rows, int64_t k, void *dst, int64_t *bad_index);
azq_status azq_quantize_weighted(int type, const float *x, int64_t rows, int64_t k, const float *importance,
                                 void *dst, int64_t *bad_index);

/* x (k, n) fp32 -> the blocks of its transpose: each of dst's n rows, dst_row_bytes apart, gets azq_row_bytes(type, k)
 * bytes. Bytes and errors are azq_quantize's, without an index. */
azq_status azq_quantize_turned(int type, const float *x, int64_t k, int64_t n, void *dst, int64_t dst_row_bytes);

/* src (rows, azq_row_bytes(type, k)) -> y (rows, k) fp32. */
azq_status azq_dequantize(int type, const void *src, int64_t rows, int64_t k, float *y);

/* ---- GGUF metadata --------------------------------------------------------------------------- */

/* Walks over count strings (uint64 length, then as many bytes) in data (end), from byte offset on.
 * starts (count + 1), where not NULL, gets each one's first byte and, last, the byte after all of them.
 * Returns that byte, or ~at when the string at byte `at` does not end within data. */
int64_t azq_gguf_strings(const void *data, int64_t end, int64_t offset, int64_t count, int big_endian,
                         int64_t *starts);

/* Copies such strings into out, a zero byte after each; with `halves` also in place of each one's first space, its
 * first byte aside. out has a byte for every one of theirs, lengths included. Returns the bytes written, or -1 when a
 * string has a zero byte, or no such space, or does not end within data. */
int64_t azq_gguf_join(const void *data, int64_t end, int64_t offset, int64_t count, int big_endian, int halves,
                      uint8_t *out);

/* Every way to cut one of count different tokens into two others of them. text holds the tokens one after the
 * other, token i up to byte ends[i]; cuts gets (token, left, right) for the first `capacity` ways, by token and
 * place of the cut; *found is how many there are. seed: any number that whoever chose the tokens cannot know. */
azq_status azq_vocabulary_cuts(const uint8_t *text, const int64_t *ends, int64_t count, uint64_t seed,
                               int32_t *cuts, int64_t capacity, int64_t *found);

/* Sorts ways to cut tokens (token, left, right): first those of the token with the highest score, of equals those with
 * the lowest left token, then the lowest right one. A score that is no number comes last. */
azq_status azq_vocabulary_sort(int32_t *cuts, int64_t count, const double *scores);

/* ---- matrices -------------------------------------------------------------------------------- */

/* A weight matrix (n, k) over GGUF bytes, which the caller keeps alive. Read-only after creation;
 * any number of calls may use it at once. */
typedef struct azq_matrix azq_matrix;

azq_status azq_matrix_create(int type, const void *data, int64_t n, int64_t k, azq_matrix **out);
void azq_matrix_free(azq_matrix *w);

/* Whether a type has a packed form and int8 kernels: q4_0, q4_1, q5_0, q5_1, q8_0, q2_k to q6_k, iq4_nl, iq4_xs
 * and mxfp4. */
int azq_has_int8(int type);

/* Makes the packed copy that the int8 and bf16 kernels read (a no-op when made already). */
azq_status azq_matrix_pack(azq_matrix *w);
/* The same for each of several, up to the first that cannot be packed. */
azq_status azq_matrices_pack(azq_matrix *const *w, int64_t count);
/* Bytes of the packed copy; 0 when there is none. */
int64_t azq_matrix_packed_bytes(const azq_matrix *w);
/* The GGUF bytes back from the packed copy, dst (n, azq_row_bytes(type, k)). AZQ_E_TYPE when not packed. */
azq_status azq_matrix_unpack(const azq_matrix *w, void *dst);

typedef enum {
    AZQ_COMPUTE_AUTO = 0, /* the fastest that the type and the machine allow */
    AZQ_COMPUTE_INT8 = 1, /* activations to 8 bits per 32; exact integer dots; see DESIGN numerics */
    AZQ_COMPUTE_FP32 = 2, /* weights dequantized to fp32 */
    AZQ_COMPUTE_BF16 = 3  /* weights and activations rounded to bf16, sums in fp32 */
} azq_compute;

/* What AZQ_COMPUTE_AUTO becomes for x of m rows and weights (n, k) of a type, on the active ISA. */
int azq_choice(int type, int64_t m, int64_t n, int64_t k);
/* The ISA whose kernel then does the multiplying; NULL for a type or mode without one. */
const char *azq_choice_isa(int type, int compute);

/* y (m, n) = x (m, k) * W^T. ldx, ldy: elements between rows. AZQ_E_TYPE for int8 asked of a type without it. */
azq_status azq_matmul(azq_matrix *w, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy, int compute);

/* ---- packed weights, without a handle ------------------------------------------------------------ */

/* For callers that keep one copy of the weights, in memory of their own: the packed form alone. A type that
 * has none of its own (see azq_matrix_pack) is "packed" as its GGUF bytes. The layout is the same on every ISA
 * of a machine, but not a file format: store what azq_unpack gives. packed must be 64-byte aligned.
 * threads: how many this call uses, instead of azq_threads(); 0 for azq_threads(). */

/* Whose threads these calls use where `threads` is not 0: a function with the contract of GNU OpenMP's
 * GOMP_parallel, which calls body(context) on `threads` threads, its caller's among them, and returns after the
 * last; NULL for azquant's own. For a program whose other library keeps such threads busy or awake: two pools
 * would take the processors from each other. A forked child is back to azquant's own. */
typedef void azq_team_fn(void (*body)(void *), void *context, unsigned threads, unsigned flags);
void azq_team_set(azq_team_fn *team);

/* Bytes of the packed form; -1 where azq_row_bytes is. */
int64_t azq_packed_bytes(int type, int64_t n, int64_t k);
/* data (n, azq_row_bytes(type, k)) -> packed (azq_packed_bytes), and back. */
azq_status azq_pack(int type, const void *data, int64_t n, int64_t k, void *packed, int threads);
azq_status azq_unpack(int type, const void *packed, int64_t n, int64_t k, void *data, int threads);
/* y (m, n) = x (m, k) * W^T + bias (n, or NULL). compute as in azq_matmul. */
azq_status azq_matmul_packed(int type, const void *packed, int64_t n, int64_t k, const float *bias, const float *x,
                             int64_t m, float *y, int compute, int threads);
/* y (count, k) = the rows asked for, dequantized. AZQ_E_INDEX when one is out of range. */
azq_status azq_packed_rows(int type, const void *packed, int64_t n, int64_t k, const int64_t *rows, int64_t count,
                           float *y, int threads);

/* ---- key/value cache ------------------------------------------------------------------------- */

typedef struct azq_kv azq_kv;

/* Room for n_seq sequences of n_ctx positions. type: AZQ_TYPE_F32, AZQ_TYPE_F16 or AZQ_TYPE_Q8_0. */
azq_status azq_kv_create(int64_t n_layer, int64_t n_seq, int64_t n_ctx, int64_t n_head_kv, int64_t head_dim, int type,
                         azq_kv **out);
void azq_kv_free(azq_kv *kv);
int64_t azq_kv_bytes(const azq_kv *kv);
/* Copies the first n positions of sequence from into sequence to. */
azq_status azq_kv_copy(azq_kv *kv, int64_t from, int64_t to, int64_t n);

/* ---- programs -------------------------------------------------------------------------------- */

/* A program is a flat list of ops over named buffers. A buffer holds `width` floats for every token of
 * the step, or, when `outputs` is set, for every row whose logits are asked for. */
typedef enum {
    AZQ_OP_EMBED = 1,      /* out = w[token] * scale (+ w2[position]) */
    AZQ_OP_LAYER_NORM = 2, /* out = (a - mean) / sqrt(var + eps) * vec0 + vec1; n_head > 0: each head by itself */
    AZQ_OP_RMS_NORM = 3,   /* out = a / sqrt(mean(a^2) + eps) * vec0; likewise */
    AZQ_OP_LINEAR = 4,     /* out = activation(a * w^T + vec0) + b */
    AZQ_OP_ROPE = 5,       /* rotates n_head heads of out in place; vec0: n_rot / 2 frequencies */
    AZQ_OP_ATTENTION = 6,  /* a: queries, keys, values side by side; writes the cache, then out */
    AZQ_OP_GLU = 7,        /* out = activation(a) * b */
    AZQ_OP_SELECT = 8,     /* out (outputs buffer) = the rows of a that are asked for */
    AZQ_OP_ADD = 9,        /* out = a * scale + b */
    AZQ_OP_SOFTCAP = 10,   /* out = softcap * tanh(a / softcap) */
    AZQ_OP_EXPERTS = 11    /* out = sum of share * down(activation(a * gate^T) * (a * up^T)) over experts, + b: the
                            * n_used that a * w^T (in fp32) rates highest; shares are the softmax of their ratings */
} azq_op_kind;

enum { AZQ_MAX_EXPERTS = 1024 };

typedef enum {
    AZQ_ACT_NONE = 0,
    AZQ_ACT_GELU_TANH = 1,
    AZQ_ACT_GELU_ERF = 2,
    AZQ_ACT_SILU = 3,
    AZQ_ACT_RELU = 4
} azq_activation;

typedef enum {
    AZQ_ROPE_NORM = 0, /* pairs (0, 1), (2, 3), ... */
    AZQ_ROPE_NEOX = 1  /* pairs (0, n_rot / 2), (1, n_rot / 2 + 1), ... */
} azq_rope_mode;

typedef struct {
    int32_t kind;
    int32_t out, a, b;               /* buffers; -1 where the op has none */
    int64_t out_col, a_col, b_col;   /* first column used of each */
    int64_t width;                   /* columns written */
    int32_t layer;                   /* ATTENTION */
    int32_t n_head, n_head_kv, head_dim; /* ROPE (n_head, head_dim), ATTENTION; norms (n_head, 0 for none) */
    int32_t n_rot, rope_mode;        /* ROPE */
    int32_t activation;              /* LINEAR, GLU, EXPERTS */
    int32_t window;                  /* ATTENTION: positions seen, the token's own included; 0 for all */
    float eps, scale;
    float softcap;                   /* ATTENTION (before the softmax; 0 for none), SOFTCAP */
    azq_matrix *w, *w2;
    const float *vec0, *vec1;
    int32_t n_expert, n_used;        /* EXPERTS */
    /* EXPERTS: a buffer for what is made on the way, of n_expert + n_used * (2 * rows of a gate + the larger of width
     * and columns of w) columns or more; nothing in it outlasts the op. */
    int32_t work;
    azq_matrix *const *experts;      /* EXPERTS: (n_expert, 3), gate, up and down of each; stays the caller's */
} azq_op;

typedef struct {
    int64_t width;
    int32_t outputs;
} azq_buffer;

typedef struct azq_program azq_program;

/* Checks the ops against the buffers and weights; copies the list. Matrices and vectors stay the caller's. */
azq_status azq_program_create(const azq_op *ops, int64_t n_ops, const azq_buffer *buffers, int64_t n_buffers,
                              azq_program **out);
void azq_program_free(azq_program *p);

/* One step over a ragged batch: tokens, sequence, position (n_tokens), no (sequence, position) twice. Keys and values of all tokens are
 * in the cache before any attends; token t sees positions 0 .. position[t] of its own sequence.
 * The last op writes logits (n_out, its width) for the tokens out_rows (n_out). compute as in azq_matmul,
 * but weights without int8 kernels are computed in fp32. A program runs one step at a time. */
azq_status azq_program_step(azq_program *p, azq_kv *kv, int compute, int64_t n_tokens, const int32_t *tokens,
                            const int32_t *sequence, const int32_t *position, int64_t n_out,
                            const int32_t *out_rows, float *logits);

/* logits (rows, n) -> ids (rows): the first of the largest of each row; where there is a NaN, the first NaN. */
azq_status azq_likeliest(const float *logits, int64_t rows, int64_t n, int32_t *ids);

/* From now on every step adds to seconds (n_ops), the caller's, what each op took. NULL ends it. */
azq_status azq_program_measure(azq_program *p, double *seconds);

/* ---- the machine's limits --------------------------------------------------------------------- */

/* Reads bytes (a multiple of 64 is read) once, over the threads; returns a value that depends on all of them. */
uint64_t azq_stream_read(const void *data, int64_t bytes);

/* Runs int8 multiply-adds out of registers on every thread; returns how many were done, all threads together. */
int64_t azq_peak_int8(int64_t rounds);
/* The same for bf16; 0 where the active ISA has no bf16 instructions. */
int64_t azq_peak_bf16(int64_t rounds);

#endif
