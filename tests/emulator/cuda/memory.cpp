// torch's CPU memory as the emulator knows it: each tensor between red zones, poisoned with NaN, registered
// for bounds checking. What is written into a red zone is found when the tensor is freed, too.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "../ptx/ptxemu.h"
#include "emulation.h"

namespace {

constexpr size_t RED_ZONE = 4096, ALIGNMENT = 256;
constexpr unsigned char RED = 0xa5, POISON = 0xff;  // 0xffff... is a NaN in every type, -1 in integers

std::mutex mutex;
std::unordered_map<void*, size_t> sizes;
std::string damage;

// Empty if the red zones around `bytes` bytes are as they were.
std::string damage_of(const unsigned char* begin, size_t bytes) {
  const auto text = [bytes](size_t distance, const char* where) {
    return "a block of " + std::to_string(bytes) + " bytes was written " + std::to_string(distance) + where;
  };
  for (size_t i = 0; i < RED_ZONE; ++i) {
    if (begin[i] != RED) return text(RED_ZONE - i, " bytes before its begin\n");
    if (begin[RED_ZONE + bytes + i] != RED) return text(i, " bytes beyond its end\n");
  }
  return "";
}

void release(void* data) {
  if (!data) return;
  auto* begin = static_cast<unsigned char*>(data) - RED_ZONE;
  {
    const std::lock_guard lock(mutex);
    const auto found = sizes.find(data);
    if (found == sizes.end()) {
      std::fprintf(stderr, "memory is freed by an allocator that it is not of\n");
      std::abort();
    }
    damage += damage_of(begin, found->second);
    sizes.erase(found);
  }
  ptxemu_unregister_memory(data);
  std::free(begin);
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    const size_t all = (bytes + 2 * RED_ZONE + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    auto* begin = static_cast<unsigned char*>(std::aligned_alloc(ALIGNMENT, all));
    if (!begin) throw std::bad_alloc();
    std::memset(begin, RED, all);
    void* data = begin + RED_ZONE;
    std::memset(data, POISON, bytes);
    {
      const std::lock_guard lock(mutex);
      sizes[data] = bytes;
    }
    ptxemu_register_memory(data, bytes, ("tensor of " + std::to_string(bytes) + " bytes").c_str());
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

// Turns it on or off. A tensor is freed by the allocator that it is of.
EXPORT void cudaemu_guard_memory(int on) {
  static GuardedAllocator guarded;
  constexpr uint8_t PRIORITY = 255;
  c10::SetAllocator(c10::DeviceType::CPU, on ? &guarded : c10::GetDefaultCPUAllocator(), PRIORITY);
}

// What the red zones of freed tensors showed since the last call.
EXPORT const char* cudaemu_damage() {
  static std::string text;
  const std::lock_guard lock(mutex);
  text.swap(damage);
  damage.clear();
  return text.c_str();
}
