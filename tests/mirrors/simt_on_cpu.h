// csrc/cuda/simt.h for a CPU that plays one thread block at a time.
//
// What it cannot show is a race that neither order of the threads brings out. An asynchronous copy arrives as
// late as the code allows, at the wait for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

namespace fused_vse {

using std::max;
using std::min;

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

}  // namespace fused_vse
