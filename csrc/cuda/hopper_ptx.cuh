// The PTX of sm_90a that has no C++ form: barriers in shared memory, the copy engine, wgmma. One function an
// instruction, named after it; the PTX ISA manual is the reference.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace fused_vse::hopper::ptx {

DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read where it is asked for: the compiler keeps no copy of it, nor of what derives from it.
DEVICE int thread_number() {
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}

// --- mbarrier: a phase ends when all arrivals and all announced bytes are there

DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
// Makes the initialised barriers visible to the copy engine and to the other block of the cluster.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// On the barrier at the same place in block `rank` of the cluster. It orders no memory between the blocks:
// what the other one may overwrite after it has been read by wgmma, and that is over. Scope .cluster would
// add a MEMBAR.ALL.GPU to every step.
DEVICE void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Until the phase of this parity is over. A new barrier counts as being past phase 1.
DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- thread block clusters

DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Of all threads of all blocks. Not .aligned: the producer's lanes come at different times.
DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// --- named barriers: `threads` counts those that sync and those that arrive

DEVICE void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- registers, moved from the producers to the consumers

template <int COUNT>
DEVICE void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- copy engine (TMA): a box of a tensor map at (column, row) into shared memory, zeros outside

DEVICE void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
DEVICE void copy_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// To the same place in every block of `blocks` (one bit each), counted by the barrier of each.
DEVICE void copy_box_to(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier,
                        uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// --- wgmma

// An operand in shared memory, rows of 128 bytes (64 elements along D), 8 of which are one 1024-byte pattern
// of the 128-byte swizzle: bits 0-13 address / 16, 32-45 distance of the patterns / 16, 62-63 the swizzle.
DEVICE uint64_t operand(const void* rows) {
  constexpr uint64_t PATTERN = uint64_t{1024 / 16} << 32, IGNORED = uint64_t{1} << 16;
  constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62;
  return SWIZZLE_128 | PATTERN | IGNORED | (shared_address(rows) & 0x3ffff) >> 4;
}
// The operand so many bytes further.
DEVICE uint64_t operand_at(uint64_t operand, int bytes) { return operand + bytes / 16; }

// Before the first wgmma that uses registers which other instructions have written.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING of the committed groups are still running.
template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define FUSED_VSE_8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FUSED_VSE_32(i) FUSED_VSE_8(i), FUSED_VSE_8(i + 8), FUSED_VSE_8(i + 16), FUSED_VSE_8(i + 24)
#define FUSED_VSE_WGMMA(TYPE)                                                             \
  asm volatile(                                                                           \
      "{\n.reg .pred accumulate;\n"                                                       \
      "setp.ne.b32 accumulate, %98, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"           \
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"  \
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"  \
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"  \
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"  \
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}," \
      " %96, %97, accumulate, 1, 1, 0, 0;\n}"                                             \
      : FUSED_VSE_32(0), FUSED_VSE_32(32), FUSED_VSE_32(64)                               \
      : "l"(a), "l"(b), "r"(accumulate))

// d = a b^t, or d += a b^t if `accumulate`: 64 rows of a, 192 rows of b, 16 elements along D.
template <typename Element>
DEVICE void wgmma(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>)
    FUSED_VSE_WGMMA("bf16");
  else
    FUSED_VSE_WGMMA("f16");
}
// After wgmma_wait: the compiler does not know that the sums were not there before, and could read them
// early.
DEVICE void wgmma_results(float (&d)[96]) {
  asm volatile("" : FUSED_VSE_32(0), FUSED_VSE_32(32), FUSED_VSE_32(64)::"memory");
}
#undef FUSED_VSE_WGMMA
#undef FUSED_VSE_32
#undef FUSED_VSE_8

}  // namespace fused_vse::hopper::ptx
