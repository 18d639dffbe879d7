// Kernels: how nvcc's generated code registers and launches them.
#include <algorithm>
#include <map>
#include <mutex>

#include "fat_binary.h"

namespace cudaemu {
namespace {

constexpr unsigned MOST_THREADS = 1024, MOST_CLUSTER = 8;  // of the portable sizes
constexpr size_t PLAIN_SHARED = 48 * KIB;                  // what a block may have without an attribute

struct Function {
  std::vector<Image>* images;
  std::string name;
  std::map<int, size_t> dynamic_limit;  // by device: cudaFuncAttributeMaxDynamicSharedMemorySize
};

std::mutex mutex;
std::string log_text;
std::map<std::string, std::string> counts;  // of the last launch of each kernel
// Filled by the static initialisers of other files, which may come first.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}

// A kernel as the current device runs it.
struct Kernel {
  Function* function = nullptr;
  const Device* device = nullptr;
  Image* image = nullptr;
  ptxemu_kernel_info info{};

  std::string label() const { return function->name + ": "; }
  // Blocks of a multiprocessor. Registers are known to ptxas alone: as many as __launch_bounds__ asks for.
  int blocks_per_multiprocessor(unsigned threads, size_t dynamic) const {
    const size_t shared = info.static_smem + dynamic + KIB;
    const size_t by_shared = device->shared_per_multiprocessor() / shared;
    const size_t by_threads = device->threads_per_multiprocessor() / threads;
    const size_t by_registers = std::max(info.min_blocks, 1u);
    return static_cast<int>(std::min({by_shared, by_threads, by_registers, size_t{32}}));
  }
};

// The newest image for the device that has the kernel, and of equal ones the specific one.
cudaError_t choose_image(Kernel& kernel) {
  for (Image& image : *kernel.function->images) {
    const Image* best = kernel.image;
    const bool is_better = !best || image.architecture > best->architecture ||
                           (image.architecture == best->architecture && image.is_specific);
    if (!image.runs_on(*kernel.device) || !is_better) continue;
    char error[8192] = "";
    if (!image.module) image.module = ptxemu_load(image.ptx.c_str(), error, sizeof(error));
    if (!image.module) return fail(cudaErrorInvalidPtx, kernel.label() + error);
    if (ptxemu_describe(image.module, kernel.function->name.c_str(), &kernel.info)) kernel.image = &image;
  }
  if (!kernel.image)
    return fail(cudaErrorNoKernelImageForDevice,
                kernel.label() + "no PTX for compute capability " + kernel.device->name());
  return cudaSuccess;
}

cudaError_t find_kernel(const void* symbol, Kernel& kernel) {
  const auto found = functions().find(symbol);
  if (found == functions().end()) return fail(cudaErrorInvalidDeviceFunction, "an unregistered function");
  kernel.function = &found->second;
  kernel.device = state().device();
  if (!kernel.device) return fail(cudaErrorInvalidDevice, kernel.label() + "no device guard");
  return choose_image(kernel);
}

struct Configuration {
  dim3 grid, block;
  size_t dynamic_shared;
  cudaStream_t stream;
  dim3 cluster{1, 1, 1};
  bool cooperative = false;

  unsigned threads() const { return block.x * block.y * block.z; }
  unsigned cluster_blocks() const { return cluster.x * cluster.y * cluster.z; }
  uint64_t blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
};

cudaError_t configuration_of(const cudaLaunchConfig_t& config, Configuration& x) {
  x = {config.gridDim, config.blockDim, config.dynamicSmemBytes, config.stream};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      x.cluster = {cluster.x, cluster.y, cluster.z};
    } else if (attribute.id == cudaLaunchAttributeCooperative) {
      x.cooperative = attribute.val.cooperative != 0;
    } else {
      return fail(cudaErrorNotSupported,
                  "launch attribute " + std::to_string(attribute.id) + " is not emulated");
    }
  }
  return cudaSuccess;
}

std::string text_of(const dim3& sizes) {
  return std::to_string(sizes.x) + " x " + std::to_string(sizes.y) + " x " + std::to_string(sizes.z);
}

cudaError_t check_sizes(const Kernel& kernel, const Configuration& x) {
  const unsigned threads = x.threads();
  if (!threads || !x.blocks() || threads > MOST_THREADS || x.grid.x > 0x7fffffffu || x.grid.y > 65535 ||
      x.grid.z > 65535)
    return fail(cudaErrorInvalidConfiguration, kernel.label() + "a grid of " + text_of(x.grid) +
                                                   " blocks of " + text_of(x.block) + " threads");
  if (kernel.info.max_threads && threads > kernel.info.max_threads)
    return fail(cudaErrorInvalidValue, kernel.label() + std::to_string(threads) + " threads, bounded by " +
                                           std::to_string(kernel.info.max_threads));
  const auto set = kernel.function->dynamic_limit.find(state().current_device);
  const size_t limit =
      set == kernel.function->dynamic_limit.end() ? PLAIN_SHARED - kernel.info.static_smem : set->second;
  if (x.dynamic_shared > limit)
    return fail(cudaErrorInvalidValue, kernel.label() + std::to_string(x.dynamic_shared) +
                                           " bytes of dynamic shared memory, limit " + std::to_string(limit));
  return cudaSuccess;
}

cudaError_t check_residence(const Kernel& kernel, const Configuration& x) {
  const unsigned cluster = x.cluster_blocks();
  if (cluster > 1) {
    if (kernel.device->major < 9) return fail(cudaErrorInvalidValue, kernel.label() + "clusters before 9.0");
    if (cluster > MOST_CLUSTER || x.grid.x % x.cluster.x || x.grid.y % x.cluster.y || x.grid.z % x.cluster.z)
      return fail(cudaErrorInvalidClusterSize,
                  kernel.label() + "a cluster of " + text_of(x.cluster) + " in a grid of " + text_of(x.grid));
  }
  const int resident = kernel.blocks_per_multiprocessor(x.threads(), x.dynamic_shared);
  if (resident < 1) return fail(cudaErrorLaunchOutOfResources, kernel.label() + "a block does not fit");
  const uint64_t fit = uint64_t(resident) * kernel.device->multiprocessors / cluster * cluster;
  if (x.cooperative && x.blocks() > fit)
    return fail(
        cudaErrorCooperativeLaunchTooLarge,
        kernel.label() + std::to_string(x.blocks()) + " cooperative blocks, " + std::to_string(fit) + " fit");
  return cudaSuccess;
}

cudaError_t launch(const void* symbol, const Configuration& x, void** arguments) {
  const std::lock_guard lock(mutex);
  Kernel kernel;
  if (const cudaError_t error = find_kernel(symbol, kernel)) return error;
  if (x.stream != STREAM)
    return fail(cudaErrorInvalidResourceHandle, kernel.label() + "not on the current stream");
  if (const cudaError_t error = check_sizes(kernel, x)) return error;
  if (const cudaError_t error = check_residence(kernel, x)) return error;
  const ptxemu_config config{{x.grid.x, x.grid.y, x.grid.z},
                             {x.block.x, x.block.y, x.block.z},
                             {x.cluster.x, x.cluster.y, x.cluster.z},
                             static_cast<unsigned>(x.dynamic_shared),
                             x.cooperative,
                             state().seed,
                             state().races};
  const std::string& name = kernel.function->name;
  log_text += name + " grid " + text_of(x.grid) + " block " + text_of(x.block) + " cluster " +
              text_of(x.cluster) + " shared " + std::to_string(x.dynamic_shared) +
              (x.cooperative ? " cooperative" : "") + " sm_" + std::to_string(kernel.image->architecture) +
              (kernel.image->is_specific ? "a\n" : "\n");
  char error[8192] = "";
  if (ptxemu_launch(kernel.image->module, name.c_str(), &config, arguments, error, sizeof(error)))
    return fail(cudaErrorLaunchFailure, error);
  counts[name] = ptxemu_counts();
  return cudaSuccess;
}

// What <<<...>>> leaves for the stub that it calls.
struct Pushed {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Pushed> pushed;

}  // namespace
}  // namespace cudaemu

using namespace cudaemu;

// What was launched since the last cudaemu_clear_log, a line a launch.
EXPORT const char* cudaemu_log() { return log_text.c_str(); }
EXPORT void cudaemu_clear_log() { log_text.clear(); }

// Of the last launch of the kernel whose mangled name contains `name`.
EXPORT const char* cudaemu_counts(const char* name) {
  for (const auto& [kernel, text] : counts)
    if (kernel.find(name) != std::string::npos) return text.c_str();
  return "";
}

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
    void* more;
  };
  return reinterpret_cast<void**>(new std::vector<Image>(images_of(static_cast<Wrapper*>(wrapper)->data)));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  functions()[host] = {reinterpret_cast<std::vector<Image>*>(handle), name, {}};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}  // libcu++'s, all unused

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Pushed x = pushed.back();
  pushed.pop_back();
  *grid = x.grid, *block = x.block, *shared = x.shared;
  *static_cast<cudaStream_t*>(stream) = x.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* symbol) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(symbol));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, {grid, block, shared, stream}, arguments);
}
cudaError_t cudaLaunchKernel(const void* symbol, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(symbol, {grid, block, shared, stream}, arguments);
}
cudaError_t cudaLaunchCooperativeKernel(const void* symbol, dim3 grid, dim3 block, void** arguments,
                                        size_t shared, cudaStream_t stream) {
  return launch(symbol, {grid, block, shared, stream, {1, 1, 1}, true}, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* symbol, void** arguments) {
  Configuration x;
  if (const cudaError_t error = configuration_of(*config, x)) return error;
  return launch(symbol, x, arguments);
}

cudaError_t cudaFuncSetAttribute(const void* symbol, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(mutex);
  Kernel kernel;
  if (const cudaError_t error = find_kernel(symbol, kernel)) return error;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return fail(cudaErrorNotSupported,
                "function attribute " + std::to_string(attribute) + " is not emulated");
  const auto most = static_cast<int>(kernel.device->shared_per_block() - kernel.info.static_smem);
  if (value < 0 || value > most)
    return fail(cudaErrorInvalidValue, kernel.label() + std::to_string(value) +
                                           " bytes of shared memory, at most " + std::to_string(most));
  kernel.function->dynamic_limit[state().current_device] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* symbol,
                                                                   int threads, size_t dynamic, unsigned) {
  const std::lock_guard lock(mutex);
  Kernel kernel;
  if (const cudaError_t error = find_kernel(symbol, kernel)) return error;
  *blocks = kernel.blocks_per_multiprocessor(static_cast<unsigned>(threads), dynamic);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* symbol, int threads,
                                                          size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, symbol, threads, dynamic, 0);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* symbol,
                                           const cudaLaunchConfig_t* config) {
  Configuration x;
  if (const cudaError_t error = configuration_of(*config, x)) return error;
  const std::lock_guard lock(mutex);
  Kernel kernel;
  if (const cudaError_t error = find_kernel(symbol, kernel)) return error;
  if (kernel.device->major < 9) return fail(cudaErrorNotSupported, kernel.label() + "clusters before 9.0");
  const int blocks = kernel.blocks_per_multiprocessor(x.threads(), x.dynamic_shared);
  *clusters = blocks * kernel.device->multiprocessors / static_cast<int>(x.cluster_blocks());
  return cudaSuccess;
}

}  // extern "C"
