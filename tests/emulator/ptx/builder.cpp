#include "builder.h"

#include <algorithm>

namespace ptxemu {
namespace {

const Instructions& instructions() {
  static const Instructions known = [] {
    Instructions result;
    for (const auto add :
         {add_integers, add_floats, add_halves, add_conversions, add_moves, add_loads_and_stores, add_atomics,
          add_mbarriers, add_copies, add_control, add_exchanges, add_mma, add_wgmma})
      add(result);
    return result;
  }();
  return known;
}

int register_bytes(int width) { return width == 1 ? sizeof(Mask) : LANES * width / 8; }

int allocate(Kernel& kernel, int width) {
  // Predicates are one word; everything else begins on 32 bytes, for vector instructions.
  const int align = width == 1 ? 4 : 32;
  const int at = (kernel.register_bytes + align - 1) / align * align;
  kernel.register_bytes = at + register_bytes(width);
  return at;
}

const std::unordered_map<std::string, Type> TYPES = {
    {"b8", {Type::BITS, 8}},           {"b16", {Type::BITS, 16}},      {"b32", {Type::BITS, 32}},
    {"b64", {Type::BITS, 64}},         {"u8", {Type::UNSIGNED, 8}},    {"u16", {Type::UNSIGNED, 16}},
    {"u32", {Type::UNSIGNED, 32}},     {"u64", {Type::UNSIGNED, 64}},  {"s8", {Type::SIGNED, 8}},
    {"s16", {Type::SIGNED, 16}},       {"s32", {Type::SIGNED, 32}},    {"s64", {Type::SIGNED, 64}},
    {"f16", {Type::FLOAT, 16}},        {"f32", {Type::FLOAT, 32}},     {"f64", {Type::FLOAT, 64}},
    {"bf16", {Type::BFLOAT, 16}},      {"pred", {Type::PREDICATE, 1}}, {"f16x2", {Type::FLOAT, 16, 2}},
    {"bf16x2", {Type::BFLOAT, 16, 2}},
};

uint64_t align_up(uint64_t value, uint64_t align) { return (value + align - 1) / align * align; }

// Places of the kernel's variables in shared memory, where dynamic ones begin where the others end, and in
// local memory.
std::map<std::string, uint64_t> lay_out_variables(Kernel& kernel, const ParsedModule& module) {
  std::map<std::string, uint64_t> places;
  std::vector<std::string> dynamic;
  uint64_t end = SHARED_RESERVED, dynamic_align = 1;
  for (const std::vector<Variable>& variables : {kernel.parsed.shared, module.shared})
    for (const Variable& variable : variables) {
      if (variable.bytes == 0) {
        dynamic.push_back(variable.name);
        dynamic_align = std::max(dynamic_align, variable.align);
        continue;
      }
      end = align_up(end, variable.align);
      places[variable.name] = end;
      end += variable.bytes;
    }
  kernel.static_shared = align_up(end, std::max<uint64_t>(dynamic_align, 16));
  for (const std::string& name : dynamic) places[name] = kernel.static_shared;
  for (const Variable& variable : kernel.parsed.local) {
    places[variable.name] = align_up(kernel.local_bytes, variable.align);
    kernel.local_bytes = places[variable.name] + variable.bytes;
  }
  kernel.local_bytes = align_up(kernel.local_bytes, 16);
  return places;
}

int number_of_opcode(Module& module, const std::string& opcode) {
  const auto [found, is_new] =
      module.opcode_numbers.try_emplace(opcode, static_cast<int>(module.opcodes.size()));
  if (is_new) module.opcodes.push_back(opcode);
  return found->second;
}

bool fits(const Builder& builder, const Lanewise& function) {
  if (builder.num_operands() != function.widths.size()) return false;
  for (size_t i = 0; i < function.widths.size(); ++i) {
    const Operand& operand = builder.operand(i);
    if (operand.kind == Operand::REGISTER && operand.reg.width != function.widths[i]) return false;
    if (operand.kind == Operand::VECTOR || operand.kind == Operand::PAIR || operand.kind == Operand::ADDRESS)
      return false;
  }
  return true;
}

Instruction decode(Module& module, Kernel& kernel, Places& places, const Statement& statement) {
  Builder builder(module, kernel, places, statement);
  const auto function = instructions().lanewise.find(statement.opcode);
  if (function != instructions().lanewise.end() && fits(builder, function->second)) {
    const auto& widths = function->second.widths;
    builder.instruction.at[0] = builder.destination(0, widths[0]);
    for (size_t i = 1; i < widths.size(); ++i) builder.instruction.at[i] = builder.source(i, widths[i]);
    builder.plain(function->second.run);
  } else {
    const auto found = instructions().builders.find(statement.opcode.substr(0, statement.opcode.find('.')));
    if (found == instructions().builders.end())
      builder.fail(function == instructions().lanewise.end() ? "unknown instruction"
                                                             : "unsupported operands");
    found->second(builder);
    builder.finish();
  }
  Instruction result = std::move(builder.instruction);
  result.source = &statement;
  result.opcode = number_of_opcode(module, statement.opcode);
  if (statement.guarded) {
    result.guard = places.registers[statement.guard.number];
    result.guard_negated = statement.guard_negated;
  }
  return result;
}

}  // namespace

Builder::Builder(Module& module, Kernel& kernel, Places& places, const Statement& statement)
    : statement(statement), module_(module), kernel_(kernel), places_(places) {
  for (size_t begin = statement.opcode.find('.'); begin != std::string::npos;) {
    const size_t end = statement.opcode.find('.', begin + 1);
    modifiers_.push_back(
        statement.opcode.substr(begin + 1, end == std::string::npos ? end : end - begin - 1));
    begin = end;
  }
  known_.assign(modifiers_.size(), false);
}

void Builder::fail(const std::string& what) const {
  throw ParseError("line " + std::to_string(statement.line) + ": " + what + ": " + statement.text);
}

bool Builder::take(const std::string& modifier) {
  return !take_if([&](const std::string& m) { return m == modifier; }).empty();
}

void Builder::ignore(std::initializer_list<const char*> modifiers) {
  for (const char* modifier : modifiers) take(modifier);
}

std::string Builder::take_optional(const std::vector<std::string>& choices, const std::string& otherwise) {
  const std::string found = take_if(
      [&](const std::string& m) { return std::find(choices.begin(), choices.end(), m) != choices.end(); });
  return found.empty() ? otherwise : found;
}

std::string Builder::take_one_of(const std::vector<std::string>& choices) {
  const std::string found = take_optional(choices, "");
  if (!found.empty()) return found;
  std::string expected;
  for (const std::string& choice : choices) expected += " ." + choice;
  fail("an unsupported form, without any of" + expected);
}

Type Builder::take_type() {
  const std::string found = take_if([](const std::string& m) { return TYPES.count(m) > 0; });
  if (found.empty()) fail("no supported type");
  return TYPES.at(found);
}

Space Builder::take_space() {
  if (take("global") || take("const")) return Space::GLOBAL;
  if (take_shared()) return Space::SHARED;
  if (take("param")) return Space::PARAMETER;
  if (take("local")) return Space::LOCAL;
  return Space::GENERIC;
}

bool Builder::take_shared() { return take("shared") || take("shared::cta") || take("shared::cluster"); }

// Hints, and orderings that hold here anyway.
void Builder::take_hints() {
  ignore({"volatile",
          "relaxed",
          "acquire",
          "release",
          "acq_rel",
          "weak",
          "cta",
          "cluster",
          "gpu",
          "sys",
          "ca",
          "cg",
          "cs",
          "lu",
          "cv",
          "wb",
          "wt",
          "nc",
          "L1::evict_normal",
          "L1::evict_unchanged",
          "L1::evict_first",
          "L1::evict_last",
          "L1::no_allocate",
          "L2::cache_hint",
          "L2::64B",
          "L2::128B",
          "L2::256B",
          "L2::evict_first",
          "L2::evict_last",
          "L2::evict_normal"});
}

void Builder::finish() const {
  for (size_t i = 0; i < modifiers_.size(); ++i)
    if (!known_[i]) fail("unknown modifier ." + modifiers_[i]);
}

const Operand& Builder::operand(size_t i) const {
  if (i >= statement.operands.size()) fail("too few operands");
  return statement.operands[i];
}

int Builder::constant(uint64_t bits, int width) {
  if (width < 64 && width > 1) bits &= (uint64_t{1} << width) - 1;
  const auto [place, is_new] = places_.constants.try_emplace({bits, width}, 0);
  if (is_new) {
    place->second = allocate(kernel_, width);
    kernel_.constants.push_back({place->second, width, bits});
  }
  return place->second;
}

int Builder::special(const std::string& name) {
  const auto [place, is_new] = places_.specials.try_emplace(name, 0);
  if (is_new) {
    const Special special = find_special(name);
    if (!special.vector) fail("unknown symbol " + name);
    place->second = allocate(kernel_, 32);
    kernel_.specials.push_back({special, place->second});
  }
  return place->second;
}

// The address of a variable or a parameter.
bool Builder::find_symbol(const std::string& name, uint64_t& value) const {
  const auto variable = places_.variables.find(name);
  if (variable != places_.variables.end()) return value = variable->second, true;
  const auto global = module_.globals.find(name);
  if (global != module_.globals.end()) return value = reinterpret_cast<uint64_t>(global->second.data()), true;
  for (const Parameter& parameter : kernel_.parsed.parameters)
    if (parameter.name == name) return value = parameter.offset, true;
  return false;
}

int Builder::source(const Operand& operand, int width) {
  if (operand.negated) fail("no operand of this instruction can be negated");
  switch (operand.kind) {
    case Operand::REGISTER:
      if (operand.reg.width != width) fail("an operand is not of " + std::to_string(width) + " bits");
      return places_.registers[operand.reg.number];
    case Operand::INTEGER: return constant(operand.bits, width);
    case Operand::FLOAT32:
      if (width != 32) fail("a float32 constant for another type");
      return constant(operand.bits, width);
    case Operand::FLOAT64: {
      if (width == 64) return constant(operand.bits, width);
      double value;
      std::memcpy(&value, &operand.bits, 8);
      const float narrow = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &narrow, 4);
      if (width != 32) fail("a floating-point constant for another type");
      return constant(bits, width);
    }
    case Operand::SYMBOL: {
      uint64_t value;
      if (find_symbol(operand.symbol, value)) return constant(value, width);
      if (width != 32) fail("special registers have 32 bits");
      return special(operand.symbol);
    }
    default: fail("an unsupported operand");
  }
}

int Builder::destination(const Operand& operand, int width) {
  if (operand.kind == Operand::SINK) return allocate(kernel_, width);
  if (operand.kind != Operand::REGISTER) fail("the result is no register");
  return source(operand, width);
}

int Builder::any_source(const Operand& operand, int& width) {
  if (operand.kind == Operand::REGISTER) width = operand.reg.width;
  return source(operand, width);
}

int Builder::any_destination(const Operand& operand, int& width) {
  if (operand.kind == Operand::REGISTER) width = operand.reg.width;
  return destination(operand, width);
}

std::vector<int> Builder::sources(size_t i, int width) {
  if (operand(i).kind != Operand::VECTOR) return {source(i, width)};
  std::vector<int> result;
  for (const Operand& part : operand(i).parts) result.push_back(source(part, width));
  return result;
}

std::vector<int> Builder::destinations(size_t i, int width) {
  if (operand(i).kind != Operand::VECTOR) return {destination(i, width)};
  std::vector<int> result;
  for (const Operand& part : operand(i).parts) result.push_back(destination(part, width));
  return result;
}

int Builder::predicate(size_t i, bool& negated) {
  Operand plain = operand(i);
  negated = std::exchange(plain.negated, false);
  return source(plain, 1);
}

void Builder::destination_pair(size_t i, int width, int& first, int& second) {
  const Operand& both = operand(i);
  const bool is_pair = both.kind == Operand::PAIR;
  first = destination(is_pair ? both.parts[0] : both, width);
  if (is_pair) second = destination(both.parts[1], 1);
}

void Builder::address(size_t i, int slot) {
  const Operand& whole = operand(i);
  if (whole.kind != Operand::ADDRESS) fail("expected an address");
  int width = 64;
  const int at = any_source(whole.parts[0], width);
  if (width != 32 && width != 64) fail("an address is not of 32 or 64 bits");
  instruction.address[slot] = {at, width == 64, static_cast<int64_t>(whole.bits)};
}

int Builder::label(const std::string& name) const {
  const int target = kernel_.parsed.find_label(statement.scope, name);
  if (target < 0 || target >= static_cast<int>(kernel_.parsed.statements.size()))
    fail("unknown label " + name);
  return target;
}

int64_t Builder::number(size_t i) const {
  if (operand(i).kind != Operand::INTEGER) fail("expected a number");
  return static_cast<int64_t>(operand(i).bits);
}

void Builder::plain(Run run) { instruction.run = run; }

void Builder::collective(Run run, bool needs_all_lanes, int members) {
  instruction.run = run;
  instruction.flow = Flow::COLLECTIVE;
  instruction.needs_all_lanes = needs_all_lanes;
  instruction.members = members;
}

void Builder::blocking(Run run, bool needs_all_lanes) {
  instruction.run = run;
  instruction.flow = Flow::BLOCKING;
  instruction.needs_all_lanes = needs_all_lanes;
}

std::unique_ptr<Kernel> decode(Module& module, ParsedKernel parsed_kernel, const ParsedModule& parsed) {
  auto kernel = std::make_unique<Kernel>();
  kernel->parsed = std::move(parsed_kernel);
  Places places;
  for (const Register& reg : kernel->parsed.registers)
    places.registers.push_back(allocate(*kernel, reg.width));
  places.variables = lay_out_variables(*kernel, parsed);
  for (const Statement& statement : kernel->parsed.statements)
    kernel->code.push_back(decode(module, *kernel, places, statement));
  // Whatever runs off the end has no instruction to run.
  const auto ends = [](const Instruction& in) {
    return in.guard == NOWHERE && (in.flow == Flow::EXIT || in.flow == Flow::BRANCH);
  };
  if (kernel->code.empty() || !ends(kernel->code.back()))
    throw ParseError(kernel->parsed.name + " does not end with an exit");
  return kernel;
}

}  // namespace ptxemu
