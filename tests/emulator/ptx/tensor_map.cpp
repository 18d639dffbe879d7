#include "tensor_map.h"

#include <limits>

namespace ptxemu {
namespace {

enum ElementType { U8, U16, U32, I32, U64, I64, F16, F32, F64, BF16, F32_FTZ, TF32, TF32_FTZ, NUM_TYPES };
constexpr uint8_t ELEMENT_BYTES[NUM_TYPES] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};

// The part of a box's row that is inside of the tensor, as bytes [first, last) of the row, and where it is.
struct RowPart {
  int first = 0, last = 0;
  uint64_t address = 0;
};
RowPart locate_row(const TensorMap& map, const Coordinates& coordinates, uint64_t row) {
  RowPart part;
  uint64_t address = map.address;
  for (int axis = 1; axis < map.rank; ++axis) {
    const int64_t at = coordinates[axis] + static_cast<int64_t>(row % map.box[axis]);
    row /= map.box[axis];
    if (at < 0 || at >= map.dims[axis]) return part;
    address += static_cast<uint64_t>(at) * map.strides[axis - 1];
  }
  const int64_t first = std::max<int64_t>(0, -int64_t{coordinates[0]});
  const int64_t last = std::min<int64_t>(map.box[0], int64_t{map.dims[0]} - coordinates[0]);
  if (first >= last) return part;
  part.first = static_cast<int>(first) * map.element_bytes;
  part.last = static_cast<int>(last) * map.element_bytes;
  part.address = address + static_cast<uint64_t>(coordinates[0] + first) * map.element_bytes;
  return part;
}

// What the type of the map does to float32 on its way.
void convert_row(const TensorMap& map, uint8_t* row, int bytes) {
  if (map.type < F32_FTZ) return;
  for (int i = 0; i < bytes; i += 4) {
    uint32_t bits;
    std::memcpy(&bits, row + i, 4);
    if (map.type != TF32 && (bits & 0x7f800000) == 0) bits &= 0x80000000;
    if (map.type != F32_FTZ && (bits & 0x7f800000) != 0x7f800000)
      bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
    std::memcpy(row + i, &bits, 4);
  }
}

void fill_row(const TensorMap& map, uint8_t* row, int bytes) {
  std::memset(row, map.fills_nan && map.type >= F16 ? 0xff : 0, bytes);
}

constexpr int MOST_ROW_BYTES = 256 * 8, CHUNK = 16;

}  // namespace

void load_rows(const TensorMap& map, const Coordinates& coordinates, Block& block, uint64_t offset,
               uint64_t first, uint64_t last) {
  const int bytes = map.row_bytes();
  uint8_t row[MOST_ROW_BYTES];
  for (uint64_t i = first; i < last; ++i) {
    const RowPart part = locate_row(map, coordinates, i);
    fill_row(map, row, bytes);
    if (part.first < part.last) {
      const int count = part.last - part.first;
      std::memcpy(row + part.first, global_memory(part.address, count), count);
      convert_row(map, row + part.first, count);
    }
    for (int at = 0; at < bytes; at += CHUNK)
      std::memcpy(shared_memory(block, swizzled(offset + i * bytes + at, map.swizzle_span), CHUNK), row + at,
                  CHUNK);
  }
}

std::vector<uint8_t> read_box(Warp& warp, const Instruction& in, const TensorMap& map, Block& block,
                              uint64_t offset) {
  const int bytes = map.row_bytes();
  std::vector<uint8_t> box(map.num_rows() * bytes);
  for (size_t at = 0; at < box.size(); at += CHUNK)
    std::memcpy(box.data() + at,
                shared_memory(warp, in, block, swizzled(offset + at, map.swizzle_span), CHUNK, Access::READ),
                CHUNK);
  return box;
}

void write_box(const TensorMap& map, const Coordinates& coordinates, const std::vector<uint8_t>& box) {
  const int bytes = map.row_bytes();
  for (uint64_t i = 0; i < map.num_rows(); ++i) {
    const RowPart part = locate_row(map, coordinates, i);
    if (part.first < part.last)
      std::memcpy(global_memory(part.address, part.last - part.first), box.data() + i * bytes + part.first,
                  part.last - part.first);
  }
}

}  // namespace ptxemu

const char* ptxemu_encode_tiled(void* map128, int element_type, unsigned rank, const void* address,
                                const uint64_t* dims, const uint64_t* strides_bytes, const uint32_t* box,
                                const uint32_t* element_strides, int interleave, int swizzle, int,
                                int oob_fill) {
  using namespace ptxemu;
  constexpr uint8_t SPANS[] = {0, 32, 64, 128};
  if (element_type < 0 || element_type >= NUM_TYPES) return "an unknown element type";
  if (rank < 1 || rank > 5) return "the rank is not from 1 to 5";
  if (swizzle < 0 || swizzle > 3) return "an unknown swizzle";
  if (interleave != 0) return "interleaved layouts are not emulated";
  if (reinterpret_cast<uint64_t>(address) % 16) return "the address is not aligned to 16 bytes";
  TensorMap map{};
  map.magic = TensorMap::MAGIC;
  map.address = reinterpret_cast<uint64_t>(address);
  map.rank = static_cast<uint8_t>(rank);
  map.type = static_cast<uint8_t>(element_type);
  map.element_bytes = ELEMENT_BYTES[element_type];
  map.swizzle_span = SPANS[swizzle];
  map.fills_nan = oob_fill == 1;
  for (unsigned axis = 0; axis < rank; ++axis) {
    if (dims[axis] < 1 || dims[axis] > std::numeric_limits<uint32_t>::max())
      return "a size of the tensor is not from 1 to 2^32 - 1";
    if (box[axis] < 1 || box[axis] > 256) return "a size of the box is not from 1 to 256";
    if (element_strides[axis] != 1) return "element strides other than 1 are not emulated";
    map.dims[axis] = static_cast<uint32_t>(dims[axis]);
    map.box[axis] = static_cast<uint16_t>(box[axis]);
    if (axis == 0) continue;
    const uint64_t stride = strides_bytes[axis - 1];
    if (stride % 16 || stride >= uint64_t{1} << 40) return "a stride is no multiple of 16 bytes below 2^40";
    if (stride < dims[0] * map.element_bytes) return "a stride is shorter than a row";
    map.strides[axis - 1] = stride;
  }
  const int inner = map.row_bytes();
  if (inner % CHUNK) return "the box's inner size is no multiple of 16 bytes";
  if (map.swizzle_span && inner > map.swizzle_span)
    return "the box's inner size is beyond the swizzle's span";
  if (map.swizzle_span && inner < map.swizzle_span)
    return "a box's inner size below the swizzle's span is not emulated";
  std::memset(map128, 0, 128);
  std::memcpy(map128, &map, sizeof(map));
  return nullptr;
}
