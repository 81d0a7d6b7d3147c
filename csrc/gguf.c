/* GGUF metadata: the one loop over a file's header that grows with its vocabulary. */

#include "azq.h"

static uint64_t load_u64(const uint8_t *at, int big_endian) {
    uint64_t value = 0;
    if (big_endian)
        for (int i = 0; i < 8; i++) value = value << 8 | at[i];
    else
        for (int i = 7; i >= 0; i--) value = value << 8 | at[i]; /* one load where the machine allows */
    return value;
}

int64_t azq_gguf_strings(const void *data, int64_t end, int64_t offset, int64_t count, int big_endian,
                         int64_t *starts) {
    const uint8_t *bytes = data;
    int64_t at = offset; /* 0 <= at <= end throughout */
    if (!data || offset < 0 || offset > end || count < 0) return ~(int64_t)0;
    for (int64_t i = 0; i < count; i++) {
        if (end - at < 8) return ~at;
        uint64_t length = load_u64(bytes + at, big_endian);
        if (length > (uint64_t)(end - at - 8)) return ~at;
        if (starts) starts[i] = at;
        at += 8 + (int64_t)length;
    }
    if (starts) starts[count] = at;
    return at;
}
