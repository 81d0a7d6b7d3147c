/* Blocks of the types of packed_types.h, between GGUF's bytes and panels. */
#include "packed_types.h"
#include <assert.h>
#include <string.h>
#include "kernels/tables.h"

/* One block of 32: a code per byte, in order, and what stands in its head (fp16 numbers as two bytes). */
typedef struct {
    uint8_t codes[32];
    uint8_t head[4];
} block32;

/* ---- GGUF's bytes ---------------------------------------------------------------------------------- */

static void get_nibbles(const uint8_t *qs, uint8_t *codes) {
    for (int j = 0; j < 16; j++) {
        codes[j] = qs[j] & 15;
        codes[j + 16] = qs[j] >> 4;
    }
}

static void set_nibbles(uint8_t *qs, const uint8_t *codes) {
    for (int j = 0; j < 16; j++) {
        qs[j] = (uint8_t)((codes[j] & 15) | codes[j + 16] << 4);
    }
}

static void get_fifth(const uint8_t *qh, uint8_t *codes) {
    for (int j = 0; j < 32; j++) {
        codes[j] |= (uint8_t)((qh[j / 8] >> j % 8 & 1) << 4);
    }
}

static void set_fifth(uint8_t *qh, const uint8_t *codes) {
    for (int i = 0; i < 4; i++) {
        unsigned bits = 0;
        for (int j = 0; j < 8; j++) {
            bits |= (codes[8 * i + j] >> 4 & 1u) << j;
        }
        qh[i] = (uint8_t)bits;
    }
}

/* 32 fields of `bits` bits at bit `shift` of 32 bytes, laid at bit `at` of the codes. */
static void get_fields(const uint8_t *bytes, int shift, int bits, int at, uint8_t *codes) {
    unsigned mask = (1u << bits) - 1;
    for (int j = 0; j < 32; j++) {
        codes[j] |= (uint8_t)((bytes[j] >> shift & mask) << at);
    }
}

static void set_fields(uint8_t *bytes, int shift, int bits, int at, const uint8_t *codes) {
    unsigned mask = (1u << bits) - 1;
    for (int j = 0; j < 32; j++) {
        bytes[j] = (uint8_t)((bytes[j] & ~(mask << shift)) | (codes[j] >> at & mask) << shift);
    }
}

static void set_bits(uint8_t *byte, int shift, unsigned mask, unsigned value) {
    *byte = (uint8_t)((*byte & ~(mask << shift)) | (value & mask) << shift);
}

static void set_k4_scales(uint8_t *packed, int g, unsigned scale, unsigned min) {
    if (g < 4) {
        set_bits(&packed[g], 0, 63, scale);
        set_bits(&packed[g + 4], 0, 63, min);
    } else {
        packed[g + 4] = (uint8_t)((scale & 15) | min << 4);
        set_bits(&packed[g - 4], 6, 3, scale >> 4);
        set_bits(&packed[g], 6, 3, min >> 4);
    }
}

static void set_q3_k_scale(uint8_t *packed, int g, unsigned scale) {
    set_bits(&packed[g % 8], g < 8 ? 0 : 4, 15, scale);
    set_bits(&packed[8 + g % 4], g / 4 * 2, 3, scale >> 4);
}

static block32 read_block(int type, const uint8_t *row, int64_t block) {
    block32 x = {{0}, {0}};
    int g = (int)(block % 8); /* in a super-block */
    switch (type) {
    case AZQ_TYPE_Q4_1: {
        const azq_block_q4_1 *from = (const azq_block_q4_1 *)(const void *)row + block;
        memcpy(x.head, from, 4);
        get_nibbles(from->qs, x.codes);
        break;
    }
    case AZQ_TYPE_Q5_0: {
        const azq_block_q5_0 *from = (const azq_block_q5_0 *)(const void *)row + block;
        memcpy(x.head, from, 2);
        get_nibbles(from->qs, x.codes);
        get_fifth(from->qh, x.codes);
        break;
    }
    case AZQ_TYPE_Q5_1: {
        const azq_block_q5_1 *from = (const azq_block_q5_1 *)(const void *)row + block;
        memcpy(x.head, from, 4);
        get_nibbles(from->qs, x.codes);
        get_fifth(from->qh, x.codes);
        break;
    }
    case AZQ_TYPE_IQ4_NL: {
        const azq_block_iq4_nl *from = (const azq_block_iq4_nl *)(const void *)row + block;
        memcpy(x.head, from, 2);
        get_nibbles(from->qs, x.codes);
        break;
    }
    case AZQ_TYPE_MXFP4: {
        const azq_block_mxfp4 *from = (const azq_block_mxfp4 *)(const void *)row + block;
        x.head[0] = from->e;
        get_nibbles(from->qs, x.codes);
        break;
    }
    case AZQ_TYPE_Q4_K: {
        const azq_block_q4_k *from = (const azq_block_q4_k *)(const void *)row + block / 8;
        x.head[0] = azq_k4_scale(from->scales, g);
        x.head[1] = azq_k4_min(from->scales, g);
        get_fields(from->qs + 32 * (g / 2), 4 * (g % 2), 4, 0, x.codes);
        break;
    }
    case AZQ_TYPE_Q5_K: {
        const azq_block_q5_k *from = (const azq_block_q5_k *)(const void *)row + block / 8;
        x.head[0] = azq_k4_scale(from->scales, g);
        x.head[1] = azq_k4_min(from->scales, g);
        get_fields(from->qs + 32 * (g / 2), 4 * (g % 2), 4, 0, x.codes);
        get_fields(from->qh, g, 1, 4, x.codes);
        break;
    }
    case AZQ_TYPE_Q2_K: {
        const azq_block_q2_k *from = (const azq_block_q2_k *)(const void *)row + block / 8;
        memcpy(x.head, from->scales + 2 * g, 2);
        get_fields(from->qs + 32 * (g / 4), 2 * (g % 4), 2, 0, x.codes);
        break;
    }
    case AZQ_TYPE_Q3_K: {
        const azq_block_q3_k *from = (const azq_block_q3_k *)(const void *)row + block / 8;
        x.head[0] = azq_q3_k_scale(from->scales, 2 * g);
        x.head[1] = azq_q3_k_scale(from->scales, 2 * g + 1);
        get_fields(from->qs + 32 * (g / 4), 2 * (g % 4), 2, 0, x.codes);
        get_fields(from->hmask, g, 1, 2, x.codes);
        break;
    }
    default: {
        const azq_block_iq4_xs *from = (const azq_block_iq4_xs *)(const void *)row + block / 8;
        assert(type == AZQ_TYPE_IQ4_XS);
        x.head[0] = (uint8_t)((from->scales_l[g / 2] >> 4 * (g % 2) & 15) | (from->scales_h >> 2 * g & 3) << 4);
        get_nibbles(from->qs + 16 * g, x.codes);
    }
    }
    return x;
}

static void write_block(int type, uint8_t *row, int64_t block, const block32 *x) {
    int g = (int)(block % 8);
    switch (type) {
    case AZQ_TYPE_Q4_1: {
        azq_block_q4_1 *to = (azq_block_q4_1 *)(void *)row + block;
        memcpy(to, x->head, 4);
        set_nibbles(to->qs, x->codes);
        break;
    }
    case AZQ_TYPE_Q5_0: {
        azq_block_q5_0 *to = (azq_block_q5_0 *)(void *)row + block;
        memcpy(to, x->head, 2);
        set_nibbles(to->qs, x->codes);
        set_fifth(to->qh, x->codes);
        break;
    }
    case AZQ_TYPE_Q5_1: {
        azq_block_q5_1 *to = (azq_block_q5_1 *)(void *)row + block;
        memcpy(to, x->head, 4);
        set_nibbles(to->qs, x->codes);
        set_fifth(to->qh, x->codes);
        break;
    }
    case AZQ_TYPE_IQ4_NL: {
        azq_block_iq4_nl *to = (azq_block_iq4_nl *)(void *)row + block;
        memcpy(to, x->head, 2);
        set_nibbles(to->qs, x->codes);
        break;
    }
    case AZQ_TYPE_MXFP4: {
        azq_block_mxfp4 *to = (azq_block_mxfp4 *)(void *)row + block;
        to->e = x->head[0];
        set_nibbles(to->qs, x->codes);
        break;
    }
    case AZQ_TYPE_Q4_K: {
        azq_block_q4_k *to = (azq_block_q4_k *)(void *)row + block / 8;
        set_k4_scales(to->scales, g, x->head[0], x->head[1]);
        set_fields(to->qs + 32 * (g / 2), 4 * (g % 2), 4, 0, x->codes);
        break;
    }
    case AZQ_TYPE_Q5_K: {
        azq_block_q5_k *to = (azq_block_q5_k *)(void *)row + block / 8;
        set_k4_scales(to->scales, g, x->head[0], x->head[1]);
        set_fields(to->qs + 32 * (g / 2), 4 * (g % 2), 4, 0, x->codes);
        set_fields(to->qh, g, 1, 4, x->codes);
        break;
    }
    case AZQ_TYPE_Q2_K: {
        azq_block_q2_k *to = (azq_block_q2_k *)(void *)row + block / 8;
        memcpy(to->scales + 2 * g, x->head, 2);
        set_fields(to->qs + 32 * (g / 4), 2 * (g % 4), 2, 0, x->codes);
        break;
    }
    case AZQ_TYPE_Q3_K: {
        azq_block_q3_k *to = (azq_block_q3_k *)(void *)row + block / 8;
        set_q3_k_scale(to->scales, 2 * g, x->head[0]);
        set_q3_k_scale(to->scales, 2 * g + 1, x->head[1]);
        set_fields(to->qs + 32 * (g / 4), 2 * (g % 4), 2, 0, x->codes);
        set_fields(to->hmask, g, 1, 2, x->codes);
        break;
    }
    default: {
        azq_block_iq4_xs *to = (azq_block_iq4_xs *)(void *)row + block / 8;
        assert(type == AZQ_TYPE_IQ4_XS);
        set_bits(&to->scales_l[g / 2], 4 * (g % 2), 15, x->head[0]);
        to->scales_h = (uint16_t)((to->scales_h & ~(3u << 2 * g)) | (x->head[0] >> 4 & 3u) << 2 * g);
        set_nibbles(to->qs + 16 * g, x->codes);
    }
    }
}

/* ---- panels ----------------------------------------------------------------------------------------- */

/* Numbers of a column's head, and of its super-blocks, are 16 columns apart: fp16 numbers by two bytes. */
static int head_step(int type) {
    return azq_packed_type_of(type).super_bytes || type == AZQ_TYPE_MXFP4 ? 1 : 2;
}

static void put_head(int type, const uint8_t *numbers, uint8_t *head, int column) {
    int step = head_step(type);
    for (int i = 0; i < azq_packed_type_of(type).head_bytes; i += step) {
        memcpy(head + AZQ_PANEL * i + step * column, numbers + i, (size_t)step);
    }
}

static void take_head(int type, uint8_t *numbers, const uint8_t *head, int column) {
    int step = head_step(type);
    for (int i = 0; i < azq_packed_type_of(type).head_bytes; i += step) {
        memcpy(numbers + i, head + AZQ_PANEL * i + step * column, (size_t)step);
    }
}

void azq_pack_block(int type, const uint8_t *row, int64_t block, uint8_t *head, uint8_t *lines, int column) {
    azq_packed_type shape = azq_packed_type_of(type);
    block32 x = read_block(type, row, block);
    put_head(type, x.head, head, column);
    uint32_t operands[8]; /* bytes 0, 4, 1, 5, then 2, 6, 3, 7 of each run of eight */
    for (int i = 0; i < 32; i++) {
        int byte = i & 7;
        ((uint8_t *)operands)[i] = x.codes[(i & ~7) + azq_lane_order[byte]];
    }
    int per_line = 8 / shape.low_bits;
    uint32_t low = shape.low_bits == 4 ? 0x0f0f0f0fu : 0x03030303u, high = 0;
    for (int line = 0; line < 8 / per_line; line++) {
        uint32_t dword = 0;
        for (int i = 0; i < per_line; i++) {
            dword |= (operands[per_line * line + i] & low) << shape.low_bits * i;
        }
        memcpy(lines + 64 * line + 4 * column, &dword, 4);
    }
    if (shape.high_bit) {
        for (int o = 0; o < 8; o++) {
            high |= (operands[o] >> (shape.high_bit == 16 ? 4 : 2) & 0x01010101u) << o;
        }
        memcpy(lines + 64 * (8 / per_line) + 4 * column, &high, 4);
    }
}

void azq_unpack_block(int type, uint8_t *row, int64_t block, const uint8_t *head, const uint8_t *lines, int column) {
    azq_packed_type shape = azq_packed_type_of(type);
    block32 x;
    take_head(type, x.head, head, column);
    int per_line = 8 / shape.low_bits;
    uint32_t low = shape.low_bits == 4 ? 0x0f0f0f0fu : 0x03030303u, high = 0, operands[8];
    if (shape.high_bit) {
        memcpy(&high, lines + 64 * (8 / per_line) + 4 * column, 4);
    }
    for (int o = 0; o < 8; o++) {
        uint32_t dword;
        memcpy(&dword, lines + 64 * (o / per_line) + 4 * column, 4);
        operands[o] = dword >> shape.low_bits * (o % per_line) & low;
        operands[o] |= (high >> o & 0x01010101u) * (uint32_t)shape.high_bit;
    }
    for (int i = 0; i < 32; i++) {
        x.codes[(i & ~7) + azq_lane_order[i & 7]] = ((const uint8_t *)operands)[i];
    }
    write_block(type, row, block, &x);
}

/* Where the fp16 numbers of a super-block begin: Q2_K and Q3_K have them last, the others first. */
static int64_t super_place(int type, int64_t *block_bytes) {
    switch (type) {
    case AZQ_TYPE_Q2_K: *block_bytes = sizeof(azq_block_q2_k); return offsetof(azq_block_q2_k, d);
    case AZQ_TYPE_Q3_K: *block_bytes = sizeof(azq_block_q3_k); return offsetof(azq_block_q3_k, d);
    case AZQ_TYPE_Q4_K: *block_bytes = sizeof(azq_block_q4_k); return 0;
    case AZQ_TYPE_Q5_K: *block_bytes = sizeof(azq_block_q5_k); return 0;
    default: *block_bytes = sizeof(azq_block_iq4_xs); return 0;
    }
}

void azq_pack_supers(int type, const uint8_t *row, int64_t n, uint8_t *supers, int column) {
    int64_t bytes = azq_packed_type_of(type).super_bytes, block_bytes, at = super_place(type, &block_bytes);
    for (int64_t s = 0; bytes && s < n; s++) {
        for (int64_t i = 0; i < bytes; i += 2) {
            memcpy(supers + AZQ_PANEL * (s * bytes + i) + 2 * column, row + s * block_bytes + at + i, 2);
        }
    }
}

void azq_unpack_supers(int type, uint8_t *row, int64_t n, const uint8_t *supers, int column) {
    int64_t bytes = azq_packed_type_of(type).super_bytes, block_bytes, at = super_place(type, &block_bytes);
    for (int64_t s = 0; bytes && s < n; s++) {
        for (int64_t i = 0; i < bytes; i += 2) {
            memcpy(row + s * block_bytes + at + i, supers + AZQ_PANEL * (s * bytes + i) + 2 * column, 2);
        }
    }
}
