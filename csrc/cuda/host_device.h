// Where functions run. Those of HOST_DEVICE are plain arithmetic, which the tests compile without nvcc, too.
#pragma once

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ DEVICE
#else
#define HOST_DEVICE inline
#endif
