#include "cpu.h"
#include "azq_target.h"

#if AZQ_X86
#include <cpuid.h>

/* XCR0 says which register files the operating system saves; CPUID alone promises too much. */
static uint64_t xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

uint32_t azq_cpu_features(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return 0;
    }
    const uint32_t leaf1_needed = 1u << 12 /* FMA */ | 1u << 27 /* OSXSAVE */ | 1u << 28 /* AVX */ | 1u << 29 /* F16C */;
    if ((c & leaf1_needed) != leaf1_needed) {
        return 0;
    }
    uint64_t saved = xcr0();
    uint32_t b7, c7, d7;
    if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !(b7 & 1u << 5)) {
        return 0;
    }
    uint32_t features = AZQ_CPU_AVX2;
    uint32_t a71 = 0;
    if (a >= 1 && __get_cpuid_count(7, 1, &a71, &b, &c, &d) && (a71 & 1u << 4)) {
        features |= AZQ_CPU_AVXVNNI;
    }
    const uint32_t leaf7_needed = 1u << 16 /* F */ | 1u << 17 /* DQ */ | 1u << 30 /* BW */ | 1u << 31 /* VL */;
    if ((saved & 0xe6) == 0xe6 && (b7 & leaf7_needed) == leaf7_needed && (c7 & 1u << 1 /* VBMI */)) {
        features |= AZQ_CPU_AVX512;
        if (c7 & 1u << 11) {
            features |= AZQ_CPU_AVX512VNNI;
        }
        if (a71 & 1u << 5) {
            features |= AZQ_CPU_AVX512BF16;
        }
    }
    const uint32_t amx_needed = 1u << 22 /* BF16 */ | 1u << 24 /* TILE */;
    if ((saved & 0x60000) == 0x60000 && (d7 & amx_needed) == amx_needed) {
        features |= AZQ_CPU_AMXBF16;
    }
    return features;
}

#elif AZQ_ARM64 && defined(__linux__)
#include <sys/auxv.h>

/* The kernel's own bits (asm/hwcap.h), which old headers lack. */
uint32_t azq_cpu_features(void) {
    const unsigned long asimddp = 1ul << 20 /* of AT_HWCAP */, i8mm = 1ul << 13 /* of AT_HWCAP2 */;
    uint32_t features = AZQ_CPU_NEON;
    if (getauxval(AT_HWCAP) & asimddp) {
        features |= AZQ_CPU_DOTPROD;
    }
    if (getauxval(AT_HWCAP2) & i8mm) {
        features |= AZQ_CPU_I8MM;
    }
    return features;
}

#elif AZQ_ARM64 && defined(__APPLE__)
#include <sys/sysctl.h>

static int has(const char *name) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}

uint32_t azq_cpu_features(void) {
    uint32_t features = AZQ_CPU_NEON;
    if (has("hw.optional.arm.FEAT_DotProd")) {
        features |= AZQ_CPU_DOTPROD;
    }
    if (has("hw.optional.arm.FEAT_I8MM")) {
        features |= AZQ_CPU_I8MM;
    }
    return features;
}

#elif AZQ_ARM64

uint32_t azq_cpu_features(void) { return AZQ_CPU_NEON; }

#else

uint32_t azq_cpu_features(void) { return 0; }

#endif
