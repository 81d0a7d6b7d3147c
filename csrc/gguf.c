/* GGUF metadata: the loops over a file's header that grow with its vocabulary. */

#include <string.h>
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

/* The first space that is not the first byte. */
static uint8_t *divide(uint8_t *text, uint64_t length) {
    return length > 1 ? memchr(text + 1, ' ', (size_t)length - 1) : NULL;
}

int64_t azq_gguf_join(const void *data, int64_t end, int64_t offset, int64_t count, int big_endian, int halves,
                      uint8_t *out) {
    const uint8_t *bytes = data;
    uint8_t *to = out;
    int64_t at = offset;
    if (!data || !out || offset < 0 || offset > end || count < 0) return -1;
    for (int64_t i = 0; i < count; i++) {
        if (end - at < 8) return -1;
        uint64_t length = load_u64(bytes + at, big_endian);
        if (length > (uint64_t)(end - at - 8)) return -1;
        memcpy(to, bytes + at + 8, (size_t)length);
        if (memchr(to, 0, (size_t)length)) return -1;
        if (halves) {
            uint8_t *space = divide(to, length);
            if (!space) return -1;
            *space = 0;
        }
        to += length;
        *to++ = 0;
        at += 8 + (int64_t)length;
    }
    return to - out;
}
