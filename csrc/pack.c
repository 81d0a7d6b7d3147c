/* Matrices and their packed form (the layout is drawn in azq_kernels.h). */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "matrix.h"
#include "packed_types.h"
#include "threads.h"

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
        azq_weights_free(atomic_load(&w->packed));
        free(w);
    }
}

int64_t azq_head_bytes(int type) {
    switch (type) {
    case AZQ_TYPE_Q4_0:
    case AZQ_TYPE_Q8_0: return AZQ_PANEL * 2;
    case AZQ_TYPE_Q6_K: return AZQ_PANEL * 4;
    default: return AZQ_PANEL * azq_packed_type_of(type).head_bytes;
    }
}

int64_t azq_line_bytes(int type) {
    switch (type) {
    case AZQ_TYPE_Q4_0: return 256;
    case AZQ_TYPE_Q8_0: return 512;
    case AZQ_TYPE_Q6_K: return 384;
    default: {
        azq_packed_type shape = azq_packed_type_of(type);
        return AZQ_PANEL * 4 * (shape.low_bits + (shape.high_bit != 0));
    }
    }
}

int64_t azq_super_bytes(int type, int64_t k) {
    return (k / AZQ_QK_K * AZQ_PANEL * azq_packed_type_of(type).super_bytes + 63) / 64 * 64;
}

int azq_has_packed(int type) { return azq_head_bytes(type) > 0; }
int azq_has_int8(int type) { return azq_has_packed(type); }

int64_t azq_panel_bytes(int type, int64_t k) {
    int64_t bytes = k / 32 * (azq_head_bytes(type) + azq_line_bytes(type));
    return azq_super_bytes(type, k) + (bytes + 63) / 64 * 64;
}

/* Called for every block of 32 of a row, to fill either side from the other. row: the row's bytes as GGUF has
 * them; head, lines: the block's in the panel; column: the row's place there. */
typedef void visit_block_fn(uint8_t *row, int64_t block, uint8_t *head, uint8_t *lines, int column);

/* Weight k of a Q4_0 block lies in byte k % 16 of qs, high nibble for k >= 16. Packed, byte j of dword i
 * holds weights 8i + order[j] (low) and 8i + order[4 + j] (high). With one weight per byte of x, shifting by
 * 12 bits lays weight k + 2 beside weight k; bytes 0, 4, 1, 5 are then the dword. */
static uint32_t nibble_dword(uint64_t x) {
    uint64_t y = x | x >> 12;
    uint32_t a = (uint32_t)y, b = (uint32_t)(y >> 32);
    return (a & 0xffu) | (b & 0xffu) << 8 | (a & 0xff00u) << 8 | (b & 0xff00u) << 16;
}

static void pack_q4_0(uint8_t *row, int64_t block, uint8_t *head, uint8_t *packed, int column) {
    const uint8_t *file = row + block * (int64_t)sizeof(azq_block_q4_0);
    memcpy(head + 2 * column, file, 2);
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

static void unpack_q4_0(uint8_t *row, int64_t block, uint8_t *head, uint8_t *packed, int column) {
    uint8_t *file = row + block * (int64_t)sizeof(azq_block_q4_0);
    memcpy(file, head + 2 * column, 2);
    for (int half = 0; half < 2; half++) {
        uint32_t low, high;
        memcpy(&low, packed + 64 * half + 4 * column, 4);
        memcpy(&high, packed + 64 * (half + 2) + 4 * column, 4);
        uint64_t bytes = nibble_octet(low) | nibble_octet(high) << 4;
        memcpy(file + 2 + 8 * half, &bytes, 8);
    }
}

/* Bytes 0, 4, 1, 5 of x; shift it by 16 bits for 2, 6, 3, 7. */
static uint32_t byte_dword(uint64_t x) {
    uint32_t a = (uint32_t)x, b = (uint32_t)(x >> 32);
    return (a & 0xffu) | (b & 0xffu) << 8 | (a & 0xff00u) << 8 | (b & 0xff00u) << 16;
}

static void pack_q8_0(uint8_t *row, int64_t block, uint8_t *head, uint8_t *packed, int column) {
    const uint8_t *file = row + block * (int64_t)sizeof(azq_block_q8_0);
    memcpy(head + 2 * column, file, 2);
    for (int run = 0; run < 4; run++) {
        uint64_t x;
        memcpy(&x, file + 2 + 8 * run, 8);
        uint32_t first = byte_dword(x), second = byte_dword(x >> 16);
        memcpy(packed + 64 * (2 * run) + 4 * column, &first, 4);
        memcpy(packed + 64 * (2 * run + 1) + 4 * column, &second, 4);
    }
}

static void unpack_q8_0(uint8_t *row, int64_t block, uint8_t *head, uint8_t *packed, int column) {
    uint8_t *file = row + block * (int64_t)sizeof(azq_block_q8_0);
    memcpy(file, head + 2 * column, 2);
    for (int k = 0; k < 32; k++) {
        file[2 + (k & ~7) + azq_lane_order[k & 7]] = packed[64 * (k >> 2) + 4 * column + (k & 3)];
    }
}

/* Where the 32 weights of block `block` stand in their super-block of 256: low four bits in one nibble of 32
 * bytes of ql, high two bits in bits `shift` of 32 bytes of qh, and two scales. */
typedef struct {
    uint8_t *ql, *qh, *scales, *d;
    int nibble, shift;
} q6_k_place;

static q6_k_place find_q6_k(uint8_t *row, int64_t block) {
    azq_block_q6_k *super = (azq_block_q6_k *)(void *)(row + block / 8 * (int64_t)sizeof(azq_block_q6_k));
    int half = (int)(block % 8) / 4, quarter = (int)(block % 4);
    return (q6_k_place){super->ql + 64 * half + 32 * (quarter & 1),
                        super->qh + 32 * half,
                        (uint8_t *)super->scales + 8 * half + 2 * quarter,
                        (uint8_t *)&super->d,
                        quarter < 2 ? 0 : 4,
                        2 * quarter};
}

static void pack_q6_k(uint8_t *row, int64_t block, uint8_t *head, uint8_t *packed, int column) {
    q6_k_place at = find_q6_k(row, block);
    memcpy(head + 2 * column, at.d, 2);
    head[32 + column] = at.scales[0];
    head[48 + column] = at.scales[1];
    uint32_t high[2] = {0, 0};
    for (int run = 0; run < 4; run++) {
        uint64_t low, bits;
        memcpy(&low, at.ql + 8 * run, 8);
        memcpy(&bits, at.qh + 8 * run, 8);
        uint32_t dword = nibble_dword(low >> at.nibble & 0x0f0f0f0f0f0f0f0fu);
        memcpy(packed + 64 * run + 4 * column, &dword, 4);
        bits = bits >> at.shift & 0x0303030303030303u;
        high[run / 2] |= byte_dword(bits) << 4 * (run % 2) | byte_dword(bits >> 16) << (4 * (run % 2) + 2);
    }
    memcpy(packed + 256 + 4 * column, &high[0], 4);
    memcpy(packed + 320 + 4 * column, &high[1], 4);
}

static void unpack_q6_k(uint8_t *row, int64_t block, uint8_t *head, uint8_t *packed, int column) {
    q6_k_place at = find_q6_k(row, block);
    memcpy(at.d, head + 2 * column, 2);
    at.scales[0] = head[32 + column];
    at.scales[1] = head[48 + column];
    for (int k = 0; k < 32; k++) {
        int run = k / 8, i = k % 8, operand = 2 * run + i / 4;
        unsigned low = packed[64 * run + 4 * column + i % 4] >> 4 * (i / 4) & 15u;
        unsigned high = packed[256 + 64 * (operand / 4) + 4 * column + i % 4] >> 2 * (operand % 4) & 3u;
        int to = 8 * run + azq_lane_order[i];
        at.ql[to] = (uint8_t)((at.ql[to] & (0xf0u >> at.nibble)) | low << at.nibble);
        at.qh[to] = (uint8_t)((at.qh[to] & ~(3u << at.shift)) | high << at.shift);
    }
}

typedef struct {
    visit_block_fn *pack, *unpack;
    uint8_t zero; /* of which lines of weight 0 are made */
} packed_form;

static packed_form form_of(int type) {
    switch (type) {
    case AZQ_TYPE_Q4_0: return (packed_form){pack_q4_0, unpack_q4_0, 0x88};
    case AZQ_TYPE_Q6_K: return (packed_form){pack_q6_k, unpack_q6_k, 0};
    case AZQ_TYPE_Q8_0: return (packed_form){pack_q8_0, unpack_q8_0, 0};
    default: return (packed_form){NULL, NULL, 0}; /* see packed_types.h */
    }
}

/* Fills one row's place in a panel from its GGUF bytes or, `back`, the other way. */
static void visit_row(const azq_matrix *w, uint8_t *row, uint8_t *panel, int column, int back) {
    int64_t n_blocks = w->k / 32, head_bytes = azq_head_bytes(w->type), line_bytes = azq_line_bytes(w->type);
    visit_block_fn *visit = back ? form_of(w->type).unpack : form_of(w->type).pack;
    uint8_t *group = panel + azq_super_bytes(w->type, w->k);
    for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {
        int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;
        uint8_t *lines = group + in_group * head_bytes;
        for (int64_t b = 0; b < in_group; b++) {
            uint8_t *head = group + b * head_bytes, *line = lines + b * line_bytes;
            if (visit) {
                visit(row, g + b, head, line, column);
            } else if (back) {
                azq_unpack_block(w->type, row, g + b, head, line, column);
            } else {
                azq_pack_block(w->type, row, g + b, head, line, column);
            }
        }
        group = lines + in_group * line_bytes;
    }
    if (!visit && back) {
        azq_unpack_supers(w->type, row, w->k / AZQ_QK_K, panel, column);
    } else if (!visit) {
        azq_pack_supers(w->type, row, w->k / AZQ_QK_K, panel, column);
    }
}

static void visit_panel(const azq_matrix *w, int64_t panel, uint8_t *file, uint8_t *packed, int back) {
    int64_t columns = w->n - panel * AZQ_PANEL < AZQ_PANEL ? w->n - panel * AZQ_PANEL : AZQ_PANEL;
    for (int64_t n = 0; n < columns; n++) {
        visit_row(w, file + (panel * AZQ_PANEL + n) * w->row_bytes, packed + panel * w->panel_bytes, (int)n, back);
    }
}

/* Columns that W lacks: scale 0 (and weight 0 where that is one byte), so that they never make a NaN. */
static void fill_padding(const azq_matrix *w, uint8_t *packed) {
    int64_t n_blocks = w->k / 32, panel = w->n / AZQ_PANEL;
    int64_t head_bytes = azq_head_bytes(w->type), line_bytes = azq_line_bytes(w->type);
    uint8_t *group = packed + panel * w->panel_bytes;
    memset(group, 0, (size_t)azq_super_bytes(w->type, w->k));
    group += azq_super_bytes(w->type, w->k);
    for (int64_t g = 0; g < n_blocks; g += AZQ_GROUP) {
        int64_t in_group = n_blocks - g < AZQ_GROUP ? n_blocks - g : AZQ_GROUP;
        memset(group, 0, (size_t)(in_group * head_bytes));
        uint8_t *lines = group + in_group * head_bytes;
        memset(lines, form_of(w->type).zero, (size_t)(in_group * line_bytes));
        group = lines + in_group * line_bytes;
    }
}

typedef struct {
    const azq_matrix *w;
    uint8_t *file, *packed;
    int back;
} visit_job;

static void visit_task(void *context, int64_t task, int worker) {
    (void)worker;
    const visit_job *job = context;
    visit_panel(job->w, task, job->file, job->packed, job->back);
}

/* Fills `packed` (whole panels) from GGUF bytes. */
static void pack_into(const azq_matrix *w, const uint8_t *data, uint8_t *packed) {
    if (w->n % AZQ_PANEL) {
        fill_padding(w, packed);
    }
    visit_job job = {w, (uint8_t *)(uintptr_t)data, packed, 0};
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
    uint8_t *packed = azq_weights_alloc((size_t)((w->n + AZQ_PANEL - 1) / AZQ_PANEL * w->panel_bytes));
    if (!packed) {
        return AZQ_E_NOMEM;
    }
    pack_into(w, w->data, packed);
    uint8_t *expected = NULL;
    if (!atomic_compare_exchange_strong(&w->packed, &expected, packed)) {
        azq_weights_free(packed); /* another thread was faster */
    }
    return AZQ_OK;
}

azq_status azq_matrices_pack(azq_matrix *const *w, int64_t count) {
    if (!w && count > 0) {
        return AZQ_E_NULL;
    }
    azq_status status = AZQ_OK;
    for (int64_t i = 0; i < count && status == AZQ_OK; i++) {
        status = azq_matrix_pack(w[i]);
    }
    return status;
}

int64_t azq_matrix_packed_bytes(const azq_matrix *w) {
    return w && atomic_load(&w->packed) ? (w->n + AZQ_PANEL - 1) / AZQ_PANEL * w->panel_bytes : 0;
}

static void unpack_from(const azq_matrix *w, const uint8_t *packed, uint8_t *dst) {
    visit_job job = {w, dst, (uint8_t *)(uintptr_t)packed, 1};
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
    visit_row(w, buffer, panel + row / AZQ_PANEL * w->panel_bytes, (int)(row % AZQ_PANEL), 1);
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
