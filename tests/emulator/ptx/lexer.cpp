#include "lexer.h"

#include <algorithm>
#include <cctype>
#include <cstring>

namespace ptxemu {
namespace {

bool is_word_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || (c && std::strchr("_$%.", c));
}

}  // namespace

std::string without_comments(std::string text) {
  bool in_string = false;
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '"') in_string = !in_string;
    if (in_string) continue;
    if (text[i] == '/' && text[i + 1] == '/') {
      for (; i < text.size() && text[i] != '\n'; ++i) text[i] = ' ';
    } else if (text[i] == '/' && text[i + 1] == '*') {
      size_t end = text.find("*/", i + 2);
      end = end == std::string::npos ? text.size() : end + 2;
      for (; i < end; ++i)
        if (text[i] != '\n') text[i] = ' ';
    }
  }
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const size_t first = text.find_first_not_of(" \t", begin);
    if (first < end && (text.compare(first, 5, ".loc\t") == 0 || text.compare(first, 5, ".loc ") == 0 ||
                        text.compare(first, 5, ".file") == 0))
      std::fill(text.begin() + first, text.begin() + end, ' ');
    begin = end + 1;
  }
  return text;
}

std::vector<Token> tokenize(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
      ++i;
      continue;
    }
    size_t end = i + 1;
    Token::Kind kind = Token::PUNCTUATION;
    if (c == '"') {
      kind = Token::STRING;
      end = text.find('"', i + 1);
      if (end++ == std::string::npos)
        throw ParseError("line " + std::to_string(line) + ": unterminated string");
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      kind = Token::NUMBER;
      while (end < text.size() && (std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '.'))
        ++end;
    } else if (is_word_character(c)) {
      kind = Token::WORD;
      for (;;) {
        if (end < text.size() && is_word_character(text[end])) {
          ++end;
        } else if (end + 2 < text.size() && text[end] == ':' && text[end + 1] == ':') {
          end += 2;  // shared::cta
        } else {
          break;
        }
      }
    }
    tokens.push_back({kind, text.substr(i, end - i), line, i});
    i = end;
  }
  tokens.push_back({Token::END, "end of the text", line, text.size()});
  return tokens;
}

}  // namespace ptxemu
