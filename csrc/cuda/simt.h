// What a kernel needs of the machine, twice: for a GPU, and for a CPU that plays one thread block at a time,
// so that the tests run the kernel's own source without a GPU. Code between two barriers stands in
// for_each_thread, which is the current thread on a GPU and a loop on a CPU; what a thread keeps in registers
// across barriers is a PerThread; a warp's instructions are functions of whole PerThreads.
//
// What the CPU cannot show is a race that neither order of the threads brings out. An asynchronous copy
// arrives there as late as the code allows, at the wait for it.
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
#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>
#define SIMT inline
#define HOST_DEVICE inline
#endif

namespace fused_vse {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#ifndef __CUDACC__
using std::max;
using std::min;
#endif

constexpr int THREADS = 256, LANES = 32;

// Four registers of a lane: the pairs of 16-bit elements that ldmatrix.x4 gives and mma takes.
struct Fragment {
  uint32_t pair[4];
};

#ifdef __CUDACC__

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

#else  // the CPU

template <typename T>
struct PerThread {
  std::vector<T> values = std::vector<T>(THREADS);
  decltype(auto) operator[](int thread) { return values[thread]; }
};

// Threads and blocks may run in any order between two barriers: a result that depends on it shows a race.
inline bool backwards = false;

template <typename F>
void for_each_thread(const F& f) {
  for (int i = 0; i < THREADS; ++i) f(backwards ? THREADS - 1 - i : i);
}

inline void block_sync() {}

inline bool any_thread(PerThread<bool>& flag) {
  for (bool is_set : flag.values)
    if (is_set) return true;
  return false;
}

struct Copy {
  void* to;
  const void* from;  // null: zeros
};
// One entry for each commit_copies of the block; the threads copy in step.
inline std::vector<Copy> uncommitted_copies;
inline std::deque<std::vector<Copy> > pending_copies;

inline void copy_async(void* shared, const void* global, bool zero) {
  uncommitted_copies.push_back({shared, zero ? nullptr : global});
}

inline void commit_copies() {
  pending_copies.push_back(std::move(uncommitted_copies));
  uncommitted_copies.clear();
}

template <int PENDING>
void wait_for_copies() {
  for (; pending_copies.size() > PENDING; pending_copies.pop_front())
    for (const Copy& copy : pending_copies.front())
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
}

template <bool TRANSPOSED, typename F>
void load_matrices(PerThread<Fragment>& out, const F& address) {
  for (int warp = 0; warp < THREADS; warp += LANES) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < LANES; ++lane)
      std::memcpy(matrix[lane / 8][lane % 8], address(warp + lane), 16);
    for (int lane = 0; lane < LANES; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, col = 2 * (lane % 4);
        const uint32_t low = TRANSPOSED ? matrix[i][col][row] : matrix[i][row][col];
        const uint32_t high = TRANSPOSED ? matrix[i][col + 1][row] : matrix[i][row][col + 1];
        out[warp + lane].pair[i] = low | high << 16;
      }
  }
}

template <typename T>
float element(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> 16 * which);
  T x;
  std::memcpy(&x, &bits, 2);
  return float(x);
}

template <typename T, typename Accumulator>
void multiply_add(PerThread<Accumulator>& acc, int first, PerThread<Fragment>& a, PerThread<Fragment>& b,
                  int half) {
  for (int warp = 0; warp < THREADS; warp += LANES) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < LANES; ++lane)
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4, col = 2 * (lane % 4) + e;
        for (int i = 0; i < 4; ++i)
          left[row + 8 * (i % 2)][col + 8 * (i / 2)] = element<T>(a[warp + lane].pair[i], e);
        for (int i = 0; i < 2; ++i)
          right[col + 8 * i][row] = element<T>(b[warp + lane].pair[2 * half + i], e);
      }
    for (int lane = 0; lane < LANES; ++lane)
      for (int i = 0; i < 4; ++i) {
        float& c = acc[warp + lane].at[first + i];
        for (int k = 0; k < 16; ++k) c += left[lane / 4 + 8 * (i / 2)][k] * right[k][2 * (lane % 4) + i % 2];
      }
  }
}

template <typename Shared>
struct Block {
  Shared* shared;
  int rank, grid, cluster_rank, cluster_size;
  Shared* const* peers;

  Shared* peer(int cluster_rank) const { return peers[cluster_rank]; }
};

#endif

}  // namespace fused_vse
