#include "counters.h"

#include <pthread.h>

enum {
    ARENA = 1 << 18,  /* counters: 1 MiB */
    MAX_ARENAS = 16,  /* a device */
    OF_A_STREAM = 4096,
    MAX_STREAMS = 256 /* a device */
};

typedef struct stream_counters {
    unsigned long long id; /* unique for the life of the process; handles are not */
    uint32_t *counters;
} stream_counters;

typedef struct device_counters {
    uint32_t *arena;
    int64_t used; /* of the arena */
    int arenas, stream_count;
    stream_counters streams[MAX_STREAMS];
} device_counters;

static struct {
    pthread_mutex_t lock;
    device_counters devices[SA_MAX_DEVICES];
} state = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Cleared on a stream of its own: the caller's may be under capture. */
static sa_status clear(const char *function, void *memory, int64_t bytes)
{
    CUstream stream;
    SA_TRY_DRIVER(function, cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    sa_status status = sa_device_fill(function, memory, 0, bytes, stream);
    if (status == SA_OK) {
        status = sa_device_wait(function, stream);
    }
    sa_driver_entries.cuStreamDestroy(stream);
    return status;
}

/* Not a part of any graph, so allowed while one is captured if the thread says so. */
static sa_status new_arena(const char *function, device_counters *device)
{
    void *memory = NULL;
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    const int64_t bytes = ARENA * (int64_t)sizeof(uint32_t);
    sa_driver_entries.cuThreadExchangeStreamCaptureMode(&mode);
    sa_status status = sa_device_allocate(function, "counters", bytes, &memory);
    if (status == SA_OK) {
        status = clear(function, memory, bytes);
    }
    sa_driver_entries.cuThreadExchangeStreamCaptureMode(&mode);
    SA_TRY(status);
    device->arena = memory;
    device->used = 0;
    device->arenas++;
    return SA_OK;
}

static sa_status cut(const char *function, device_counters *device, int64_t count, uint32_t **counters)
{
    *counters = NULL;
    if (device->arena == NULL || device->used + count > ARENA) {
        if (device->arenas == MAX_ARENAS) {
            return SA_OK;
        }
        SA_TRY(new_arena(function, device));
    }
    *counters = device->arena + device->used;
    device->used += count;
    return SA_OK;
}

static sa_status of_stream(const char *function, device_counters *device, unsigned long long id, uint32_t **counters)
{
    *counters = NULL;
    for (int i = 0; i < device->stream_count; i++) {
        if (device->streams[i].id == id) {
            *counters = device->streams[i].counters;
            return SA_OK;
        }
    }
    if (device->stream_count == MAX_STREAMS) {
        return SA_OK;
    }
    SA_TRY(cut(function, device, OF_A_STREAM, counters));
    if (*counters != NULL) {
        device->streams[device->stream_count++] = (stream_counters){id, *counters};
    }
    return SA_OK;
}

sa_status sa_counters_take(const char *function, const sa_device_scope *scope, void *stream, int64_t count, uint32_t **counters)
{
    bool capturing;
    unsigned long long id = 0;
    *counters = NULL;
    if (count > OF_A_STREAM) {
        return SA_OK;
    }
    SA_TRY(sa_device_capturing(function, stream, &capturing));
    if (!capturing) {
        SA_TRY_DRIVER(function, cuStreamGetId(stream, &id));
    }
    device_counters *device = &state.devices[scope->ordinal];
    pthread_mutex_lock(&state.lock);
    const int64_t lines = (count + 31) / 32 * 32; /* calls share no cache line */
    const sa_status status = capturing ? cut(function, device, lines, counters) : of_stream(function, device, id, counters);
    pthread_mutex_unlock(&state.lock);
    return status;
}
