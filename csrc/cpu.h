#ifndef AZQ_CPU_H
#define AZQ_CPU_H
#include <stdint.h>
/* What the processor offers and the operating system has enabled. */
enum {
    AZQ_CPU_AVX2 = 1 << 0,       /* AVX2, FMA, F16C, and the system saves ymm */
    AZQ_CPU_AVXVNNI = 1 << 1,    /* 256-bit VNNI, VEX-encoded */
    AZQ_CPU_AVX512 = 1 << 2,     /* F, BW, DQ, VL, VBMI, and the system saves zmm */
    AZQ_CPU_AVX512VNNI = 1 << 3, /* with AZQ_CPU_AVX512 */
    AZQ_CPU_AVX512BF16 = 1 << 4, /* with AZQ_CPU_AVX512 */
    AZQ_CPU_AMXBF16 = 1 << 5,    /* tiles and their bf16 product, and the system saves tiles; see amx.h */
    AZQ_CPU_NEON = 1 << 16,      /* aarch64 */
    AZQ_CPU_DOTPROD = 1 << 17,   /* sdot: Armv8.2 and later */
    AZQ_CPU_I8MM = 1 << 18       /* smmla: Armv8.6 and later */
};
uint32_t azq_cpu_features(void);
#endif
