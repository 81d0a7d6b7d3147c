/* AMX is used only after it has been asked for and tried. The trial is there because a wrong result would be silent,
 * and because tile state is young: hypervisors, emulators and kernels have had it wrong. It takes microseconds. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* syscall */
#endif
#include "amx.h"
#include <math.h>
#include <stdatomic.h>
#include <string.h>
#include "azq_half.h"
#include "azq_target.h"

enum { ROW_TILES = 3, PANELS = 2, K_TILES = 3, C_TILE = AZQ_TILE_ROWS * AZQ_PANEL };

/* Numbers of about equal size and either sign. */
static void fill(uint16_t *tiles, int64_t n, uint32_t seed) {
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        tiles[i] = azq_f32_to_bf16((float)(int32_t)seed * 0x1p-31f);
    }
}

/* Two calls, so that sums are begun and gone on with. */
static void multiply(const azq_kernel_slots *kernels, const uint16_t *a, const uint16_t *b, int64_t rows, int64_t panels,
                     float *c) {
    if (kernels->bf16_begin) {
        kernels->bf16_begin();
    }
    for (int64_t t = 0; t < K_TILES; t += K_TILES - 1) {
        kernels->gemm_bf16(a + t * AZQ_TILE, K_TILES * AZQ_TILE, rows, b + t * AZQ_TILE, K_TILES * AZQ_TILE, panels,
                           t ? 1 : K_TILES - 1, c, PANELS * C_TILE, t == 0);
    }
    if (kernels->bf16_end) {
        kernels->bf16_end();
    }
}

int azq_bf16_agrees(const azq_kernel_slots *kernels) {
    _Alignas(64) uint16_t a[ROW_TILES * K_TILES * AZQ_TILE], b[PANELS * K_TILES * AZQ_TILE];
    _Alignas(64) float got[ROW_TILES * PANELS * C_TILE], want[ROW_TILES * PANELS * C_TILE];
    fill(a, ROW_TILES * K_TILES * AZQ_TILE, 1);
    fill(b, PANELS * K_TILES * AZQ_TILE, 2);
    for (int64_t row_tiles = 1; row_tiles <= ROW_TILES; row_tiles++) {
        for (int64_t panels = 1; panels <= PANELS; panels++) {
            int64_t rows = row_tiles * AZQ_TILE_ROWS;
            memset(got, 0, sizeof got);
            memset(want, 0, sizeof want);
            multiply(kernels, a, b, rows, panels, got);
            multiply(&azq_kernels_scalar.slots, a, b, rows, panels, want);
            for (int i = 0; i < ROW_TILES * PANELS * C_TILE; i++) {
                if (!(fabsf(got[i] - want[i]) <= 1e-4f)) { /* 96 products, each below 1; rounding gives 1e-5 at most */
                    return 0;
                }
            }
        }
    }
    return 1;
}

#if AZQ_X86

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* arch_prctl(2): tile registers are given to a process that asks for them, all its threads at once. Refused by
 * kernels before 5.16, by some sandboxes, and where a thread's alternate signal stack could not hold them. */
static int permitted(void) {
    enum { ARCH_GET_XCOMP_PERM = 0x1022, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    uint64_t granted = 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 &&
           syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &granted) == 0 && granted >> XFEATURE_XTILEDATA & 1;
}
#else
static int permitted(void) { return 0; } /* nobody to ask */
#endif

const char *azq_amx_refusal(void) {
    enum { UNKNOWN, FINE, NOT_PERMITTED, WRONG };
    static _Atomic int known; /* two threads may both find out; they find the same */
    int found = atomic_load(&known);
    if (found == UNKNOWN) {
        found = !permitted() ? NOT_PERMITTED : azq_bf16_agrees(&azq_kernels_amx.slots) ? FINE : WRONG;
        atomic_store(&known, found);
    }
    switch (found) {
    case NOT_PERMITTED: return "the operating system does not let this process use tile registers (arch_prctl)";
    case WRONG: return "its products were wrong when tried at start";
    default: return NULL;
    }
}

#endif
