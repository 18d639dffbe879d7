// PTX text -> kernels as lists of statements with resolved registers. Knows the syntax, not the instructions.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "lexer.h"

namespace ptxemu {

// A register's width in bits; predicates have 1.
struct Register {
  int width = 0;
  int number = -1;  // among the kernel's registers
};

struct Operand {
  enum Kind {
    REGISTER,
    INTEGER,  // bits
    FLOAT32,  // bits of 0f...
    FLOAT64,  // bits of 0d...
    SYMBOL,   // label, variable, parameter or special register
    VECTOR,   // {a, b, ...}
    PAIR,     // a|b
    ADDRESS,  // [parts[0] + bits], or with coordinates [parts[0], {parts[1], ...}]
    SINK,     // _
  };
  Kind kind = SINK;
  Register reg;
  uint64_t bits = 0;
  bool negated = false;  // !p
  std::string symbol;
  std::vector<Operand> parts;
};

struct Statement {
  int line = 0;
  int scope = 0;  // of labels
  std::string text;
  std::string opcode;  // with its modifiers
  bool guarded = false, guard_negated = false;
  Register guard;
  std::vector<Operand> operands;
};

struct Variable {
  std::string name;
  uint64_t bytes = 0, align = 1;
  std::vector<uint8_t> initial;
};

struct Parameter {
  std::string name;
  unsigned bytes = 0, align = 1, offset = 0;
};

struct ParsedKernel {
  std::string name;
  std::vector<Parameter> parameters;
  unsigned parameter_bytes = 0;
  unsigned required_threads = 0, most_threads = 0, min_blocks = 0;  // .reqntid, .maxntid, .minnctapersm
  std::vector<Register> registers;
  std::vector<Statement> statements;
  std::vector<Variable> shared, local;
  std::vector<int> scope_parents;
  std::map<std::pair<int, std::string>, int> labels;  // (scope, name) -> statement

  // The statement that a label, seen from `scope`, stands before; -1 if there is none.
  int find_label(int scope, const std::string& name) const;
};

struct ParsedModule {
  std::vector<ParsedKernel> kernels;
  std::vector<Variable> globals;  // .global and .const
  std::vector<Variable> shared;   // of the module; without bytes: dynamic
};

ParsedModule parse(const std::string& text);

}  // namespace ptxemu
