// Devices, memory, errors, and the one function of the driver.
#include <cuda.h>

#include <cstring>
#include <utility>

#include "../ptx/ptxemu.h"
#include "emulation.h"

namespace cudaemu {

State& state() {
  static State all;
  return all;
}

cudaError_t fail(cudaError_t error, const std::string& what) {
  state().report = what;
  return state().last_error = error;
}

namespace {

// -1 for one that is not emulated.
int value_of(cudaDeviceAttr attribute, const Device& device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return device.major;
    case cudaDevAttrComputeCapabilityMinor: return device.minor;
    case cudaDevAttrMultiProcessorCount: return device.multiprocessors;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return static_cast<int>(device.shared_per_block());
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return static_cast<int>(device.shared_per_multiprocessor());
    case cudaDevAttrMaxThreadsPerMultiProcessor: return static_cast<int>(device.threads_per_multiprocessor());
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrWarpSize: return 32;
    default: return -1;
  }
}

CUresult CUDAAPI encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                              const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                              const cuuint32_t* steps, CUtensorMapInterleave interleave,
                              CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
                              CUtensorMapFloatOOBfill fill) {
  const char* why = "the map is not aligned to 64 bytes";
  if (reinterpret_cast<uintptr_t>(map) % 64 == 0)
    why = ptxemu_encode_tiled(map, type, rank, address, dims, strides, box, steps, interleave, swizzle, l2,
                              fill);
  if (!why) return CUDA_SUCCESS;
  state().report =
      std::string("cuTensorMapEncodeTiled: ") + why;  // the driver's errors are not the runtime's
  return CUDA_ERROR_INVALID_VALUE;
}

cudaError_t check_stream(cudaStream_t stream, const std::string& what) {
  if (!state().device()) return fail(cudaErrorInvalidDevice, what + ": no device guard");
  if (stream != STREAM) return fail(cudaErrorInvalidResourceHandle, what + ": not on the current stream");
  return cudaSuccess;
}

}  // namespace
}  // namespace cudaemu

using namespace cudaemu;

// --- for the tests

EXPORT int cudaemu_add_device(int major, int minor, int multiprocessors) {
  state().devices.push_back({major, minor, multiprocessors});
  return static_cast<int>(state().devices.size()) - 1;
}
// The device of all tensors, and how its kernels run.
EXPORT void cudaemu_use_device(int device, uint64_t seed, int races) {
  state().device_of_tensors = device;
  state().seed = seed;
  state().races = races;
}

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = state().current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  state().current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(state().devices.size());
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const Device* device = state().device_at(index);
  if (!device) return fail(cudaErrorInvalidDevice, "no device " + std::to_string(index));
  *value = value_of(attribute, *device);
  if (*value >= 0) return cudaSuccess;
  return fail(cudaErrorInvalidValue, "device attribute " + std::to_string(attribute) + " is not emulated");
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream, "cudaMemsetAsync")) return error;
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream, "cudaMemcpyAsync")) return error;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return std::exchange(state().last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return state().last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = std::to_string(error) + ": " + state().report;
  return text.c_str();
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const bool is_known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = is_known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (result) *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
