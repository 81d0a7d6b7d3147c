#ifndef AZQ_TARGET_H
#define AZQ_TARGET_H
/* Regions compiled for a given instruction set: one .so, one flag set, many ISAs. Functions in a region
 * may run only after dispatch has seen that the processor has it; nothing outside may be inlined from it. */

#define AZQ_PRAGMA(x) _Pragma(#x)

#if defined(__clang__)
#define AZQ_TARGET_BEGIN(isa) AZQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define AZQ_TARGET_END AZQ_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define AZQ_TARGET_BEGIN(isa) AZQ_PRAGMA(GCC push_options) AZQ_PRAGMA(GCC target(isa))
#define AZQ_TARGET_END AZQ_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define AZQ_X86 1
#else
#define AZQ_X86 0
#endif

/* clang 15 and before know the later instructions only where the whole file may use them. */
#if defined(__aarch64__) && defined(__AARCH64EL__) && defined(__GNUC__)
#define AZQ_ARM64 1
#else
#define AZQ_ARM64 0
#endif
#if AZQ_ARM64 && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD))
#define AZQ_ARM64_DOTPROD 1
#else
#define AZQ_ARM64_DOTPROD 0
#endif
#if AZQ_ARM64_DOTPROD && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_MATMUL_INT8))
#define AZQ_ARM64_I8MM 1
#else
#define AZQ_ARM64_I8MM 0
#endif

#endif
