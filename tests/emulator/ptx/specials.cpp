// Special registers.
#include "machine.h"

namespace ptxemu {
namespace {

using Vector = std::array<unsigned, 3>;

Vector coordinates(unsigned index, const unsigned (&sizes)[3]) {
  return {index % sizes[0], index / sizes[0] % sizes[1], index / sizes[0] / sizes[1]};
}
unsigned product(const unsigned (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }
const Block& block_of(const Thread& t) { return *t.warp.block; }

Vector tid(const Thread& t) { return coordinates(t.warp.index * LANES + t.lane, t.launch.config.block); }
Vector ntid(const Thread& t) {
  const auto& n = t.launch.config.block;
  return {n[0], n[1], n[2]};
}
Vector ctaid(const Thread& t) { return block_of(t).position; }
Vector nctaid(const Thread& t) {
  const auto& n = t.launch.config.grid;
  return {n[0], n[1], n[2]};
}
Vector cluster_nctaid(const Thread& t) {
  const auto& n = t.launch.config.cluster;
  return {n[0], n[1], n[2]};
}
Vector quotient(const Vector& x, const Vector& y) { return {x[0] / y[0], x[1] / y[1], x[2] / y[2]}; }
Vector clusterid(const Thread& t) { return quotient(ctaid(t), cluster_nctaid(t)); }
Vector nclusterid(const Thread& t) { return quotient(nctaid(t), cluster_nctaid(t)); }
Vector cluster_ctaid(const Thread& t) { return coordinates(block_of(t).rank, t.launch.config.cluster); }

Vector cluster_ctarank(const Thread& t) { return {block_of(t).rank}; }
Vector cluster_nctarank(const Thread& t) { return {product(t.launch.config.cluster)}; }
Vector laneid(const Thread& t) { return {t.lane}; }
Vector warpid(const Thread& t) { return {static_cast<unsigned>(t.warp.index)}; }
Vector nwarpid(const Thread& t) { return {(product(t.launch.config.block) + LANES - 1) / LANES}; }
Vector smid(const Thread& t) { return {block_of(t).position[0]}; }
Vector nsmid(const Thread& t) { return {t.launch.config.grid[0]}; }
Vector gridid(const Thread&) { return {}; }

Mask this_lane(const Thread& t) { return Mask{1} << t.lane; }
Vector lanemask_eq(const Thread& t) { return {this_lane(t)}; }
Vector lanemask_lt(const Thread& t) { return {this_lane(t) - 1}; }
Vector lanemask_le(const Thread& t) { return {this_lane(t) | (this_lane(t) - 1)}; }
Vector lanemask_gt(const Thread& t) { return {~(this_lane(t) | (this_lane(t) - 1))}; }
Vector lanemask_ge(const Thread& t) { return {~(this_lane(t) - 1)}; }

Vector dynamic_smem_size(const Thread& t) { return {t.launch.config.dynamic_smem}; }
Vector total_smem_size(const Thread& t) { return {t.launch.shared_bytes}; }

// The address of a cooperative grid's barrier, or 0: its upper and its lower half.
uint64_t grid_barrier(const Thread& t) {
  return t.launch.config.cooperative ? reinterpret_cast<uint64_t>(t.launch.grid_workspace.data()) : 0;
}
Vector envreg1(const Thread& t) { return {static_cast<unsigned>(grid_barrier(t) >> 32)}; }
Vector envreg2(const Thread& t) { return {static_cast<unsigned>(grid_barrier(t))}; }

const std::unordered_map<std::string, decltype(&tid)> VECTORS = {
    {"%tid", tid},
    {"%ntid", ntid},
    {"%ctaid", ctaid},
    {"%nctaid", nctaid},
    {"%clusterid", clusterid},
    {"%nclusterid", nclusterid},
    {"%cluster_ctaid", cluster_ctaid},
    {"%cluster_nctaid", cluster_nctaid},
};
const std::unordered_map<std::string, decltype(&tid)> SCALARS = {
    {"%cluster_ctarank", cluster_ctarank},
    {"%cluster_nctarank", cluster_nctarank},
    {"%laneid", laneid},
    {"%warpid", warpid},
    {"%nwarpid", nwarpid},
    {"%smid", smid},
    {"%nsmid", nsmid},
    {"%gridid", gridid},
    {"%lanemask_eq", lanemask_eq},
    {"%lanemask_lt", lanemask_lt},
    {"%lanemask_le", lanemask_le},
    {"%lanemask_gt", lanemask_gt},
    {"%lanemask_ge", lanemask_ge},
    {"%dynamic_smem_size", dynamic_smem_size},
    {"%total_smem_size", total_smem_size},
    {"%envreg1", envreg1},
    {"%envreg2", envreg2},
};

}  // namespace

Special find_special(const std::string& name) {
  if (const auto scalar = SCALARS.find(name); scalar != SCALARS.end()) return {scalar->second, 0};
  const size_t dot = name.find('.');
  const auto vector = VECTORS.find(name.substr(0, dot));
  const size_t axis = dot == std::string::npos ? dot : std::string("xyz").find(name.substr(dot + 1));
  if (vector == VECTORS.end() || axis > 2 || name.size() != dot + 2) return {};
  return {vector->second, static_cast<int>(axis)};
}

}  // namespace ptxemu
