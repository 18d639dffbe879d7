// Picks the kernels for the CPU at hand, once.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace fused_vse {

extern const Kernels<float>* const KERNELS_BASELINE_F32;
extern const Kernels<double>* const KERNELS_BASELINE_F64;
#if FUSED_VSE_X86
extern const Kernels<float>* const KERNELS_AVX2_F32;
extern const Kernels<double>* const KERNELS_AVX2_F64;
extern const Kernels<float>* const KERNELS_AVX512_F32;
extern const Kernels<double>* const KERNELS_AVX512_F64;
extern const SearchKernels* const SEARCH_KERNELS_AVX512;
#endif

namespace {

enum class Isa { BASELINE, AVX2, AVX512 };

// ATEN_CPU_CAPABILITY (default | avx2 | avx512) limits PyTorch's own kernels; it limits these, too.
Isa detect() {
#if FUSED_VSE_X86
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit && !std::strcmp(limit, "default")) return Isa::BASELINE;
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !(limit && !std::strcmp(limit, "avx2"))) return Isa::AVX512;
  if (avx2) return Isa::AVX2;
#endif
  return Isa::BASELINE;
}

Isa isa() {
  static const Isa value = detect();
  return value;
}

}  // namespace

#if FUSED_VSE_X86
#define FUSED_VSE_SELECT(suffix)                       \
  switch (isa()) {                                     \
    case Isa::AVX512: return *KERNELS_AVX512_##suffix; \
    case Isa::AVX2: return *KERNELS_AVX2_##suffix;     \
    case Isa::BASELINE: break;                         \
  }                                                    \
  return *KERNELS_BASELINE_##suffix
#else
#define FUSED_VSE_SELECT(suffix) return *KERNELS_BASELINE_##suffix
#endif

template <>
const Kernels<float>& kernels<float>() {
  FUSED_VSE_SELECT(F32);
}

template <>
const Kernels<double>& kernels<double>() {
  FUSED_VSE_SELECT(F64);
}

const SearchKernels* search_kernels() {
#if FUSED_VSE_X86
  // Every CPU with AMX has it, too.
  if (isa() == Isa::AVX512 && __builtin_cpu_supports("avx512bf16")) return SEARCH_KERNELS_AVX512;
#endif
  return nullptr;
}

}  // namespace fused_vse
