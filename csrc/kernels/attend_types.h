/* attend.h for both types of cache. The vectors are the including file's. */
#define AZQ_KV float
#define v_load_kv v_load
#define kv_value(x) (x)
#define AZQ_ATTEND(part) attend_f32_##part
#include "attend.h"

#define AZQ_KV uint16_t
#define v_load_kv v_load_f16
#define kv_value(x) azq_f16_to_f32(x)
#define AZQ_ATTEND(part) attend_f16_##part
#include "attend.h"

#define AZQ_ATTEND_SLOTS .attend_f32 = attend_f32_rows, .attend_f16 = attend_f16_rows
