#include "parser.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <unordered_map>

namespace ptxemu {
namespace {

// Of a value of the type: 32 of .b32 and .f16x2, 1 of .pred; 0 if the word is no type.
unsigned bits_of(const std::string& word) {
  if (word == ".pred") return 1;
  size_t digits = 1;
  while (digits < word.size() && std::isalpha(static_cast<unsigned char>(word[digits]))) ++digits;
  const std::string kind = word.substr(0, digits);
  if (kind != ".b" && kind != ".u" && kind != ".s" && kind != ".f" && kind != ".bf") return 0;
  char* rest = nullptr;
  const auto bits = static_cast<unsigned>(std::strtoul(word.c_str() + digits, &rest, 10));
  return std::strcmp(rest, "x2") == 0 ? 2 * bits : *rest ? 0 : bits;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(without_comments(text)), tokens_(tokenize(text_)) {}

  ParsedModule run() {
    while (peek().kind != Token::END) module_item();
    return std::move(module_);
  }

 private:
  const Token& peek(int ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  const Token& next() { return tokens_[at_ < tokens_.size() - 1 ? at_++ : at_]; }
  bool is(const char* text) const { return peek().text == text && peek().kind != Token::STRING; }
  bool accept(const char* text) {
    if (!is(text)) return false;
    ++at_;
    return true;
  }
  void expect(const char* text) {
    if (!accept(text)) fail(std::string("expected '") + text + "'");
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw ParseError("line " + std::to_string(peek().line) + ": " + what + ", found '" + peek().text + "'");
  }
  uint64_t number() {
    if (peek().kind != Token::NUMBER) fail("expected a number");
    return std::strtoull(next().text.c_str(), nullptr, 0);
  }
  void skip_past(const char* text) {
    while (!accept(text)) {
      if (peek().kind == Token::END) fail(std::string("expected '") + text + "'");
      next();
    }
  }
  // Of an element, of a variable or a parameter; the word has been read.
  unsigned bytes_of(const std::string& word) const {
    const unsigned bytes = bits_of(word) / 8;
    if (bytes == 0) fail(word + " is no known type or attribute");
    return bytes;
  }
  void skip_braces() {
    expect("{");
    for (int depth = 1; depth > 0;) {
      if (peek().kind == Token::END) fail("expected '}'");
      const std::string& text = next().text;
      depth += (text == "{") - (text == "}");
    }
  }

  void module_item() {
    while (accept(".visible") || accept(".extern") || accept(".weak") || accept(".common")) {
    }
    if (accept(".version") || accept(".address_size")) {
      next();
    } else if (accept(".target")) {
      next();
      while (accept(",")) next();
    } else if (accept(".section")) {
      next();
      skip_braces();
    } else if (accept(".entry")) {
      kernel();
    } else if (accept(".func")) {
      // Calls are no known instruction, so nothing can reach it.
      while (!is("{") && !is(";") && peek().kind != Token::END) next();
      is("{") ? skip_braces() : skip_past(";");
    } else if (is(".global") || is(".const")) {
      next();
      module_.globals.push_back(variable());
    } else if (accept(".shared")) {
      module_.shared.push_back(variable());
    } else if (accept(";")) {
    } else if (accept(".pragma")) {
      skip_past(";");
    } else {
      fail("unknown item of a module");
    }
  }

  // What follows the state space: .align 16 .b8 name[4] = {1, 2};
  Variable variable() {
    Variable result;
    unsigned element = 0;
    while (peek().text[0] == '.') {
      const std::string word = next().text;
      if (word == ".align") {
        result.align = number();
      } else if (word == ".attribute") {
        skip_past(")");
      } else {
        element = bytes_of(word);
      }
    }
    result.name = next().text;
    result.bytes = element;
    while (accept("[")) {
      result.bytes *= is("]") ? 0 : number();
      expect("]");
    }
    if (accept("=")) initializer(result, element);
    expect(";");
    return result;
  }

  // A number with its sign.
  Operand immediate() {
    const bool is_negative = accept("-");
    if (peek().kind != Token::NUMBER) fail("expected a number");
    Operand result = magnitude(next().text);
    if (!is_negative) return result;
    const uint64_t sign = uint64_t{1} << (result.kind == Operand::FLOAT32 ? 31 : 63);
    result.bits = result.kind == Operand::INTEGER ? -result.bits : result.bits ^ sign;
    return result;
  }

  void initializer(Variable& variable, unsigned element) {
    const bool is_list = accept("{");
    do {
      const Operand value = immediate();
      if ((value.kind == Operand::FLOAT32 && element != 4) ||
          (value.kind == Operand::FLOAT64 && element != 8))
        fail("an initial value of another size than the elements of " + variable.name);
      const auto* bytes = reinterpret_cast<const uint8_t*>(&value.bits);
      variable.initial.insert(variable.initial.end(), bytes, bytes + element);
    } while (accept(","));
    if (is_list) expect("}");
    if (variable.initial.size() > variable.bytes)
      fail("more initial values than elements of " + variable.name);
  }

  void kernel() {
    kernel_ = ParsedKernel();
    names_.assign(1, {});
    scopes_.assign(1, 0);
    kernel_.scope_parents.assign(1, -1);
    kernel_.name = next().text;
    if (accept("(")) parameters();
    while (!is("{")) kernel_directive();
    expect("{");
    while (!scopes_.empty()) body_item();
    module_.kernels.push_back(std::move(kernel_));
  }

  void parameters() {
    while (!accept(")")) {
      accept(",");
      expect(".param");
      Parameter parameter;
      while (peek().text[0] == '.') {
        const std::string word = next().text;
        if (word == ".align") {
          const unsigned align = number();
          if (!parameter.bytes) parameter.align = align;  // and not that of what a .ptr points to
        } else if (word != ".ptr" && word != ".global" && word != ".shared" && word != ".const") {
          parameter.bytes = bytes_of(word);
        }
      }
      parameter.name = next().text;
      parameter.align = std::max(parameter.align, parameter.bytes);
      if (accept("[")) {
        parameter.bytes *= number();
        expect("]");
      }
      unsigned& end = kernel_.parameter_bytes;
      parameter.offset = (end + parameter.align - 1) / parameter.align * parameter.align;
      end = parameter.offset + parameter.bytes;
      kernel_.parameters.push_back(parameter);
    }
  }

  void kernel_directive() {
    const std::string word = next().text;
    if (word == ".reqntid" || word == ".maxntid") {
      unsigned threads = number();
      while (accept(",")) threads *= number();
      (word == ".reqntid" ? kernel_.required_threads : kernel_.most_threads) = threads;
    } else if (word == ".minnctapersm") {
      kernel_.min_blocks = number();
    } else if (word == ".maxnreg" || word == ".maxclusterrank" || word == ".reqnctapercluster") {
      number();
      while (accept(",")) number();
    } else if (word == ".pragma") {
      skip_past(";");
    } else if (word != ".explicitcluster") {
      fail("unknown directive " + word + " of a kernel");
    }
  }

  void body_item() {
    if (accept("{")) {
      kernel_.scope_parents.push_back(scopes_.back());
      scopes_.push_back(static_cast<int>(kernel_.scope_parents.size()) - 1);
      names_.emplace_back();
    } else if (accept("}")) {
      scopes_.pop_back();
      names_.pop_back();
    } else if (accept(";")) {
    } else if (accept(".reg")) {
      registers();
    } else if (accept(".shared")) {
      kernel_.shared.push_back(variable());
    } else if (accept(".local")) {
      kernel_.local.push_back(variable());
    } else if (accept(".pragma")) {
      skip_past(";");
    } else if (peek().kind == Token::WORD && peek(1).text == ":") {
      kernel_.labels[{scopes_.back(), next().text}] = static_cast<int>(kernel_.statements.size());
      expect(":");
    } else if (is("@") || (peek().kind == Token::WORD && peek().text[0] != '.')) {
      statement();
    } else {
      fail("unknown item of a kernel");
    }
  }

  void registers() {
    const std::string type = next().text;
    // 8 bits take a register of 16.
    const int width = type == ".pred" ? 1 : std::max(16, static_cast<int>(bits_of(type)));
    if (bits_of(type) == 0 || (width != 1 && width != 16 && width != 32 && width != 64))
      fail("registers of " + type + " are not supported");
    do {
      const std::string name = next().text;
      if (accept("<")) {
        const uint64_t count = number();
        expect(">");
        for (uint64_t i = 0; i < count; ++i) declare(name + std::to_string(i), width);
      } else {
        declare(name, width);
      }
    } while (accept(","));
    expect(";");
  }

  void declare(const std::string& name, int width) {
    const Register reg{width, static_cast<int>(kernel_.registers.size())};
    kernel_.registers.push_back(reg);
    names_.back()[name] = reg;
  }

  const Register* find_register(const std::string& name) const {
    for (auto scope = names_.rbegin(); scope != names_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return &found->second;
    }
    return nullptr;
  }

  void statement() {
    Statement result;
    result.line = peek().line;
    result.scope = scopes_.back();
    const size_t begin = peek().begin;
    if (accept("@")) {
      result.guarded = true;
      result.guard_negated = accept("!");
      const Register* guard = find_register(next().text);
      if (!guard || guard->width != 1) fail("expected a predicate");
      result.guard = *guard;
    }
    result.opcode = next().text;
    if (!is(";")) do {
        result.operands.push_back(operand());
      } while (accept(","));
    const size_t end = peek().begin;
    expect(";");
    result.text = one_line(text_.substr(begin, end - begin));
    kernel_.statements.push_back(std::move(result));
  }

  static std::string one_line(std::string text) {
    std::string result;
    for (char c : text) {
      const bool is_space = std::isspace(static_cast<unsigned char>(c));
      if (!is_space || (!result.empty() && result.back() != ' ')) result += is_space ? ' ' : c;
    }
    while (!result.empty() && result.back() == ' ') result.pop_back();
    return result.size() > 160 ? result.substr(0, 157) + "..." : result;
  }

  Operand operand() {
    Operand first = simple_operand();
    if (!accept("|")) return first;
    Operand pair;
    pair.kind = Operand::PAIR;
    pair.parts = {first, simple_operand()};
    return pair;
  }

  Operand simple_operand() {
    Operand result;
    if (accept("{")) {
      result.kind = Operand::VECTOR;
      do result.parts.push_back(operand());
      while (accept(","));
      expect("}");
      return result;
    }
    if (accept("[")) return address();
    if (accept("!")) {
      result = simple_operand();
      result.negated = true;
      return result;
    }
    if (is("-") || peek().kind == Token::NUMBER) return immediate();
    if (peek().kind != Token::WORD) fail("expected an operand");
    const std::string name = next().text;
    if (name == "_") return result;
    if (const Register* reg = find_register(name)) {
      result.kind = Operand::REGISTER;
      result.reg = *reg;
    } else {
      result.kind = Operand::SYMBOL;
      result.symbol = name;
    }
    return result;
  }

  Operand address() {
    Operand result;
    result.kind = Operand::ADDRESS;
    result.parts.push_back(simple_operand());
    for (;;) {
      if (accept("+")) {
        const bool is_negative = accept("-");
        const uint64_t offset = number();
        result.bits += is_negative ? -offset : offset;
      } else if (is("-")) {
        next();
        result.bits -= number();
      } else {
        break;
      }
    }
    if (accept(",")) {
      const Operand coordinates = simple_operand();
      if (coordinates.kind != Operand::VECTOR) fail("expected coordinates");
      result.parts.insert(result.parts.end(), coordinates.parts.begin(), coordinates.parts.end());
    }
    expect("]");
    return result;
  }

  static Operand magnitude(const std::string& text) {
    Operand result;
    const bool is_hex_float = text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1]);
    if (is_hex_float) {
      result.kind = std::strchr("fF", text[1]) ? Operand::FLOAT32 : Operand::FLOAT64;
      result.bits = std::strtoull(text.c_str() + 2, nullptr, 16);
    } else if (text.find('.') != std::string::npos) {
      result.kind = Operand::FLOAT64;
      const double value = std::strtod(text.c_str(), nullptr);
      std::memcpy(&result.bits, &value, 8);
    } else {
      result.kind = Operand::INTEGER;
      const bool is_binary = text.size() > 2 && text[0] == '0' && std::strchr("bB", text[1]);
      result.bits = std::strtoull(text.c_str() + (is_binary ? 2 : 0), nullptr, is_binary ? 2 : 0);
    }
    return result;
  }

  const std::string text_;
  const std::vector<Token> tokens_;
  size_t at_ = 0;
  ParsedModule module_;
  ParsedKernel kernel_;
  std::vector<int> scopes_;
  std::vector<std::unordered_map<std::string, Register>> names_;  // one of each open scope
};

}  // namespace

int ParsedKernel::find_label(int scope, const std::string& name) const {
  for (; scope >= 0; scope = scope_parents[scope]) {
    const auto found = labels.find({scope, name});
    if (found != labels.end()) return found->second;
  }
  return -1;
}

ParsedModule parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptxemu
