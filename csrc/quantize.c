/* Blocks: checks, then pieces of a tensor over the threads. */
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include "azq.h"
#include "azq_kernels.h"
#include "azq_target.h"
#include "threads.h"
#if AZQ_X86
#include <emmintrin.h>
#endif

/* Elements and bytes of a block, and where its fp16 scales lie (-1: there is none). */
typedef struct {
    int32_t elements, bytes;
    int16_t scale[2];
} geometry;

#define AZQ_BLOCK(n, type, first, second) {n, sizeof(type), {first, second}}
#define AZQ_AT(type, field) (int16_t) offsetof(type, field)
static const geometry geometries[AZQ_TYPE_COUNT] = {
    [AZQ_TYPE_F32] = {1, 4, {-1, -1}},
    [AZQ_TYPE_F16] = {1, 2, {-1, -1}},
    [AZQ_TYPE_BF16] = {1, 2, {-1, -1}},
    [AZQ_TYPE_Q4_0] = AZQ_BLOCK(AZQ_QK4_0, azq_block_q4_0, AZQ_AT(azq_block_q4_0, d), -1),
    [AZQ_TYPE_Q4_1] = AZQ_BLOCK(AZQ_QK4_1, azq_block_q4_1, AZQ_AT(azq_block_q4_1, d), AZQ_AT(azq_block_q4_1, m)),
    [AZQ_TYPE_Q5_0] = AZQ_BLOCK(AZQ_QK5_0, azq_block_q5_0, AZQ_AT(azq_block_q5_0, d), -1),
    [AZQ_TYPE_Q5_1] = AZQ_BLOCK(AZQ_QK5_1, azq_block_q5_1, AZQ_AT(azq_block_q5_1, d), AZQ_AT(azq_block_q5_1, m)),
    [AZQ_TYPE_Q8_0] = AZQ_BLOCK(AZQ_QK8_0, azq_block_q8_0, AZQ_AT(azq_block_q8_0, d), -1),
    [AZQ_TYPE_Q2_K] = AZQ_BLOCK(AZQ_QK_K, azq_block_q2_k, AZQ_AT(azq_block_q2_k, d), AZQ_AT(azq_block_q2_k, dmin)),
    [AZQ_TYPE_Q3_K] = AZQ_BLOCK(AZQ_QK_K, azq_block_q3_k, AZQ_AT(azq_block_q3_k, d), -1),
    [AZQ_TYPE_Q4_K] = AZQ_BLOCK(AZQ_QK_K, azq_block_q4_k, AZQ_AT(azq_block_q4_k, d), AZQ_AT(azq_block_q4_k, dmin)),
    [AZQ_TYPE_Q5_K] = AZQ_BLOCK(AZQ_QK_K, azq_block_q5_k, AZQ_AT(azq_block_q5_k, d), AZQ_AT(azq_block_q5_k, dmin)),
    [AZQ_TYPE_Q6_K] = AZQ_BLOCK(AZQ_QK_K, azq_block_q6_k, AZQ_AT(azq_block_q6_k, d), -1),
    [AZQ_TYPE_Q8_K] = AZQ_BLOCK(AZQ_QK_K, azq_block_q8_k, -1, -1),
    [AZQ_TYPE_IQ2_XXS] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq2_xxs, AZQ_AT(azq_block_iq2_xxs, d), -1),
    [AZQ_TYPE_IQ2_XS] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq2_xs, AZQ_AT(azq_block_iq2_xs, d), -1),
    [AZQ_TYPE_IQ2_S] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq2_s, AZQ_AT(azq_block_iq2_s, d), -1),
    [AZQ_TYPE_IQ3_XXS] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq3_xxs, AZQ_AT(azq_block_iq3_xxs, d), -1),
    [AZQ_TYPE_IQ3_S] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq3_s, AZQ_AT(azq_block_iq3_s, d), -1),
    [AZQ_TYPE_IQ1_S] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq1_s, AZQ_AT(azq_block_iq1_s, d), -1),
    [AZQ_TYPE_IQ1_M] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq1_m, -1, -1),
    [AZQ_TYPE_IQ4_NL] = AZQ_BLOCK(AZQ_QK4_NL, azq_block_iq4_nl, AZQ_AT(azq_block_iq4_nl, d), -1),
    [AZQ_TYPE_IQ4_XS] = AZQ_BLOCK(AZQ_QK_K, azq_block_iq4_xs, AZQ_AT(azq_block_iq4_xs, d), -1),
    [AZQ_TYPE_TQ1_0] = AZQ_BLOCK(AZQ_QK_K, azq_block_tq1_0, AZQ_AT(azq_block_tq1_0, d), -1),
    [AZQ_TYPE_TQ2_0] = AZQ_BLOCK(AZQ_QK_K, azq_block_tq2_0, AZQ_AT(azq_block_tq2_0, d), -1),
    [AZQ_TYPE_MXFP4] = AZQ_BLOCK(AZQ_QK_MXFP4, azq_block_mxfp4, -1, -1),
    [AZQ_TYPE_NVFP4] = AZQ_BLOCK(AZQ_QK_NVFP4, azq_block_nvfp4, -1, -1),
    [AZQ_TYPE_Q1_0] = AZQ_BLOCK(AZQ_QK1_0, azq_block_q1_0, AZQ_AT(azq_block_q1_0, d), -1),
    [AZQ_TYPE_Q2_0] = AZQ_BLOCK(AZQ_QK2_0, azq_block_q2_0, AZQ_AT(azq_block_q2_0, d), -1),
};

static const geometry *geometry_of(int type) {
    return type >= 0 && type < AZQ_TYPE_COUNT && geometries[type].elements ? &geometries[type] : NULL;
}

int64_t azq_row_bytes(int type, int64_t k) {
    const geometry *block = geometry_of(type);
    if (!block || k < 0 || k % block->elements || k / block->elements > INT64_MAX / block->bytes) {
        return -1;
    }
    return k / block->elements * block->bytes;
}

/* No block with an fp16 scale holds a number of this size (Q6_K's most is 65504 * 127 * 32), and below it no
 * search overflows in fp32, where it would find nonsense without an infinite scale to show for it. */
#define AZQ_TOO_LARGE 1e9f

/* Below this every block's scales are far from fp16's largest number, 65504: none exceeds twice the largest magnitude
 * in the block. Almost all weights are, and need no look at their scales, which costs a fifth of the speed. */
#define AZQ_ORDINARY 8192.0f

/* Whether an fp16 number is infinite or NaN. */
static int infinite(const uint8_t *p) {
    uint16_t scale;
    memcpy(&scale, p, sizeof scale);
    return (scale & 0x7c00) == 0x7c00;
}

/* The element of largest magnitude in the first block of a row that has an infinite or NaN scale; -1: none
 * has. (A plain fp16 or bf16 number that overflows is infinite on its own, as IEEE conversion has it.) */
static int64_t find_overflow(const geometry *block, const uint8_t *blocks, const float *x, int64_t k) {
    int64_t n_blocks = k / block->elements;
    for (int64_t b = 0; b < n_blocks; b++, blocks += block->bytes, x += block->elements) {
        if (infinite(blocks + block->scale[0]) || (block->scale[1] >= 0 && infinite(blocks + block->scale[1]))) {
            int64_t worst = 0;
            for (int64_t j = 1; j < block->elements; j++) {
                worst = fabsf(x[j]) > fabsf(x[worst]) ? j : worst;
            }
            return b * block->elements + worst;
        }
    }
    return -1;
}

enum {
    ELEMENTS_PER_TASK = 65536, /* so that a task outweighs handing it out */
    ELEMENTS_PER_HUGE_PAGE = (2 << 20) / sizeof(float), /* where two threads meet, one waits */
    PIECE = 1024,              /* elements quantized at once, whole blocks of every type; they stay in the first cache */
    STREAMED_BYTES = 16 << 20, /* results this large leave no room in a cache for themselves: they are made */
    HELD_BYTES = 16384,        /* in so much of it and stored past it, which saves reading what is overwritten */
};

static void copy_past_cache(uint8_t *to, const uint8_t *from, size_t bytes) {
#if AZQ_X86
    for (; bytes > 0 && (uintptr_t)to % 16; bytes--) {
        *to++ = *from++;
    }
    for (; bytes >= 16; bytes -= 16, to += 16, from += 16) {
        _mm_stream_si128((__m128i *)(void *)to, _mm_loadu_si128((const __m128i *)(const void *)from));
    }
#endif
    memcpy(to, from, bytes);
}

typedef struct {
    int64_t elements, per_task;
    int64_t piece; /* done at once: a row where its importance counts, else PIECE */
    int streamed;
    const float *x;
    uint8_t *blocks;
    const geometry *block;
    const float *importance;
    azq_quantize_row_fn *row;
    azq_quantize_checked_row_fn *checked_row;   /* NULL with importance, or where there is none */
    azq_quantize_weighted_row_fn *weighted_row; /* NULL without importance, or where it changes nothing */
    azq_find_bad_fn *find_bad;
    _Atomic int64_t bad; /* smallest offending index so far */
} quantize_job;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Quantizes n elements; the index of the first that the type cannot hold, or -1. */
static int64_t quantize_piece(const quantize_job *job, const float *x, uint8_t *blocks, int64_t n) {
    if (job->checked_row && job->checked_row(x, blocks, n)) {
        return -1;
    }
    int scaled = job->block->scale[0] >= 0;
    int64_t bad = job->find_bad(x, n, scaled ? AZQ_ORDINARY : INFINITY);
    int large = scaled && bad >= 0;
    if (large) {
        bad = job->find_bad(x, n, AZQ_TOO_LARGE);
    }
    if (bad >= 0) {
        return bad;
    }
    if (job->weighted_row) {
        job->weighted_row(x, job->importance, blocks, n);
    } else {
        job->row(x, blocks, n);
    }
    return large ? find_overflow(job->block, blocks, x, n) : -1;
}

static void quantize_task(void *context, int64_t task, int worker) {
    (void)worker;
    quantize_job *job = context;
    int64_t at = task * job->per_task, end = smaller(at + job->per_task, job->elements);
    uint8_t *to = job->blocks + at / job->block->elements * job->block->bytes;
    uint8_t held[HELD_BYTES];
    int64_t n_held = 0;
    for (int64_t n; at < end; at += n) {
        n = smaller(job->piece, end - at);
        int64_t bytes = n / job->block->elements * job->block->bytes;
        if (n_held + bytes > HELD_BYTES && job->streamed) {
            copy_past_cache(to, held, (size_t)n_held);
            to += n_held;
            n_held = 0;
        }
        int64_t bad = quantize_piece(job, job->x + at, (job->streamed ? held : to) + n_held, n);
        if (bad >= 0) {
            int64_t index = at + bad;
            int64_t seen = atomic_load(&job->bad);
            while (index < seen && !atomic_compare_exchange_weak(&job->bad, &seen, index)) {
            }
            break;
        }
        n_held += bytes;
    }
    if (job->streamed) {
        copy_past_cache(to, held, (size_t)n_held);
    }
#if AZQ_X86
    _mm_sfence(); /* before another thread hears that the task is done */
#endif
}

azq_status azq_quantize(int type, const float *x, int64_t rows, int64_t k, void *dst, int64_t *bad_index) {
    return azq_quantize_weighted(type, x, rows, k, NULL, dst, bad_index);
}

azq_status azq_quantize_weighted(int type, const float *x, int64_t rows, int64_t k, const float *importance,
                                 void *dst, int64_t *bad_index) {
    const geometry *block = geometry_of(type);
    const azq_kernel_slots *kernels = azq_active();
    if (!block || !kernels->quantize_row[type]) {
        return AZQ_E_TYPE;
    }
    if (rows < 0 || azq_row_bytes(type, k) < 0 || (k > 0 && rows > INT64_MAX / 4 / k)) {
        return AZQ_E_SHAPE;
    }
    if (rows == 0 || k == 0) {
        return AZQ_OK;
    }
    if (!x || !dst || !bad_index) {
        return AZQ_E_NULL;
    }
    azq_quantize_weighted_row_fn *weighted_row = importance ? kernels->quantize_weighted_row[type] : NULL;
    int64_t piece = weighted_row ? k : PIECE, piece_bytes = azq_row_bytes(type, piece);
    quantize_job job = {
        .elements = rows * k,
        .piece = piece,
        .per_task = piece < ELEMENTS_PER_TASK ? ELEMENTS_PER_TASK / piece * piece : piece,
        .streamed = piece_bytes <= HELD_BYTES && rows * azq_row_bytes(type, k) >= STREAMED_BYTES,
        .x = x,
        .blocks = dst,
        .block = block,
        .importance = importance,
        .row = kernels->quantize_row[type],
        .checked_row = weighted_row ? NULL : kernels->quantize_checked_row[type],
        .weighted_row = weighted_row,
        .find_bad = kernels->find_bad,
        .bad = INT64_MAX,
    };
    azq_parallel((job.elements + job.per_task - 1) / job.per_task, AZQ_MAX_THREADS, quantize_task, &job);
    int64_t bad = atomic_load(&job.bad);
    if (bad == INT64_MAX) {
        return AZQ_OK;
    }
    *bad_index = bad;
    return isfinite(x[bad]) ? AZQ_E_RANGE : AZQ_E_NONFINITE;
}

typedef struct {
    int64_t elements, per_task;
    const uint8_t *blocks;
    float *y;
    const geometry *block;
    azq_dequantize_row_fn *row;
} dequantize_job;

static void dequantize_task(void *context, int64_t task, int worker) {
    (void)worker;
    const dequantize_job *job = context;
    int64_t first = task * job->per_task;
    job->row(job->blocks + first / job->block->elements * job->block->bytes, job->y + first,
             smaller(job->per_task, job->elements - first));
}

azq_status azq_dequantize(int type, const void *src, int64_t rows, int64_t k, float *y) {
    const geometry *block = geometry_of(type);
    if (!block) {
        return AZQ_E_TYPE;
    }
    if (rows < 0 || azq_row_bytes(type, k) < 0 || (k > 0 && rows > INT64_MAX / 4 / k)) {
        return AZQ_E_SHAPE;
    }
    if (rows == 0 || k == 0) {
        return AZQ_OK;
    }
    if (!src || !y) {
        return AZQ_E_NULL;
    }
    int enough_pages = rows * k / ELEMENTS_PER_HUGE_PAGE >= 4 * azq_threads(); /* to share them out evenly */
    dequantize_job job = {
        .elements = rows * k,
        .per_task = enough_pages ? ELEMENTS_PER_HUGE_PAGE : ELEMENTS_PER_TASK,
        .blocks = src,
        .y = y,
        .block = block,
        .row = azq_active()->dequantize_row[type],
    };
    azq_parallel((job.elements + job.per_task - 1) / job.per_task, AZQ_MAX_THREADS, dequantize_task, &job);
    return AZQ_OK;
}
