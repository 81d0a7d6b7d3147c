#ifndef AZQ_BF16_H
#define AZQ_BF16_H
#include "../azq_kernels.h"
/* The bf16 kernels (tiles: see azq_kernels.h); an ISA's table collects them from here.
 *
 *   bf16_tiles.h   rounding and dequantizing to tiles in plain C, compiled once per ISA by bf16_<isa>.c
 *   bf16_fma.h     products of tiles on machines without bf16 instructions
 *   avx512bf16.c, amx.c   tables of their own */

#define AZQ_BF16_DECLARE(isa)                                                                                   \
    azq_round_bf16_fn round_bf16_##isa;                                                                         \
    azq_dequantize_bf16_fn dequantize_bf16_q4_0_##isa, dequantize_bf16_q8_0_##isa, dequantize_bf16_q6_k_##isa; \
    azq_gemm_bf16_fn gemm_bf16_##isa

AZQ_BF16_DECLARE(scalar);
AZQ_BF16_DECLARE(avx2);
AZQ_BF16_DECLARE(avx512);

/* Entries of a table, to stand among its slots. */
#define AZQ_BF16_SLOTS(isa)                                     \
    .round_bf16 = round_bf16_##isa,                             \
    .dequantize_bf16 = {[AZQ_TYPE_Q4_0] = dequantize_bf16_q4_0_##isa, \
                        [AZQ_TYPE_Q8_0] = dequantize_bf16_q8_0_##isa, \
                        [AZQ_TYPE_Q6_K] = dequantize_bf16_q6_k_##isa}, \
    .gemm_bf16 = gemm_bf16_##isa

/* An azq_dequantize_bf16_fn over the including file's block_<type>(head, lines, tile). */
#define AZQ_DEQUANTIZE_BF16(name, type, head_bytes, line_bytes)                                                 \
    void name(const uint8_t *group, int64_t n_blocks, uint16_t *tiles) {                                        \
        for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {                                                     \
            int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;                             \
            const uint8_t *lines = group + in_group * (head_bytes);                                             \
            for (int64_t b = 0; b < in_group; b++, group += (head_bytes), lines += (line_bytes)) {              \
                block_##type(group, lines, tiles);                                                              \
                tiles += AZQ_TILE;                                                                              \
            }                                                                                                   \
            group = lines;                                                                                      \
        }                                                                                                       \
    }

#endif
