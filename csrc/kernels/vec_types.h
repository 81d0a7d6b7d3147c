#ifndef AZQ_VEC_TYPES_H
#define AZQ_VEC_TYPES_H
#include <stdint.h>
/* Eight fp32 lanes as a compiler vector: one register with AVX2, two without. Only static inline functions
 * pass it by value, so its calling convention never matters (-Wno-psabi). */
typedef float v8 __attribute__((vector_size(32)));
typedef float v8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));

#define AZQ_INLINE static inline __attribute__((always_inline, unused))

AZQ_INLINE v8 load8(const float *p) { return *(const v8_unaligned *)p; }
AZQ_INLINE void store8(float *p, v8 x) { *(v8_unaligned *)p = x; }
AZQ_INLINE v8 set8(float x) { return (v8){x, x, x, x, x, x, x, x}; }
AZQ_INLINE v8 zero8(void) { return (v8){0}; }
#endif
