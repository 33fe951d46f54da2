// As much of CUDA's runtime as fake tensors and the compiler need, for machines without a GPU: see pretended.py.
// Loaded before the real one, it says that one H200 is there. Memory is the host's, and kernels do nothing.
#include <stdlib.h>
#include <string.h>

#include <driver_types.h>
#include <vector_types.h>

#define DONE return cudaSuccess
#define MEMORY 150754820096ULL
typedef cudaError_t Done;

Done cudaGetDeviceCount(int *count) { *count = 1; DONE; }
Done cudaGetDevice(int *device) { *device = 0; DONE; }
Done cudaSetDevice(int device) { DONE; }
Done cudaGetLastError(void) { DONE; }
Done cudaPeekAtLastError(void) { DONE; }
Done cudaDriverGetVersion(int *version) { *version = 13000; DONE; }
Done cudaRuntimeGetVersion(int *version) { *version = 13000; DONE; }
Done cudaDeviceSynchronize(void) { DONE; }
Done cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; DONE; }
Done cudaMalloc(void **to, size_t size) { return (*to = calloc(1, size)) ? cudaSuccess : cudaErrorMemoryAllocation; }
Done cudaFree(void *memory) { free(memory); DONE; }
Done cudaMemGetInfo(size_t *unused, size_t *all) { *unused = *all = MEMORY; DONE; }
Done cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) { DONE; }
Done cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { DONE; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return 0; }
Done __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) { DONE; }
Done cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; DONE; }
Done cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; DONE; }
Done cudaStreamQuery(cudaStream_t stream) { DONE; }
Done cudaStreamSynchronize(cudaStream_t stream) { DONE; }
Done cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { DONE; }
Done cudaEventQuery(cudaEvent_t event) { DONE; }
Done cudaEventSynchronize(cudaEvent_t event) { DONE; }
Done cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) { *milliseconds = 1; DONE; }
Done cudaEventDestroy(cudaEvent_t event) { DONE; }
Done cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { DONE; }
Done cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { DONE; }

static long made = 16;  // streams and events are numbers that nobody follows
Done cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = (cudaStream_t)(made += 16);
  DONE;
}
Done cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = (cudaEvent_t)(made += 16);
  DONE;
}

Done cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (pretended)");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = MEMORY;
  p->warpSize = 32;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsPerBlock = 1024;
  p->regsPerMultiprocessor = p->regsPerBlock = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->l2CacheSize = 62914560;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->memoryBusWidth = 6144;
  p->unifiedAddressing = 1;
  DONE;
}

Done cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? 9
           : attribute == cudaDevAttrMultiProcessorCount          ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
           : attribute == cudaDevAttrWarpSize                     ? 32
                                                                  : 0;
  DONE;
}

// Of the driver, which is loaded by its own name.
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 0;
  return 0;
}
