#ifndef AZQ_FAMILIES_H
#define AZQ_FAMILIES_H
#include "../azq_kernels.h"
/* Kernels of the block types that have files of their own; an ISA's table collects them from here.
 *
 *   decode.h           dequantizers                        decode_codebook.c   those of the IQ1, IQ2, IQ3 types
 *   encode.h           quantizers without a search         kquants.h           Q2_K .. Q6_K
 *   weighted.h         blocks of 32 with importances, IQ4_NL, IQ4_XS (both on search.h)
 *
 * Each header is compiled once per ISA, by families_<isa>.c. */

#define AZQ_FAMILY_DECLARE(isa)                                                                                       \
    azq_dequantize_row_fn dequantize_q4_1_##isa, dequantize_q5_0_##isa, dequantize_q5_1_##isa, dequantize_q2_k_##isa, \
        dequantize_q3_k_##isa, dequantize_q4_k_##isa, dequantize_q5_k_##isa, dequantize_q6_k_##isa,                   \
        dequantize_q8_k_##isa, dequantize_iq4_nl_##isa, dequantize_iq4_xs_##isa, dequantize_tq1_0_##isa,              \
        dequantize_tq2_0_##isa, dequantize_mxfp4_##isa, dequantize_nvfp4_##isa, dequantize_q1_0_##isa,                \
        dequantize_q2_0_##isa;                                                                                        \
    azq_quantize_row_fn quantize_q4_1_##isa, quantize_q5_0_##isa, quantize_q5_1_##isa, quantize_mxfp4_##isa,          \
        quantize_tq1_0_##isa, quantize_tq2_0_##isa, quantize_q2_k_##isa, quantize_q3_k_##isa, quantize_q4_k_##isa,    \
        quantize_q5_k_##isa, quantize_q6_k_##isa, quantize_iq4_nl_##isa, quantize_iq4_xs_##isa;                       \
    azq_quantize_weighted_row_fn quantize_weighted_q4_0_##isa, quantize_weighted_q4_1_##isa,                          \
        quantize_weighted_q5_0_##isa, quantize_weighted_q5_1_##isa, quantize_weighted_q2_k_##isa,                     \
        quantize_weighted_q3_k_##isa, quantize_weighted_q4_k_##isa, quantize_weighted_q5_k_##isa,                     \
        quantize_weighted_q6_k_##isa, quantize_weighted_iq4_nl_##isa, quantize_weighted_iq4_xs_##isa

AZQ_FAMILY_DECLARE(scalar);
AZQ_FAMILY_DECLARE(avx2);
AZQ_FAMILY_DECLARE(avx512);

azq_dequantize_row_fn azq_dequantize_iq2_xxs, azq_dequantize_iq2_xs, azq_dequantize_iq2_s, azq_dequantize_iq3_xxs,
    azq_dequantize_iq3_s, azq_dequantize_iq1_s, azq_dequantize_iq1_m;

/* Entries of a table, to stand among its slots. */
#define AZQ_FAMILY_DEQUANTIZE(isa)                              \
    .dequantize_row[AZQ_TYPE_Q4_1] = dequantize_q4_1_##isa,     \
    .dequantize_row[AZQ_TYPE_Q5_0] = dequantize_q5_0_##isa,     \
    .dequantize_row[AZQ_TYPE_Q5_1] = dequantize_q5_1_##isa,     \
    .dequantize_row[AZQ_TYPE_Q2_K] = dequantize_q2_k_##isa,     \
    .dequantize_row[AZQ_TYPE_Q3_K] = dequantize_q3_k_##isa,     \
    .dequantize_row[AZQ_TYPE_Q4_K] = dequantize_q4_k_##isa,     \
    .dequantize_row[AZQ_TYPE_Q5_K] = dequantize_q5_k_##isa,     \
    .dequantize_row[AZQ_TYPE_Q6_K] = dequantize_q6_k_##isa,     \
    .dequantize_row[AZQ_TYPE_Q8_K] = dequantize_q8_k_##isa,     \
    .dequantize_row[AZQ_TYPE_IQ4_NL] = dequantize_iq4_nl_##isa, \
    .dequantize_row[AZQ_TYPE_IQ4_XS] = dequantize_iq4_xs_##isa, \
    .dequantize_row[AZQ_TYPE_TQ1_0] = dequantize_tq1_0_##isa,   \
    .dequantize_row[AZQ_TYPE_TQ2_0] = dequantize_tq2_0_##isa,   \
    .dequantize_row[AZQ_TYPE_MXFP4] = dequantize_mxfp4_##isa,   \
    .dequantize_row[AZQ_TYPE_NVFP4] = dequantize_nvfp4_##isa,   \
    .dequantize_row[AZQ_TYPE_Q1_0] = dequantize_q1_0_##isa,     \
    .dequantize_row[AZQ_TYPE_Q2_0] = dequantize_q2_0_##isa

#define AZQ_FAMILY_SEARCH(isa)                              \
    .quantize_row[AZQ_TYPE_Q2_K] = quantize_q2_k_##isa,     \
    .quantize_row[AZQ_TYPE_Q3_K] = quantize_q3_k_##isa,     \
    .quantize_row[AZQ_TYPE_Q4_K] = quantize_q4_k_##isa,     \
    .quantize_row[AZQ_TYPE_Q5_K] = quantize_q5_k_##isa,     \
    .quantize_row[AZQ_TYPE_Q6_K] = quantize_q6_k_##isa,     \
    .quantize_row[AZQ_TYPE_IQ4_NL] = quantize_iq4_nl_##isa, \
    .quantize_row[AZQ_TYPE_IQ4_XS] = quantize_iq4_xs_##isa

#define AZQ_FAMILY_QUANTIZE(isa)                          \
    .quantize_row[AZQ_TYPE_Q4_1] = quantize_q4_1_##isa,   \
    .quantize_row[AZQ_TYPE_Q5_0] = quantize_q5_0_##isa,   \
    .quantize_row[AZQ_TYPE_Q5_1] = quantize_q5_1_##isa,   \
    .quantize_row[AZQ_TYPE_MXFP4] = quantize_mxfp4_##isa, \
    .quantize_row[AZQ_TYPE_TQ1_0] = quantize_tq1_0_##isa, \
    .quantize_row[AZQ_TYPE_TQ2_0] = quantize_tq2_0_##isa

#define AZQ_FAMILY_WEIGHTED(isa)                                              \
    .quantize_weighted_row[AZQ_TYPE_Q4_0] = quantize_weighted_q4_0_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q4_1] = quantize_weighted_q4_1_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q5_0] = quantize_weighted_q5_0_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q5_1] = quantize_weighted_q5_1_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q2_K] = quantize_weighted_q2_k_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q3_K] = quantize_weighted_q3_k_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q4_K] = quantize_weighted_q4_k_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q5_K] = quantize_weighted_q5_k_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_Q6_K] = quantize_weighted_q6_k_##isa,     \
    .quantize_weighted_row[AZQ_TYPE_IQ4_NL] = quantize_weighted_iq4_nl_##isa, \
    .quantize_weighted_row[AZQ_TYPE_IQ4_XS] = quantize_weighted_iq4_xs_##isa

#define AZQ_CODEBOOK_DEQUANTIZE                                 \
    .dequantize_row[AZQ_TYPE_IQ2_XXS] = azq_dequantize_iq2_xxs, \
    .dequantize_row[AZQ_TYPE_IQ2_XS] = azq_dequantize_iq2_xs,   \
    .dequantize_row[AZQ_TYPE_IQ2_S] = azq_dequantize_iq2_s,     \
    .dequantize_row[AZQ_TYPE_IQ3_XXS] = azq_dequantize_iq3_xxs, \
    .dequantize_row[AZQ_TYPE_IQ3_S] = azq_dequantize_iq3_s,     \
    .dequantize_row[AZQ_TYPE_IQ1_S] = azq_dequantize_iq1_s,     \
    .dequantize_row[AZQ_TYPE_IQ1_M] = azq_dequantize_iq1_m

/* All that depends on the ISA. (AVX-512 takes the searches alone.) */
#define AZQ_FAMILY_SLOTS(isa) \
    AZQ_FAMILY_DEQUANTIZE(isa), AZQ_FAMILY_QUANTIZE(isa), AZQ_FAMILY_SEARCH(isa), AZQ_FAMILY_WEIGHTED(isa)

#endif
