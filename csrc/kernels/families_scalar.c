/* The families compiled for any machine; the compiler makes the eight lanes of whatever it has. */
#define AZQ_NAME(name) name##_scalar
#define AZQ_LANES 8
#include "families.h"

#include "decode.h"
#include "encode_any.h"
#include "encode.h"
#include "search.h"
#include "kquants.h"
#include "weighted.h"
