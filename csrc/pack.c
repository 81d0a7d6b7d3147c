/* Matrices and their packed form (the layout is drawn in azq_kernels.h). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* MADV_HUGEPAGE */
#endif
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "matrix.h"
#include "threads.h"

/* ---- memory ------------------------------------------------------------------------------------- */

/* The allocation's size stands in the 64 bytes before it. */
enum { HEADER = 64, HUGE_PAGE = 2 << 20 };

void *azq_alloc(size_t bytes) {
    if (bytes > SIZE_MAX - HEADER - HUGE_PAGE) {
        return NULL;
    }
    size_t total = bytes + HEADER;
    size_t alignment = total >= HUGE_PAGE ? HUGE_PAGE : 64;
    total = (total + alignment - 1) / alignment * alignment;
    uint8_t *p = aligned_alloc(alignment, total);
    if (!p) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (alignment == HUGE_PAGE) {
        (void)madvise(p, total, MADV_HUGEPAGE); /* a wish; refusal changes nothing */
    }
#endif
    return p + HEADER;
}

void azq_free(void *p) {
    if (p) {
        free((uint8_t *)p - HEADER);
    }
}

/* ---- matrices ----------------------------------------------------------------------------------- */

azq_status azq_matrix_create(int type, const void *data, int64_t n, int64_t k, azq_matrix **out) {
    if (!out || (!data && n > 0 && k > 0)) {
        return AZQ_E_NULL;
    }
    *out = NULL;
    if (type < 0 || type >= AZQ_TYPE_COUNT || azq_row_bytes(type, 0) < 0) {
        return AZQ_E_TYPE;
    }
    int64_t row_bytes = azq_row_bytes(type, k);
    if (n < 0 || row_bytes < 0 || n > INT64_MAX / 8 / (row_bytes > 0 ? row_bytes : 1) || k > INT64_MAX / 64) {
        return AZQ_E_SHAPE;
    }
    azq_matrix *w = calloc(1, sizeof *w);
    if (!w) {
        return AZQ_E_NOMEM;
    }
    w->type = type;
    w->n = n;
    w->k = k;
    w->row_bytes = row_bytes;
    w->data = data;
    w->panel_bytes = azq_panel_bytes(type, k);
    *out = w;
    return AZQ_OK;
}

void azq_matrix_free(azq_matrix *w) {
    if (w) {
        azq_free(atomic_load(&w->packed));
        free(w);
    }
}

int64_t azq_group_bytes(int type, int64_t b) {
    switch (type) {
    case AZQ_TYPE_Q4_0: return b * (AZQ_PANEL * 2 + 256);
    case AZQ_TYPE_Q8_0: return b * (AZQ_PANEL * 2 + 512);
    default: return 0;
    }
}

int azq_has_packed(int type) { return azq_group_bytes(type, 1) > 0; }

int64_t azq_panel_bytes(int type, int64_t k) {
    int64_t bytes = azq_group_bytes(type, k / 32);
    return (bytes + 63) / 64 * 64;
}

/* Called for every block of a row, to fill either side from the other. */
typedef void visit_block_fn(uint8_t *file, uint8_t *scale, uint8_t *packed, int column);

/* file: the row's blocks as GGUF has them; column: the row's place in its panel. */
static void visit_row(const azq_matrix *w, uint8_t *file, uint8_t *panel, int column, visit_block_fn *visit) {
    int64_t n_blocks = w->k / 32;
    int64_t file_block = n_blocks ? w->row_bytes / n_blocks : 0;
    int64_t packed_block = azq_group_bytes(w->type, 1) - AZQ_PANEL * 2;
    uint8_t *group = panel;
    for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {
        int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;
        uint8_t *lines = group + in_group * AZQ_PANEL * 2;
        for (int64_t b = 0; b < in_group; b++) {
            visit(file + (g + b) * file_block, group + (b * AZQ_PANEL + column) * 2, lines + b * packed_block, column);
        }
        group = lines + in_group * packed_block;
    }
}

static void visit_panel(const azq_matrix *w, int64_t panel, uint8_t *file, uint8_t *packed, visit_block_fn *visit) {
    int64_t columns = w->n - panel * AZQ_PANEL < AZQ_PANEL ? w->n - panel * AZQ_PANEL : AZQ_PANEL;
    for (int64_t n = 0; n < columns; n++) {
        visit_row(w, file + (panel * AZQ_PANEL + n) * w->row_bytes, packed + panel * w->panel_bytes, (int)n, visit);
    }
}

/* Weight k of a Q4_0 block lies in byte k % 16 of qs, high nibble for k >= 16. Packed, byte j of dword i
 * holds weights 8i + order[j] (low) and 8i + order[4 + j] (high). With one weight per byte of x, shifting by
 * 12 bits lays weight k + 2 beside weight k; bytes 0, 4, 1, 5 are then the dword. */
static uint32_t nibble_dword(uint64_t x) {
    uint64_t y = x | x >> 12;
    uint32_t a = (uint32_t)y, b = (uint32_t)(y >> 32);
    return (a & 0xffu) | (b & 0xffu) << 8 | (a & 0xff00u) << 8 | (b & 0xff00u) << 16;
}

static void pack_q4_0(uint8_t *file, uint8_t *scale, uint8_t *packed, int column) {
    memcpy(scale, file, 2);
    for (int half = 0; half < 2; half++) {
        uint64_t bytes;
        memcpy(&bytes, file + 2 + 8 * half, 8);
        uint32_t low = nibble_dword(bytes & 0x0f0f0f0f0f0f0f0fu), high = nibble_dword(bytes >> 4 & 0x0f0f0f0f0f0f0f0fu);
        memcpy(packed + 64 * half + 4 * column, &low, 4);
        memcpy(packed + 64 * (half + 2) + 4 * column, &high, 4);
    }
}

/* The way back: eight weights of a dword, one per byte, in order. */
static uint64_t nibble_octet(uint32_t dword) {
    uint32_t low = dword & 0x0f0f0f0fu, high = dword >> 4 & 0x0f0f0f0fu;
    uint32_t first = (low & 0xffu) | (low >> 8 & 0xff00u) | (high & 0xffu) << 16 | (high & 0xff0000u) << 8;
    uint32_t second = (low >> 8 & 0xffu) | (low >> 16 & 0xff00u) | (high & 0xff00u) << 8 | (high & 0xff000000u);
    return (uint64_t)second << 32 | first;
}

static void unpack_q4_0(uint8_t *file, uint8_t *scale, uint8_t *packed, int column) {
    memcpy(file, scale, 2);
    for (int half = 0; half < 2; half++) {
        uint32_t low, high;
        memcpy(&low, packed + 64 * half + 4 * column, 4);
        memcpy(&high, packed + 64 * (half + 2) + 4 * column, 4);
        uint64_t bytes = nibble_octet(low) | nibble_octet(high) << 4;
        memcpy(file + 2 + 8 * half, &bytes, 8);
    }
}

/* Bytes 0, 4, 1, 5 of x in one dword, 2, 6, 3, 7 in the next. */
static void pack_q8_0(uint8_t *file, uint8_t *scale, uint8_t *packed, int column) {
    memcpy(scale, file, 2);
    for (int run = 0; run < 4; run++) {
        uint32_t a, b;
        memcpy(&a, file + 2 + 8 * run, 4);
        memcpy(&b, file + 2 + 8 * run + 4, 4);
        for (int odd = 0; odd < 2; odd++, a >>= 16, b >>= 16) {
            uint32_t dword = (a & 0xffu) | (b & 0xffu) << 8 | (a & 0xff00u) << 8 | (b & 0xff00u) << 16;
            memcpy(packed + 64 * (2 * run + odd) + 4 * column, &dword, 4);
        }
    }
}

static void unpack_q8_0(uint8_t *file, uint8_t *scale, uint8_t *packed, int column) {
    memcpy(file, scale, 2);
    for (int k = 0; k < 32; k++) {
        file[2 + (k & ~7) + azq_lane_order[k & 7]] = packed[64 * (k >> 2) + 4 * column + (k & 3)];
    }
}

/* Columns that W lacks: scale 0 and weight 0 (nibble 8), so that they never make a NaN. */
static void fill_padding(const azq_matrix *w, uint8_t *packed) {
    int64_t n_blocks = w->k / 32, panel = w->n / AZQ_PANEL;
    int64_t packed_block = azq_group_bytes(w->type, 1) - AZQ_PANEL * 2;
    uint8_t *group = packed + panel * w->panel_bytes;
    for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {
        int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;
        memset(group, 0, (size_t)(in_group * AZQ_PANEL * 2));
        uint8_t *lines = group + in_group * AZQ_PANEL * 2;
        memset(lines, w->type == AZQ_TYPE_Q4_0 ? 0x88 : 0, (size_t)(in_group * packed_block));
        group = lines + in_group * packed_block;
    }
}

typedef struct {
    const azq_matrix *w;
    uint8_t *file, *packed;
    visit_block_fn *visit;
} visit_job;

static void visit_task(void *context, int64_t task, int worker) {
    (void)worker;
    const visit_job *job = context;
    visit_panel(job->w, task, job->file, job->packed, job->visit);
}

/* Fills `packed` (whole panels) from GGUF bytes. */
static void pack_into(const azq_matrix *w, const uint8_t *data, uint8_t *packed) {
    if (w->n % AZQ_PANEL) {
        fill_padding(w, packed);
    }
    visit_job job = {w, (uint8_t *)(uintptr_t)data, packed, w->type == AZQ_TYPE_Q4_0 ? pack_q4_0 : pack_q8_0};
    azq_parallel((w->n + AZQ_PANEL - 1) / AZQ_PANEL, AZQ_MAX_THREADS, visit_task, &job);
}

azq_status azq_matrix_pack(azq_matrix *w) {
    if (!w) {
        return AZQ_E_NULL;
    }
    if (!azq_has_packed(w->type)) {
        return AZQ_E_TYPE;
    }
    if (atomic_load(&w->packed)) {
        return AZQ_OK;
    }
    uint8_t *packed = azq_alloc((size_t)((w->n + AZQ_PANEL - 1) / AZQ_PANEL * w->panel_bytes));
    if (!packed) {
        return AZQ_E_NOMEM;
    }
    pack_into(w, w->data, packed);
    uint8_t *expected = NULL;
    if (!atomic_compare_exchange_strong(&w->packed, &expected, packed)) {
        azq_free(packed); /* another thread was faster */
    }
    return AZQ_OK;
}

int64_t azq_matrix_packed_bytes(const azq_matrix *w) {
    return w && atomic_load(&w->packed) ? (w->n + AZQ_PANEL - 1) / AZQ_PANEL * w->panel_bytes : 0;
}

static void unpack_from(const azq_matrix *w, const uint8_t *packed, uint8_t *dst) {
    visit_job job = {w, dst, (uint8_t *)(uintptr_t)packed, w->type == AZQ_TYPE_Q4_0 ? unpack_q4_0 : unpack_q8_0};
    azq_parallel((w->n + AZQ_PANEL - 1) / AZQ_PANEL, AZQ_MAX_THREADS, visit_task, &job);
}

azq_status azq_matrix_unpack(const azq_matrix *w, void *dst) {
    if (!w || !dst) {
        return AZQ_E_NULL;
    }
    uint8_t *packed = atomic_load(&w->packed);
    if (!packed) {
        return AZQ_E_TYPE;
    }
    unpack_from(w, packed, dst);
    return AZQ_OK;
}

/* ---- weights that are only packed ---------------------------------------------------------------- */

const void *azq_matrix_row(const azq_matrix *w, int64_t row, uint8_t *buffer) {
    if (w->data) {
        return w->data + row * w->row_bytes;
    }
    uint8_t *panel = atomic_load_explicit(&((azq_matrix *)(uintptr_t)w)->packed, memory_order_relaxed);
    visit_row(w, buffer, panel + row / AZQ_PANEL * w->panel_bytes, (int)(row % AZQ_PANEL),
              w->type == AZQ_TYPE_Q4_0 ? unpack_q4_0 : unpack_q8_0);
    return buffer;
}

azq_status azq_matrix_borrow(int type, const void *packed, int64_t n, int64_t k, azq_matrix *out) {
    if (type < 0 || type >= AZQ_TYPE_COUNT || azq_row_bytes(type, 0) < 0) {
        return AZQ_E_TYPE;
    }
    int64_t row_bytes = azq_row_bytes(type, k);
    if (n < 0 || row_bytes < 0 || n > INT64_MAX / 64 / (row_bytes > 0 ? row_bytes : 1) || k > INT64_MAX / 64) {
        return AZQ_E_SHAPE;
    }
    *out = (azq_matrix){.type = type, .n = n, .k = k, .row_bytes = row_bytes, .panel_bytes = azq_panel_bytes(type, k)};
    if (azq_has_packed(type)) {
        atomic_init(&out->packed, (uint8_t *)(uintptr_t)packed);
    } else {
        out->data = packed;
    }
    return AZQ_OK;
}

int64_t azq_packed_bytes(int type, int64_t n, int64_t k) {
    azq_matrix w;
    if (azq_matrix_borrow(type, NULL, n, k, &w) != AZQ_OK) {
        return -1;
    }
    return azq_has_packed(type) ? (n + AZQ_PANEL - 1) / AZQ_PANEL * w.panel_bytes : n * w.row_bytes;
}

azq_status azq_pack(int type, const void *data, int64_t n, int64_t k, void *packed, int threads) {
    azq_matrix w;
    azq_status status = azq_matrix_borrow(type, packed, n, k, &w);
    if (status != AZQ_OK || n == 0 || k == 0) {
        return status;
    }
    if (!data || !packed) {
        return AZQ_E_NULL;
    }
    if (!azq_has_packed(type)) {
        memcpy(packed, data, (size_t)(n * w.row_bytes));
        return AZQ_OK;
    }
    azq_threads_here(threads);
    pack_into(&w, data, packed);
    azq_threads_here(0);
    return AZQ_OK;
}

azq_status azq_unpack(int type, const void *packed, int64_t n, int64_t k, void *data, int threads) {
    azq_matrix w;
    azq_status status = azq_matrix_borrow(type, packed, n, k, &w);
    if (status != AZQ_OK || n == 0 || k == 0) {
        return status;
    }
    if (!data || !packed) {
        return AZQ_E_NULL;
    }
    if (!azq_has_packed(type)) {
        memcpy(data, packed, (size_t)(n * w.row_bytes));
        return AZQ_OK;
    }
    azq_threads_here(threads);
    unpack_from(&w, packed, data);
    azq_threads_here(0);
    return AZQ_OK;
}
