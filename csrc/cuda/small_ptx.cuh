// The machine of the small-batch loss: its instructions that have no C++ form, and a thread block's place.
#pragma once

#include <cooperative_groups.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "small_plan.h"

namespace fused_vse::small {

// Four registers of a lane: the pairs of 16-bit elements that ldmatrix.x4 gives and mma takes.
struct Fragment {
  uint32_t pair[4];
};

// Copies 16 bytes to shared memory, or fills in zeros; both addresses are multiples of 16.
DEVICE void copy_async(void* shared, const void* global, bool zero) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(zero ? 0 : 16)
      : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `PENDING` groups of this thread's copies have arrived.
template <int PENDING>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and gets
// elements (l / 4, 2 (l % 4)) and the next of each matrix, or of its transpose.
template <bool TRANSPOSED>
DEVICE Fragment load_matrices(const void* row) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  Fragment out;
  uint32_t (&r)[4] = out.pair;
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  return out;
}

// c[0..3] += a b for a of 16 x 16 and b, half of a Fragment, of 16 x 8.
template <typename T>
DEVICE void multiply_add(float* c, const Fragment& a, const uint32_t* b) {
  const uint32_t (&x)[4] = a.pair;
  if constexpr (std::is_same_v<T, torch::headeronly::Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(b[0]), "r"(b[1]));
}

// A thread block, its place in the grid and in its cluster (of one block before sm_90).
template <typename Shared>
struct Block {
  Shared* shared;
  int rank, grid, cluster_rank, cluster_size;

  DEVICE Shared* peer(int cluster_rank) const {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, cluster_rank);
#else
    return shared;
#endif
  }
};

}  // namespace fused_vse::small
