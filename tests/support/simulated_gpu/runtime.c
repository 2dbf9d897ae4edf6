/* One CUDA device that is made of host memory: the part of the CUDA runtime that torch needs to allocate and copy.

   Preloaded before libcudart, so that `torch.cuda` finds a device and hands out genuine `cuda:0` tensors. Nothing here
   computes: device.py runs every operator on the host. A kernel that torch launches itself would leave its output
   unwritten, so each launch is an error. What is missing here falls through to the real runtime, which has no device
   and says so. The few types are declared here, since pip's CUDA packages come without some headers. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned x, y, z; } dim3;
typedef struct { int type, device; void *devicePointer, *hostPointer; long reserved[8]; } cudaPointerAttributes;

/* The first members of CUDA 13's cudaDeviceProp, up to the last that torch asks for here; its size is 1008 bytes. */
typedef struct {
  char name[256], uuid[16], luid[8];
  unsigned luidDeviceNodeMask;
  size_t totalGlobalMem, sharedMemPerBlock;
  int regsPerBlock, warpSize;
  size_t memPitch;
  int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
  size_t totalConstMem;
  int major, minor;
  size_t textureAlignment, texturePitchAlignment;
  int multiProcessorCount;
} cudaDeviceProp;

enum { OK = 0, OUT_OF_MEMORY = 2, NO_KERNEL = 209 };
static const size_t TOTAL = (size_t)16 << 30;

/* The device. */
int cudaGetDeviceCount(int *n) { *n = 1; return OK; }
int cudaGetDevice(int *d) { *d = 0; return OK; }
int cudaSetDevice(int d) { return OK; }
int cudaDriverGetVersion(int *v) { *v = 13000; return OK; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return OK; }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = 0; return OK; }
int cudaDeviceSynchronize(void) { return OK; }
int cudaDeviceGetPCIBusId(char *id, int n, int d) { strncpy(id, "0000:00:00.0", n); return OK; }
int cudaGetDeviceProperties(cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Simulated GPU");
  p->totalGlobalMem = TOTAL; p->sharedMemPerBlock = 49152; p->regsPerBlock = 65536; p->totalConstMem = 65536;
  p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->multiProcessorCount = 132;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9; p->textureAlignment = 512;
  return OK;
}
const char *cudaGetErrorName(int e) { return e == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorSimulated"; }
const char *cudaGetErrorString(int e) {
  return e == OUT_OF_MEMORY ? "out of memory"
       : e == NO_KERNEL ? "the simulated GPU was to launch a kernel: run the operator in its mode"
       : "the simulated GPU lacks a call of the CUDA runtime: add it to runtime.c";
}
static __thread int error;
int cudaGetLastError(void) { int e = error; error = OK; return e; }
int cudaPeekAtLastError(void) { return error; }

/* The driver: this library also bears the name libcuda.so.1. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *on) { *flags = 0; *on = 1; return OK; }
static int nothing(void) { return OK; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, int *found) {
  *f = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing : (void *)cuDevicePrimaryCtxGetState;
  if (found) *found = 0;
  return OK;
}

/* Streams and events: everything is done at once. */
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
int cudaStreamCreateWithPriority(void **s, unsigned f, int p) { static long next = 16; *s = (void *)(next += 16); return OK; }
int cudaStreamQuery(void *s) { return OK; }
int cudaStreamSynchronize(void *s) { return OK; }
int cudaStreamWaitEvent(void *s, void *e, unsigned f) { return OK; }
int cudaStreamIsCapturing(void *s, int *status) { *status = 0; return OK; }
int cudaStreamGetCaptureInfo(void *s, int *status, ...) { *status = 0; return OK; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return OK; }
int cudaEventCreateWithFlags(void **e, unsigned f) { static long next = 16; *e = (void *)(next += 16); return OK; }
int cudaEventDestroy(void *e) { return OK; }
int cudaEventQuery(void *e) { return OK; }
int cudaEventRecord(void *e, void *s) { return OK; }
int cudaEventRecordWithFlags(void *e, void *s, unsigned f) { return OK; }
int cudaEventSynchronize(void *e) { return OK; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1; return OK; }

/* Memory. Pinned blocks are remembered, since torch asks whether a pointer is one; torch keeps and reuses them. */
static struct { char *start; size_t size; } pinned[4096];
static int blocks;
static void *aligned(size_t n) { return aligned_alloc(4096, (n + 4095) / 4096 * 4096); }
int cudaMalloc(void **p, size_t n) {
  *p = aligned(n);
  return error = *p ? OK : OUT_OF_MEMORY;
}
int cudaFree(void *p) { free(p); return OK; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = TOTAL; return OK; }
int cudaHostAlloc(void **p, size_t n, unsigned f) {
  if (blocks == 4096 || !(*p = aligned(n))) return error = OUT_OF_MEMORY;
  pinned[blocks].start = *p; pinned[blocks++].size = n;
  return OK;
}
int cudaFreeHost(void *p) {
  for (int i = 0; i < blocks; i++) if (pinned[i].start == p) pinned[i] = pinned[--blocks];
  free(p);
  return OK;
}
int cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a); /* type 0: ordinary host memory */
  for (int i = 0; i < blocks; i++)
    if ((char *)p >= pinned[i].start && (char *)p < pinned[i].start + pinned[i].size) a->type = 1;
  return OK;
}
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { memmove(to, from, n); return OK; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) { memmove(to, from, n); return OK; }
int cudaMemsetAsync(void *p, int v, size_t n, void *s) { memset(p, v, n); return OK; }

/* Kernels. */
int cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, void *s) { return error = NO_KERNEL; }
int cudaLaunchKernelExC(const void *c, const void *f, void **a) { return error = NO_KERNEL; }
int __cudaLaunchKernel(void *k, dim3 g, dim3 b, void **a, size_t m, void *s) { return error = NO_KERNEL; }
int __cudaGetKernel(void **k, const void *f) { *k = (void *)f; return OK; }
