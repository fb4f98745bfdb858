/* A libcuda.so.1 for machines without one: device memory is memory of the host, kernels do nothing but `stage`, unless fake_run_kernel is
 * linked to it (tests/c/device/driver.cpp), which runs them. FAKE_CUDA says what is
 * wrong with it: old, nodevice, broken, memory (none to be had), launch (kernels fail), young (no cuFuncLoad). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "driver_abi.h"
#include "stage.h"

enum { DEVICES = 2 };

static int context_of[DEVICES + 1]; /* their addresses are the contexts */
static CUcontext stack[64];
static int depth;
static const char *names[512];
static int name_count;
static long long launches;

static int wrong(const char *what)
{
    const char *wish = getenv("FAKE_CUDA");
    return wish != NULL && strcmp(wish, what) == 0;
}

static CUresult fake_cuInit(unsigned flags)
{
    (void)flags;
    return wrong("broken") ? 999 : CUDA_SUCCESS;
}

static CUresult fake_cuGetErrorString(CUresult error, const char **text)
{
    *text = error == 700 ? "an illegal memory access was encountered" : "unknown error";
    return CUDA_SUCCESS;
}

static CUresult fake_cuGetErrorName(CUresult error, const char **text)
{
    *text = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_UNKNOWN";
    return CUDA_SUCCESS;
}

static CUresult fake_cuDeviceGetCount(int *count)
{
    *count = wrong("nodevice") ? 0 : DEVICES;
    return CUDA_SUCCESS;
}

static CUresult fake_cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return CUDA_SUCCESS;
}

static CUresult fake_cuDeviceGetName(char *name, int length, CUdevice device)
{
    (void)device;
    strncpy(name, "Fake", (size_t)length);
    return CUDA_SUCCESS;
}

static CUresult fake_cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    (void)device;
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 9
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
             : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT     ? 132
                                                                         : 232448;
    return CUDA_SUCCESS;
}

static CUresult fake_cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    *context = (CUcontext)(void *)&context_of[device];
    return CUDA_SUCCESS;
}

static CUresult fake_cuCtxGetCurrent(CUcontext *context)
{
    *context = depth > 0 ? stack[depth - 1] : NULL;
    return CUDA_SUCCESS;
}

static CUresult fake_cuCtxGetDevice(CUdevice *device)
{
    *device = (int)((int *)(void *)stack[depth - 1] - context_of);
    return CUDA_SUCCESS;
}

static CUresult fake_cuCtxPushCurrent(CUcontext context)
{
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

static CUresult fake_cuCtxPopCurrent(CUcontext *context)
{
    *context = stack[--depth];
    return CUDA_SUCCESS;
}

static CUresult fake_cuLibraryLoadData(CUlibrary *library, const void *code, int *a, void **b, unsigned c, int *d, void **e, unsigned f)
{
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    *library = (CUlibrary)(void *)(uintptr_t)code;
    return CUDA_SUCCESS;
}

static CUresult fake_cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name)
{
    (void)library;
    names[name_count] = name;
    *kernel = (CUkernel)(void *)&names[name_count++];
    return CUDA_SUCCESS;
}

static CUresult fake_cuKernelGetFunction(CUfunction *function, CUkernel kernel)
{
    *function = (CUfunction)(void *)kernel;
    return CUDA_SUCCESS;
}

static CUresult fake_cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice device)
{
    (void)attribute, (void)value, (void)kernel, (void)device;
    return CUDA_SUCCESS;
}

static CUresult fake_cuKernelGetAttribute(int *value, int attribute, CUkernel kernel, CUdevice device)
{
    (void)attribute, (void)kernel, (void)device;
    *value = 90;
    return CUDA_SUCCESS;
}

__attribute__((weak)) void fake_run_kernel(const char *name, const CUlaunchConfig *config, const void *parameter);

static CUresult fake_cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra)
{
    (void)extra;
    launches++;
    if (wrong("launch")) {
        return 700;
    }
    if (strcmp(*(const char **)(void *)function, "stage") == 0) {
        const sa_stage *stage = parameters[0];
        memcpy(stage->target, stage->words, (size_t)stage->count * sizeof(uint32_t));
    } else if (fake_run_kernel != NULL) {
        fake_run_kernel(*(const char **)(void *)function, config, parameters[0]);
    }
    return CUDA_SUCCESS;
}

static CUresult fake_cuOccupancyMaxPotentialClusterSize(int *size, CUfunction function, const CUlaunchConfig *config)
{
    (void)function, (void)config;
    *size = 16;
    return CUDA_SUCCESS;
}

static CUresult fake_cuPointerGetAttribute(void *value, int attribute, CUdeviceptr pointer)
{
    (void)attribute, (void)pointer;
    *(int *)value = 0;
    return CUDA_SUCCESS;
}

static CUresult fake_cuMemAlloc(CUdeviceptr *memory, size_t bytes)
{
    void *place = NULL;
    if (wrong("memory") || posix_memalign(&place, 256, bytes) != 0) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memset(place, 0xAB, bytes);
    *memory = (CUdeviceptr)place;
    return CUDA_SUCCESS;
}

static CUresult fake_cuMemFree(CUdeviceptr memory)
{
    free((void *)memory);
    return CUDA_SUCCESS;
}

static CUresult copy(void *target, const void *source, size_t bytes)
{
    memmove(target, source, bytes);
    return CUDA_SUCCESS;
}

static CUresult fake_cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t bytes, CUstream stream)
{
    (void)stream;
    return copy((void *)target, source, bytes);
}

static CUresult fake_cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t bytes, CUstream stream)
{
    (void)stream;
    return copy(target, (const void *)source, bytes);
}

static CUresult fake_cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream)
{
    (void)stream;
    return copy((void *)target, (const void *)source, bytes);
}

static CUresult fake_cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream)
{
    (void)stream;
    memset((void *)target, value, count);
    return CUDA_SUCCESS;
}

static CUresult nothing(void)
{
    return CUDA_SUCCESS;
}

static CUresult fake_cuStreamIsCapturing(CUstream stream, int *status)
{
    (void)stream;
    *status = 0;
    return CUDA_SUCCESS;
}

static CUresult fake_cuStreamGetId(CUstream stream, unsigned long long *id)
{
    *id = (unsigned long long)(uintptr_t)stream;
    return CUDA_SUCCESS;
}

#define fake_cuTensorMapEncodeTiled nothing
#define fake_cuFuncLoad nothing
#define fake_cuStreamSynchronize nothing
#define fake_cuStreamCreate nothing
#define fake_cuStreamDestroy nothing
#define fake_cuStreamWaitEvent nothing
#define fake_cuEventCreate nothing
#define fake_cuEventRecord nothing
#define fake_cuEventDestroy nothing
#define fake_cuThreadExchangeStreamCaptureMode nothing

/* Every entry is counted on its way to the function that serves it. */
enum {
#define INDEX(name, arguments) INDEX_##name,
    SA_DRIVER_ENTRIES(INDEX)
};
static long long counts[64];
#define COUNTED(name, arguments)                                                    \
    static void counted_##name(void)                                                \
    {                                                                               \
        void *given = __builtin_apply_args();                                       \
        counts[INDEX_##name]++;                                                     \
        __builtin_return(__builtin_apply((void (*)())fake_##name, given, 64));      \
    }
SA_DRIVER_ENTRIES(COUNTED)

__attribute__((visibility("default"))) CUresult cuDriverGetVersion(int *version)
{
    *version = wrong("old") ? 11080 : 13000;
    return CUDA_SUCCESS;
}

__attribute__((visibility("default"))) CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                                                                    int *status)
{
    (void)version, (void)flags;
    static const struct {
        const char *name;
        void *function;
    } entries[] = {
#define ENTRY(name, arguments) {#name, (void *)counted_##name},
        SA_DRIVER_ENTRIES(ENTRY)
    };
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
        if (strcmp(entries[i].name, symbol) == 0) {
            *function = entries[i].function;
            *status = 0;
            return CUDA_SUCCESS;
        }
    }
    if (strcmp(symbol, "cuFuncLoad") == 0 && !wrong("young")) {
        *function = (void *)fake_cuFuncLoad;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

/* How often an entry was called since it was last asked for. */
__attribute__((visibility("default"))) long long fake_calls(const char *symbol)
{
#define TAKE(name, arguments)                       \
    if (strcmp(symbol, #name) == 0) {               \
        const long long count = counts[INDEX_##name]; \
        counts[INDEX_##name] = 0;                   \
        return count;                               \
    }
    SA_DRIVER_ENTRIES(TAKE)
    return -1;
}

__attribute__((visibility("default"))) long long fake_launches(void)
{
    return launches;
}

__attribute__((visibility("default"))) int fake_context_depth(void)
{
    return depth;
}
