#ifndef AZQ_AMX_H
#define AZQ_AMX_H
#include "azq_kernels.h"
/* Whether AMX may be used on a processor that has it. */

/* Asks the operating system for the tile registers and has the kernel multiply a few tiles, once. NULL, or why it
 * must not be used, in words. */
const char *azq_amx_refusal(void);

/* Whether the kernels multiply bf16 tiles as the definition does, within rounding: every shape of tile blocks. */
int azq_bf16_agrees(const azq_kernel_slots *kernels);

#endif
