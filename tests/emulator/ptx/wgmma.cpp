// wgmma: each warp of a warpgroup computes 16 of the 64 rows.
#include "elements.h"

namespace ptxemu {
namespace {

constexpr int MOST_COLUMNS = 256, MOST_DEPTH = 32, WARP_ROWS = 16;

enum class Sums { FLOAT32, FLOAT16, INTEGER };

// at[0]: the descriptor of a, NOWHERE if it is in registers; at[1]: that of b; at[2]: whether to accumulate,
// or NOWHERE; list: accumulators.
struct Wgmma {
  int columns, depth;
  Element type_a, type_b;
  Sums sums;
  std::vector<int> a;  // registers
  bool transposed_a = false, transposed_b = false;
  float sign = 1;
};

// An operand in shared memory: rows along M or N, or if `transposed` along K.
struct SharedOperand {
  uint64_t start, leading, stride;  // bytes
  int span;                         // of the swizzle, 0 for none
  bool transposed;
  int bytes;  // of an element

  SharedOperand(uint64_t descriptor, bool transposed, int bytes) : transposed(transposed), bytes(bytes) {
    constexpr int SPANS[] = {0, 128, 64, 32};
    start = (descriptor & 0x3fff) << 4;
    leading = (descriptor >> 16 & 0x3fff) << 4;
    stride = (descriptor >> 32 & 0x3fff) << 4;
    span = SPANS[descriptor >> 62];
    if (descriptor >> 49 & 7) throw Fault("a descriptor with a base offset");
  }

  // Of element (row, k), which begins 16 bytes that lie together.
  uint64_t address(int row, int k) const {
    if (!transposed) {
      const uint64_t along = uint64_t(k) * bytes;
      if (span == 0) return start + row / 8 * stride + along / 16 * leading + row % 8 * 16 + along % 16;
      return swizzled(start + row / 8 * stride + row % 8 * uint64_t(span) + along, span);
    }
    const uint64_t along = uint64_t(row) * bytes;
    if (span == 0) return start + along / 16 * stride + k / 8 * leading + k % 8 * 16 + along % 16;
    return swizzled(start + along / span * leading + k / 8 * stride + k % 8 * uint64_t(span) + along % span,
                    span);
  }
};

// `count` elements that lie next to each other.
void decode_elements(Element type, const uint8_t* from, int count, float* to) {
  for (int i = 0; i < count; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, from + i * ELEMENT_BYTES[type], ELEMENT_BYTES[type]);
    to[i] = decode_element(type, bits);
  }
}

// to[row][k] of `rows` rows from `first` on.
void read_operand(Warp& warp, const Instruction& in, const SharedOperand& operand, Element type, int first,
                  int rows, int depth, float (*to)[MOST_DEPTH]) {
  const int together = 16 / operand.bytes;
  const auto read = [&](int row, int k) {
    return shared_memory(warp, in, *warp.block, operand.address(first + row, k), 16, Access::READ);
  };
  float values[16];
  if (!operand.transposed) {
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < depth; k += together) decode_elements(type, read(row, k), together, &to[row][k]);
    return;
  }
  for (int k = 0; k < depth; ++k)
    for (int row = 0; row < rows; row += together) {
      decode_elements(type, read(row, k), together, values);
      for (int i = 0; i < together; ++i) to[row + i][k] = values[i];
    }
}

void read_registers(Warp& warp, const std::vector<int>& registers, Element type, float (*to)[MOST_DEPTH]) {
  const int per_register = 4 / ELEMENT_BYTES[type], bits = 8 * ELEMENT_BYTES[type];
  for (size_t i = 0; i < registers.size(); ++i)
    for (int lane = 0; lane < LANES; ++lane)
      for (int e = 0; e < per_register; ++e)
        to[lane / 4 + 8 * (i % 2)][k_of(lane, static_cast<int>(i), e, per_register)] =
            decode_element(type, warp.reg<uint32_t>(registers[i])[lane] >> e * bits);
}

template <typename T>
void multiply(const float (*a)[MOST_DEPTH], const float (*b)[MOST_COLUMNS], int columns, int depth,
              T (*sums)[MOST_COLUMNS]) {
  for (int row = 0; row < WARP_ROWS; ++row)
    for (int k = 0; k < depth; ++k) {
      const T factor = static_cast<T>(a[row][k]);
      for (int column = 0; column < columns; ++column)
        sums[row][column] += factor * static_cast<T>(b[k][column]);
    }
}

// f(i, lane, row, column) for all sums of a warp.
template <typename F>
void for_each_sum(int columns, F f) {
  for (int i = 0; i < columns / 2; ++i)
    for (int lane = 0; lane < LANES; ++lane)
      f(i, lane, lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2);
}

template <typename T>
void accumulate(const Product& product, const float (*a)[MOST_DEPTH], const float (*b)[MOST_COLUMNS]) {
  const auto& x = product.instruction->detail<Wgmma>();
  auto& values = product.accumulators->values;
  static T sums[WARP_ROWS][MOST_COLUMNS];  // launches take turns
  std::memset(sums, 0, sizeof(sums));
  const bool is_narrow = x.sums == Sums::FLOAT16;
  if (product.accumulates)
    for_each_sum(x.columns, [&](int i, int lane, int row, int column) {
      if (is_narrow)
        sums[row][column] = T(to_float(Half{static_cast<uint16_t>(values[i / 2][lane] >> 16 * (i % 2))}));
      else
        sums[row][column] = bits_as<T>(values[i][lane]);
    });
  multiply(a, b, x.columns, x.depth, sums);
  for_each_sum(x.columns, [&](int i, int lane, int row, int column) {
    if (is_narrow) {
      const uint16_t sum = to_half(static_cast<float>(sums[row][column])).bits;
      uint32_t& both = values[i / 2][lane];
      both = i % 2 ? pair(sum, static_cast<uint16_t>(both)) : pair(static_cast<uint16_t>(both >> 16), sum);
    } else {
      values[i][lane] = bits_as<uint32_t>(sums[row][column]);
    }
  });
}

void execute(Warp& warp, Product& product) {
  if (product.is_done) return;
  product.is_done = true;
  const Instruction& in = *product.instruction;
  const auto& x = in.detail<Wgmma>();
  static float a[WARP_ROWS][MOST_DEPTH], rows_of_b[MOST_COLUMNS][MOST_DEPTH], b[MOST_DEPTH][MOST_COLUMNS];
  try {
    if (in.at[0] == NOWHERE) {
      read_registers(warp, x.a, x.type_a, a);
    } else {
      const SharedOperand operand(product.a, x.transposed_a, ELEMENT_BYTES[x.type_a]);
      read_operand(warp, in, operand, x.type_a, WARP_ROWS * (warp.index % 4), WARP_ROWS, x.depth, a);
    }
    const SharedOperand operand(product.b, x.transposed_b, ELEMENT_BYTES[x.type_b]);
    read_operand(warp, in, operand, x.type_b, 0, x.columns, x.depth, rows_of_b);
  } catch (const Fault& fault) {
    throw Fault(describe(warp, in) + ": " + fault.what());
  }
  for (int column = 0; column < x.columns; ++column)
    for (int k = 0; k < x.depth; ++k) b[k][column] = x.sign * rows_of_b[column][k];
  x.sums == Sums::INTEGER ? accumulate<int32_t>(product, a, b) : accumulate<float>(product, a, b);
}

// The accumulators that an instruction adds to, from now on in flight.
std::shared_ptr<Accumulators> take_accumulators(Warp& warp, const Instruction& in) {
  for (const auto& known : warp.accumulators) {
    if (known->registers == in.list) return known;
    for (int at : in.list)
      if (std::find(known->registers.begin(), known->registers.end(), at) != known->registers.end())
        throw Fault("its sums share registers with those of a product of another shape that is under way");
  }
  auto taken = std::make_shared<Accumulators>();
  taken->registers = in.list;
  taken->values.resize(in.list.size());
  for (size_t i = 0; i < in.list.size(); ++i) {
    uint32_t* const reg = warp.reg<uint32_t>(in.list[i]);
    std::memcpy(taken->values[i].data(), reg, sizeof(taken->values[i]));
    std::memset(reg, 0xff, sizeof(taken->values[i]));
  }
  warp.accumulators.push_back(taken);
  return taken;
}

uint64_t uniform_descriptor(Warp& warp, int at) {
  const uint64_t* values = warp.reg<uint64_t>(at);
  for (int lane = 1; lane < LANES; ++lane)
    if (values[lane] != values[0]) throw Fault("the descriptors of the lanes differ");
  return values[0];
}

void execute_all(Warp& warp) {
  for (auto& group : warp.products)
    for (Product& product : group) execute(warp, product);
  for (Product& product : warp.open_products) execute(warp, product);
}

void run_wgmma(Warp& warp, const Instruction& in, Mask) {
  Product product;
  product.instruction = &in;
  if (in.at[0] != NOWHERE) product.a = uniform_descriptor(warp, in.at[0]);
  product.b = uniform_descriptor(warp, in.at[1]);
  if (in.at[2] != NOWHERE) {
    const Mask scale = warp.predicate(in.at[2]);
    if (scale != 0 && scale != ALL_LANES) throw Fault("scale-d differs between the lanes");
    product.accumulates = scale != 0;
  }
  product.accumulators = take_accumulators(warp, in);
  ++product.accumulators->pending;
  warp.open_products.push_back(std::move(product));
  if (warp.block->launch->chance(3)) execute_all(warp);
}

void run_wgmma_commit(Warp& warp, const Instruction&, Mask) {
  warp.products.push_back(std::move(warp.open_products));
  warp.open_products.clear();
}

void run_wgmma_wait(Warp& warp, const Instruction& in, Mask) { finish_products(warp, in.option[0]); }

void build_group(Builder& builder, Run run) {
  builder.take_one_of({"sync"});
  builder.take_one_of({"aligned"});
  if (run == run_wgmma_wait) builder.instruction.option[0] = static_cast<int>(builder.number(0));
  builder.collective(run, true);
}

// 1 or -1.
float take_sign(Builder& builder, size_t i) {
  const int64_t sign = builder.number(i);
  if (sign != 1 && sign != -1) builder.fail("a sign of " + std::to_string(sign));
  return static_cast<float>(sign);
}

// wgmma.mma_async d, a, b, scale-d, sign-a, sign-b, transposed-a (of a descriptor), transposed-b;
void build_wgmma(Builder& builder) {
  if (builder.take("fence")) return build_group(builder, run_nothing);
  if (builder.take("commit_group")) return build_group(builder, run_wgmma_commit);
  if (builder.take("wait_group")) return build_group(builder, run_wgmma_wait);
  builder.take_one_of({"mma_async"});
  builder.take_one_of({"sync"});
  builder.take_one_of({"aligned"});
  const auto shape = take_shape(builder);
  Wgmma x;
  const std::string of_sums = take_element(builder);
  x.type_a = element_of(builder, take_element(builder));
  x.type_b = element_of(builder, take_element(builder));
  x.sums = of_sums == "f16" ? Sums::FLOAT16 : of_sums == "s32" ? Sums::INTEGER : Sums::FLOAT32;
  x.columns = shape[1], x.depth = shape[2];
  if (shape[0] != 64 || x.type_a == F64 || x.columns < 8 || x.columns > MOST_COLUMNS || x.columns % 8 ||
      x.depth * ELEMENT_BYTES[x.type_a] != 32 || ELEMENT_BYTES[x.type_a] != ELEMENT_BYTES[x.type_b])
    builder.fail("unsupported shape");
  Instruction& in = builder.instruction;
  in.list = builder.destinations(0, 32);
  if (in.list.size() * (x.sums == Sums::FLOAT16 ? 2 : 1) != static_cast<size_t>(x.columns) / 2)
    builder.fail("wrong number of registers");
  const bool in_registers = builder.operand(1).kind == Operand::VECTOR;
  if (in_registers)
    x.a = builder.sources(1, 32);
  else
    in.at[0] = builder.source(1, 64);
  in.at[1] = builder.source(2, 64);
  const size_t count = builder.num_operands();
  if (count > 3) in.at[2] = builder.source(3, 1);
  if (count > 5) x.sign = take_sign(builder, 4) * take_sign(builder, 5);
  if (count > 6) {
    x.transposed_a = !in_registers && builder.number(6);
    x.transposed_b = builder.number(count - 1);
  }
  in.details = std::make_shared<const Wgmma>(std::move(x));
  builder.collective(run_wgmma, true);
}

}  // namespace

void finish_products(Warp& warp, size_t most_pending) {
  for (; warp.products.size() > most_pending; warp.products.pop_front())
    for (Product& product : warp.products.front()) {
      execute(warp, product);
      Accumulators& accumulators = *product.accumulators;
      if (--accumulators.pending) continue;
      for (size_t i = 0; i < accumulators.registers.size(); ++i)
        std::memcpy(warp.reg<uint32_t>(accumulators.registers[i]), accumulators.values[i].data(),
                    sizeof(accumulators.values[i]));
      auto& in_flight = warp.accumulators;
      in_flight.erase(std::find(in_flight.begin(), in_flight.end(), product.accumulators));
    }
}

void add_wgmma(Instructions& known) { known.builders["wgmma"] = build_wgmma; }

}  // namespace ptxemu
