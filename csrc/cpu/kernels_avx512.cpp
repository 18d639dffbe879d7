// The kernels for AVX-512 (F, BW, DQ, VL).
#include "isa.h"
#if FUSED_VSE_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

// GCC 12 warns of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define VEC_BYTES 64
FUSED_VSE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
#include "kernels.inl"
#include "search.inl"

namespace fused_vse {
extern const Kernels<float>* const KERNELS_AVX512_F32 = &TABLE<float>;
extern const Kernels<double>* const KERNELS_AVX512_F64 = &TABLE<double>;
extern const SearchKernels* const SEARCH_KERNELS_AVX512 = &SEARCH_TABLE;
}  // namespace fused_vse
FUSED_VSE_TARGET_END
#endif
