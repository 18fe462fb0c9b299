// A CUDA device that is not there: memory is the host's, kernels do not run, and what is asked of it is written down.
//
// One library in front of the CUDA runtime (by LD_PRELOAD) and in place of the driver (libcuda.so.1). It has what PyTorch 2.11
// and Triton 3.6 call; an event is a line: its kind (launch, copy, sync, allocate, graph) and what.

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#define API extern "C" __attribute__((visibility("default")))
#define OK return cudaSuccess
using ull = unsigned long long;

namespace {
std::mutex lock;
std::string events;
bool counting = false, capturing = false;
uintptr_t handles = 0x1000;
template <class T> void fresh(T* handle) { *handle = (T)(handles += 16); }

// Host and pinned memory are never given back: pages that nobody touches cost nothing.
struct Arena {
    size_t size;
    char *begin = nullptr, *free = nullptr;
    void* take(size_t bytes, size_t step) {
        std::lock_guard<std::mutex> guard(lock);
        if (!begin) begin = free = (char*)mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (begin == MAP_FAILED) abort();
        char* taken = free;
        free += (bytes + step - 1) / step * step;
        return free <= begin + size ? taken : nullptr;
    }
    bool has(const void* p) const { return begin && p >= begin && p < begin + size; }
} memory{(size_t)139 << 30}, pinned{(size_t)16 << 30};

std::unordered_map<const void*, std::string>& kernels() {
    static auto* names = new std::unordered_map<const void*, std::string>;
    return *names;
}
std::string demangled(const char* name) {
    int status;
    char* plain = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    std::string text = status ? name : plain;
    free(plain);
    return text;
}
}  // namespace

API void counting_event(const char* kind, const char* what) {
    std::lock_guard<std::mutex> guard(lock);
    if (counting) events += std::string(kind) + ' ' + what + '\n';
}
API void counting_start() { std::lock_guard<std::mutex> guard(lock); events.clear(); counting = true; }
API const char* counting_stop() { std::lock_guard<std::mutex> guard(lock); counting = false; return events.c_str(); }

static void copied(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind, bool waits) {
    const char* names[] = {"host to host", "host to device", "device to host", "device to device", "any to any"};
    const void* host = kind == cudaMemcpyHostToDevice ? from : kind == cudaMemcpyDeviceToHost ? to : nullptr;
    const char* how = waits ? "waiting" : host && !pinned.has(host) ? "pageable" : "asynchronous";
    counting_event("copy", (std::string(how) + ' ' + names[kind] + ' ' + std::to_string(bytes)).c_str());
    memcpy((void*)to, from, bytes);
}
static cudaError_t launched(const void* kernel) {
    auto found = kernels().find(kernel);
    counting_event("launch", found == kernels().end() ? "unnamed kernel" : found->second.c_str());
    OK;
}

// ---- Memory.

API cudaError_t cudaMalloc(void** p, size_t n) {
    counting_event("allocate", std::to_string(n).c_str());
    return (*p = memory.take(n, 2 << 20)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
    counting_event("allocate", ("pinned " + std::to_string(n)).c_str());
    return (*p = pinned.take(n, 4096)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
API cudaError_t cudaFree(void*) { OK; }
API cudaError_t cudaFreeHost(void*) { OK; }
API cudaError_t cudaMemGetInfo(size_t* left, size_t* all) { *left = *all = memory.size; OK; }
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t) { copied(d, s, n, k, false); OK; }
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) { copied(d, s, n, k, true); OK; }
API cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) {
    counting_event("copy", ("memset " + std::to_string(n)).c_str());
    if (n < 1 << 24) memset(p, v, n);
    OK;
}
API cudaError_t cudaMemset(void* p, int v, size_t n) { return cudaMemsetAsync(p, v, n, nullptr); }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    a->type = memory.has(p) ? cudaMemoryTypeDevice : pinned.has(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    if (a->type != cudaMemoryTypeUnregistered) a->devicePointer = (void*)p;
    OK;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) { return cudaMalloc(p, 4096); }

// ---- The device: an H200, for which code is compiled.

static int attribute(int which) {
    switch (which) {
        case 1: case 2: case 3: return 1024;          // threads of a block
        case 4: return 64;
        case 5: return 2147483647;                    // blocks of a grid
        case 6: case 7: return 65535;
        case 8: return 49152;                         // bytes of shared memory
        case 81: return 233472;
        case 97: return 232448;
        case 10: return 32;                           // threads of a warp
        case 12: case 82: return 65536;               // registers
        case 13: return 1785000;                      // kHz
        case 36: return 2619000;
        case 16: return 132;                          // multiprocessors
        case 37: return 6144;                         // bits of the memory's bus
        case 38: return 50 << 20;                     // bytes of cache
        case 39: return 2048;                         // threads of a multiprocessor
        case 75: return 9;                            // compute capability 9.0
        case 76: return 0;
        case 106: return 32;
        default: return 1;
    }
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) { *v = attribute(a); OK; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "counting device (as an NVIDIA H200)");
    p->major = 9, p->totalGlobalMem = memory.size, p->multiProcessorCount = attribute(16), p->warpSize = 32;
    p->sharedMemPerBlock = attribute(8), p->sharedMemPerBlockOptin = attribute(97), p->sharedMemPerMultiprocessor = attribute(81);
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = attribute(5), p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = attribute(38), p->memoryBusWidth = attribute(37), p->maxBlocksPerMultiProcessor = 32, p->unifiedAddressing = 1;
    OK;
}
API cudaError_t cudaGetDeviceCount(int* n) { *n = 1; OK; }
API cudaError_t cudaGetDevice(int* n) { *n = 0; OK; }
API cudaError_t cudaSetDevice(int) { OK; }
API cudaError_t cudaDriverGetVersion(int* n) { *n = CUDART_VERSION; OK; }
API cudaError_t cudaRuntimeGetVersion(int* n) { *n = CUDART_VERSION; OK; }
API cudaError_t cudaGetLastError() { OK; }
API cudaError_t cudaPeekAtLastError() { OK; }
API const char* cudaGetErrorString(cudaError_t) { return "the counting device cannot do this"; }
API const char* cudaGetErrorName(cudaError_t) { return "counting device"; }
API cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) { *v = 0; OK; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** f, unsigned, ull, cudaDriverEntryPointQueryResult* found) {
    *f = nullptr;
    if (found) *found = cudaDriverEntryPointSymbolNotFound;
    OK;
}

// ---- Streams, events, graphs. Everything is done at once.

static cudaError_t waited(const char* how) {
    counting_event(gettid() == getpid() ? "sync" : "wait of another thread", how);
    OK;
}
API cudaError_t cudaDeviceSynchronize() { return waited("cudaDeviceSynchronize"); }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return waited("cudaStreamSynchronize"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return waited("cudaEventSynchronize"); }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { *least = 0, *most = -5; OK; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { fresh(s); OK; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; OK; }
API cudaError_t cudaStreamQuery(cudaStream_t) { OK; }
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { OK; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { fresh(e); OK; }
API cudaError_t cudaEventCreate(cudaEvent_t* e) { fresh(e); OK; }
API cudaError_t cudaEventDestroy(cudaEvent_t) { OK; }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 1; OK; }
API cudaError_t cudaEventQuery(cudaEvent_t) { OK; }
API cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { OK; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { OK; }

static cudaStreamCaptureStatus status() { return capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { *s = status(); OK; }
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* s, ull* id, cudaGraph_t* g, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* n) {
    *s = status();
    if (id) *id = 1;
    if (g) *g = (cudaGraph_t)1;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (n) *n = 0;
    OK;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { capturing = true; counting_event("graph", "begin"); OK; }
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* g) { capturing = false; counting_event("graph", "end"); fresh(g); OK; }
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { OK; }
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, ull) { fresh(e); OK; }
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t, ull) { fresh(e); OK; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) { *n = 1; OK; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { counting_event("launch", "cudaGraphLaunch"); OK; }
API cudaError_t cudaGraphDestroy(cudaGraph_t) { OK; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { OK; }

// ---- Kernels of the runtime.

API cudaError_t cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* f, void**) { return launched(f); }
API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) { *k = (cudaKernel_t)f; OK; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    OK;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { OK; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int threads, size_t, unsigned) {
    *n = 2048 / (threads ? threads : 1);
    OK;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int threads, size_t bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, threads, bytes, 0);
}
static thread_local struct { dim3 grid, block; size_t bytes; void* stream; } pushed;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t n, CUstream_st* s) { pushed = {g, b, n, s}; return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* n, void* s) {
    *g = pushed.grid, *b = pushed.block, *n = pushed.bytes, *(void**)s = pushed.stream;
    OK;
}
API void** __cudaRegisterFatBinary(void*) { static void* module[4]; return module; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API int __cudaInitModule(void**) { return 0; }
API void __cudaRegisterFunction(void**, const char* f, char*, const char* name, int, void*, void*, void*, void*, int*) {
    kernels()[f] = demangled(name);
}

// ---- cuBLAS: no arithmetic, so that settings do not matter.

#define NOTHING(name) API int name() { return 0; }
#define LAUNCH(name) API int name() { counting_event("launch", #name); return 0; }
#define MAKE(name) API int name(void** handle) { *handle = calloc(1, 256); return 0; }
NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode) NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasDestroy_v2) NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutSetAttribute) NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtGetVersion)
LAUNCH(cublasLtMatmul) LAUNCH(cublasGemmEx) LAUNCH(cublasSgemm_v2) LAUNCH(cublasDgemm_v2) LAUNCH(cublasSgemmEx)
LAUNCH(cublasGemmStridedBatchedEx) LAUNCH(cublasSgemmStridedBatched) LAUNCH(cublasSgemv_v2) LAUNCH(cublasSdot_v2)
MAKE(cublasCreate_v2) MAKE(cublasLtMatmulDescCreate) MAKE(cublasLtMatmulPreferenceCreate) MAKE(cublasLtMatrixLayoutCreate)
API int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
API int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) { *found = 1; return 0; }

// ---- The driver, for Triton: its kernels are handles with a name.

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* v) { *v = CUDART_VERSION; return 0; }
API int cuDeviceGet(int* d, int) { *d = 0; return 0; }
API int cuDeviceGetCount(int* n) { *n = 1; return 0; }
API int cuDeviceGetAttribute(int* v, int a, int) { *v = attribute(a); return 0; }
API int cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }
API int cuCtxGetDevice(int* d) { *d = 0; return 0; }
API int cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)1; return 0; }
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0, *active = 1; return 0; }
API int cuModuleLoadData(void** m, const void*) { *m = (void*)1; return 0; }
API int cuModuleLoad(void** m, const char*) { *m = (void*)1; return 0; }
API int cuModuleUnload(void*) { return 0; }
API int cuModuleGetFunction(void** f, void*, const char* name) { *f = new std::string(name); return 0; }
API int cuFuncGetAttribute(int* v, int a, void*) { *v = a == 0 ? 1024 : a == 4 ? 32 : 0; return 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int threads, size_t) { *n = 2048 / threads; return 0; }
API int cuGetErrorString(int, const char** s) { *s = "the counting device cannot do this"; return 0; }
API int cuPointerGetAttribute(void* value, int, ull p) { *(ull*)value = p; return 0; }
static int named(void* f) { counting_event("launch", ((std::string*)f)->c_str()); return 0; }
API int cuLaunchKernel(void* f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) { return named(f); }
API int cuLaunchKernelEx(const void*, void* f, void**, void**) { return named(f); }
NOTHING(cuCtxSetCurrent) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuOccupancyMaxActiveClusters)
API int cuGetExportTable(const void**, const void*) { return 500; }  // not found: the runtime compiler, which asks, does without
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cuLaunchCooperativeKernel)
