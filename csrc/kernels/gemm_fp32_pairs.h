/* Sixteen numbers as two vectors of vec_types.h, for gemm_fp32.h; fma8(a, b, c) = a * b + c is the including file's. */
typedef struct {
    v8 low, high;
} wide;

AZQ_INLINE wide w_zero(void) { return (wide){zero8(), zero8()}; }
AZQ_INLINE wide w_set(float x) { return (wide){set8(x), set8(x)}; }
AZQ_INLINE wide w_load(const float *p) { return (wide){load8(p), load8(p + 8)}; }
AZQ_INLINE void w_store(float *p, wide x) {
    store8(p, x.low);
    store8(p + 8, x.high);
}
AZQ_INLINE wide w_add(wide a, wide b) { return (wide){a.low + b.low, a.high + b.high}; }
AZQ_INLINE wide w_add_product(wide sum, wide a, wide b) {
    return (wide){fma8(a.low, b.low, sum.low), fma8(a.high, b.high, sum.high)};
}
#define TILE_ROWS 3
#define TILE_COLUMNS 2
#define PLANE_ROWS 6
#define PLANE_WIDES 1
