// CUDA's runtime without a device, for machines without a GPU: see host.py. Loaded before the real one, it says that
// one H200 is there. Memory is the host's, a copy copies, and a kernel that is launched does nothing: what a program
// then takes is what its host takes.
#include <stdlib.h>
#include <string.h>

#include <driver_types.h>

#define NOTHING(name) \
  int name() { return 0; }
NOTHING(cudaSetDevice) NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError) NOTHING(cudaDeviceSynchronize)
NOTHING(cudaStreamSynchronize) NOTHING(cudaStreamQuery) NOTHING(cudaStreamWaitEvent) NOTHING(cudaFuncSetAttribute)
NOTHING(cudaEventQuery) NOTHING(cudaEventDestroy) NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaThreadExchangeStreamCaptureMode) NOTHING(cudaLaunchKernel) NOTHING(cudaLaunchKernelExC)

NOTHING(cuInit) NOTHING(cuGetErrorString)  // of the driver
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = *active = 0; }

static int give(int *to, int value) { return *to = value, 0; }
int cudaGetDeviceCount(int *count) { return give(count, 1); }
int cudaGetDevice(int *device) { return give(device, 0); }
int cudaDriverGetVersion(int *version) { return give(version, 13000); }
int cudaRuntimeGetVersion(int *version) { return give(version, 13000); }
int cudaStreamIsCapturing(void *stream, int *status) { return give(status, 0); }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return give(least, 0), give(greatest, -5); }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return give(blocks, 2); }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return give(blocks, 2); }
int cudaDeviceGetAttribute(int *value, int attribute) {
  return give(value, attribute == cudaDevAttrComputeCapabilityMajor         ? 9
                     : attribute == cudaDevAttrMultiProcessorCount          ? 132
                     : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
                     : attribute == cudaDevAttrWarpSize                     ? 32
                                                                            : 0);
}

static long made = 16;  // streams and events are numbers that nobody follows
int cudaStreamCreateWithPriority(void **stream) { return *stream = (void *)(made += 16), 0; }
int cudaEventCreateWithFlags(void **event) { return *event = (void *)(made += 16), 0; }

int cudaMalloc(void **to, size_t size) { return (*to = calloc(1, size)) ? 0 : cudaErrorMemoryAllocation; }
int cudaFree(void *memory) { return free(memory), 0; }
int cudaMemGetInfo(size_t *unused, size_t *all) { return *unused = *all = 150754820096, 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { return memmove(to, from, size), 0; }
int cudaMemsetAsync(void *to, int value, size_t size) { return memset(to, value, size), 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *found) { return memset(found, 0, sizeof *found), 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *found) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *p) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (pretended)");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = 150754820096;
  p->warpSize = 32;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsPerBlock = 1024;
  p->regsPerMultiprocessor = p->regsPerBlock = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  return 0;
}
