// The kernels for AVX2 and FMA.
#include "isa.h"
#if FUSED_VSE_X86
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

#define VEC_BYTES 32
FUSED_VSE_TARGET_BEGIN("avx2,fma,bmi2")
#include "kernels.inl"

namespace fused_vse {
extern const Kernels<float>* const KERNELS_AVX2_F32 = &TABLE<float>;
extern const Kernels<double>* const KERNELS_AVX2_F64 = &TABLE<double>;
}  // namespace fused_vse
FUSED_VSE_TARGET_END
#endif
