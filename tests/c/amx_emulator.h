#ifndef AMX_EMULATOR_H
#define AMX_EMULATOR_H
/* The six AMX instructions that csrc/kernels/amx.c uses, for machines without AMX: a handler of SIGILL decodes the
 * instruction that failed, does what Intel's manual says it does, and goes on behind it. So the kernel's own machine
 * code is what is checked. Any other illegal instruction, or one that the manual makes fault, ends the program. */

/* 0 where this cannot be done (not x86-64 Linux). */
int amx_emulator_start(void);
void amx_emulator_stop(void);

/* Instructions emulated since the start, all threads together. */
long amx_emulator_count(void);

/* Whether the calling thread has tiles configured and not released. */
int amx_emulator_holds_tiles(void);

/* Makes a product wrong, as a broken machine would. */
typedef enum { AMX_RIGHT = 0, AMX_DROPS_ODD_PRODUCTS = 1, AMX_FORGETS_SUMS = 2 } amx_emulator_fault;
void amx_emulator_break(amx_emulator_fault fault);

#endif
