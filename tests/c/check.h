#ifndef CHECK_H
#define CHECK_H
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <stddef.h>
#include <stdint.h>
#include "azq.h"
#include "azq_kernels.h"
/* What the check files share: counting, random input, guarded output. The check is single-threaded unless a
 * function says otherwise. */

/* ---- counting ----------------------------------------------------------------------------------- */

/* A group is one line of output: its ISA (or "-"), its name, how many checks passed. */
void group_begin(const char *isa, const char *name);
void group_end(void);
/* One check. The first few failures of a group print the message. Returns ok. */
int expect(int ok, const char *message, ...) __attribute__((format(printf, 2, 3)));

/* A slot of the kernel table that a group drives; main() fails for a filled slot that none drove. */
#define DRIVES(slot) drives_slot(offsetof(azq_kernel_slots, slot) / sizeof(azq_find_bad_fn *))
#define DRIVES_TYPE(slot, type) drives_slot(offsetof(azq_kernel_slots, slot) / sizeof(azq_find_bad_fn *) + (size_t)(type))
void drives_slot(size_t slot);

/* ---- input -------------------------------------------------------------------------------------- */

/* splitmix64; any value is a good seed. */
typedef struct {
    uint64_t state;
} random_state;
uint64_t random_next(random_state *r);
int64_t random_below(random_state *r, int64_t n); /* 0 .. n - 1 */
float random_float(random_state *r);              /* [-1, 1), 24 bits */

/* Kinds of float rows, each the home of some bug: ties of the largest magnitude, -0.0, subnormals, exact
 * halves, any bit pattern. All but the last are finite; the last has NaN or infinity somewhere. */
enum { PATTERNS = 14, FINITE_PATTERNS = 13 };
void fill(random_state *r, int pattern, float *x, int64_t n);

/* Exactly n elements of `size` bytes, `offset` elements off malloc's alignment, so that a sanitizer sees any
 * read past the end. Freed by input_free. */
void *input_new(int64_t n, size_t size, int64_t offset);
void input_free(void *input, size_t size, int64_t offset);

/* ---- output ------------------------------------------------------------------------------------- */

/* Memory for results between two runs of guard bytes, `offset` bytes off a 64-byte boundary. */
typedef struct {
    uint8_t *base, *data;
    size_t bytes;
} guarded;
guarded guarded_new(size_t bytes, size_t offset);
int guarded_intact(const guarded *g);
void guarded_free(guarded *g);

/* Equal bits, or both NaN (which NaN is nobody's promise). */
int same_floats(const float *a, const float *b, int64_t n);

/* FNV-1a, 64 bits. */
uint64_t fnv1a(const void *data, size_t bytes);

/* ---- the files ---------------------------------------------------------------------------------- */

/* Elements per block of a type that azq_row_bytes knows; 0 for others. */
int64_t block_elements(int type);

void check_blocks(const char *isa, const azq_kernel_slots *slots, int rounds);
void check_gemm(const char *isa, const azq_kernel_slots *slots, int rounds);
void check_bf16(const char *isa, const azq_kernel_slots *slots, int rounds);
/* AMX where the machine lacks it; see amx_emulator.h. */
void check_amx(int rounds);
void check_vectors(const char *isa, const azq_kernel_slots *slots, int rounds);
void check_golden(const char *isa);
void check_api(const char *isa);
void check_arguments(void);
void check_threads(void);
void check_programs(const char *isa);
void check_bits(const char *isa);
void print_bits(void);

/* The logits of check_program.c's model, whole prompt at once (freed by input_free(x, sizeof *x, 0)). */
float *program_logits(int compute, int kv_type, size_t *bytes);

#endif
