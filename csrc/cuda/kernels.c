#include "kernels.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "../core/integers.h"
#include "images_built.h"
#include "stage.h"

enum { MAX_KERNELS = 256, MAX_IMAGES = 32 };

static const sa_cuda_kernel own_kernels[SA_OWN_KERNELS] = {
    [SA_KERNEL_STAGE] = {"stage", "stage"},
    [SA_KERNEL_MERGE] = {"merge", "merge"},
    [SA_KERNEL_KV_APPEND] = {"kv_append", "kv_append"},
    [SA_KERNEL_KV_STEP] = {"kv_step_sink_window", "kv_step"},
    [SA_KERNEL_KV_STEP + 1] = {"kv_step_h2o", "kv_step"},
    [SA_KERNEL_KV_STEP + 2] = {"kv_step_h2o_norm", "kv_step"},
    [SA_KERNEL_KV_STEP + 3] = {"kv_step_h2o_ema", "kv_step"},
    [SA_KERNEL_KV_STEP + 4] = {"kv_step_v_length_h2o", "kv_step"},
    [SA_KERNEL_KV_STEP + 5] = {"kv_step_scissorhands", "kv_step"},
    [SA_KERNEL_KV_STEP + 6] = {"kv_step_tova", "kv_step"},
    [SA_KERNEL_KV_STEP_K_NORM] = {"kv_step_k_norm", "kv_step"},
    [SA_KERNEL_KV_STEP_DRAWN] = {"kv_step_drawn", "kv_step"},
    [SA_KERNEL_KV_EVICT] = {"kv_evict", "kv_evict"},
    [SA_KERNEL_KV_MASS] = {"kv_mass", "kv_evict"},
    [SA_KERNEL_KV_WEIGHTS] = {"kv_weights", "kv_weights"},
};

typedef struct library {
    const char *image;
    CUlibrary handle;
} library;

typedef struct kernel {
    CUkernel handle;                       /* the same for every device and context; a launch looks up the rest */
    CUfunction functions[SA_MAX_DEVICES];  /* in the primary context, which saves the look-up */
    atomic_bool ready[SA_MAX_DEVICES];
    atomic_llong calls;
} kernel;

static struct {
    pthread_mutex_t lock;
    library libraries[MAX_IMAGES];
    int library_count;
    kernel kernels[MAX_KERNELS];
} state = {.lock = PTHREAD_MUTEX_INITIALIZER};

static const sa_cuda_kernel *describe(int index)
{
    return index < sa_cuda_kernel_count ? &sa_cuda_kernels[index] : &own_kernels[index - sa_cuda_kernel_count];
}

static sa_status find_library(const char *function, const char *image, CUlibrary *found)
{
    for (int i = 0; i < state.library_count; i++) {
        if (strcmp(state.libraries[i].image, image) == 0) {
            *found = state.libraries[i].handle;
            return SA_OK;
        }
    }
    const char *data = sa_cuda_image(image);
    if (data == NULL || state.library_count == MAX_IMAGES) {
        return sa_fail(SA_NOT_IMPLEMENTED, "%s(): this build lacks the CUDA kernels of %s.cu", function, image);
    }
    library *next = &state.libraries[state.library_count];
    SA_TRY_DRIVER(function, cuLibraryLoadData(&next->handle, data, NULL, NULL, 0, NULL, NULL, 0));
    next->image = image;
    state.library_count++;
    *found = next->handle;
    return SA_OK;
}

static sa_status find_kernel(const char *function, int index)
{
    kernel *one = &state.kernels[index];
    if (one->handle != NULL) {
        return SA_OK;
    }
    CUlibrary found = NULL;
    SA_TRY(find_library(function, describe(index)->image, &found));
    const CUresult result = sa_driver_entries.cuLibraryGetKernel(&one->handle, found, describe(index)->name);
    if (result == CUDA_ERROR_NOT_FOUND) {
        one->handle = NULL;
        return sa_fail(SA_NOT_IMPLEMENTED, "%s(): this build lacks the CUDA kernel %s", function, describe(index)->name);
    }
    return result == CUDA_SUCCESS ? SA_OK : sa_driver_failure(function, describe(index)->name, result);
}

/* Loads the code now, so that a launch under stream capture has nothing left to load. */
static sa_status finalise(const char *function, const sa_device_scope *scope, int index)
{
    CUfunction loaded;
    const CUkernel handle = state.kernels[index].handle;
    const CUresult result = sa_driver_entries.cuKernelGetFunction(&loaded, handle);
    if (result == CUDA_ERROR_NO_BINARY_FOR_GPU) {
        return sa_fail(SA_NOT_IMPLEMENTED, "%s(): CUDA kernel %s was built for " SA_CUDA_ARCHS ", none of which runs on cuda:%d (sm_%d): set "
                       "SINKATTN_CUDA_ARCHS when you build", function, describe(index)->name, scope->ordinal, scope->device->capability);
    }
    if (result != CUDA_SUCCESS) {
        return sa_driver_failure(function, describe(index)->name, result);
    }
    SA_TRY_DRIVER(function, cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, scope->device->shared_limit, handle,
                                                 scope->handle));
    if (scope->device->capability >= 90) {
        SA_TRY_DRIVER(function, cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, handle, scope->handle));
    }
    if (sa_driver_entries.cuFuncLoad != NULL) {
        SA_TRY_DRIVER(function, cuFuncLoad(loaded));
    }
    if (scope->primary) {
        state.kernels[index].functions[scope->ordinal] = loaded;
    }
    return SA_OK;
}

/* Loading is forbidden while a stream of the process is captured, unless the thread says that it knows what it does: it does, as nothing
 * of it belongs to the graph. */
static sa_status prepare(const char *function, const sa_device_scope *scope, int index)
{
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    pthread_mutex_lock(&state.lock);
    sa_driver_entries.cuThreadExchangeStreamCaptureMode(&mode);
    sa_status status = find_kernel(function, index);
    if (status == SA_OK) {
        status = finalise(function, scope, index);
    }
    sa_driver_entries.cuThreadExchangeStreamCaptureMode(&mode);
    atomic_store_explicit(&state.kernels[index].ready[scope->ordinal], status == SA_OK, memory_order_release);
    pthread_mutex_unlock(&state.lock);
    return status;
}

static bool is_ready(const sa_device_scope *scope, int index)
{
    return atomic_load_explicit(&state.kernels[index].ready[scope->ordinal], memory_order_acquire);
}

sa_status sa_device_launch(const char *function, const sa_device_scope *scope, const sa_cuda_launch *launch, void *pod, void *stream)
{
    kernel *one = &state.kernels[launch->kernel];
    if (!is_ready(scope, launch->kernel)) {
        SA_TRY(prepare(function, scope, launch->kernel));
    }
    CUlaunchAttribute attributes[2];
    unsigned count = 0;
    if (launch->cluster > 1) {
        attributes[count++] = (CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, .value.clusterDim = {launch->cluster, 1, 1}};
    }
    if (launch->early) {
        attributes[count++] = (CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, .value.programmaticStreamSerializationAllowed = 1};
    }
    const CUlaunchConfig config = {
        .gridDimX = launch->grid,
        .gridDimY = 1,
        .gridDimZ = 1,
        .blockDimX = launch->block,
        .blockDimY = 1,
        .blockDimZ = 1,
        .sharedMemBytes = launch->shared,
        .hStream = stream,
        .attrs = attributes,
        .numAttrs = count,
    };
    void *parameters[] = {pod};
    const CUfunction known = scope->primary ? one->functions[scope->ordinal] : NULL;
    const CUfunction function_handle = known != NULL ? known : (CUfunction)(void *)one->handle;
    const CUresult result = sa_driver_entries.cuLaunchKernelEx(&config, function_handle, parameters, NULL);
    if (result != CUDA_SUCCESS) {
        return sa_driver_failure(function, describe(launch->kernel)->name, result);
    }
    atomic_fetch_add_explicit(&one->calls, 1, memory_order_relaxed);
    return SA_OK;
}

sa_status sa_device_stage(const char *function, const sa_device_scope *scope, void *target, const void *source, int64_t bytes, void *stream)
{
    sa_stage parameters;
    const sa_cuda_launch launch = {.kernel = sa_cuda_kernel_count + SA_KERNEL_STAGE, .grid = 1, .block = 256, .cluster = 1};
    for (int64_t word = 0; word < bytes / 4; word += SA_STAGE_WORDS) {
        parameters.target = (uint32_t *)target + word;
        parameters.count = (int32_t)min_i64(bytes / 4 - word, SA_STAGE_WORDS);
        memcpy(parameters.words, (const uint32_t *)source + word, (size_t)parameters.count * sizeof(uint32_t));
        SA_TRY(sa_device_launch(function, scope, &launch, &parameters, stream));
    }
    return SA_OK;
}

sa_status sa_device_cluster_limit(const char *function, const sa_device_scope *scope, int32_t *limit)
{
    int kernel_index = 0, size = 0;
    *limit = 0;
    while (kernel_index < sa_cuda_kernel_count && strcmp(sa_cuda_kernels[kernel_index].name, "decode_bf16_128") != 0) {
        kernel_index++;
    }
    if (scope->device->capability < 90 || kernel_index == sa_cuda_kernel_count || sa_cuda_image("decode") == NULL) {
        return SA_OK;
    }
    SA_TRY(prepare(function, scope, kernel_index));
    int virtual_architecture = 0;
    SA_TRY_DRIVER(function, cuKernelGetAttribute(&virtual_architecture, CU_FUNC_ATTRIBUTE_PTX_VERSION, state.kernels[kernel_index].handle,
                                                 scope->handle));
    if (virtual_architecture < 90) { /* an older kernel that this device runs all the same has no code for clusters */
        return SA_OK;
    }
    const CUlaunchConfig config = {.gridDimX = 16,
                                   .gridDimY = 1,
                                   .gridDimZ = 1,
                                   .blockDimX = 256,
                                   .blockDimY = 1,
                                   .blockDimZ = 1,
                                   .sharedMemBytes = (unsigned)scope->device->shared_limit};
    const CUfunction function_handle = (CUfunction)(void *)state.kernels[kernel_index].handle;
    SA_TRY_DRIVER(function, cuOccupancyMaxPotentialClusterSize(&size, function_handle, &config));
    *limit = size >= 16 ? 16 : size >= 8 ? 8 : 0;
    return SA_OK;
}

bool sa_device_has_wgmma(const sa_device_scope *scope)
{
    return scope->device->capability == 90 && strstr(SA_CUDA_ARCHS, "sm_90a") != NULL;
}

int sa_cuda_kernel_total(void)
{
    return sa_cuda_kernel_count + SA_OWN_KERNELS;
}

const char *sa_cuda_kernel_name(int index)
{
    return describe(index)->name;
}

int64_t sa_cuda_kernel_calls(int index)
{
    return atomic_load_explicit(&state.kernels[index].calls, memory_order_relaxed);
}
