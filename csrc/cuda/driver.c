#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "driver_abi.h"
#include "images_built.h"

enum { OLDEST_DRIVER = 12000, TEXT = 512 };

/* --- what was built in ----------------------------------------------------------------------------------------------------------- */

#define SA_IMAGE(name, path) extern const char sa_image_##name[] __attribute__((visibility("hidden")));
#include "images.h"
#undef SA_IMAGE

typedef struct image {
    const char *name, *data;
} image;

static const image images[] = {
#define SA_IMAGE(name, path) {#name, sa_image_##name},
#include "images.h"
#undef SA_IMAGE
    {NULL, NULL},
};

const char *sa_cuda_image(const char *name)
{
    for (int i = 0; images[i].name != NULL; i++) {
        if (strcmp(images[i].name, name) == 0) {
            return images[i].data;
        }
    }
    return NULL;
}

/* --- the driver ------------------------------------------------------------------------------------------------------------------ */

sa_driver sa_driver_entries;

typedef struct device_state {
    sa_cuda_device facts;
    CUdevice handle;
    CUcontext primary;
    atomic_bool ready;
} device_state;

static struct {
    pthread_mutex_t lock;
    atomic_bool opened, forked;
    sa_status status;   /* of opening */
    char problem[TEXT]; /* why it failed, without the function's name */
    int version, device_count;
    device_state devices[SA_MAX_DEVICES];
} state = {.lock = PTHREAD_MUTEX_INITIALIZER};

static const char fork_text[] = "this process was forked after CUDA was used, which CUDA does not survive: start processes with the "
                                "'spawn' method (multiprocessing.get_context('spawn'))";

static void after_fork_in_child(void)
{
    pthread_mutex_init(&state.lock, NULL);
    atomic_store(&state.forked, true);
}

sa_status sa_driver_failure(const char *function, const char *what, CUresult result)
{
    const char *name = NULL, *text = NULL;
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        return sa_fail(SA_NO_MEMORY, "%s(): out of CUDA memory: %s", function, what);
    }
    if (result == CUDA_ERROR_NOT_INITIALIZED) {
        return sa_fail(SA_RUNTIME_ERROR, "%s(): %s", function, fork_text);
    }
    sa_driver_entries.cuGetErrorName(result, &name);
    sa_driver_entries.cuGetErrorString(result, &text);
    return sa_fail(SA_RUNTIME_ERROR, "%s(): CUDA error %d (%s): %s, at: %s", function, result, name ? name : "unnamed",
                   text ? text : "the driver has no text for it", what);
}

static sa_status problem(sa_status status, const char *text)
{
    snprintf(state.problem, sizeof state.problem, "%s", text);
    return status;
}

typedef CUresult (*get_address)(const char *symbol, void **function, int version, uint64_t flags, int *status);

static void *entry(get_address get, const char *name, int version)
{
    void *function = NULL;
    int status = 0;
    return get(name, &function, version, 0, &status) == CUDA_SUCCESS ? function : NULL;
}

/* Opens the library and resolves its entries; a library without one of them is too old. */
static sa_status load_driver(void)
{
    if (images[0].name == NULL) {
        return problem(SA_NOT_IMPLEMENTED, "not built: " SA_CUDA_NOT_BUILT "; build sinkattn where nvcc is found (SINKATTN_NVCC, CUDA_HOME)");
    }
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        return problem(SA_RUNTIME_ERROR, "built, but libcuda.so.1 was not found: install the NVIDIA driver, and in a container pass the GPU in");
    }
    CUresult (*version)(int *version) = (CUresult(*)(int *))dlsym(library, "cuDriverGetVersion");
    const get_address get = (get_address)dlsym(library, "cuGetProcAddress_v2");
    if (version == NULL || version(&state.version) != CUDA_SUCCESS || state.version < OLDEST_DRIVER || get == NULL) {
        snprintf(state.problem, sizeof state.problem, "built, but the driver is for CUDA %d.%d: install one for CUDA 12.0 or later",
                 state.version / 1000, state.version % 1000 / 10);
        return SA_RUNTIME_ERROR;
    }
#define SA_ENTRY(name, arguments)                                                                                    \
    sa_driver_entries.name = (CUresult(*) arguments)entry(get, #name, OLDEST_DRIVER);                                           \
    if (sa_driver_entries.name == NULL) {                                                                                       \
        return problem(SA_RUNTIME_ERROR, "built, but the driver lacks " #name ": install one for CUDA 12.0 or later"); \
    }
    SA_DRIVER_ENTRIES(SA_ENTRY)
#undef SA_ENTRY
    sa_driver_entries.cuFuncLoad = (CUresult(*)(CUfunction))entry(get, "cuFuncLoad", 12040);
    return SA_OK;
}

static sa_status start_driver(void)
{
    const CUresult result = sa_driver_entries.cuInit(0);
    if (result == CUDA_SUCCESS && sa_driver_entries.cuDeviceGetCount(&state.device_count) == CUDA_SUCCESS && state.device_count > 0) {
        if (state.device_count > SA_MAX_DEVICES) {
            state.device_count = SA_MAX_DEVICES;
        }
        return pthread_atfork(NULL, NULL, after_fork_in_child) == 0 ? SA_OK : problem(SA_NO_MEMORY, "out of memory");
    }
    if (result == CUDA_ERROR_NOT_INITIALIZED) {
        return problem(SA_RUNTIME_ERROR, fork_text);
    }
    if (result == CUDA_SUCCESS || result == CUDA_ERROR_NO_DEVICE) {
        return problem(SA_RUNTIME_ERROR, "built, driver found, but no device: see nvidia-smi and CUDA_VISIBLE_DEVICES");
    }
    const char *text = NULL;
    sa_driver_entries.cuGetErrorString(result, &text);
    snprintf(state.problem, sizeof state.problem, "built, driver found, but it does not start: error %d, %s", result, text ? text : "no text");
    return SA_RUNTIME_ERROR;
}

/* Once a process; its outcome stays. */
static sa_status open_driver(void)
{
    if (!atomic_load_explicit(&state.opened, memory_order_acquire)) {
        pthread_mutex_lock(&state.lock);
        if (!atomic_load(&state.opened)) {
            state.status = load_driver();
            if (state.status == SA_OK) {
                state.status = start_driver();
            }
            atomic_store_explicit(&state.opened, true, memory_order_release);
        }
        pthread_mutex_unlock(&state.lock);
    }
    return state.status;
}

/* --- devices ---------------------------------------------------------------------------------------------------------------------- */

static sa_status read_facts(const char *function, device_state *device)
{
    int major, minor;
    sa_cuda_device *facts = &device->facts;
    SA_TRY_DRIVER(function, cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device->handle));
    SA_TRY_DRIVER(function, cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device->handle));
    SA_TRY_DRIVER(function, cuDeviceGetAttribute(&facts->multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device->handle));
    SA_TRY_DRIVER(function, cuDeviceGetAttribute(&facts->shared_limit, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device->handle));
    facts->capability = 10 * major + minor;
    return SA_OK;
}

/* The primary context is retained for the life of the process: frameworks do the same, and releasing it would end theirs. */
static sa_status prepare_device(const char *function, int ordinal)
{
    device_state *device = &state.devices[ordinal];
    SA_TRY_DRIVER(function, cuDeviceGet(&device->handle, ordinal));
    SA_TRY(read_facts(function, device));
    if (device->facts.capability < 80) {
        return sa_fail(SA_NOT_IMPLEMENTED, "%s(): cuda:%d has compute capability %d.%d, expected 8.0 or later", function, ordinal,
                       device->facts.capability / 10, device->facts.capability % 10);
    }
    SA_TRY_DRIVER(function, cuDevicePrimaryCtxRetain(&device->primary, device->handle));
    return SA_OK;
}

static sa_status prepare_locked(const char *function, int ordinal)
{
    sa_status status = SA_OK;
    pthread_mutex_lock(&state.lock);
    if (!atomic_load(&state.devices[ordinal].ready)) {
        status = prepare_device(function, ordinal);
        atomic_store_explicit(&state.devices[ordinal].ready, status == SA_OK, memory_order_release);
    }
    pthread_mutex_unlock(&state.lock);
    return status;
}

static sa_status make_current(const char *function, const device_state *device, sa_device_scope *scope)
{
    CUcontext current = NULL;
    CUdevice owner;
    scope->pushed = false;
    scope->primary = true;
    SA_TRY_DRIVER(function, cuCtxGetCurrent(&current));
    if (current == device->primary) {
        return SA_OK;
    }
    if (current != NULL && sa_driver_entries.cuCtxGetDevice(&owner) == CUDA_SUCCESS && owner == device->handle) {
        scope->primary = false;
        return SA_OK; /* a context that the user made: his streams live there */
    }
    SA_TRY_DRIVER(function, cuCtxPushCurrent(device->primary));
    scope->pushed = true;
    return SA_OK;
}

static sa_status need_driver(const char *function)
{
    if (atomic_load_explicit(&state.forked, memory_order_relaxed)) {
        return sa_fail(SA_RUNTIME_ERROR, "%s(): %s", function, fork_text);
    }
    const sa_status opened = open_driver();
    return opened == SA_OK ? SA_OK
                           : sa_fail(opened, "%s(): CUDA is %s%s", function, state.problem,
                                     opened == SA_NOT_IMPLEMENTED ? "; the backends of this build are: cpu" : "");
}

sa_status sa_device_check(const char *function, int ordinal)
{
    SA_TRY(need_driver(function));
    if (ordinal < 0 || ordinal >= state.device_count) {
        return sa_fail(SA_VALUE_ERROR, "%s(): device is cuda:%d, expected cuda:0 to cuda:%d", function, ordinal, state.device_count - 1);
    }
    return SA_OK;
}

sa_status sa_device_enter(const char *function, int ordinal, sa_device_scope *scope)
{
    SA_TRY(sa_device_check(function, ordinal));
    device_state *device = &state.devices[ordinal];
    if (!atomic_load_explicit(&device->ready, memory_order_acquire)) {
        SA_TRY(prepare_locked(function, ordinal));
    }
    scope->device = &device->facts;
    scope->handle = device->handle;
    scope->ordinal = ordinal;
    return make_current(function, device, scope);
}

void sa_device_leave(const sa_device_scope *scope)
{
    CUcontext popped;
    if (scope->pushed) {
        sa_driver_entries.cuCtxPopCurrent(&popped);
    }
}

sa_status sa_device_of_pointer(const char *function, const char *what, const void *pointer, int *ordinal)
{
    SA_TRY(need_driver(function));
    const CUresult result =
        sa_driver_entries.cuPointerGetAttribute(ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, (CUdeviceptr)pointer);
    if (pointer == NULL) { /* an empty array */
        *ordinal = 0;
        return SA_OK;
    }
    return result == CUDA_SUCCESS ? SA_OK : sa_driver_failure(function, what, result);
}

/* --- memory and order ------------------------------------------------------------------------------------------------------------- */

sa_status sa_device_allocate(const char *function, const char *what, int64_t bytes, void **memory)
{
    CUdeviceptr address = 0;
    const CUresult result = sa_driver_entries.cuMemAlloc(&address, (size_t)(bytes > 0 ? bytes : 1));
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        return sa_fail(SA_NO_MEMORY, "%s(): out of CUDA memory: %lld bytes for %s", function, (long long)bytes, what);
    }
    *memory = (void *)address;
    return result == CUDA_SUCCESS ? SA_OK : sa_driver_failure(function, what, result);
}

void sa_device_free(int ordinal, void *memory)
{
    sa_device_scope scope;
    if (memory != NULL && !atomic_load(&state.forked) && sa_device_enter("free", ordinal, &scope) == SA_OK) {
        sa_driver_entries.cuMemFree((CUdeviceptr)memory);
        sa_device_leave(&scope);
    }
}

sa_status sa_device_copy_in(const char *function, void *target, const void *source, int64_t bytes, void *stream)
{
    if (bytes > 0) {
        SA_TRY_DRIVER(function, cuMemcpyHtoDAsync((CUdeviceptr)target, source, (size_t)bytes, stream));
    }
    return SA_OK;
}

sa_status sa_device_copy_out(const char *function, void *target, const void *source, int64_t bytes, void *stream)
{
    if (bytes > 0) {
        SA_TRY_DRIVER(function, cuMemcpyDtoHAsync(target, (CUdeviceptr)source, (size_t)bytes, stream));
    }
    return SA_OK;
}

sa_status sa_device_copy(const char *function, void *target, const void *source, int64_t bytes, void *stream)
{
    if (bytes > 0) {
        SA_TRY_DRIVER(function, cuMemcpyDtoDAsync((CUdeviceptr)target, (CUdeviceptr)source, (size_t)bytes, stream));
    }
    return SA_OK;
}

sa_status sa_device_fill(const char *function, void *target, int byte, int64_t bytes, void *stream)
{
    if (bytes > 0) {
        SA_TRY_DRIVER(function, cuMemsetD8Async((CUdeviceptr)target, (unsigned char)byte, (size_t)bytes, stream));
    }
    return SA_OK;
}

sa_status sa_device_wait(const char *function, void *stream)
{
    SA_TRY_DRIVER(function, cuStreamSynchronize(stream));
    return SA_OK;
}

sa_status sa_device_capturing(const char *function, void *stream, bool *capturing)
{
    int status = CU_STREAM_CAPTURE_STATUS_NONE;
    SA_TRY_DRIVER(function, cuStreamIsCapturing(stream, &status));
    *capturing = status != CU_STREAM_CAPTURE_STATUS_NONE;
    return SA_OK;
}

sa_status sa_device_order(const char *function, void *stream, void *waiting)
{
    CUevent event;
    SA_TRY_DRIVER(function, cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    CUresult result = sa_driver_entries.cuEventRecord(event, stream);
    if (result == CUDA_SUCCESS) {
        result = sa_driver_entries.cuStreamWaitEvent(waiting, event, 0);
    }
    sa_driver_entries.cuEventDestroy(event); /* released once it has passed */
    return result == CUDA_SUCCESS ? SA_OK : sa_driver_failure(function, "ordering two streams", result);
}

/* --- what users are told ---------------------------------------------------------------------------------------------------------- */

int sa_cuda_device_count(void)
{
    return !atomic_load(&state.forked) && open_driver() == SA_OK ? state.device_count : 0;
}

static void name_devices(char *text, size_t room)
{
    for (int i = 0; i < state.device_count; i++) {
        char name[96] = "unnamed";
        CUdevice device;
        device_state facts = {0};
        if (sa_driver_entries.cuDeviceGet(&device, i) != CUDA_SUCCESS) {
            continue;
        }
        facts.handle = device;
        sa_driver_entries.cuDeviceGetName(name, sizeof name, device);
        const sa_status status = read_facts("info", &facts);
        const size_t used = strlen(text);
        snprintf(text + used, room - used, "%s cuda:%d %s (sm_%d)", i == 0 ? "; devices:" : ",", i, name,
                 status == SA_OK ? facts.facts.capability : 0);
    }
}

const char *sa_cuda_sentence(bool probe)
{
    static _Thread_local char text[4 * TEXT];
    if (images[0].name == NULL) {
        return "not built: " SA_CUDA_NOT_BUILT "; build sinkattn where nvcc is found (SINKATTN_NVCC, CUDA_HOME)";
    }
    if (!probe && !atomic_load(&state.opened)) {
        snprintf(text, sizeof text, "built for %s; the driver is looked for when the first CUDA array comes", SA_CUDA_ARCHS);
        return text;
    }
    if (open_driver() != SA_OK) {
        return state.problem;
    }
    snprintf(text, sizeof text, "built for %s; driver for CUDA %d.%d", SA_CUDA_ARCHS, state.version / 1000, state.version % 1000 / 10);
    if (probe) {
        name_devices(text, sizeof text);
    }
    return text;
}
