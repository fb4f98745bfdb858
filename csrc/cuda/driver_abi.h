/* The part of the CUDA driver API that we call, from its published ABI (CUDA 12.0; cuFuncLoad is optional). Having it here, the C files
 * compile without a toolkit. */
#ifndef SA_DRIVER_ABI_H
#define SA_DRIVER_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef uintptr_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;
typedef struct CUfunc_st *CUfunction;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_NOT_FOUND = 500,
};

enum {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};

enum {
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_FUNC_ATTRIBUTE_PTX_VERSION = 5, /* what the kernel was compiled for: major and minor digit */
    CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14,
};

enum { CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

enum { CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9 };
enum { CU_EVENT_DISABLE_TIMING = 2, CU_STREAM_NON_BLOCKING = 1 };
enum { CU_STREAM_CAPTURE_STATUS_NONE = 0 };
enum { CU_STREAM_CAPTURE_MODE_RELAXED = 2 };

enum { CU_TENSOR_MAP_FLOAT16 = 6, CU_TENSOR_MAP_BFLOAT16 = 9, CU_TENSOR_MAP_SWIZZLE_128B = 3, CU_TENSOR_MAP_L2_PROMOTION_256B = 3 };

typedef union CUlaunchAttributeValue {
    char pad[64];
    struct {
        unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
} CUlaunchAttributeValue;

typedef struct CUlaunchAttribute {
    int id;
    char pad[8 - sizeof(int)];
    CUlaunchAttributeValue value;
} CUlaunchAttribute;

typedef struct CUlaunchConfig {
    unsigned gridDimX, gridDimY, gridDimZ;
    unsigned blockDimX, blockDimY, blockDimZ;
    unsigned sharedMemBytes;
    CUstream hStream;
    CUlaunchAttribute *attrs;
    unsigned numAttrs;
} CUlaunchConfig;

/* X(name, arguments): entry points as of CUDA 12.0, which cuGetProcAddress gives under these names whatever the driver's age. */
#define SA_DRIVER_ENTRIES(X)                                                                                                              \
    X(cuInit, (unsigned flags))                                                                                                           \
    X(cuGetErrorString, (CUresult error, const char **text))                                                                              \
    X(cuGetErrorName, (CUresult error, const char **text))                                                                                \
    X(cuDeviceGetCount, (int *count))                                                                                                     \
    X(cuDeviceGet, (CUdevice * device, int ordinal))                                                                                      \
    X(cuDeviceGetName, (char *name, int length, CUdevice device))                                                                         \
    X(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device))                                                                 \
    X(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                                                   \
    X(cuCtxGetCurrent, (CUcontext * context))                                                                                             \
    X(cuCtxGetDevice, (CUdevice * device))                                                                                                \
    X(cuCtxPushCurrent, (CUcontext context))                                                                                              \
    X(cuCtxPopCurrent, (CUcontext * context))                                                                                             \
    X(cuLibraryLoadData, (CUlibrary * library, const void *code, int *jit_options, void **jit_values, unsigned jit_count,                 \
                          int *library_options, void **library_values, unsigned library_count))                                           \
    X(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char *name))                                                       \
    X(cuKernelGetFunction, (CUfunction * function, CUkernel kernel))                                                                      \
    X(cuKernelGetAttribute, (int *value, int attribute, CUkernel kernel, CUdevice device))                                                \
    X(cuKernelSetAttribute, (int attribute, int value, CUkernel kernel, CUdevice device))                                                 \
    X(cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra))                             \
    X(cuTensorMapEncodeTiled, (void *map, int type, uint32_t rank, void *address, const uint64_t *lengths, const uint64_t *strides,       \
                               const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill))         \
    X(cuOccupancyMaxPotentialClusterSize, (int *size, CUfunction function, const CUlaunchConfig *config))                                 \
    X(cuPointerGetAttribute, (void *value, int attribute, CUdeviceptr pointer))                                                           \
    X(cuMemAlloc, (CUdeviceptr * memory, size_t bytes))                                                                                   \
    X(cuMemFree, (CUdeviceptr memory))                                                                                                    \
    X(cuMemcpyHtoDAsync, (CUdeviceptr target, const void *source, size_t bytes, CUstream stream))                                         \
    X(cuMemcpyDtoHAsync, (void *target, CUdeviceptr source, size_t bytes, CUstream stream))                                               \
    X(cuMemcpyDtoDAsync, (CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream))                                         \
    X(cuMemsetD8Async, (CUdeviceptr target, unsigned char value, size_t count, CUstream stream))                                          \
    X(cuStreamSynchronize, (CUstream stream))                                                                                             \
    X(cuThreadExchangeStreamCaptureMode, (int *mode))                                                                                     \
    X(cuStreamCreate, (CUstream * stream, unsigned flags))                                                                                \
    X(cuStreamDestroy, (CUstream stream))                                                                                                 \
    X(cuStreamGetId, (CUstream stream, unsigned long long *id))                                                                           \
    X(cuStreamIsCapturing, (CUstream stream, int *status))                                                                                \
    X(cuStreamWaitEvent, (CUstream stream, CUevent event, unsigned flags))                                                                \
    X(cuEventCreate, (CUevent * event, unsigned flags))                                                                                   \
    X(cuEventRecord, (CUevent event, CUstream stream))                                                                                    \
    X(cuEventDestroy, (CUevent event))

#endif
