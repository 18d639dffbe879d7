// torch's functions that need a CUDA build, under the names that cuda_ops.py gives them.
#include <cstring>

#include "emulation.h"

using cudaemu::state;

extern "C" {

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line,
                                     void** library);

int32_t cudaemu_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
int32_t cudaemu_torch_get_device_index(void* tensor, int32_t* index) {
  *index = state().device_of_tensors;
  return tensor ? 0 : 1;
}
int32_t cudaemu_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line,
                                        void** library) {
  return aoti_torch_library_init_impl(name, std::strcmp(key, "CUDA") == 0 ? "CPU" : key, file, line, library);
}
int32_t cudaemu_torch_create_device_guard(int32_t device, void** guard) {
  *guard = new int(state().current_device);
  state().current_device = device;
  return 0;
}
int32_t cudaemu_torch_delete_device_guard(void* guard) {
  state().current_device = *static_cast<int*>(guard);
  delete static_cast<int*>(guard);
  return 0;
}
int32_t cudaemu_torch_get_current_cuda_stream(int32_t device, void** stream) {
  if (!state().device_at(device)) return 1;
  *stream = cudaemu::STREAM;
  return 0;
}

}  // extern "C"
