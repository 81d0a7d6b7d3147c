/* Made by make_golden.py from libggml; do not edit. FNV-1a 64 of the blocks and of the values. */
enum { GOLDEN_ROWS = 256, GOLDEN_COLUMNS = 512 };
static const uint64_t golden_input_hash = 0x80e93c812f294f1fu;
static const struct {
    int type;
    uint64_t blocks, values;
} goldens[] = {
    {AZQ_TYPE_F32, 0x80e93c812f294f1fu, 0x80e93c812f294f1fu},
    {AZQ_TYPE_F16, 0x34e9a4c0475fe221u, 0x7c25b4a12680965eu},
    {AZQ_TYPE_Q4_0, 0xcda222a31354dc58u, 0xeda4622fa8485003u},
    {AZQ_TYPE_Q8_0, 0x0cf9cd3a19eb88e3u, 0x120ff54f86bc4852u},
    {AZQ_TYPE_BF16, 0xb7b1b433f3a03d16u, 0x1dd46c65b2298f9eu},
};
