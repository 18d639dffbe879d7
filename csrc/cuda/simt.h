// What a kernel needs of the machine, for a GPU. For a CPU that plays one thread block at a time, so that the
// tests run the kernel's own source without a GPU, tests/mirrors/simt_on_cpu.h has the same. Code between two
// barriers stands in for_each_thread, which is the current thread on a GPU and a loop on a CPU; what a thread
// keeps in registers across barriers is a PerThread; a warp's instructions are functions of whole PerThreads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#define SIMT __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SIMT inline
#define HOST_DEVICE inline
#endif

namespace fused_vse {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int THREADS = 256, LANES = 32;

// Four registers of a lane: the pairs of 16-bit elements that ldmatrix.x4 gives and mma takes.
struct Fragment {
  uint32_t pair[4];
};

}  // namespace fused_vse

#ifndef __CUDACC__
#include "simt_on_cpu.h"
#else

namespace fused_vse {

template <typename T>
struct PerThread {
  T value;
  SIMT T& operator[](int) { return value; }
};

template <typename F>
SIMT void for_each_thread(const F& f) {
  f(int(threadIdx.x));
}

SIMT void block_sync() { __syncthreads(); }

// Whether any thread's flag is set; a barrier too.
SIMT bool any_thread(PerThread<bool>& flag) { return __syncthreads_or(flag.value); }

// Copies 16 bytes to shared memory, or fills in zeros; both addresses are multiples of 16.
SIMT void copy_async(void* shared, const void* global, bool zero) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(zero ? 0 : 16)
      : "memory");
}

SIMT void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `PENDING` groups of this thread's copies have arrived.
template <int PENDING>
SIMT void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and gets
// elements (l / 4, 2 (l % 4)) and the next of each matrix, or of its transpose.
template <bool TRANSPOSED, typename F>
SIMT void load_matrices(PerThread<Fragment>& out, const F& address) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(address(int(threadIdx.x))));
  uint32_t (&r)[4] = out.value.pair;
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
}

// acc[first..first + 3] += a b for a of 16 x 16 and b, half of a Fragment, of 16 x 8.
template <typename T, typename Accumulator>
SIMT void multiply_add(PerThread<Accumulator>& acc, int first, PerThread<Fragment>& a, PerThread<Fragment>& b,
                       int half) {
  const uint32_t (&x)[4] = a.value.pair;
  const uint32_t* y = b.value.pair + 2 * half;
  float* c = acc.value.at + first;
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}

// A thread block, its place in the grid and in its cluster (of one block before sm_90).
template <typename Shared>
struct Block {
  Shared* shared;
  int rank, grid, cluster_rank, cluster_size;

  SIMT Shared* peer(int cluster_rank) const {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, cluster_rank);
#else
    return shared;
#endif
  }
};

}  // namespace fused_vse

#endif
