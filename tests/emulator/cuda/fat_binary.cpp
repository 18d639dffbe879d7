#include "fat_binary.h"

#include <cstdio>
#include <cstdlib>

namespace cudaemu {
namespace {

constexpr uint32_t MAGIC = 0xba55ed50;
constexpr uint16_t PTX = 1;

struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct Part {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
};

// This runs before main, where nobody catches an exception.
[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "the emulator cannot load this library: %s\n", why);
  std::abort();
}

}  // namespace

std::vector<Image> images_of(const void* fat_binary) {
  const auto* at = static_cast<const char*>(fat_binary);
  const auto* header = reinterpret_cast<const Header*>(at);
  if (header->magic != MAGIC) give_up("it has no fat binary of a known format");
  at += header->header_bytes;
  std::vector<Image> images;
  for (const char* end = at + header->bytes; at < end;) {
    const auto* part = reinterpret_cast<const Part*>(at);
    if (part->kind == PTX) {
      const std::string padded(at + part->header_bytes, part->bytes);
      Image image{0, false, padded.c_str()};  // up to the zeros
      const std::string target = ".target sm_";
      const size_t found = image.ptx.find(target);
      if (found == std::string::npos) give_up("its PTX is compressed; compile with --compress-mode=none");
      char* after = nullptr;
      image.architecture =
          static_cast<int>(std::strtol(image.ptx.c_str() + found + target.size(), &after, 10));
      image.is_specific = *after == 'a' || *after == 'f';
      images.push_back(std::move(image));
    }
    at += part->header_bytes + part->bytes;
  }
  return images;
}

}  // namespace cudaemu
