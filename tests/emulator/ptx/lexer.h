// PTX text -> tokens.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace ptxemu {

// What is wrong with a text, with the line it is in.
struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Token {
  enum Kind { WORD, NUMBER, STRING, PUNCTUATION, END };
  Kind kind;
  std::string text;
  int line;
  size_t begin;  // in the text
};

// Blanks out comments and lines of debugging information, keeping the line structure.
std::string without_comments(std::string text);

// The last token is END.
std::vector<Token> tokenize(const std::string& text);

}  // namespace ptxemu
