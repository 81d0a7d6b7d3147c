/* ggml's own bytes: hashes made by make_golden.py from libggml. */
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include "golden.h"

/* The generator of make_golden.py. */
static void golden_input(float *x) {
    random_state r = {0x617a7175616e74u};
    for (int64_t i = 0; i < GOLDEN_ROWS * GOLDEN_COLUMNS; i++) {
        uint64_t z = random_next(&r);
        float mantissa = (float)((int64_t)(z >> 40) - (1 << 23));
        int odd = (int)(z & 1);
        switch (i / 32 % 16) {
        case 0: x[i] = 0.0f; break;
        case 1: x[i] = odd ? -0.0f : 0.0f; break;
        case 2: x[i] = odd ? -0.75f : 0.75f; break;
        case 3: x[i] = ldexpf(mantissa, -146); break;
        case 4: x[i] = ldexpf(mantissa, -8); break;
        case 5: x[i] = i % 32 ? ((float)(z & 255) - 128.0f) * 0.5f : -64.0f; break;
        case 6: x[i] = ldexpf(mantissa, -46); break;
        default: x[i] = ldexpf(mantissa, -23 - (int)(z & 7)); break;
        }
    }
}

void check_golden(const char *isa) {
    group_begin(isa, "golden bytes of ggml");
    enum { N = GOLDEN_ROWS * GOLDEN_COLUMNS };
    float *x = input_new(N, sizeof *x, 0), *y = input_new(N, sizeof *y, 0);
    uint8_t *blocks = input_new(N, sizeof *x, 0);
    golden_input(x);
    expect(fnv1a(x, N * sizeof *x) == golden_input_hash, "the generator differs from make_golden.py's");
    for (size_t i = 0; i < sizeof goldens / sizeof *goldens; i++) {
        int type = goldens[i].type;
        int64_t bad;
        azq_status status = azq_quantize(type, x, GOLDEN_ROWS, GOLDEN_COLUMNS, blocks, &bad);
        size_t bytes = (size_t)(GOLDEN_ROWS * azq_row_bytes(type, GOLDEN_COLUMNS));
        expect(status == AZQ_OK && fnv1a(blocks, bytes) == goldens[i].blocks, "type %d: not ggml's bytes", type);
        status = azq_dequantize(type, blocks, GOLDEN_ROWS, GOLDEN_COLUMNS, y);
        expect(status == AZQ_OK && fnv1a(y, N * sizeof *y) == goldens[i].values, "type %d: not ggml's values", type);
    }
    input_free(x, sizeof *x, 0);
    input_free(y, sizeof *y, 0);
    input_free(blocks, sizeof *x, 0);
    group_end();
}
