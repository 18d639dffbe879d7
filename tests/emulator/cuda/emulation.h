// The CUDA runtime, the driver and torch's CUDA half, as far as the host code of csrc/cuda asks for them, on
// a machine that has none of them: kernels run in the emulator (ptxemu.h), memory is the host's.
//
//   fat_binary   nvcc embeds the PTX, uncompressed
//   kernels      each launch takes what the driver would take for the current device: the newest architecture
//                that it runs, sm_90a on 9.0 only; what the driver would refuse is refused
//   runtime      devices, of which the tests make a table; one stream, whose handle is not null; errors
//   memory       torch's CPU memory between red zones, poisoned, with checked bounds
//   torch        the functions that the stable headers call, renamed by -D (see cuda_ops.py): the ops get
//                registered for CPU tensors, which are then "CUDA tensors" of the chosen device
//
// Device 0 runs nothing: it is what is current where a device guard is missing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace cudaemu {

constexpr size_t KIB = 1024;
const cudaStream_t STREAM = reinterpret_cast<cudaStream_t>(0x5eed5eed);

struct Device {
  int major, minor, multiprocessors;

  int capability() const { return 10 * major + minor; }
  size_t shared_per_multiprocessor() const {
    return (capability() == 80 ? 164 : capability() < 90 || major == 12 ? 100 : 228) * KIB;
  }
  size_t shared_per_block() const { return shared_per_multiprocessor() - KIB; }  // 1 KiB is the system's
  unsigned threads_per_multiprocessor() const {
    return capability() == 80 || major == 9 || major == 10 ? 2048 : 1536;
  }
  std::string name() const { return std::to_string(major) + "." + std::to_string(minor); }
};

struct State {
  std::vector<Device> devices{{0, 0, 0}};
  int current_device = 0, device_of_tensors = 0;
  uint64_t seed = 0;  // of ptxemu_config, as is `races`
  bool races = false;
  cudaError_t last_error = cudaSuccess;
  std::string report;  // what the last error was

  // None for device 0, and for those that are not there.
  const Device* device_at(int index) const {
    return index > 0 && index < static_cast<int>(devices.size()) ? &devices[index] : nullptr;
  }
  const Device* device() const { return device_at(current_device); }
};
State& state();

cudaError_t fail(cudaError_t error, const std::string& what);

}  // namespace cudaemu
