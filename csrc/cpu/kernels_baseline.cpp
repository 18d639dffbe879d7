// The kernels for whatever the compiler targets by default (SSE2, NEON).
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

#define VEC_BYTES 16
#include "kernels.inl"

namespace fused_vse {
extern const Kernels<float>* const KERNELS_BASELINE_F32 = &TABLE<float>;
extern const Kernels<double>* const KERNELS_BASELINE_F64 = &TABLE<double>;
}  // namespace fused_vse
