#ifndef AZQ_PACKED_TYPES_H
#define AZQ_PACKED_TYPES_H
#include <stddef.h>
#include <stdint.h>
#include "azq_kernels.h"
/* The types whose packed form is made of low bits, a high bit and a head: everything that pack_types.c and the
 * kernels of gemm_types.h need to know of one. Drawn in azq_kernels.h. */

typedef enum {
    AZQ_ONE_DOT,    /* isum is one dot product */
    AZQ_WITH_MIN,   /* and there is a minimum per block */
    AZQ_HALVES,     /* two dot products, each with its scale */
    AZQ_HALVES_MIN, /* and each with its minimum */
} azq_packed_kind;

typedef struct {
    azq_packed_kind kind;
    int low_bits;    /* 4 or 2: AZQ_PANEL * 32 * low_bits / 8 bytes of lines */
    int high_bit;    /* the code's value of the bit in the last line, 0 when there is none */
    int head_bytes;  /* per column and block */
    int super_bytes; /* per column and super-block of 256 */
    int offset;      /* code (or table entry) less this is the number that is multiplied */
} azq_packed_type;

/* low_bits is 0 for every other type. A constant type makes this a constant. */
static inline __attribute__((always_inline)) azq_packed_type azq_packed_type_of(int type) {
    switch (type) {
    case AZQ_TYPE_Q4_1: return (azq_packed_type){AZQ_WITH_MIN, 4, 0, 4, 0, 0};
    case AZQ_TYPE_Q5_0: return (azq_packed_type){AZQ_ONE_DOT, 4, 16, 2, 0, 16};
    case AZQ_TYPE_Q5_1: return (azq_packed_type){AZQ_WITH_MIN, 4, 16, 4, 0, 0};
    case AZQ_TYPE_Q4_K: return (azq_packed_type){AZQ_WITH_MIN, 4, 0, 2, 4, 0};
    case AZQ_TYPE_Q5_K: return (azq_packed_type){AZQ_WITH_MIN, 4, 16, 2, 4, 0};
    case AZQ_TYPE_Q2_K: return (azq_packed_type){AZQ_HALVES_MIN, 2, 0, 2, 4, 0};
    case AZQ_TYPE_Q3_K: return (azq_packed_type){AZQ_HALVES, 2, 4, 2, 2, 4};
    case AZQ_TYPE_IQ4_NL: return (azq_packed_type){AZQ_ONE_DOT, 4, 0, 2, 0, 128};
    case AZQ_TYPE_IQ4_XS: return (azq_packed_type){AZQ_ONE_DOT, 4, 0, 1, 2, 128};
    case AZQ_TYPE_MXFP4: return (azq_packed_type){AZQ_ONE_DOT, 4, 0, 1, 0, 16};
    default: return (azq_packed_type){AZQ_ONE_DOT, 0, 0, 0, 0, 0};
    }
}

/* Where a panel's block has its head, its lines and its super-block's numbers. */
typedef struct {
    const uint8_t *head, *lines, *super;
} azq_packed_place;

static inline __attribute__((always_inline)) azq_packed_place azq_packed_block(int type, const uint8_t *panel,
                                                                               int64_t n_blocks, int64_t block) {
    azq_packed_type shape = azq_packed_type_of(type);
    int64_t head = AZQ_PANEL * shape.head_bytes, lines = 64 * (shape.low_bits + (shape.high_bit != 0));
    int64_t supers = (n_blocks / 8 * AZQ_PANEL * shape.super_bytes + 63) / 64 * 64;
    int64_t group = block / AZQ_GROUP * AZQ_GROUP, i = block - group;
    int64_t in_group = n_blocks - group < AZQ_GROUP ? n_blocks - group : AZQ_GROUP;
    const uint8_t *heads = panel + supers + group * (head + lines);
    return (azq_packed_place){heads + i * head, heads + in_group * head + i * lines,
                              panel + block / 8 * AZQ_PANEL * shape.super_bytes};
}

/* What a four-bit code stands for, plus the type's offset; NULL where a code is its own number. */
static inline __attribute__((always_inline)) const uint8_t *azq_packed_table(int type) {
    static const uint8_t iq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
    static const uint8_t e2m1[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};
    return type == AZQ_TYPE_IQ4_NL || type == AZQ_TYPE_IQ4_XS ? iq4 : type == AZQ_TYPE_MXFP4 ? e2m1 : NULL;
}

/* Fills a block of a panel from a row's GGUF bytes, and back, in the manner of pack.c. `column`: of the panel. */
void azq_pack_block(int type, const uint8_t *row, int64_t block, uint8_t *head, uint8_t *lines, int column);
void azq_unpack_block(int type, uint8_t *row, int64_t block, const uint8_t *head, const uint8_t *lines, int column);
/* The same for the numbers of a row's super-blocks, n of them. */
void azq_pack_supers(int type, const uint8_t *row, int64_t n, uint8_t *supers, int column);
void azq_unpack_supers(int type, uint8_t *row, int64_t n, const uint8_t *supers, int column);

#endif
