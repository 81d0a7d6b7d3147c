#ifndef AZQ_BLOCKS_H
#define AZQ_BLOCKS_H
#include <stdint.h>
/* Block layouts of the ggml tensor types, as they lie in a GGUF file (little-endian, unpadded).
 * This is the only place that states them. The build script hands it to cffi after dropping the
 * include and guard lines, so it holds plain declarations only. */

/* Type numbers of GGUF. */
enum {
    AZQ_TYPE_F32 = 0,
    AZQ_TYPE_F16 = 1,
    AZQ_TYPE_Q4_0 = 2,
    AZQ_TYPE_Q4_1 = 3,
    AZQ_TYPE_Q5_0 = 6,
    AZQ_TYPE_Q5_1 = 7,
    AZQ_TYPE_Q8_0 = 8,
    AZQ_TYPE_Q2_K = 10,
    AZQ_TYPE_Q3_K = 11,
    AZQ_TYPE_Q4_K = 12,
    AZQ_TYPE_Q5_K = 13,
    AZQ_TYPE_Q6_K = 14,
    AZQ_TYPE_Q8_K = 15,
    AZQ_TYPE_IQ2_XXS = 16,
    AZQ_TYPE_IQ2_XS = 17,
    AZQ_TYPE_IQ3_XXS = 18,
    AZQ_TYPE_IQ1_S = 19,
    AZQ_TYPE_IQ4_NL = 20,
    AZQ_TYPE_IQ3_S = 21,
    AZQ_TYPE_IQ2_S = 22,
    AZQ_TYPE_IQ4_XS = 23,
    AZQ_TYPE_IQ1_M = 29,
    AZQ_TYPE_BF16 = 30,
    AZQ_TYPE_TQ1_0 = 34,
    AZQ_TYPE_TQ2_0 = 35,
    AZQ_TYPE_MXFP4 = 39,
    AZQ_TYPE_NVFP4 = 40,
    AZQ_TYPE_Q1_0 = 41,
    AZQ_TYPE_Q2_0 = 42,
    AZQ_TYPE_COUNT = 43
};

/* ---- blocks of 32, one scale ------------------------------------------------------------------ */

/* Q4_0: 32 weights, 4 bits each, w = (q - 8) * d.
 *
 *   byte      0    1    2          3                17
 *           +---------+----------+----------+-- --+-----------+
 *           |  d fp16 | w16 | w0 | w17 | w1 | ... | w31 | w15 |      high nibble | low nibble
 *           +---------+----------+----------+-- --+-----------+
 */
#define AZQ_QK4_0 32
typedef struct {
    uint16_t d;     /* scale, fp16 */
    uint8_t qs[16]; /* qs[j]: weight j in the low nibble, weight j + 16 in the high one */
} azq_block_q4_0;

/* Q4_1: w = q * d + m, nibbles as in Q4_0. */
#define AZQ_QK4_1 32
typedef struct {
    uint16_t d, m; /* scale, minimum: fp16 */
    uint8_t qs[16];
} azq_block_q4_1;

/* Q5_0: w = (q - 16) * d. The low four bits as in Q4_0, bit 4 of weight j in bit j of qh. */
#define AZQ_QK5_0 32
typedef struct {
    uint16_t d;
    uint8_t qh[4]; /* little-endian */
    uint8_t qs[16];
} azq_block_q5_0;

/* Q5_1: w = q * d + m, bits as in Q5_0. */
#define AZQ_QK5_1 32
typedef struct {
    uint16_t d, m;
    uint8_t qh[4];
    uint8_t qs[16];
} azq_block_q5_1;

/* Q8_0: 32 weights, 8 bits each, w = q * d. */
#define AZQ_QK8_0 32
typedef struct {
    uint16_t d; /* scale, fp16 */
    int8_t qs[32];
} azq_block_q8_0;

/* IQ4_NL: w = table[q] * d with a table of 16 numbers denser around zero; nibbles as in Q4_0. */
#define AZQ_QK4_NL 32
typedef struct {
    uint16_t d;
    uint8_t qs[16];
} azq_block_iq4_nl;

/* MXFP4 (OCP microscaling): w = e2m1(q) * 2^(e - 127); nibbles as in Q4_0. */
#define AZQ_QK_MXFP4 32
typedef struct {
    uint8_t e; /* E8M0 */
    uint8_t qs[16];
} azq_block_mxfp4;

/* NVFP4: four groups of 16, w = e2m1(q) * ue4m3(d[g]); byte 8g + j holds weights j and j + 8 of group g. */
#define AZQ_QK_NVFP4 64
typedef struct {
    uint8_t d[4]; /* unsigned, 4 exponent and 3 mantissa bits */
    uint8_t qs[32];
} azq_block_nvfp4;

/* Q1_0: w = +d where bit j is set, else -d. Q2_0: w = (q - 1) * d, q of weight j at bits 2 (j % 4). */
#define AZQ_QK1_0 128
typedef struct {
    uint16_t d;
    uint8_t qs[16];
} azq_block_q1_0;
#define AZQ_QK2_0 64
typedef struct {
    uint16_t d;
    uint8_t qs[16];
} azq_block_q2_0;

/* ---- super-blocks of 256 ----------------------------------------------------------------------- */

#define AZQ_QK_K 256

/* Two bits of 256 weights in 64 bytes (Q2_K, Q3_K, TQ2_0): bits 2s, 2s + 1 of byte 32h + l hold weight
 * 128h + 32s + l, for halves h = 0, 1 and s = 0..3. */

/* Q2_K: 16 groups of 16, w = d * (scales[g] & 15) * q - dmin * (scales[g] >> 4). */
typedef struct {
    uint8_t scales[16];
    uint8_t qs[64];
    uint16_t d, dmin;
} azq_block_q2_k;

/* Q3_K: 16 groups of 16, w = d * (s[g] - 32) * (q - 4). Bit 2 of weight 32i + l is bit i of hmask[l].
 * The 16 six-bit s: low four bits of s[g] in nibble g / 8 of scales[g % 8], high two in bits 2 (g / 4) of
 * scales[8 + g % 4]. */
typedef struct {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;
} azq_block_q3_k;

/* Q4_K: 8 groups of 32, w = d * s[g] * q - dmin * m[g]. Byte 32i + l of qs: weight 64i + l low, 64i + 32 + l
 * high. Six-bit s and m in 12 bytes:
 *
 *   byte   0..3   s[g] | high two bits of s[g + 4] << 6          g = 0..3
 *   byte   4..7   m[g] | high two bits of m[g + 4] << 6
 *   byte   8..11  low four bits of s[g + 4] | low four of m[g + 4] << 4
 */
typedef struct {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qs[128];
} azq_block_q4_k;

/* Q5_K: as Q4_K, and bit 4 of weight 32i + l is bit i of qh[l]. */
typedef struct {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
} azq_block_q5_k;

/* Q6_K: 16 groups of 16, w = d * scales[g] * (q - 32). For half h, s = 0..3, l < 32, weight 128h + 32s + l:
 * low four bits in nibble s / 2 of ql[64h + 32 (s % 2) + l], high two in bits 2s of qh[32h + l]. */
typedef struct {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
} azq_block_q6_k;

/* Q8_K: w = q * d, d fp32; what runtimes turn activations into, hardly met in files. */
typedef struct {
    float d;
    int8_t qs[256];
    int16_t bsums[16]; /* sums of 16 */
} azq_block_q8_k;

/* IQ4_XS: 8 groups of 32 over IQ4_NL's table, w = d * (s[g] - 32) * table[q]; nibbles per group as in Q4_0.
 * s[g]: low four bits in nibble g % 2 of scales_l[g / 2], high two in bits 2g of scales_h. */
typedef struct {
    uint16_t d;
    uint16_t scales_h;
    uint8_t scales_l[4];
    uint8_t qs[128];
} azq_block_iq4_xs;

/* TQ1_0: w = (t - 1) * d, five ternary digits t in a byte: the byte is ceil(256 * number / 243), and digit n
 * comes out as (byte * 3^n mod 256) * 3 >> 8. qs: byte m < 32 holds weights m + 32n, byte 32 + m (m < 16)
 * weights 160 + m + 16n, qh[m] weights 240 + m + 4n (n < 4). TQ2_0: w = (q - 1) * d in two bits. */
typedef struct {
    uint8_t qs[48];
    uint8_t qh[4];
    uint16_t d;
} azq_block_tq1_0;
typedef struct {
    uint8_t qs[64];
    uint16_t d;
} azq_block_tq2_0;

/* ---- codebook types: 8 or 4 magnitudes at once from a table (azq_codebooks.h), signs apart -------- */

/* Seven bits give eight signs: the eighth makes their number even. */

/* IQ2_XXS: per 32 weights four bytes of indices, then a word of 4 x 7 sign bits and a scale s in the top four
 * bits; w = d * (s + 0.5) / 4 * magnitude. */
typedef struct {
    uint16_t d;
    uint8_t qs[64];
} azq_block_iq2_xxs;

/* IQ2_XS: nine bits of index and seven of signs in a word; a scale per 16 weights in scales' nibbles. */
typedef struct {
    uint16_t d;
    uint16_t qs[32];
    uint8_t scales[8];
} azq_block_iq2_xs;

/* IQ2_S: 32 low bytes of indices, 32 bytes of signs; two more index bits each in qh. */
typedef struct {
    uint16_t d;
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t scales[8];
} azq_block_iq2_s;

/* IQ3_XXS: 64 bytes of indices to four magnitudes, then eight words of signs and scale as in IQ2_XXS;
 * w = d * (s + 0.5) / 2 * magnitude. */
typedef struct {
    uint16_t d;
    uint8_t qs[96];
} azq_block_iq3_xxs;

/* IQ3_S: w = d * (2 s + 1) * magnitude, s per 32 weights in scales' nibbles; bit 8 of index j is bit j % 8 of
 * qh[j / 8]. */
typedef struct {
    uint16_t d;
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t signs[32];
    uint8_t scales[4];
} azq_block_iq3_s;

/* IQ1_S: w = d * (2 s + 1) * (v +- 1/8), v in -1, 0, 1. qh per 32 weights: 4 x 3 index bits, s in bits 12..14,
 * the sign of the eighth in bit 15. */
typedef struct {
    uint16_t d;
    uint8_t qs[32];
    uint16_t qh[8];
} azq_block_iq1_s;

/* IQ1_M: as IQ1_S with s per 16 weights and a shift per 8; d lies in the top nibbles of the four scale words. */
typedef struct {
    uint8_t qs[32];
    uint8_t qh[16];    /* nibble: three index bits, then the shift's sign */
    uint16_t scales[4]; /* 3 bits each, four to a word */
} azq_block_iq1_m;

#endif
