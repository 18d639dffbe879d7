// Compiles part of a file for another instruction set than the rest of the library. System headers must
// be included before: their inline functions would otherwise be compiled for it, too, and win at link time.
#pragma once

#if defined(__x86_64__)
#define FUSED_VSE_X86 1
#else
#define FUSED_VSE_X86 0
#endif

#define FUSED_VSE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FUSED_VSE_TARGET_BEGIN(isa) \
  FUSED_VSE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FUSED_VSE_TARGET_END FUSED_VSE_PRAGMA(clang attribute pop)
#else
#define FUSED_VSE_TARGET_BEGIN(isa) FUSED_VSE_PRAGMA(GCC push_options) FUSED_VSE_PRAGMA(GCC target(isa))
#define FUSED_VSE_TARGET_END FUSED_VSE_PRAGMA(GCC pop_options)
#endif
