/* Drives every slot of every kernel table that this machine can run, and the C API above them.
 *
 *   check [rounds [isa ...]]    one line per ISA and group, then "N passed, N failed"; exit code 1 on a failure
 *
 *   check bits                  prints bits.h
 *
 * Without names, ISAs that the machine lacks are skipped; one that is named must be there.
 *
 * The scalar kernels are the definition: every other ISA must give their bits. The scalar ones themselves are
 * held against golden hashes of ggml's reference quantizers (make_golden.py) and against sums in double. */
#include "check.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *isa, *name;
    long group_passed, group_failed, passed, failed;
} count;

void group_begin(const char *isa, const char *name) {
    count.isa = isa;
    count.name = name;
    count.group_passed = count.group_failed = 0;
}

void group_end(void) {
    printf("%-12s %-22s %8ld passed", count.isa, count.name, count.group_passed);
    printf(count.group_failed ? ", %ld FAILED\n" : "\n", count.group_failed);
    fflush(stdout);
    count.passed += count.group_passed;
    count.failed += count.group_failed;
}

int expect(int ok, const char *message, ...) {
    enum { MESSAGES = 8 };
    if (ok) {
        count.group_passed++;
    } else if (count.group_failed++ < MESSAGES) {
        va_list arguments;
        printf("  %s %s: ", count.isa, count.name);
        va_start(arguments, message);
        vprintf(message, arguments);
        va_end(arguments);
        printf("\n");
    }
    return ok;
}

/* ---- slots --------------------------------------------------------------------------------------- */

enum { SLOTS = sizeof(azq_kernel_slots) / sizeof(azq_find_bad_fn *) };
static unsigned char driven[SLOTS];

void drives_slot(size_t slot) { driven[slot] = 1; }

static void check_coverage(const char *isa, const azq_kernel_slots *slots) {
    azq_find_bad_fn *pointers[SLOTS];
    memcpy(pointers, slots, sizeof pointers);
    group_begin(isa, "every slot was driven");
    for (int i = 0; i < SLOTS; i++) {
        if (pointers[i]) {
            expect(driven[i], "slot %d is filled, but no check drives it", i);
        }
    }
    group_end();
}

/* ---- input --------------------------------------------------------------------------------------- */

uint64_t random_next(random_state *r) {
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int64_t random_below(random_state *r, int64_t n) { return (int64_t)(random_next(r) % (uint64_t)n); }

float random_float(random_state *r) { return (float)((int64_t)(random_next(r) >> 40) - (1 << 23)) * 0x1p-23f; }

static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float any_finite(random_state *r) {
    uint32_t bits;
    do {
        bits = (uint32_t)random_next(r);
    } while ((bits & 0x7f800000u) == 0x7f800000u);
    return from_bits(bits);
}

static float one_of(random_state *r, int pattern) {
    float x = random_float(r);
    int odd = (int)(random_next(r) & 1);
    switch (pattern) {
    case 0: return x + random_float(r) + random_float(r); /* like weights */
    case 1: return 0.0f;
    case 2: return odd ? -0.0f : 0.0f;
    case 3: return odd ? 0.75f : -0.75f;                           /* every element ties for the largest */
    case 4: return x * 0x1p-126f;                                  /* subnormal */
    case 5: return x * 0x1p-120f;                                  /* around where 1 / d overflows */
    case 6: return x * 524000.0f;                                  /* scales near fp16's largest */
    case 7: return x * 0x1.fffffep127f;                            /* near FLT_MAX */
    case 8: return (float)(random_below(r, 33) - 16) * 0.5f;       /* exact halves of Q4_0: scale 1 */
    case 9: return (float)(random_below(r, 509) - 254) * 0.5f;     /* of Q8_0 */
    case 10: return random_below(r, 40) ? x * 1e-3f : x * 100.0f;  /* outliers */
    case 11: return x * 1e-7f;                                     /* subnormal fp16 scales */
    default: return any_finite(r);
    }
}

void fill(random_state *r, int pattern, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        x[i] = one_of(r, pattern);
    }
    if (n && (pattern == 8 || pattern == 9)) { /* pin the scale of each block */
        for (int64_t i = random_below(r, 32); i < n; i += 32) {
            x[i] = pattern == 8 ? -8.0f : 127.0f;
        }
    }
    if (n && pattern == FINITE_PATTERNS) {
        static const uint32_t bad[] = {0x7fc00000u, 0xffc00001u, 0x7f800001u, 0x7f800000u, 0xff800000u};
        fill(r, (int)random_below(r, FINITE_PATTERNS), x, n);
        for (int64_t i = 0; i <= n / 100; i++) {
            x[random_below(r, n)] = from_bits(bad[random_below(r, 5)]);
        }
    }
}

void *input_new(int64_t n, size_t size, int64_t offset) {
    uint8_t *p = malloc((size_t)(n + offset) * size);
    if (!p) {
        exit(2);
    }
    return p + (size_t)offset * size;
}

void input_free(void *input, size_t size, int64_t offset) { free((uint8_t *)input - (size_t)offset * size); }

/* ---- output -------------------------------------------------------------------------------------- */

enum { GUARD = 128, GUARD_BYTE = 0xa5 };

guarded guarded_new(size_t bytes, size_t offset) {
    void *base;
    if (posix_memalign(&base, 64, GUARD + offset + bytes + GUARD) != 0) {
        exit(2);
    }
    memset(base, GUARD_BYTE, GUARD + offset + bytes + GUARD);
    return (guarded){base, (uint8_t *)base + GUARD + offset, bytes};
}

int guarded_intact(const guarded *g) {
    for (const uint8_t *p = g->base; p < g->data; p++) {
        if (*p != GUARD_BYTE) {
            return 0;
        }
    }
    for (int i = 0; i < GUARD; i++) {
        if (g->data[g->bytes + (size_t)i] != GUARD_BYTE) {
            return 0;
        }
    }
    return 1;
}

void guarded_free(guarded *g) { free(g->base); }

int same_floats(const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (memcmp(a + i, b + i, sizeof *a) != 0 && !(a[i] != a[i] && b[i] != b[i])) {
            return 0;
        }
    }
    return 1;
}

uint64_t fnv1a(const void *data, size_t bytes) {
    uint64_t value = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++) {
        value = (value ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    }
    return value;
}

int64_t block_elements(int type) {
    for (int64_t k = 1; k <= 256; k *= 2) {
        if (azq_row_bytes(type, k) > 0) {
            return k;
        }
    }
    return 0;
}

/* Whether the arguments from the second on name the ISA, or there are none. */
static int wanted(int argc, char **argv, const char *isa) {
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], isa) == 0) {
            return 1;
        }
    }
    return argc <= 2;
}

static int is_usable(const char *isa) {
    for (int i = 0; i < azq_isa_count(); i++) {
        if (strcmp(azq_isa_name(i), isa) == 0) {
            return azq_isa_usable(i);
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "bits") == 0) {
        print_bits();
        return 0;
    }
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    for (int i = 2; i < argc; i++) {
        if (!is_usable(argv[i])) {
            printf("%s: this machine has no such ISA\n", argv[i]);
            return 2;
        }
    }
    printf("%-12s is what dispatch chose\n", azq_isa_active());
    for (int i = 0; i < azq_isa_count(); i++) {
        const char *isa = azq_isa_name(i);
        if (!wanted(argc, argv, isa)) {
            continue;
        }
        if (!azq_isa_usable(i)) {
            printf("%-12s skipped: not on this machine\n", isa);
            continue;
        }
        if (azq_isa_use(isa) != AZQ_OK) {
            return 2;
        }
        memset(driven, 0, sizeof driven);
        check_blocks(isa, azq_active(), rounds);
        check_gemm(isa, azq_active(), rounds);
        check_bf16(isa, azq_active(), rounds);
        check_vectors(isa, azq_active(), rounds);
        check_coverage(isa, azq_active());
        check_golden(isa);
        check_api(isa);
        check_programs(isa);
        check_bits(isa);
    }
    check_amx(rounds);
    check_arguments();
    check_threads();
    printf("%ld passed, %ld failed\n", count.passed, count.failed);
    return count.failed != 0;
}
