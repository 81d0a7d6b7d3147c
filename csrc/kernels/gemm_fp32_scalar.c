/* The fp32 product for any machine; the compiler makes the lanes of whatever it has. */
#include "gemm_types.h"
#define AZQ_NAME(name) name##_scalar
#include "gemm_fp32_pairs.h"
#include "gemm_fp32.h"
