// Tiles in shared memory and their products: acc[64 x 64] += A[64 x chunk] B[chunk x 64].
//
// A's rows are contiguous along the chunk. B comes as 64 rows contiguous along the chunk (scores: the
// captions), or as the chunk's rows of 64 (gradients: rows of embeddings). 16-bit elements go through
// ldmatrix and mma.sync m16n8k16 with float32 accumulators, float32 through fused multiply-adds.
#pragma once

#include "small_ptx.cuh"

namespace fused_vse::small {

struct Accumulator {
  float at[PER_THREAD];
};

struct Stage {
  alignas(16) unsigned char a[TILE * CHUNK_BYTES], b[TILE * CHUNK_BYTES];
};

// A contiguous matrix of embeddings; `aligned`: every row starts at a multiple of 16 bytes.
template <typename T>
struct Rows {
  const T* data;
  int count, dim;
  bool aligned;
};

// Starts copying the 8 KiB of rows [row, ..) x columns [col, ..) to shared memory, zeros outside the matrix.
template <typename T, int ROW_BYTES>
DEVICE void load_tile(unsigned char* tile, const Rows<T>& x, int row, int col) {
  constexpr int PIECE = 16 / int(sizeof(T)), PIECES = ROW_BYTES / 16;
#pragma unroll
  for (int piece = threadIdx.x; piece < TILE * CHUNK_BYTES / 16; piece += THREADS) {
    const int r = row + piece / PIECES, c = col + piece % PIECES * PIECE;
    unsigned char* to = tile + swizzled<ROW_BYTES>(piece / PIECES, piece % PIECES * 16);
    const T* from = x.data + int64_t(r) * x.dim + c;
    const bool outside = r >= x.count || c >= x.dim;
    if (x.aligned) {
      copy_async(to, outside ? x.data : from, outside);
    } else {
      for (int e = 0; e < PIECE; ++e)
        reinterpret_cast<T*>(to)[e] = outside || c + e >= x.dim ? T(0.0f) : from[e];
    }
  }
}

template <typename T, int ROW_BYTES>
DEVICE T& at(unsigned char* tile, int row, int col) {
  return *reinterpret_cast<T*>(tile + swizzled<ROW_BYTES>(row, col * int(sizeof(T))));
}

// B_BY_CHUNK: B's rows are those of the chunk.
template <typename T, bool B_BY_CHUNK>
DEVICE void multiply_on_tensor_cores(Stage& stage, Accumulator& acc) {
  const int thread = threadIdx.x, lane = thread % LANES;
#pragma unroll
  for (int k = 0; k < CHUNK_BYTES; k += 32) {  // in bytes: 16 elements
    Fragment a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = coordinate<T>(thread - lane, 8 * i).row;
      a[i] = load_matrices<false>(stage.a + swizzled<CHUNK_BYTES>(row + lane % 16, k + lane / 16 * 16));
    }
    const int col = coordinate<T>(thread - lane, 0).col;
    const Fragment b = load_matrices<B_BY_CHUNK>(
        stage.b + (B_BY_CHUNK
                       ? swizzled<CHUNK_BYTES>(k / 2 + lane % 16, 2 * (col + lane / 16 * 8))
                       : swizzled<CHUNK_BYTES>(col + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 16)));
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_add<T>(acc.at + 4 * i, a[i / 2], b.pair + i % 2 * 2);
  }
}

template <bool B_BY_CHUNK>
DEVICE void multiply_in_float32(Stage& stage, Accumulator& acc) {
  const int thread = threadIdx.x;
#pragma unroll 4
  for (int k = 0; k < CHUNK<float>; ++k) {
    float a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = coordinate<float>(thread, 4 * i).row, col = coordinate<float>(thread, i).col;
      a[i] = at<float, CHUNK_BYTES>(stage.a, row, k);
      b[i] =
          B_BY_CHUNK ? at<float, 2 * CHUNK_BYTES>(stage.b, k, col) : at<float, CHUNK_BYTES>(stage.b, col, k);
    }
#pragma unroll
    for (int r = 0; r < PER_THREAD; ++r) acc.at[r] = fmaf(a[r / 4], b[r % 4], acc.at[r]);
  }
}

template <typename T, bool B_BY_CHUNK>
DEVICE void multiply(Stage& stage, Accumulator& acc) {
  if constexpr (sizeof(T) == 4)
    multiply_in_float32<B_BY_CHUNK>(stage, acc);
  else
    multiply_on_tensor_cores<T, B_BY_CHUNK>(stage, acc);
}

// The pipeline of every product: load(stage, chunk) starts the copies of a chunk, prepare(stage, chunk)
// writes what is computed instead, and both have arrived when the chunk is multiplied.
template <typename T, bool B_BY_CHUNK, typename Load, typename Prepare>
DEVICE Accumulator multiply_chunks(Stage* stages, int begin, int end, const Load& load,
                                   const Prepare& prepare) {
  Accumulator acc{};
  __syncthreads();  // whoever used the stages before has finished
  for (int chunk = begin; chunk < begin + STAGES - 1; ++chunk) {
    if (chunk < end) load(stages[(chunk - begin) % STAGES], chunk);
    commit_copies();  // an empty group keeps the count
  }
  for (int chunk = begin; chunk < end; ++chunk) {
    Stage& stage = stages[(chunk - begin) % STAGES];
    prepare(stage, chunk);
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // and the chunk before has been multiplied by all threads: its stage is free
    const int next = chunk + STAGES - 1;
    if (next < end) load(stages[(next - begin) % STAGES], next);
    commit_copies();
    multiply<T, B_BY_CHUNK>(stage, acc);
  }
  wait_for_copies<0>();
  __syncthreads();
  return acc;
}

}  // namespace fused_vse::small
