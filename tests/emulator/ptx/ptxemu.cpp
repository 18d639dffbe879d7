// The C interface.
#include "ptxemu.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

#include "machine.h"

struct ptxemu_module {
  ptxemu::Module module;

  ptxemu_module() = default;
  ptxemu_module(const ptxemu_module&) = delete;
  ~ptxemu_module() {
    for (const auto& [name, memory] : module.globals) ptxemu::unregister_memory(memory.data());
  }
};

namespace {

std::mutex mutex;
std::string counts;

void report(const std::string& message, char* err, size_t bytes) {
  if (err && bytes) std::snprintf(err, bytes, "%s", message.c_str());
}

void note_counts(const ptxemu::Launch& launch) {
  std::map<std::string, std::pair<uint64_t, uint64_t>> totals;
  for (size_t i = 0; i < launch.kernel.code.size(); ++i) {
    if (!launch.executed_warps[i]) continue;
    auto& total = totals[launch.module.opcodes[launch.kernel.code[i].opcode]];
    total.first += launch.executed_warps[i];
    total.second += launch.executed_lanes[i];
  }
  std::ostringstream out;
  for (const auto& [opcode, total] : totals)
    out << opcode << ' ' << total.first << ' ' << total.second << '\n';
  counts = out.str();
}

const ptxemu::Kernel* find_kernel(const ptxemu_module& module, const std::string& name) {
  for (const auto& kernel : module.module.kernels)
    if (kernel->parsed.name == name) return kernel.get();
  return nullptr;
}

}  // namespace

ptxemu_module* ptxemu_load(const char* text, char* err, size_t err_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  try {
    auto result = std::make_unique<ptxemu_module>();
    ptxemu::ParsedModule parsed = ptxemu::parse(text);
    for (const ptxemu::Variable& variable : parsed.globals) {
      ptxemu::AlignedMemory& memory = result->module.globals[variable.name];
      memory = ptxemu::AlignedMemory(variable.bytes, 0);
      std::copy(variable.initial.begin(), variable.initial.end(), memory.data());
      ptxemu::register_memory(memory.data(), memory.size(), variable.name, true);
    }
    for (ptxemu::ParsedKernel& kernel : parsed.kernels)
      result->module.kernels.push_back(ptxemu::decode(result->module, std::move(kernel), parsed));
    return result.release();
  } catch (const std::exception& error) {
    report(error.what(), err, err_bytes);
    return nullptr;
  }
}

void ptxemu_unload(ptxemu_module* module) {
  const std::lock_guard<std::mutex> lock(mutex);
  delete module;
}

int ptxemu_describe(const ptxemu_module* module, const char* name, ptxemu_kernel_info* info) {
  const ptxemu::Kernel* kernel = find_kernel(*module, name);
  if (!kernel) return 0;
  info->static_smem = static_cast<unsigned>(kernel->static_shared - ptxemu::SHARED_RESERVED);
  info->max_threads = kernel->parsed.most_threads;
  info->min_blocks = kernel->parsed.min_blocks;
  return 1;
}

int ptxemu_launch(ptxemu_module* module, const char* name, const ptxemu_config* config, void** parameters,
                  char* err, size_t err_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  try {
    const ptxemu::Kernel* kernel = find_kernel(*module, name);
    if (!kernel) throw ptxemu::Fault("no such kernel");
    ptxemu::Launch launch(module->module, *kernel, *config, parameters);
    launch.run();
    note_counts(launch);
    return 0;
  } catch (const std::exception& error) {
    report(std::string(name) + ": " + error.what(), err, err_bytes);
    return 1;
  }
}

void ptxemu_register_memory(const void* start, size_t bytes, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  ptxemu::register_memory(start, bytes, name ? name : "memory");
}

void ptxemu_unregister_memory(const void* start) {
  const std::lock_guard<std::mutex> lock(mutex);
  ptxemu::unregister_memory(start);
}

const char* ptxemu_counts(void) { return counts.c_str(); }
