/* The definition of the int8 products of gemm_types.h: plain C, one number at a time. */
#include "gemm_types.h"
#include <math.h>
#include <string.h>
#include "../azq_half.h"
#include "../packed_types.h"
#include "tables.h"

static float half_at(const uint8_t *p, int column) {
    uint16_t bits;
    memcpy(&bits, p + 2 * column, sizeof bits);
    return azq_f16_to_f32(bits);
}

/* What byte j of operand o of a column stands for; see azq_kernels.h. */
static int weight(int type, const uint8_t *lines, int column, int o, int j) {
    azq_packed_type shape = azq_packed_type_of(type);
    int per_line = 8 / shape.low_bits, at = 4 * column + j;
    int code = lines[64 * (o / per_line) + at] >> shape.low_bits * (o % per_line) & ((1 << shape.low_bits) - 1);
    if (shape.high_bit) {
        code += (lines[64 * (8 / per_line) + at] >> o & 1) * shape.high_bit;
    }
    const uint8_t *table = azq_packed_table(type);
    return (table ? table[code] : code) - shape.offset;
}

/* The column's numbers of one block: what its sum is multiplied with, and its minimum. */
static void head_of(int type, const uint8_t *super, const uint8_t *head, int n, float *scale, float *min) {
    float d = azq_packed_type_of(type).super_bytes ? half_at(super, n) : 0.0f;
    *min = 0.0f;
    switch (type) {
    case AZQ_TYPE_Q4_K:
    case AZQ_TYPE_Q5_K:
        *scale = d * (float)head[n];
        *min = -half_at(super + 2 * AZQ_PANEL, n) * (float)head[AZQ_PANEL + n];
        break;
    case AZQ_TYPE_Q2_K:
        *scale = d;
        *min = -half_at(super + 2 * AZQ_PANEL, n);
        break;
    case AZQ_TYPE_Q3_K: *scale = d; break;
    case AZQ_TYPE_IQ4_XS: *scale = d * (float)(head[n] - 32); break;
    case AZQ_TYPE_MXFP4: *scale = azq_e8m0_halved(head[n]); break;
    case AZQ_TYPE_Q4_1:
    case AZQ_TYPE_Q5_1:
        *scale = half_at(head, n);
        *min = half_at(head + 2 * AZQ_PANEL, n);
        break;
    default: *scale = half_at(head, n);
    }
}

static float dot_column(const azq_act *act, int64_t row, int type, const uint8_t *panel, int n) {
    azq_packed_type shape = azq_packed_type_of(type);
    int64_t n_blocks = act->k / 32;
    const int8_t *q = act->q + row * act->k;
    float sum = 0.0f;
    for (int64_t b = 0; b < n_blocks; b++, q += 32) {
        azq_packed_place place = azq_packed_block(type, panel, n_blocks, b);
        const uint8_t *head = place.head;
        int64_t at = row * n_blocks + b;
        int32_t dots[2] = {0, 0}, sums_of_min = 0;
        for (int i = 0; i < 32; i++) {
            dots[i / 16] += weight(type, place.lines, n, i / 4, i % 4) * q[i];
        }
        if (shape.kind == AZQ_HALVES) {
            dots[0] *= head[n] - 32;
            dots[1] *= head[AZQ_PANEL + n] - 32;
        } else if (shape.kind == AZQ_HALVES_MIN) {
            dots[0] *= head[n] & 15;
            dots[1] *= head[AZQ_PANEL + n] & 15;
            sums_of_min = (head[n] >> 4) * act->sum16[2 * at] + (head[AZQ_PANEL + n] >> 4) * act->sum16[2 * at + 1];
        }
        float scale, min;
        head_of(type, place.super, head, n, &scale, &min);
        sum = fmaf((float)(dots[0] + dots[1]), scale * act->d[at], sum);
        if (shape.kind == AZQ_WITH_MIN) {
            sum = fmaf(min, act->dsum[at], sum);
        } else if (shape.kind == AZQ_HALVES_MIN) {
            sum = fmaf((float)sums_of_min, min * act->d[at], sum);
        }
    }
    return sum;
}

#define AZQ_GEMM_TYPE(name, type)                                                                                   \
    void gemm_##name##_scalar(const azq_act *act, int64_t row0, int64_t rows, const uint8_t *panels,                \
                              int64_t panel_bytes, int64_t n_panels, float *c, int64_t ldc) {                       \
        for (int64_t i = 0; i < rows * n_panels * AZQ_PANEL; i++) {                                                 \
            int64_t r = i / (n_panels * AZQ_PANEL), j = i % (n_panels * AZQ_PANEL);                                 \
            const uint8_t *panel = panels + j / AZQ_PANEL * panel_bytes;                                            \
            c[r * ldc + j] = dot_column(act, row0 + r, AZQ_TYPE_##type, panel, (int)(j % AZQ_PANEL));               \
        }                                                                                                           \
    }
AZQ_GEMM_TYPES_ALL
