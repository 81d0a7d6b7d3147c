/* The fp32 product for any machine; the compiler makes the lanes of whatever it has. */
#include <math.h>
#include "gemm_types.h"
#include "vec_types.h"
#define AZQ_NAME(name) name##_scalar
AZQ_INLINE v8 fma8(v8 a, v8 b, v8 c) {
    for (int i = 0; i < 8; i++) {
        c[i] = fmaf(a[i], b[i], c[i]);
    }
    return c;
}
#include "gemm_fp32_pairs.h"
#include "gemm_fp32.h"
