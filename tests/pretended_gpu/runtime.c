/* A CUDA runtime and driver without a GPU: memory of the device is the computer's, streams run at once, and kernels do
   nothing. Loaded before PyTorch's own; device.py computes what the kernels would. Only what PyTorch calls is here. */

#define __CUDA_API_VERSION_INTERNAL 1
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DONE { return cudaSuccess; }
#define GIB (1UL << 30)

static const size_t TOTAL = 24 * GIB;
static long last_handle = 4096; /* streams and events are numbers */

static void *memory(size_t size, size_t alignment) {
    return aligned_alloc(alignment, (size + alignment) / alignment * alignment);
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) DONE
cudaError_t cudaDeviceSynchronize(void) DONE
cudaError_t cudaGetLastError(void) DONE
cudaError_t cudaPeekAtLastError(void) DONE
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { strncpy(id, "0000:00:00.0", size); return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "a pretended GPU");
    found->totalGlobalMem = TOTAL;
    found->major = 9;
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = 227 << 10;
    found->regsPerBlock = 65536;
    found->textureAlignment = 512;
    found->l2CacheSize = 50 << 20;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *left = TOTAL - 4 * GIB; *total = TOTAL; return cudaSuccess; }
cudaError_t cudaMalloc(void **place, size_t size) { *place = memory(size, 512); return cudaSuccess; }
cudaError_t cudaFree(void *place) { free(place); return cudaSuccess; }
cudaError_t cudaHostAlloc(void **place, size_t size, unsigned flags) { *place = memory(size, 4096); return cudaSuccess; }
cudaError_t cudaFreeHost(void *place) { free(place); return cudaSuccess; }
cudaError_t cudaHostRegister(void *place, size_t size, unsigned flags) DONE
cudaError_t cudaHostUnregister(void *place) DONE

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    memmove(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    memmove(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) { memset(to, value, size); return cudaSuccess; }

static cudaError_t made(void **handle) { *handle = (void *)(last_handle += 16); return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return made((void **)stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return made((void **)stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return made((void **)stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) DONE
cudaError_t cudaStreamQuery(cudaStream_t stream) DONE
cudaError_t cudaStreamSynchronize(cudaStream_t stream) DONE
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) DONE
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) DONE

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *count) {
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return made((void **)event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return made((void **)event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) DONE
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) DONE
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) DONE
cudaError_t cudaEventQuery(cudaEvent_t event) DONE
cudaError_t cudaEventSynchronize(cudaEvent_t event) DONE
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1; return cudaSuccess; }

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    if (getenv("PRETENDED_GPU_STRICT")) {
        fprintf(stderr, "a kernel was launched that device.py does not know of\n");
        abort();
    }
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) DONE

static int nothing(void) { return 0; }

static int context_state(int device, unsigned *flags, int *is_active) {
    *flags = 0;
    *is_active = 1;
    return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    *function = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing : (void *)context_state;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* The driver, which PyTorch opens as libcuda.so.1. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) { return context_state(device, flags, is_active); }
#define DRIVER(name) int name(void) { return 0; }
DRIVER(cuCtxGetCurrent) DRIVER(cuCtxSetCurrent) DRIVER(cuDeviceGet)
DRIVER(cuDeviceGetAttribute) DRIVER(cuDevicePrimaryCtxRetain) DRIVER(cuFuncGetAttribute)
DRIVER(cuFuncSetAttribute) DRIVER(cuFuncSetCacheConfig) DRIVER(cuGetErrorString)
DRIVER(cuLaunchCooperativeKernel) DRIVER(cuLaunchKernel) DRIVER(cuLinkAddData_v2)
DRIVER(cuLinkComplete) DRIVER(cuLinkCreate_v2) DRIVER(cuModuleGetFunction)
DRIVER(cuModuleLoad) DRIVER(cuModuleLoadData) DRIVER(cuModuleLoadDataEx)
DRIVER(cuModuleUnload) DRIVER(cuOccupancyMaxActiveBlocksPerMultiprocessor) DRIVER(cuPointerGetAttribute)
DRIVER(cuTensorMapEncodeTiled)
