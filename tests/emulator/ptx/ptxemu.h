/* Runs compiled GPU kernels, given as PTX text, on the CPU: see README.md. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ptxemu_module ptxemu_module;

typedef struct {
  unsigned grid[3], block[3], cluster[3]; /* cluster 1,1,1 if none */
  unsigned dynamic_smem;                  /* bytes */
  int cooperative;                        /* all blocks are resident at once (grid barrier) */
  /* 0: warps take turns, and asynchronous operations take effect at the latest legal moment.
     Otherwise: the seed of a random schedule and of random completion times. */
  uint64_t seed;
  int races; /* looks for races in shared memory between warps */
} ptxemu_config;

/* NULL on error; `err` then names the line and the instruction. */
ptxemu_module* ptxemu_load(const char* ptx_text, char* err, size_t err_bytes);
void ptxemu_unload(ptxemu_module*);

typedef struct {
  unsigned static_smem; /* bytes */
  unsigned max_threads; /* .maxntid, of all axes; 0 if not given */
  unsigned min_blocks;  /* .minnctapersm, likewise */
} ptxemu_kernel_info;

/* 0 if the module has no kernel of that name. */
int ptxemu_describe(const ptxemu_module*, const char* kernel, ptxemu_kernel_info*);

/* `kernel_params` as for cuLaunchKernel: one pointer per .param, whose size the PTX declares. 0 = ok. */
int ptxemu_launch(ptxemu_module*, const char* kernel, const ptxemu_config*, void** kernel_params, char* err,
                  size_t err_bytes);

/* Once any range is registered, every global access must fall inside a registered range. One that is
   registered twice has to be unregistered twice. */
void ptxemu_register_memory(const void* start, size_t bytes, const char* name);
void ptxemu_unregister_memory(const void* start);

/* What cuTensorMapEncodeTiled does, into 128 opaque bytes of a format of our own. NULL, or why not. */
const char* ptxemu_encode_tiled(void* map128, int element_type /* CUtensorMapDataType */, unsigned rank,
                                const void* address, const uint64_t* dims,
                                const uint64_t* strides_bytes /* rank - 1 */, const uint32_t* box,
                                const uint32_t* element_strides, int interleave,
                                int swizzle /* CUtensorMapSwizzle */, int l2, int oob_fill);

/* "opcode warps lanes" a line: how often the last launch executed each instruction. */
const char* ptxemu_counts(void);

#ifdef __cplusplus
}
#endif
