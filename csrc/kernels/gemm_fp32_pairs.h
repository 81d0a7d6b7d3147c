/* Sixteen lanes as two of vec_types.h, for gemm_fp32.h. */
#include "vec_types.h"

typedef struct {
    v8 low, high;
} wide;

AZQ_INLINE wide w_zero(void) { return (wide){zero8(), zero8()}; }
AZQ_INLINE wide w_load(const float *p) { return (wide){load8(p), load8(p + 8)}; }
AZQ_INLINE void w_store(float *p, wide x) {
    store8(p, x.low);
    store8(p + 8, x.high);
}
AZQ_INLINE wide w_add_product(wide sum, wide a, wide b) {
    return (wide){sum.low + a.low * b.low, sum.high + a.high * b.high};
}
#define TILE_ROWS 3
#define TILE_COLUMNS 2
