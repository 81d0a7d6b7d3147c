/* The definition: plain C, one element at a time. Every other ISA is judged by these functions. */
#include "../azq_kernels.h"
#include <assert.h>
#include "../azq_half.h"
#include "bf16.h"
#include "families.h"
#include "gemm_types.h"
#include "rounding.h"

#include "vec_types.h"

typedef float vf;
#define LANES 1
#define V_ZERO 0.0f
#define v_set(x) (x)
#define v_load(p) (*(p))
#define v_store(p, v) ((void)(*(p) = (v)))
#define v_fma(a, b, c) fmaf(a, b, c)
#define v_mul(a, b) ((a) * (b))
#define v_add(a, b) ((a) + (b))
#define v_div(a, b) ((a) / (b))
#define v_sub(a, b) ((a) - (b))
static inline float v_max(float a, float b) { return a > b ? a : b; }
static inline float v_min(float a, float b) { return a < b ? a : b; }
static inline float v_scale(float p, float n) {
    return n == n ? azq_from_bits(azq_bits(p) + ((uint32_t)(int32_t)n << 23)) : p;
}
#define v_below(x, limit, yes, no) ((x) < (limit) ? (yes) : (no))
#define v_load_f16(p) azq_f16_to_f32(*(p))
#define v_set_f16(h) azq_f16_to_f32(h)
#define v_load_i8(p) ((float)*(const int8_t *)(p))
#define AZQ_TILES_1 1
#define AZQ_TILES_4 1
#define AZQ_CHAINS 2
#include "exp.h"
#include "vec.h"
#include "attend_types.h"

/* ---- quantize: the ggml reference, bit by bit --------------------------------------------------- */

static void quantize_q4_0(const float *x, void *blocks, int64_t k) {
    azq_block_q4_0 *y = blocks;
    assert(k % AZQ_QK4_0 == 0);
    for (int64_t b = 0; b < k / AZQ_QK4_0; b++, x += AZQ_QK4_0) {
        float amax = 0.0f, max = 0.0f; /* max: the first element whose magnitude is amax, with its sign */
        for (int j = 0; j < AZQ_QK4_0; j++) {
            if (amax < fabsf(x[j])) {
                amax = fabsf(x[j]);
                max = x[j];
            }
        }
        float d = max / -8.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        y[b].d = azq_f32_to_f16(d);
        for (int j = 0; j < AZQ_QK4_0 / 2; j++) {
            int8_t low = azq_truncate_i8(x[j] * id + 8.5f);
            int8_t high = azq_truncate_i8(x[j + 16] * id + 8.5f);
            low = low < 15 ? low : 15;
            high = high < 15 ? high : 15;
            y[b].qs[j] = (uint8_t)((uint8_t)low | (uint8_t)high << 4);
        }
    }
}

static void quantize_q8_0(const float *x, void *blocks, int64_t k) {
    azq_block_q8_0 *y = blocks;
    assert(k % AZQ_QK8_0 == 0);
    for (int64_t b = 0; b < k / AZQ_QK8_0; b++, x += AZQ_QK8_0) {
        float amax = 0.0f;
        for (int j = 0; j < AZQ_QK8_0; j++) {
            amax = amax < fabsf(x[j]) ? fabsf(x[j]) : amax;
        }
        float d = amax / 127.0f;
        float id = d != 0.0f ? 1.0f / d : 0.0f;
        y[b].d = azq_f32_to_f16(d);
        for (int j = 0; j < AZQ_QK8_0; j++) {
            y[b].qs[j] = azq_truncate_i8(roundf(x[j] * id)); /* half away from zero */
        }
    }
}

static void quantize_f32(const float *x, void *blocks, int64_t k) { memcpy(blocks, x, (size_t)k * sizeof *x); }

static void quantize_f16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    for (int64_t i = 0; i < k; i++) {
        y[i] = azq_f32_to_f16(x[i]);
    }
}

static void quantize_bf16(const float *x, void *blocks, int64_t k) {
    uint16_t *y = blocks;
    for (int64_t i = 0; i < k; i++) {
        y[i] = azq_f32_to_bf16(x[i]);
    }
}

static int64_t find_bad(const float *x, int64_t n, float limit) {
    for (int64_t i = 0; i < n; i++) {
        if (!(fabsf(x[i]) < limit)) {
            return i;
        }
    }
    return -1;
}

/* ---- dequantize --------------------------------------------------------------------------------- */

static void dequantize_q4_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q4_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK4_0; b++, y += AZQ_QK4_0) {
        float d = azq_f16_to_f32(x[b].d);
        for (int j = 0; j < AZQ_QK4_0 / 2; j++) {
            y[j] = (float)((x[b].qs[j] & 15) - 8) * d;
            y[j + 16] = (float)((x[b].qs[j] >> 4) - 8) * d;
        }
    }
}

static void dequantize_q8_0(const void *blocks, float *y, int64_t k) {
    const azq_block_q8_0 *x = blocks;
    for (int64_t b = 0; b < k / AZQ_QK8_0; b++, y += AZQ_QK8_0) {
        float d = azq_f16_to_f32(x[b].d);
        for (int j = 0; j < AZQ_QK8_0; j++) {
            y[j] = (float)x[b].qs[j] * d;
        }
    }
}

static void dequantize_f32(const void *blocks, float *y, int64_t k) { memcpy(y, blocks, (size_t)k * sizeof *y); }

static void dequantize_f16(const void *blocks, float *y, int64_t k) {
    const uint16_t *x = blocks;
    for (int64_t i = 0; i < k; i++) {
        y[i] = azq_f16_to_f32(x[i]);
    }
}

static void dequantize_bf16(const void *blocks, float *y, int64_t k) {
    const uint16_t *x = blocks;
    for (int64_t i = 0; i < k; i++) {
        y[i] = azq_bf16_to_f32(x[i]);
    }
}

/* ---- int8 matmul -------------------------------------------------------------------------------- */

static void quantize_act(const float *x, int64_t k, int8_t *q, float *d, int32_t *sum8, int32_t *sum8_pair,
                         int32_t *sum16) {
    for (int64_t b = 0; b < k / 32; b++, x += 32, q += 32) {
        float amax = 0.0f;
        int finite = 1;
        for (int j = 0; j < 32; j++) {
            float magnitude = fabsf(x[j]);
            finite &= magnitude < INFINITY;
            amax = amax < magnitude ? magnitude : amax;
        }
        float inverse = 127.0f / amax;
        int usable = finite && inverse < INFINITY; /* amax 0 gives infinity too */
        int32_t pair[2] = {0, 0}, half[2] = {0, 0};
        for (int j = 0; j < 32; j++) {
            float scaled = usable ? rintf(x[(j & ~7) + azq_lane_order[j & 7]] * inverse) : 0.0f;
            scaled = scaled > 127.0f ? 127.0f : scaled < -127.0f ? -127.0f : scaled;
            q[j] = (int8_t)scaled;
            pair[j >> 1 & 1] += q[j];
            half[j >> 4] += q[j];
        }
        d[b] = finite ? amax / 127.0f : azq_from_bits(0x7fc00000u);
        sum8[b] = -8 * (pair[0] + pair[1]);
        sum16[2 * b] = half[0];
        sum16[2 * b + 1] = half[1];
        sum8_pair[b] = (int32_t)(((uint32_t)(-8 * pair[0]) & 0xffffu) | (uint32_t)(-8 * pair[1]) << 16);
    }
}

/* Integer dot of one block of activations with column n of a packed block. */
static int32_t dot_block_q4_0(const int8_t *a, const uint8_t *head, const uint8_t *block, int n) {
    (void)head;
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) {
        const uint8_t *dword = block + 64 * i + 4 * n;
        for (int j = 0; j < 4; j++) {
            sum += ((dword[j] & 15) - 8) * a[8 * i + j];
            sum += ((dword[j] >> 4) - 8) * a[8 * i + 4 + j];
        }
    }
    return sum;
}

static int32_t dot_block_q8_0(const int8_t *a, const uint8_t *head, const uint8_t *block, int n) {
    (void)head;
    int32_t sum = 0;
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 4; j++) {
            sum += (int8_t)block[64 * i + 4 * n + j] * a[4 * i + j];
        }
    }
    return sum;
}

/* The block's halves, each by its own scale, which stand in the block's head. */
static int32_t dot_block_q6_k(const int8_t *a, const uint8_t *head, const uint8_t *block, int n) {
    int32_t halves[2] = {0, 0};
    for (int o = 0; o < 8; o++) {
        for (int j = 0; j < 4; j++) {
            int low = block[64 * (o / 2) + 4 * n + j] >> 4 * (o % 2) & 15;
            int high = block[256 + 64 * (o / 4) + 4 * n + j] >> 2 * (o % 4) & 3;
            halves[o / 4] += ((low | high << 4) - 32) * a[4 * o + j];
        }
    }
    return (int8_t)head[32 + n] * halves[0] + (int8_t)head[48 + n] * halves[1];
}

typedef int32_t dot_block_fn(const int8_t *a, const uint8_t *head, const uint8_t *block, int n);

static float dot_column(const azq_act *act, int64_t row, const uint8_t *panel, int n, int head_bytes, int line_bytes,
                        dot_block_fn *dot_block) {
    int64_t n_blocks = act->k / 32;
    const int8_t *q = act->q + row * act->k;
    const float *d = act->d + row * n_blocks;
    const uint8_t *group = panel;
    float sum = 0.0f;
    for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {
        int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;
        const uint8_t *lines = group + in_group * head_bytes;
        for (int64_t b = 0; b < in_group; b++) {
            const uint8_t *head = group + b * head_bytes;
            uint16_t scale;
            memcpy(&scale, head + 2 * n, sizeof scale);
            int32_t dot = dot_block(q + (g + b) * 32, head, lines + b * line_bytes, n);
            sum = fmaf((float)dot, azq_f16_to_f32(scale) * d[g + b], sum);
        }
        group = lines + in_group * line_bytes;
    }
    return sum;
}

#define AZQ_GEMM(name, dot_block, head_bytes, line_bytes)                                                       \
    static void name(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels, int64_t panel_bytes, \
                     int64_t n_panels, float *c, int64_t ldc) {                                                 \
        for (int64_t r = 0; r < rows; r++) {                                                                    \
            for (int64_t j = 0; j < n_panels * AZQ_PANEL; j++) {                                                \
                const uint8_t *panel = panels + j / AZQ_PANEL * panel_bytes;                                    \
                int n = (int)(j % AZQ_PANEL);                                                                   \
                c[r * ldc + j] = dot_column(act, row0 + r, panel, n, head_bytes, line_bytes, dot_block);        \
            }                                                                                                   \
        }                                                                                                       \
    }
AZQ_GEMM(gemm_q4_0, dot_block_q4_0, 32, 256)
AZQ_GEMM(gemm_q8_0, dot_block_q8_0, 32, 512)
AZQ_GEMM(gemm_q6_k, dot_block_q6_k, 64, 384)

/* ---- an activation that compilers vectorize by themselves ----------------------------------------- */

static void relu(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        x[i] = x[i] < 0.0f ? 0.0f : x[i]; /* NaN stays */
    }
}

/* ---- measuring ---------------------------------------------------------------------------------- */

static uint64_t stream_read(const void *lines, int64_t n) {
    const uint64_t *x = lines;
    uint64_t sum = 0;
    for (int64_t i = 0; i < 8 * n; i++) {
        sum ^= x[i];
    }
    return sum;
}

static int64_t peak_int8(int64_t rounds) {
    static volatile int8_t source[64];
    int8_t a[32], b[32];
    for (int i = 0; i < 32; i++) {
        a[i] = source[i];
        b[i] = source[32 + i];
    }
    int32_t sum = 0;
    for (int64_t r = 0; r < rounds; r++) {
        for (int i = 0; i < 32; i++) {
            sum += (a[i] ^ (int8_t)r) * b[i];
        }
    }
    static volatile int32_t sink;
    sink = sum;
    (void)sink;
    return 32 * rounds;
}

const azq_kernels azq_kernels_scalar = {
    .isa = "scalar",
    .needs = 0,
    .slots =
        {
            .quantize_row = {[AZQ_TYPE_F32] = quantize_f32,
                             [AZQ_TYPE_F16] = quantize_f16,
                             [AZQ_TYPE_BF16] = quantize_bf16,
                             [AZQ_TYPE_Q4_0] = quantize_q4_0,
                             [AZQ_TYPE_Q8_0] = quantize_q8_0},
            .dequantize_row = {[AZQ_TYPE_F32] = dequantize_f32,
                               [AZQ_TYPE_F16] = dequantize_f16,
                               [AZQ_TYPE_BF16] = dequantize_bf16,
                               [AZQ_TYPE_Q4_0] = dequantize_q4_0,
                               [AZQ_TYPE_Q8_0] = dequantize_q8_0},
            AZQ_FAMILY_SLOTS(scalar),
            AZQ_CODEBOOK_DEQUANTIZE,
            .find_bad = find_bad,
            .quantize_act = quantize_act,
            .gemm = {[AZQ_TYPE_Q4_0] = gemm_q4_0, [AZQ_TYPE_Q8_0] = gemm_q8_0, [AZQ_TYPE_Q6_K] = gemm_q6_k},
            AZQ_GEMM_TYPES_SLOTS(scalar),
            .gemm_fp32[AZQ_TYPE_F32] = gemm_fp32_f32_scalar,
            .gemm_plane = gemm_plane_scalar,
            .stream_read = stream_read,
            .peak_int8 = peak_int8,
            AZQ_BF16_SLOTS(scalar),
            AZQ_VEC_SLOTS,
            AZQ_EXP_SLOTS,
            AZQ_ATTEND_SLOTS,
            .relu = relu,
        },
};
