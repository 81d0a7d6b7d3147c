#ifndef AZQ_GEMM_TYPES_H
#define AZQ_GEMM_TYPES_H
#include "../azq_kernels.h"
/* The int8 products of the types of packed_types.h; an ISA's table collects them from here.
 *
 *   gemm_types_scalar.c     the definition
 *   gemm_types_simd.h       one text for registers of 128, 256 and 512 bits, compiled by gemm_types_<isa>.c */

#define AZQ_GEMM_TYPES_DECLARE(isa)                                                                             \
    azq_gemm_fn gemm_q4_1_##isa, gemm_q5_0_##isa, gemm_q5_1_##isa, gemm_q4_k_##isa, gemm_q5_k_##isa,            \
        gemm_q2_k_##isa, gemm_q3_k_##isa, gemm_iq4_nl_##isa, gemm_iq4_xs_##isa, gemm_mxfp4_##isa

AZQ_GEMM_TYPES_DECLARE(scalar);
AZQ_GEMM_TYPES_DECLARE(avx2);
AZQ_GEMM_TYPES_DECLARE(avxvnni);
AZQ_GEMM_TYPES_DECLARE(avx512vnni);
AZQ_GEMM_TYPES_DECLARE(neon);
AZQ_GEMM_TYPES_DECLARE(dotprod);

/* Entries of a table, to stand among its slots. */
#define AZQ_GEMM_TYPES_SLOTS(isa)                 \
    .gemm[AZQ_TYPE_Q4_1] = gemm_q4_1_##isa,       \
    .gemm[AZQ_TYPE_Q5_0] = gemm_q5_0_##isa,       \
    .gemm[AZQ_TYPE_Q5_1] = gemm_q5_1_##isa,       \
    .gemm[AZQ_TYPE_Q4_K] = gemm_q4_k_##isa,       \
    .gemm[AZQ_TYPE_Q5_K] = gemm_q5_k_##isa,       \
    .gemm[AZQ_TYPE_Q2_K] = gemm_q2_k_##isa,       \
    .gemm[AZQ_TYPE_Q3_K] = gemm_q3_k_##isa,       \
    .gemm[AZQ_TYPE_IQ4_NL] = gemm_iq4_nl_##isa,   \
    .gemm[AZQ_TYPE_IQ4_XS] = gemm_iq4_xs_##isa,   \
    .gemm[AZQ_TYPE_MXFP4] = gemm_mxfp4_##isa

/* The fp32 product over dense weights (gemm_fp32.h). */
azq_gemm_fp32_fn gemm_fp32_f32_scalar, gemm_fp32_f32_avx2, gemm_fp32_f16_avx2, gemm_fp32_bf16_avx2,
    gemm_fp32_f32_avx512, gemm_fp32_f16_avx512, gemm_fp32_bf16_avx512, gemm_fp32_f32_neon, gemm_fp32_f16_neon,
    gemm_fp32_bf16_neon;
azq_gemm_plane_fn gemm_plane_scalar, gemm_plane_avx2, gemm_plane_avx512, gemm_plane_neon;
#define AZQ_GEMM_FP32_SLOTS(isa)                         \
    .gemm_fp32 = {[AZQ_TYPE_F32] = gemm_fp32_f32_##isa,  \
                  [AZQ_TYPE_F16] = gemm_fp32_f16_##isa,  \
                  [AZQ_TYPE_BF16] = gemm_fp32_bf16_##isa}, \
    .gemm_plane = gemm_plane_##isa

/* Defines them all: AZQ_GEMM_TYPE(name, type) is the including file's. */
#define AZQ_GEMM_TYPES_ALL         \
    AZQ_GEMM_TYPE(q4_1, Q4_1)      \
    AZQ_GEMM_TYPE(q5_0, Q5_0)      \
    AZQ_GEMM_TYPE(q5_1, Q5_1)      \
    AZQ_GEMM_TYPE(q4_k, Q4_K)      \
    AZQ_GEMM_TYPE(q5_k, Q5_K)      \
    AZQ_GEMM_TYPE(q2_k, Q2_K)      \
    AZQ_GEMM_TYPE(q3_k, Q3_K)      \
    AZQ_GEMM_TYPE(iq4_nl, IQ4_NL)  \
    AZQ_GEMM_TYPE(iq4_xs, IQ4_XS)  \
    AZQ_GEMM_TYPE(mxfp4, MXFP4)

#endif
