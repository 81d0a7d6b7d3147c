#ifndef AZQ_TRANSPOSE_H
#define AZQ_TRANSPOSE_H
/* Four rows of four 32-bit words turned, in vectors that every machine of today has. */
typedef float azq_v4 __attribute__((vector_size(16)));
typedef float azq_v4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

static inline __attribute__((always_inline)) azq_v4 azq_load4(const void *p) {
    return *(const azq_v4_unaligned *)p;
}
static inline __attribute__((always_inline)) void azq_store4(void *p, azq_v4 x) { *(azq_v4_unaligned *)p = x; }

static inline __attribute__((always_inline)) void azq_transpose4(azq_v4 rows[4]) {
    azq_v4 ab_low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
    azq_v4 ab_high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
    azq_v4 cd_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
    azq_v4 cd_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    rows[1] = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    rows[2] = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    rows[3] = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

#endif
