// ldmatrix, stmatrix and mma.sync.
#include "elements.h"

namespace ptxemu {
namespace {

// An 8 x 8 matrix in shared memory. address[0]: of its rows; list: registers; option[0]: transposed.
struct Matrix {
  uint16_t at[8][8];

  uint16_t& element(const Instruction& in, int row, int column) {
    return in.option[0] ? at[column][row] : at[row][column];
  }
};

uint8_t* matrix_row(Warp& warp, const Instruction& in, size_t matrix, int row, Access access,
                    const void* written = nullptr) {
  const int lane = static_cast<int>(matrix) * 8 + row;
  return memory(warp, in, lane, Space::SHARED, address_of(warp, in, 0, lane), 16, access, written);
}

void run_ldmatrix(Warp& warp, const Instruction& in, Mask) {
  for (size_t i = 0; i < in.list.size(); ++i) {
    Matrix matrix;
    for (int row = 0; row < 8; ++row)
      std::memcpy(matrix.at[row], matrix_row(warp, in, i, row, Access::READ), 16);
    for (int lane = 0; lane < LANES; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      warp.reg<uint32_t>(in.list[i])[lane] =
          pair(matrix.element(in, row, column + 1), matrix.element(in, row, column));
    }
  }
}

void run_stmatrix(Warp& warp, const Instruction& in, Mask) {
  for (size_t i = 0; i < in.list.size(); ++i) {
    Matrix matrix;
    for (int lane = 0; lane < LANES; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t both = warp.reg<uint32_t>(in.list[i])[lane];
      matrix.element(in, row, column) = static_cast<uint16_t>(both);
      matrix.element(in, row, column + 1) = static_cast<uint16_t>(both >> 16);
    }
    for (int row = 0; row < 8; ++row)
      std::memcpy(matrix_row(warp, in, i, row, Access::WRITE, matrix.at[row]), matrix.at[row], 16);
  }
  warp.block->launch->event();
}

void build_matrix(Builder& builder, bool is_load) {
  Instruction& in = builder.instruction;
  builder.take_one_of({"sync"});
  builder.take_one_of({"aligned"});
  builder.take_one_of({"m8n8"});
  const size_t count = builder.take("x4") ? 4 : builder.take("x2") ? 2 : 1;
  builder.take("x1");
  in.option[0] = builder.take("trans");
  builder.take_one_of({"shared", "shared::cta"});
  builder.take_one_of({"b16"});
  in.list = is_load ? builder.destinations(0, 32) : builder.sources(1, 32);
  if (in.list.size() != count) builder.fail("wrong number of registers");
  builder.address(is_load ? 1 : 0, 0);
  builder.collective(is_load ? run_ldmatrix : run_stmatrix, true);
}
void build_ldmatrix(Builder& builder) { build_matrix(builder, true); }
void build_stmatrix(Builder& builder) { build_matrix(builder, false); }

bool is_integer(Element type) { return type == S8 || type == U8; }

// --- mma.sync

struct Mma {
  int rows, depth;
  Element type_a, type_b;
  std::vector<int> a, b, c, d;  // registers
  bool narrow_sums, saturates;  // float16 sums; integer sums that saturate
};

void run_mma(Warp& warp, const Instruction& in, Mask) {
  constexpr int COLUMNS = 8;
  const Mma& x = in.detail<Mma>();
  const bool is_double = x.type_a == F64;
  const int per_register = is_double ? 1 : 4 / ELEMENT_BYTES[x.type_a], bits = 8 * ELEMENT_BYTES[x.type_a];
  const int halves = x.rows / 8;  // of 8 rows each, between which the registers of A alternate
  double a[16][64], b[64][COLUMNS];
  for (int lane = 0; lane < LANES; ++lane)
    for (int e = 0; e < per_register; ++e) {
      const auto value = [&](Element type, int at) -> double {
        if (is_double) return warp.reg<double>(at)[lane];
        return decode_element(type, warp.reg<uint32_t>(at)[lane] >> e * bits);
      };
      for (int i = 0; i < static_cast<int>(x.a.size()); ++i)
        a[lane / 4 + 8 * (i % halves)][k_of(lane, 2 / halves * i, e, per_register)] = value(x.type_a, x.a[i]);
      for (int i = 0; i < static_cast<int>(x.b.size()); ++i)
        b[k_of(lane, 2 * i, e, per_register)][lane / 4] = value(x.type_b, x.b[i]);
    }
  for (int lane = 0; lane < LANES; ++lane) {
    uint16_t even = 0;  // the lower half of a register with two sums
    for (int i = 0; i < x.rows / 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double dot = 0;
      for (int k = 0; k < x.depth; ++k) dot += a[row][k] * b[k][column];
      if (is_double) {
        warp.reg<double>(x.d[i])[lane] = warp.reg<double>(x.c[i])[lane] + dot;
      } else if (is_integer(x.type_a)) {
        int64_t sum = warp.reg<int32_t>(x.c[i])[lane] + static_cast<int64_t>(dot);
        if (x.saturates) sum = std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX);
        warp.reg<int32_t>(x.d[i])[lane] = static_cast<int32_t>(sum);
      } else if (x.narrow_sums) {
        const auto old = static_cast<uint16_t>(warp.reg<uint32_t>(x.c[i / 2])[lane] >> 16 * (i % 2));
        const uint16_t sum = to_half(static_cast<float>(to_float(Half{old}) + dot)).bits;
        if (i % 2)
          warp.reg<uint32_t>(x.d[i / 2])[lane] = pair(sum, even);
        else
          even = sum;
      } else {
        warp.reg<float>(x.d[i])[lane] = static_cast<float>(warp.reg<float>(x.c[i])[lane] + dot);
      }
    }
  }
}

void build_mma(Builder& builder) {
  builder.take_one_of({"sync"});
  builder.take_one_of({"aligned"});
  const auto shape = take_shape(builder);
  builder.take_one_of({"row"});
  builder.take_one_of({"col"});
  Mma x;
  x.saturates = builder.take("satfinite");
  const std::string of_results = take_element(builder);
  x.type_a = element_of(builder, take_element(builder));
  x.type_b = element_of(builder, take_element(builder));
  if (take_element(builder) != of_results) builder.fail("sums of two types");
  x.narrow_sums = of_results == "f16";
  x.rows = shape[0], x.depth = shape[2];
  const int width = x.type_a == F64 ? 64 : 32;
  x.a = builder.sources(1, width);
  x.b = builder.sources(2, width);
  x.c = builder.sources(3, width);
  x.d = builder.destinations(0, width);
  if (shape[1] != 8 || x.depth > 32 || !(x.rows == 16 || (x.rows == 8 && x.type_a == F64)) ||
      ELEMENT_BYTES[x.type_a] != ELEMENT_BYTES[x.type_b])
    builder.fail("unsupported shape");
  const size_t bytes = ELEMENT_BYTES[x.type_a] * x.depth * 8 / width;
  const size_t sums = x.c.size() * LANES * (x.narrow_sums ? 2 : 1);
  const bool fits = x.a.size() * LANES == x.rows * bytes && x.b.size() * LANES == shape[1] * bytes &&
                    sums == static_cast<size_t>(x.rows * shape[1]) && x.d.size() == x.c.size();
  if (!fits) builder.fail("wrong number of registers");
  builder.instruction.details = std::make_shared<const Mma>(std::move(x));
  builder.collective(run_mma, true);
}

}  // namespace

void add_mma(Instructions& known) {
  known.builders["ldmatrix"] = build_ldmatrix;
  known.builders["stmatrix"] = build_stmatrix;
  known.builders["mma"] = build_mma;
}

}  // namespace ptxemu
