/* A CUDA runtime with one H100 that computes nothing: PyTorch starts on it, and fake tensors can live on it.
 *
 * Preloaded in front of the real library. Tensors are fake, so that no kernel is ever launched and no memory needed;
 * what PyTorch still asks for is answered here: the device's properties, streams and events.
 */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define DONE return cudaSuccess

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; DONE; }
cudaError_t cudaGetDevice(int *device) { *device = 0; DONE; }
cudaError_t cudaSetDevice(int device) { DONE; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; DONE; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; DONE; }
cudaError_t cudaGetLastError(void) { DONE; }
cudaError_t cudaPeekAtLastError(void) { DONE; }
const char *cudaGetErrorString(cudaError_t error) { return "no error of the fake device"; }
const char *cudaGetErrorName(cudaError_t error) { return "fake"; }
cudaError_t cudaDeviceSynchronize(void) { DONE; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; DONE; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; DONE; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "NVIDIA H100 80GB HBM3");
  properties->major = 9;
  properties->totalGlobalMem = 80ull << 30;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsPerBlock = 1024;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->regsPerMultiprocessor = 65536;
  DONE;
}

static size_t last_handle = 16;
static size_t new_handle(void) { return last_handle += 16; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = (cudaEvent_t)new_handle(); DONE; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { DONE; }
cudaError_t cudaEventQuery(cudaEvent_t event) { DONE; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { DONE; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { DONE; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { DONE; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = (cudaStream_t)new_handle();
  DONE;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { DONE; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { DONE; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { DONE; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  DONE;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { DONE; }

/* PyTorch makes one real element when it first meets the device, and copies constants to it. */
cudaError_t cudaMalloc(void **pointer, size_t size) { *pointer = malloc(size); DONE; }
cudaError_t cudaFree(void *pointer) { free(pointer); DONE; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  memcpy(to, from, size);
  DONE;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 80ull << 30; DONE; }

static int driver_function(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = (void *)driver_function;
  if (result) *result = cudaDriverEntryPointSuccess;
  DONE;
}

/* Of the driver, which PyTorch loads by the name that this library bears. */
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *active = 1; return 0; }
