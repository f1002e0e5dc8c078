// A card without a card: libcudart, cuBLAS, libcuda and NVML for tests, in one library that is loaded before Python.
//
// torch's dispatch, its checks of shapes and dtypes, its caching allocator, autograd's threads, bitsandbytes and the
// compiler of Triton run as on a card of capability STUB_CC with STUB_MIB of memory. Kernels are counted, not run:
//   real      shapes, control flow, each allocation, memory that runs out, launches, waits, what the host reads
//   not real  numbers, and times of kernels
// The host reads back what it has copied to the card itself; of all else zeros, and of a single byte, a bool, 1. So
// losses are finite, and an answer ends with its first token.
//
// stub.py builds it. Each function of these libraries that is not defined here returns 0, success, and does nothing.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE (2UL << 20)
#define RETURN(statement) { statement; return 0; }
#define LOCKED __attribute__((cleanup(unlock))) int locked = pthread_mutex_lock(&lock)  // until the function returns

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // autograd has threads of its own
static void unlock(int *locked) { pthread_mutex_unlock(&lock); }
static struct { long launches, waits, reads; } counts;
static size_t total, used, held_by_others;
static int capability;

__attribute__((constructor)) static void begin(void) {
  const char *mib = getenv("STUB_MIB"), *cc = getenv("STUB_CC");
  total = (size_t)(mib ? atol(mib) : 24564) << 20;
  capability = cc ? atoi(cc) : 89;
  used = 500UL << 20;  // by the context, a guess
}

// ---- what tests call ------------------------------------------------------------------------------------------------

void card_counts(long *to) { memcpy(to, &counts, sizeof counts); }
void card_reset(void) { memset(&counts, 0, sizeof counts); }
void card_hold(size_t size) { held_by_others = size; }

// ---- memory ---------------------------------------------------------------------------------------------------------

#define MOST_RANGES (1 << 16)
#define MOST_COPIED (1UL << 20)  // bytes of a copy that is kept: no test reads weights
typedef struct { char *start; size_t size; } Range;
typedef struct { Range at[MOST_RANGES]; int n; } Ranges;
static Ranges blocks;  // the card's memory: addresses of the host, of which only what is copied there is in memory
static Ranges copied;  // parts of it that hold what the host has copied there

static void add(Ranges *ranges, void *start, size_t size) {
  if (ranges->n == MOST_RANGES) abort();
  ranges->at[ranges->n++] = (Range){start, size};
}

static Range *find(Ranges *ranges, const char *start, size_t size) {
  for (int i = ranges->n; i-- > 0;) {
    Range *range = &ranges->at[i];
    if (start >= range->start && start + size <= range->start + range->size) return range;
  }
  return 0;
}

static void forget(const char *start, size_t size) {
  for (int i = copied.n; i-- > 0;) {
    Range *range = &copied.at[i];
    if (range->start < start + size && start < range->start + range->size) *range = copied.at[--copied.n];
  }
}

// A kernel may have used a freed block since. Such a result (a loss, numbers of a step) is short, and a short read is
// believed only of a whole copy. Labels that were in its block would be NaN.
static int is_copied(const char *start, size_t size) {
  Range *range = find(&copied, start, size);
  return range && (size > 128 || (range->start == start && range->size == size));
}

static void *reserve(size_t size) {
  return mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static int take(size_t size) {
  if (used + held_by_others + size > total) return 0;
  used += size;
  return 1;
}

cudaError_t cudaMalloc(void **to, size_t size) {
  LOCKED;
  size = (size + PAGE - 1) / PAGE * PAGE;
  if (!take(size)) return cudaErrorMemoryAllocation;
  add(&blocks, *to = reserve(size), size);
  return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  LOCKED;
  Range *block = pointer ? find(&blocks, pointer, 1) : 0;
  if (!block) return cudaSuccess;
  forget(block->start, block->size);
  munmap(block->start, block->size);
  used -= block->size;
  *block = blocks.at[--blocks.n];
  return cudaSuccess;
}

// Expandable segments are ranges of addresses, into which pieces of memory are mapped. A piece's handle is its size.
CUresult cuMemAddressReserve(CUdeviceptr *to, size_t size, size_t alignment, CUdeviceptr at, unsigned long long flags) {
  LOCKED;
  *to = ((uintptr_t)reserve(size + PAGE) + PAGE - 1) / PAGE * PAGE;
  add(&blocks, (void *)*to, size);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *to, size_t n, const CUmemAllocationProp *p, unsigned long long f) {
  LOCKED;
  *to = n;
  return take(n) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle size) RETURN(LOCKED; used -= size)
CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) RETURN(LOCKED; forget((char *)pointer, size))
cudaError_t cudaMemGetInfo(size_t *free, size_t *all) RETURN(*free = total - used - held_by_others; *all = total)
cudaError_t cudaHostAlloc(void **to, size_t size, unsigned flags) RETURN(*to = malloc(size))
cudaError_t cudaFreeHost(void *pointer) RETURN(free(pointer))

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *to, const void *pointer) {
  LOCKED;
  memset(to, 0, sizeof *to);
  to->type = find(&blocks, pointer, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  to->devicePointer = (void *)pointer;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  LOCKED;
  int is_real = size <= MOST_COPIED && (kind == cudaMemcpyHostToDevice || is_copied(from, size));
  counts.launches += kind == cudaMemcpyDeviceToDevice;
  counts.reads += kind == cudaMemcpyDeviceToHost;
  if (is_real) memcpy(to, from, size);
  else if (kind == cudaMemcpyDeviceToHost && size <= MOST_COPIED) memset(to, size == 1, size);
  if (kind == cudaMemcpyDeviceToHost) return cudaSuccess;
  forget(to, size);
  if (is_real) add(&copied, to, size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream)
  RETURN(LOCKED; counts.launches++; forget(to, size))
cudaError_t cudaStreamSynchronize(cudaStream_t stream) RETURN(counts.waits++)
cudaError_t cudaDeviceSynchronize(void) RETURN(counts.waits++)
cudaError_t cudaEventSynchronize(cudaEvent_t event) RETURN(counts.waits++)

// ---- kernels --------------------------------------------------------------------------------------------------------

void card_launch(void) { __sync_fetch_and_add(&counts.launches, 1); }  // products and Triton's kernels: stub.py

// One kernel runs: int32 plus a number, which moves the bounds of a part of a batch. The host reads them back.
static const void *adds_number[8];  // vectorized by 2, 4, …
static int n_adds_number;

void __cudaRegisterFunction(void **binary, const char *function, char *device, const char *name) {
  if (strstr(name, "CUDAFunctorOnSelf_addIiEESt5arrayIPcLm2EE") && n_adds_number < 8)
    adds_number[n_adds_number++] = function;
}

static void add_number(void **arguments) {
  int n = *(int *)arguments[0], *number = arguments[1];  // the second is its factor
  int **data = arguments[2];                             // output and input
  LOCKED;
  for (int i = 0; i < n; i++) data[0][i] = data[1][i] + number[0] * number[1];
  forget((char *)data[0], n * sizeof(int));
  add(&copied, data[0], n * sizeof(int));
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t n, cudaStream_t s) {
  card_launch();
  for (int i = 0; i < n_adds_number; i++)
    if (adds_number[i] == function) add_number(arguments);
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t n, cudaStream_t s) {
  return cudaLaunchKernel(kernel, grid, block, arguments, n, s);
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } call;  // of <<<…>>>

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream)
  RETURN(call.grid = grid; call.block = block; call.shared = shared; call.stream = stream)
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
  RETURN(*grid = call.grid; *block = call.block; *shared = call.shared; *(void **)stream = call.stream)
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) RETURN(*kernel = (cudaKernel_t)function)

// ---- the device -----------------------------------------------------------------------------------------------------

static int attribute(int name) {  // libcudart and libcuda have the same numbers
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor: return capability / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability % 10;
    case cudaDevAttrMultiProcessorCount: return 108;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return capability == 75 ? 1024 : 1536;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:  // what kernels of Triton and FlashAttention ask for
      return (capability == 75 ? 64 : capability >= 90 ? 227 : capability == 80 ? 163 : 99) << 10;
    case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: return 2000000;
    case cudaDevAttrGlobalMemoryBusWidth: return 384;
    default: return 0;
  }
}

cudaError_t cudaDeviceGetAttribute(int *to, enum cudaDeviceAttr name, int device) RETURN(*to = attribute(name))
CUresult cuDeviceGetAttribute(int *to, CUdevice_attribute name, CUdevice device) RETURN(*to = attribute(name))

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *to, int device) {
  memset(to, 0, sizeof *to);
  strcpy(to->name, "Stub");
  to->totalGlobalMem = total;
  to->major = capability / 10;
  to->minor = capability % 10;
  to->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  to->warpSize = attribute(cudaDevAttrWarpSize);
  to->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  for (int i = 0; i < 3; i++) to->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
  for (int i = 0; i < 3; i++) to->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
  to->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  to->regsPerBlock = to->regsPerMultiprocessor = 65536;
  to->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  to->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  to->sharedMemPerMultiprocessor = to->sharedMemPerBlockOptin + 1024;
  to->l2CacheSize = 72 << 20;  // which torch's compiler clears before it measures a kernel
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *to, const void *function) {
  memset(to, 0, sizeof *to);
  to->maxThreadsPerBlock = 1024;
  to->numRegs = 32;
  to->binaryVersion = to->ptxVersion = capability == 89 ? 86 : capability;
  return cudaSuccess;
}

CUresult cuFuncGetAttribute(int *to, CUfunction_attribute name, CUfunction function)
  RETURN(*to = name == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0)
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g)
  RETURN(*n = 2)
cudaError_t cudaGetDeviceCount(int *n) RETURN(*n = 1)
cudaError_t cudaGetDevice(int *device) RETURN(*device = 0)
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) RETURN(*flags = 0; *active = 1)
const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorMemoryAllocation"; }
const char *cudaGetErrorString(cudaError_t error) { return "out of memory"; }  // there is no other error
CUresult cuGetErrorString(CUresult error, const char **to) RETURN(*to = "out of memory")
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *n, void *processes) RETURN(*n = 0)
int nvmlDeviceGetGpuFabricInfoV(void) { return 3; }  // not supported

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **to, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  if (result) *result = cudaDriverEntryPointSuccess;
  *to = dlsym(RTLD_DEFAULT, name);
  return cudaSuccess;
}

// ---- handles, into which nobody looks -------------------------------------------------------------------------------

#define ANY ((void *)64)
void **__cudaRegisterFatBinary(void *binary) { return ANY; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *to, unsigned flags) RETURN(*to = ANY)
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) RETURN(*ms = 1)
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *to) RETURN(*to = 0)
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *to, unsigned long long *id,
    cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) RETURN(*to = 0)
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) RETURN(*least = 0; *greatest = -3)
CUresult cuCtxGetCurrent(CUcontext *to) RETURN(*to = ANY)
CUresult cuDevicePrimaryCtxRetain(CUcontext *to, CUdevice device) RETURN(*to = ANY)
CUresult cuModuleLoad(CUmodule *to, const char *file) RETURN(*to = ANY)
CUresult cuModuleLoadData(CUmodule *to, const void *image) RETURN(*to = ANY)
CUresult cuModuleGetFunction(CUfunction *to, CUmodule module, const char *name) RETURN(*to = ANY)
CUresult cuPointerGetAttribute(void *to, CUpointer_attribute name, CUdeviceptr p) RETURN(*(CUdeviceptr *)to = p)
int cublasCreate_v2(void **to) RETURN(*to = ANY)
int cublasGetMathMode(void *handle, int *mode) RETURN(*mode = 0)
