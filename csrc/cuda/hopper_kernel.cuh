// One pass over S = I T^t for sm_90a: the row and the column statistics of every tile, S never stored.
//
//   s_ij = <I_i, T_j>
//   item(i) = merge over the negatives j of i,  item(j) = merge over the negatives i of j
//
// A block is one producer warp and two consumer warpgroups that take turns ("ping-pong"): while one
// multiplies, the other reduces the tile that it has just multiplied.
//
//   producer                              consumer w = 0, 1
//   for my tiles:                         for every second of my tiles:
//     for k in D / 64:                      wait for my turn
//       wait until the stage is empty       for k in D / 64:
//       copy I[128 rows, k] to it             wait until the stage is full
//       copy my half of T[192 rows, k]        acc += I[128, k] T[192, k]^t: 8 wgmma, asynchronous
//         to it, in both blocks               wait for the step before; its stage is empty, in both blocks
//                                           give the turn to the other
//                                           wait for the last step; its stage is empty
//                                           reduce acc: within a thread; across lanes by swap-shuffle;
//                                             columns across the 4 warps, in shared memory
//                                           store the items
//
// The turn changes before the last products are done, so that the tensor cores always have work queued. The
// epilogue stays hidden as long as it takes less than the other's multiplication, 12 D clocks.
//
// Budget of a block (one a multiprocessor), checked by tests/compile/test_cuda_hopper_compile.py:
//   registers  128 producer threads x 40 + 256 consumer threads x 232 = 64512 = 384 x the 168 at its start
//   shared     5 stages x 40 KiB + 12 KiB to exchange column items + barriers = 213 KiB of 227
#pragma once

#include "hopper_ptx.cuh"
#include "hopper_statistics.cuh"

// wgmma and setmaxnreg exist for sm_90a only; compiled for anything else the kernel is empty and never run.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FUSED_VSE_SM90A 1
#endif

namespace fused_vse::hopper {

constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

struct __align__(1024) Stage {
  uint8_t images[TILE_ROWS * TILE_DEPTH * 2];
  uint8_t captions[TILE_COLS * TILE_DEPTH * 2];  // rows [0, 96) come from block 0, the others from block 1
};
constexpr int STAGE_BYTES = sizeof(Stage);
constexpr int SHARE_BYTES = SHARE_COLS * TILE_DEPTH * 2;

template <typename Prepared>
struct Shared {
  Stage stages[STAGES];
  uint8_t column_items[2][WARPS * TILE_COLS * MAX_ITEM_BYTES];  // [warp][column] of each consumer
  uint64_t full[STAGES], empty[STAGES];
  Prepared prepared;  // what the statistic computes once; registers are for scores
};
// Dynamic shared memory begins on a 16-byte boundary only as far as is promised.
template <typename Problem>
constexpr int SHARED_BYTES = sizeof(Shared<typename Problem::Prepared>) + 1024;

// Named barriers; 0 is __syncthreads'.
constexpr int TURN_BARRIER = 1;      // + consumer
constexpr int EPILOGUE_BARRIER = 3;  // + consumer

#ifdef FUSED_VSE_SM90A

DEVICE int clusters() { return gridDim.x / CLUSTER; }
DEVICE int first_tile() { return blockIdx.x / CLUSTER; }

template <typename Shared>
DEVICE void produce(const CUtensorMap* images, const CUtensorMap* captions, Shared& shared, const Walk& walk,
                    int rank) {
  ptx::prefetch(images);
  ptx::prefetch(captions);
  RingPosition position;
  for (int number = first_tile(); number < walk.raster.cluster_tiles; number += clusters()) {
    const Tile tile = walk.raster.tile(number, rank);
    const int row = tile.row(walk.rectangle), column = tile.column() + rank * SHARE_COLS;
    for (int step = 0; step < walk.depth_steps; ++step) {
      Stage& stage = shared.stages[position.stage];
      uint64_t* full = &shared.full[position.stage];
      // In both blocks: half of what this one copies goes to the other. A byte may get there before the
      // other's producer has announced it; the barrier's count is then negative for a while.
      ptx::mbarrier_wait(&shared.empty[position.stage], position.phase ^ 1);
      ptx::mbarrier_arrive_expect_bytes(full, STAGE_BYTES);
      ptx::copy_box(stage.images, images, step * TILE_DEPTH, row, full);
      ptx::copy_box_to(stage.captions + rank * SHARE_BYTES, captions, step * TILE_DEPTH, column, full,
                       (1 << CLUSTER) - 1);
      position.advance(1);
    }
  }
}

// acc = I[rows of the tile] T[columns of the tile]^t. `position` is that of the tile's first stage.
template <typename Element, typename Shared>
DEVICE void multiply(Fragment& acc, Shared& shared, RingPosition position, int depth_steps, bool another_turn,
                     int other) {
  const int lane = ptx::thread_number() % 32;
  int previous = -1;
  // One arrival a warp and block, by lanes 0 and 1: `empty` counts the warps of both blocks.
  const auto release = [&](int stage) {
    if (lane < CLUSTER) ptx::mbarrier_arrive_at(&shared.empty[stage], lane);
  };
  for (int step = 0; step < depth_steps; ++step) {
    Stage& stage = shared.stages[position.stage];
    ptx::mbarrier_wait(&shared.full[position.stage], position.phase);
    const uint64_t a = ptx::operand(stage.images), b = ptx::operand(stage.captions);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE_DEPTH / 16; ++k) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
        ptx::wgmma<Element>(acc[block], ptx::operand_at(a, 64 * TILE_DEPTH * 2 * block + 32 * k),
                            ptx::operand_at(b, 32 * k), step + k);
    }
    ptx::wgmma_commit();
    if (step > 0) {
      ptx::wgmma_wait<1>();
      release(previous);
    }
    previous = position.stage;
    position.advance(1);
  }
  if (another_turn) ptx::barrier_arrive(TURN_BARRIER + other, 2 * WARPGROUP);
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) ptx::wgmma_results(acc[block]);
  release(previous);
}

template <typename Item>
DEVICE Item exchange(Item item, int lane_mask) {
  constexpr int WORDS = sizeof(Item) / 4;
  uint32_t words[WORDS];
  memcpy(words, &item, sizeof item);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = __shfl_xor_sync(0xffffffff, words[i], lane_mask);
  memcpy(&item, words, sizeof item);
  return item;
}

// See swap_halves.
template <int STRIDE, int COUNT, typename Statistic, typename Item>
DEVICE void swap_reduce(const Statistic& statistic, Item* items, int lane) {
  if constexpr (COUNT > 1) {
    constexpr int HALF = COUNT / 2, BIT = STRIDE * HALF;
    Item outgoing[HALF];
    swap_halves<HALF>(items, outgoing, (lane & BIT) != 0);
#pragma unroll
    for (int i = 0; i < HALF; ++i) items[i] = statistic.merge(items[i], exchange(outgoing[i], BIT));
    swap_reduce<STRIDE, HALF>(statistic, items, lane);
  }
}

// Reduces the tile in `acc` and hands the items of anchors to `sink`. The exchange in shared memory is free
// again when this warpgroup passes its next turn barrier, which all its threads have to reach.
template <typename Statistic, typename Sink>
DEVICE void reduce(Fragment& acc, const Statistic& statistic, const Sink& sink, const Walk& walk, Tile tile,
                   void* exchange_memory, int barrier) {
  using Item = typename Statistic::Item;
  static_assert(sizeof(Item) <= MAX_ITEM_BYTES);
  auto* exchanged = static_cast<Item(*)[TILE_COLS]>(exchange_memory);
  const int thread = ptx::thread_number() % WARPGROUP;
  const int warp = thread / 32, lane = thread % 32;
  const int row0 = tile.row(walk.rectangle), column0 = tile.column();
  statistic.prepare(acc);

  Item rows[LANE_ROWS];
#pragma unroll
  for (int slot = 0; slot < LANE_ROWS; ++slot)
    rows[slot] = statistic.over(RowScores{acc, slot}, row0 + lane_row(warp, lane, slot),
                                column0 + lane_column(lane, 0, 0));
  swap_reduce<ROW_STRIDE, LANE_ROWS>(statistic, rows, lane);
  const int row = row0 + lane_row(warp, lane, slot_of_lane(lane));
  if (walk.stores_row(row)) sink.store_row(tile, row, rows[0]);

#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    Item items[LANE_COLS];
#pragma unroll
    for (int i = 0; i < LANE_COLS; ++i)
      items[i] = statistic.over(ColumnScores{acc, chunk, i},
                                walk.row_anchors + column0 + lane_column(lane, chunk, i),
                                row0 + lane_row(warp, lane, 0));
    swap_reduce<COLUMN_STRIDE, LANE_COLS>(statistic, items, lane);
    exchanged[warp][lane_column(lane, chunk, item_of_lane(lane))] = items[0];
  }
  ptx::barrier_sync(barrier, WARPGROUP);
  for (int c = thread; c < TILE_COLS; c += WARPGROUP) {
    Item total = exchanged[0][c];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) total = statistic.merge(total, exchanged[w][c]);
    const int column = column0 + c;
    if (walk.stores_column(tile, column)) sink.store_column(tile, column, total);
  }
}

template <typename Element, typename Problem, typename Shared>
DEVICE void consume(Shared& shared, const Walk& walk, const Problem& problem, int rank, int consumer) {
  const int tiles = walk.raster.cluster_tiles;
  RingPosition position;
  position.advance(consumer * walk.depth_steps);
  // Each sync of a turn meets one arrival: the first turn's is given away here.
  if (consumer == 1) ptx::barrier_arrive(TURN_BARRIER, 2 * WARPGROUP);
  for (int number = first_tile() + consumer * clusters(); number < tiles; number += 2 * clusters()) {
    Fragment acc;
    ptx::barrier_sync(TURN_BARRIER + consumer, 2 * WARPGROUP);
    multiply<Element>(acc, shared, position, walk.depth_steps, number + clusters() < tiles, 1 - consumer);
    position.advance(2 * walk.depth_steps);

    // Read anew, so that nothing that derives from it takes registers during the multiplication.
    const int thread = ptx::thread_number() % WARPGROUP;
    const Tile tile = walk.raster.tile(number, rank);
    if (walk.may_hold_excluded(tile)) walk.leave_out(acc, tile, thread / 32, thread % 32);
    problem.reduce_with(shared.prepared, [&](const auto& statistic, const auto& sink) {
      reduce(acc, statistic, sink, walk, tile, shared.column_items[consumer], EPILOGUE_BARRIER + consumer);
    });
  }
}

#endif  // FUSED_VSE_SM90A

// `Problem` says which statistic and where its items go: hopper_problems.cuh. Launched in clusters of
// CLUSTER.
template <typename Element, typename Problem>
__global__ void __launch_bounds__(THREADS, 1)
    statistics_kernel(const __grid_constant__ CUtensorMap images,
                      const __grid_constant__ CUtensorMap captions, const __grid_constant__ Walk walk,
                      const __grid_constant__ Problem problem) {
#ifdef FUSED_VSE_SM90A
  extern __shared__ uint8_t memory[];
  // The same offset in both blocks, as the copies to both need it.
  auto& shared =
      *reinterpret_cast<Shared<typename Problem::Prepared>*>(memory + (-ptx::shared_address(memory) & 1023));
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      ptx::mbarrier_init(&shared.full[s], 1);                 // the producer
      ptx::mbarrier_init(&shared.empty[s], CLUSTER * WARPS);  // the consuming warps of both blocks
    }
    ptx::fence_mbarrier_init();
    shared.prepared = problem.prepare();
  }
  ptx::cluster_sync();

  // Through a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == 0) {
    ptx::registers_give<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(&images, &captions, shared, walk, rank);
  } else {
    ptx::registers_take<CONSUMER_REGISTERS>();
    consume<Element>(shared, walk, problem, rank, warpgroup - 1);
  }
  // Neither block may leave while the other one still copies to it or arrives at its barriers.
  ptx::cluster_sync();
#endif
}

}  // namespace fused_vse::hopper
