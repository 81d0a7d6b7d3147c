#include <stdatomic.h>
#include <string.h>
#include "amx.h"
#include "azq.h"
#include "azq_kernels.h"
#include "azq_target.h"
#include "cpu.h"

/* Plainest first. */
static const azq_kernels *const tables[] = {
    &azq_kernels_scalar,
#if AZQ_X86
    &azq_kernels_avx2,
    &azq_kernels_avxvnni,
    &azq_kernels_avx512vnni,
    &azq_kernels_avx512bf16,
    &azq_kernels_amx,
#elif AZQ_ARM64
    &azq_kernels_neon,
#if AZQ_ARM64_DOTPROD
    &azq_kernels_dotprod,
#endif
#if AZQ_ARM64_I8MM
    &azq_kernels_i8mm,
#endif
#endif
};
enum { N_TABLES = sizeof tables / sizeof *tables };

/* One merged table per ISA, filled on first use. Filling twice writes the same pointers, so a race
 * between two first calls is settled by the flag alone: only its winner fills. */
static azq_kernel_slots merged[N_TABLES];
static _Atomic int active = -1;
static atomic_flag merging = ATOMIC_FLAG_INIT;
static _Atomic int ready;

typedef void (*slot)(void);
enum { N_SLOTS = sizeof(azq_kernel_slots) / sizeof(slot) };
_Static_assert(sizeof(azq_kernel_slots) % sizeof(slot) == 0, "slots are function pointers only");

/* Asked once: in a virtual machine CPUID takes tens of microseconds. Bit 31 says that it was asked. */
static uint32_t features(void) {
    static _Atomic uint32_t known;
    uint32_t found = atomic_load_explicit(&known, memory_order_relaxed);
    if (!found) {
        found = azq_cpu_features() | UINT32_C(1) << 31;
        atomic_store_explicit(&known, found, memory_order_relaxed);
    }
    return found;
}

/* Why the ISA cannot be used; NULL when it can. */
static const char *refusal(int index) {
    uint32_t needs = tables[index]->needs;
    if ((features() & needs) != needs) {
        return "the processor lacks it, or the operating system has not enabled it";
    }
#if AZQ_X86
    if (needs & AZQ_CPU_AMXBF16) {
        return azq_amx_refusal();
    }
#endif
    return NULL;
}

static int usable(int index) { return refusal(index) == NULL; }

static void override_slots(azq_kernel_slots *below, const azq_kernel_slots *above) {
    slot lower[N_SLOTS], upper[N_SLOTS];
    memcpy(lower, below, sizeof lower);
    memcpy(upper, above, sizeof upper);
    for (int i = 0; i < N_SLOTS; i++) {
        if (upper[i]) {
            lower[i] = upper[i];
        }
    }
    memcpy(below, lower, sizeof lower);
}

static void prepare(void) {
    if (atomic_load_explicit(&ready, memory_order_acquire)) {
        return;
    }
    while (atomic_flag_test_and_set_explicit(&merging, memory_order_acquire)) {
    }
    if (!atomic_load_explicit(&ready, memory_order_relaxed)) {
        int best = 0;
        for (int i = 0; i < N_TABLES; i++) {
            if (i > 0) {
                merged[i] = merged[i - 1];
            }
            if (usable(i)) {
                override_slots(&merged[i], &tables[i]->slots);
                best = i;
            }
        }
        atomic_store(&active, best);
        atomic_store_explicit(&ready, 1, memory_order_release);
    }
    atomic_flag_clear_explicit(&merging, memory_order_release);
}

const azq_kernel_slots *azq_active(void) {
    prepare();
    return &merged[atomic_load_explicit(&active, memory_order_relaxed)];
}

const azq_kernels *azq_active_isa(void) {
    prepare();
    return tables[atomic_load_explicit(&active, memory_order_relaxed)];
}

/* The best table at or below the active one that fills the slot at this offset. */
static const char *provider(size_t offset) {
    prepare();
    for (int i = atomic_load(&active); i >= 0; i--) {
        slot filled;
        memcpy(&filled, (const char *)&tables[i]->slots + offset, sizeof filled);
        if (filled && usable(i)) {
            return tables[i]->isa;
        }
    }
    return NULL;
}

const char *azq_choice_isa(int type, int compute) {
    if (type < 0 || type >= AZQ_TYPE_COUNT) {
        return NULL;
    }
    switch (compute) {
    case AZQ_COMPUTE_INT8: return provider(offsetof(azq_kernel_slots, gemm) + (size_t)type * sizeof(slot));
    case AZQ_COMPUTE_BF16: return provider(offsetof(azq_kernel_slots, gemm_bf16));
    case AZQ_COMPUTE_FP32: return provider(offsetof(azq_kernel_slots, gemm_fp32[AZQ_TYPE_F32]));
    default: return NULL;
    }
}

int azq_isa_count(void) { return N_TABLES; }

const char *azq_isa_name(int index) { return index < 0 || index >= N_TABLES ? NULL : tables[index]->isa; }

int azq_isa_usable(int index) { return index >= 0 && index < N_TABLES && usable(index); }

const char *azq_isa_refusal(int index) {
    return index < 0 || index >= N_TABLES ? "azquant has no such instruction set" : refusal(index);
}

const char *azq_isa_active(void) {
    prepare();
    return tables[atomic_load(&active)]->isa;
}

azq_status azq_isa_use(const char *name) {
    if (!name) {
        return AZQ_E_NULL;
    }
    prepare();
    for (int i = 0; i < N_TABLES; i++) {
        if (strcmp(tables[i]->isa, name) == 0) {
            if (!usable(i)) {
                return AZQ_E_ISA;
            }
            atomic_store(&active, i);
            return AZQ_OK;
        }
    }
    return AZQ_E_ISA;
}

const char *azq_status_name(int status) {
    switch (status) {
    case AZQ_OK: return "AZQ_OK";
    case AZQ_E_NULL: return "AZQ_E_NULL";
    case AZQ_E_SHAPE: return "AZQ_E_SHAPE";
    case AZQ_E_TYPE: return "AZQ_E_TYPE";
    case AZQ_E_ISA: return "AZQ_E_ISA";
    case AZQ_E_INDEX: return "AZQ_E_INDEX";
    case AZQ_E_PROGRAM: return "AZQ_E_PROGRAM";
    case AZQ_E_NONFINITE: return "AZQ_E_NONFINITE";
    case AZQ_E_RANGE: return "AZQ_E_RANGE";
    case AZQ_E_NOMEM: return "AZQ_E_NOMEM";
    default: return "unknown azq_status";
    }
}
