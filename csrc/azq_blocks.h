#ifndef AZQ_BLOCKS_H
#define AZQ_BLOCKS_H
#include <stdint.h>
/* Block layouts of the ggml tensor types, as they lie in a GGUF file (little-endian, unpadded).
 * This is the only place that states them. The build script hands it to cffi after dropping the
 * include and guard lines, so it holds plain declarations only. */

/* Type numbers of GGUF. */
enum {
    AZQ_TYPE_F32 = 0,
    AZQ_TYPE_F16 = 1,
    AZQ_TYPE_Q4_0 = 2,
    AZQ_TYPE_Q8_0 = 8,
    AZQ_TYPE_BF16 = 30,
    AZQ_TYPE_COUNT = 43
};

/* Q4_0: 32 weights, 4 bits each, w = (q - 8) * d.
 *
 *   byte      0    1    2          3                17
 *           +---------+----------+----------+-- --+-----------+
 *           |  d fp16 | w16 | w0 | w17 | w1 | ... | w31 | w15 |      high nibble | low nibble
 *           +---------+----------+----------+-- --+-----------+
 */
#define AZQ_QK4_0 32
typedef struct {
    uint16_t d;     /* scale, fp16 */
    uint8_t qs[16]; /* qs[j]: weight j in the low nibble, weight j + 16 in the high one */
} azq_block_q4_0;

/* Q8_0: 32 weights, 8 bits each, w = q * d. */
#define AZQ_QK8_0 32
typedef struct {
    uint16_t d; /* scale, fp16 */
    int8_t qs[32];
} azq_block_q8_0;

#endif
