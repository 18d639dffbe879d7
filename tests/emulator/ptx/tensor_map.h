// Tensor maps, in a format of our own, and the boxes that the copy engine moves by them.
#pragma once

#include "machine.h"

namespace ptxemu {

struct TensorMap {
  static constexpr uint64_t MAGIC = 0x70616d726f736e74;
  uint64_t magic;
  uint64_t address;
  uint64_t strides[4];  // bytes, of dimensions 1 and up
  uint32_t dims[5];
  uint16_t box[5];
  uint8_t rank, type, element_bytes, swizzle_span, fills_nan;

  int row_bytes() const { return box[0] * element_bytes; }
  uint64_t num_rows() const {
    uint64_t rows = 1;
    for (int axis = 1; axis < rank; ++axis) rows *= box[axis];
    return rows;
  }
};
static_assert(sizeof(TensorMap) <= 128);
using Coordinates = std::array<int32_t, 5>;

// Writes rows [first, last) of the box to shared memory.
void load_rows(const TensorMap&, const Coordinates&, Block&, uint64_t offset, uint64_t first, uint64_t last);
// The box as it is in shared memory, and what writes it.
std::vector<uint8_t> read_box(Warp&, const Instruction&, const TensorMap&, Block&, uint64_t offset);
void write_box(const TensorMap&, const Coordinates&, const std::vector<uint8_t>& box);

}  // namespace ptxemu
