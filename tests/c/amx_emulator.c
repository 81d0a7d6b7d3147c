/* Intel 64 and IA-32 Architectures Software Developer's Manual, volumes 1 (chapter "Programming with Intel AMX") and
 * 2 (the instructions' pages; section "Instruction format" for VEX, ModRM, SIB). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* REG_RAX and its like */
#endif
#include "amx_emulator.h"

#if defined(__x86_64__) && defined(__linux__)
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

/* TILECFG, as ldtilecfg reads it. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* A thread's AMX state. */
static _Thread_local tile_config config;
static _Thread_local uint8_t tiles[TILES][ROWS][ROW_BYTES];

static _Atomic long count;
static _Atomic int fault;

/* Only what a signal handler may call. */
static void require(int ok, const char *what) {
    if (!ok) {
        static const char prefix[] = "amx_emulator: ";
        (void)!write(2, prefix, sizeof prefix - 1);
        (void)!write(2, what, strlen(what));
        (void)!write(2, "\n", 1);
        _exit(3);
    }
}

/* ---- the instructions ---------------------------------------------------------------------------- */

static void load_config(const tile_config *from) {
    tile_config new;
    memcpy(&new, from, sizeof new);
    require(new.palette <= 1, "ldtilecfg: palette above 1 faults");
    for (int i = 0; i < 14; i++) {
        require(new.reserved[i] == 0, "ldtilecfg: a reserved byte that is not 0 faults");
    }
    for (int t = 0; t < 16; t++) {
        require(new.row_bytes[t] <= ROW_BYTES && new.rows[t] <= ROWS, "ldtilecfg: a tile too large faults");
        require((new.row_bytes[t] == 0) == (new.rows[t] == 0), "ldtilecfg: rows without bytes fault");
        require(t < TILES || new.rows[t] == 0, "ldtilecfg: a tile above 7 faults");
    }
    config = new;
    memset(tiles, 0, sizeof tiles);
}

static void require_tile(int t) {
    require(config.palette == 1, "a tile instruction without a configuration faults");
    require(t < TILES && config.rows[t] > 0, "a tile that is not configured faults");
}

static void load_tile(int t, const uint8_t *base, int64_t stride) {
    require_tile(t);
    memset(tiles[t], 0, sizeof tiles[t]);
    for (int r = 0; r < config.rows[t]; r++) {
        memcpy(tiles[t][r], base + r * stride, config.row_bytes[t]);
    }
}

static void store_tile(int t, uint8_t *base, int64_t stride) {
    require_tile(t);
    for (int r = 0; r < config.rows[t]; r++) {
        memcpy(base + r * stride, tiles[t][r], config.row_bytes[t]);
    }
}

static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

static float bf16_at(const uint8_t *row, int i) {
    uint16_t half;
    memcpy(&half, row + 2 * i, sizeof half);
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

/* sums += a * b: the first products of all pairs in one chain, the second ones in another, then their sum. */
static void multiply(int sums, int a, int b) {
    require_tile(sums);
    require_tile(a);
    require_tile(b);
    require(sums != a && sums != b && a != b, "tdpbf16ps: equal tiles fault");
    require(config.row_bytes[sums] % 4 == 0 && config.row_bytes[a] % 4 == 0 && config.row_bytes[b] % 4 == 0 &&
                config.rows[sums] == config.rows[a] && config.row_bytes[a] / 4 == config.rows[b] &&
                config.row_bytes[sums] == config.row_bytes[b],
            "tdpbf16ps: shapes that do not fit fault");
    for (int m = 0; m < config.rows[sums]; m++) {
        float even[ROWS] = {0}, odd[ROWS] = {0};
        int columns = config.row_bytes[sums] / 4;
        for (int k = 0; k < config.row_bytes[a] / 4; k++) {
            for (int n = 0; n < columns; n++) {
                even[n] = flushed(fmaf(bf16_at(tiles[a][m], 2 * k), bf16_at(tiles[b][k], 2 * n), even[n]));
                odd[n] = flushed(fmaf(bf16_at(tiles[a][m], 2 * k + 1), bf16_at(tiles[b][k], 2 * n + 1), odd[n]));
            }
        }
        for (int n = 0; n < columns; n++) {
            float sum, products = flushed(even[n] + (fault == AMX_DROPS_ODD_PRODUCTS ? 0.0f : odd[n]));
            memcpy(&sum, tiles[sums][m] + 4 * n, sizeof sum);
            sum = fault == AMX_FORGETS_SUMS ? products : flushed(flushed(sum) + products);
            memcpy(tiles[sums][m] + 4 * n, &sum, sizeof sum);
        }
    }
}

/* ---- decoding ------------------------------------------------------------------------------------ */

static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

typedef struct {
    int64_t base;  /* base register plus displacement */
    int64_t index; /* scaled; what a tile load takes for its stride */
    int has_sib, rip_relative;
    const uint8_t *end;
} operand;

/* A memory operand; p stands behind ModRM. extend_x, extend_b: VEX.X and VEX.B, not inverted. */
static operand decode_memory(const uint8_t *p, int mod, int rm, int extend_x, int extend_b, const greg_t *gregs) {
    operand o = {0};
    int base = rm, no_base = 0;
    if (rm == 4) {
        uint8_t sib = *p++;
        int index = (sib >> 3 & 7) + 8 * extend_x;
        base = sib & 7;
        o.has_sib = 1;
        o.index = index == 4 ? 0 : gregs[registers[index]] * (1 << (sib >> 6));
        no_base = mod == 0 && base == 5;
    } else if (mod == 0 && rm == 5) {
        o.rip_relative = no_base = 1;
    }
    o.base = no_base ? 0 : gregs[registers[base + 8 * extend_b]];
    if (mod == 1) {
        o.base += (int8_t)*p++;
    } else if (mod == 2 || no_base) {
        int32_t displacement;
        memcpy(&displacement, p, sizeof displacement);
        o.base += displacement;
        p += sizeof displacement;
    }
    o.end = p;
    if (o.rip_relative) {
        o.base += (int64_t)(intptr_t)p;
    }
    return o;
}

static void on_illegal(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)info;
    greg_t *gregs = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *p = (const uint8_t *)(uintptr_t)gregs[REG_RIP];
    require(p[0] == 0xc4 && (p[1] & 0x1f) == 2, "an illegal instruction that is none of AMX's"); /* VEX, map 0F 38 */
    int extend_r = !(p[1] & 0x80), extend_x = !(p[1] & 0x40), extend_b = !(p[1] & 0x20);
    int wide = p[2] >> 7, vvvv = ~(p[2] >> 3) & 15, length = p[2] >> 2 & 1, prefix = p[2] & 3; /* 1: 66, 2: F3, 3: F2 */
    int opcode = p[3], mod = p[4] >> 6, reg = p[4] >> 3 & 7, rm = p[4] & 7;
    require(!wide && !length && !extend_r, "AMX instructions have W = 0, L = 0 and tiles 0 to 7");
    const uint8_t *end = p + 5;
    operand o = {0};
    if (mod != 3) {
        o = decode_memory(p + 5, mod, rm, extend_x, extend_b, gregs);
        end = o.end;
    }
    require(opcode == 0x5c || vvvv == 0, "vvvv is for products only");
    if (opcode == 0x49 && prefix == 0 && mod != 3 && reg == 0) {
        load_config((const tile_config *)(uintptr_t)o.base);
    } else if (opcode == 0x49 && prefix == 0 && p[4] == 0xc0) {
        memset(&config, 0, sizeof config);
        memset(tiles, 0, sizeof tiles);
    } else if (opcode == 0x49 && prefix == 3 && mod == 3 && rm == 0) {
        require_tile(reg);
        memset(tiles[reg], 0, sizeof tiles[reg]);
    } else if (opcode == 0x4b && prefix == 3 && o.has_sib) {
        load_tile(reg, (const uint8_t *)(uintptr_t)o.base, o.index);
    } else if (opcode == 0x4b && prefix == 2 && o.has_sib) {
        store_tile(reg, (uint8_t *)(uintptr_t)o.base, o.index);
    } else if (opcode == 0x5c && prefix == 2 && mod == 3 && !extend_b) {
        multiply(reg, rm, vvvv);
    } else {
        require(0, "an AMX instruction that the kernels are not known to use");
    }
    atomic_fetch_add(&count, 1);
    gregs[REG_RIP] = (greg_t)(uintptr_t)end;
}

static struct sigaction before;

int amx_emulator_start(void) {
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
    action.sa_sigaction = on_illegal;
    atomic_store(&count, 0);
    return sigaction(SIGILL, &action, &before) == 0;
}

void amx_emulator_stop(void) { sigaction(SIGILL, &before, NULL); }

long amx_emulator_count(void) { return atomic_load(&count); }

int amx_emulator_holds_tiles(void) { return config.palette != 0; }

void amx_emulator_break(amx_emulator_fault wanted) { atomic_store(&fault, (int)wanted); }

#else

int amx_emulator_start(void) { return 0; }
void amx_emulator_stop(void) {}
long amx_emulator_count(void) { return 0; }
int amx_emulator_holds_tiles(void) { return 0; }
void amx_emulator_break(amx_emulator_fault wanted) { (void)wanted; }

#endif
