#include "cache.h"

#include <stdlib.h>

#include "../core/cache_check.h"
#include "../core/ring.h"
#include "kernels.h"

enum { ALIGNMENT = 256 };

static sa_ring ring_of(const sa_cuda_store *store)
{
    return (sa_ring){store->config.pinned, store->config.window, store->view.capacity};
}

static int64_t slot_count(const sa_cache_config *config)
{
    return config->pinned + config->window + config->rollback;
}

/* Bytes of one of the two tensors. */
static int64_t tensor_bytes(const sa_cache_config *config, int64_t depth)
{
    return config->batch * config->heads_kv * slot_count(config) * depth * sa_dtype_size(config->dtype);
}

static int64_t counter_bytes(const sa_cache_config *config)
{
    return config->batch * (int64_t)sizeof(int64_t);
}

static int64_t padded(int64_t bytes)
{
    return round_up(bytes, ALIGNMENT);
}

int64_t sa_cuda_store_bytes(const sa_cache_config *config)
{
    return padded(tensor_bytes(config, config->depth)) + padded(tensor_bytes(config, config->depth_v)) + 2 * padded(counter_bytes(config)) +
           padded(config->inv_freq_count * (int64_t)sizeof(double)) + padded(sa_step_counters(config->batch, config->heads_kv) * (int64_t)sizeof(uint32_t));
}

static void *take(char **next, int64_t bytes)
{
    void *place = *next;
    *next += padded(bytes);
    return place;
}

void sa_cuda_store_lay_out(const sa_cache_config *config, void *memory, sa_cuda_store *store)
{
    char *next = memory;
    *store = (sa_cuda_store){
        .config = *config,
        .key_bytes = tensor_bytes(config, config->depth),
        .value_bytes = tensor_bytes(config, config->depth_v),
    };
    store->config.inv_freq = NULL;
    store->view = (sa_cuda_cache){
        .keys = take(&next, store->key_bytes),
        .values = take(&next, store->value_bytes),
        .lengths = take(&next, counter_bytes(config)),
        .lows = take(&next, counter_bytes(config)),
        .inv_freq = take(&next, config->inv_freq_count * (int64_t)sizeof(double)),
        .window = config->window,
        .capacity = config->window + config->rollback,
        .pairs = config->inv_freq_count,
        .scaling = config->attention_scaling,
        .interleaved = config->interleaved,
        .applied = config->applied,
        .slot_positions = config->slot_positions,
    };
    store->counter_count = sa_step_counters(config->batch, config->heads_kv);
    store->counters = take(&next, store->counter_count * (int64_t)sizeof(uint32_t));
}

sa_status sa_cuda_store_place(const sa_cache_config *config, void *memory, const sa_device_scope *scope, void *stream, sa_cuda_store *store)
{
    static const char function[] = "SinkCache";
    sa_cuda_store_lay_out(config, memory, store);
    SA_TRY(sa_device_fill(function, store->counters, 0, store->counter_count * (int64_t)sizeof(uint32_t), stream));
    void *frequencies = (void *)(uintptr_t)store->view.inv_freq;
    SA_TRY(sa_device_fill(function, store->view.keys, 0, store->key_bytes, stream)); /* unused slots are zero in a saved state */
    SA_TRY(sa_device_fill(function, store->view.values, 0, store->value_bytes, stream));
    SA_TRY(sa_device_stage(function, scope, frequencies, config->inv_freq, config->inv_freq_count * (int64_t)sizeof(double), stream));
    return sa_cuda_store_reset(store, scope, NULL, stream);
}

int64_t sa_cuda_store_nbytes(const sa_cuda_store *store)
{
    return store->key_bytes + store->value_bytes + 2 * counter_bytes(&store->config);
}

int64_t sa_cuda_store_slots(const sa_cuda_store *store)
{
    return slot_count(&store->config);
}

/* Writes `count` equal counters, as kernel parameters: a captured reset replays. */
static sa_status set_counters(const sa_device_scope *scope, int64_t *target, int64_t value, int64_t count, void *stream)
{
    int64_t values[256];
    for (int64_t i = 0; i < min_i64(count, 256); i++) {
        values[i] = value;
    }
    for (int64_t done = 0; done < count; done += 256) {
        SA_TRY(sa_device_stage("reset", scope, target + done, values, min_i64(count - done, 256) * (int64_t)sizeof(int64_t), stream));
    }
    return SA_OK;
}

sa_status sa_cuda_store_reset(sa_cuda_store *store, const sa_device_scope *scope, const bool *rows, void *stream)
{
    const int64_t batch = store->config.batch;
    for (int64_t first = 0, count; first < batch; first += count) {
        const bool wanted = rows == NULL || rows[first];
        count = sa_rows_alike(rows, first, batch);
        if (wanted) {
            SA_TRY(set_counters(scope, store->view.lengths + first, 0, count, stream));
            SA_TRY(set_counters(scope, store->view.lows + first, store->config.pinned, count, stream));
        }
    }
    return SA_OK;
}

sa_status sa_cuda_store_read(const sa_cuda_store *store, void *keys, void *values, int64_t *lengths, int64_t *lows, void *stream)
{
    static const char function[] = "SinkCache";
    const int64_t counters = counter_bytes(&store->config);
    SA_TRY(sa_device_copy_out(function, keys, store->view.keys, keys != NULL ? store->key_bytes : 0, stream));
    SA_TRY(sa_device_copy_out(function, values, store->view.values, values != NULL ? store->value_bytes : 0, stream));
    SA_TRY(sa_device_copy_out(function, lengths, store->view.lengths, lengths != NULL ? counters : 0, stream));
    SA_TRY(sa_device_copy_out(function, lows, store->view.lows, lows != NULL ? counters : 0, stream));
    return sa_device_wait(function, stream);
}

sa_status sa_cuda_store_write(sa_cuda_store *store, const void *keys, const void *values, const int64_t *lengths, const int64_t *lows,
                              void *stream)
{
    static const char function[] = "load_state_dict";
    SA_TRY(sa_device_copy_in(function, store->view.keys, keys, store->key_bytes, stream));
    SA_TRY(sa_device_copy_in(function, store->view.values, values, store->value_bytes, stream));
    SA_TRY(sa_device_copy_in(function, store->view.lengths, lengths, counter_bytes(&store->config), stream));
    SA_TRY(sa_device_copy_in(function, store->view.lows, lows, counter_bytes(&store->config), stream));
    return sa_device_wait(function, stream);
}

sa_status sa_cuda_store_crop(sa_cuda_store *store, const sa_device_scope *scope, int64_t length, void *stream)
{
    const int64_t batch = store->config.batch, bytes = counter_bytes(&store->config);
    const sa_ring ring = ring_of(store);
    int64_t *lengths = malloc((size_t)max_i64(2 * bytes, 1)), *lows = lengths + batch;
    if (lengths == NULL) {
        return sa_no_memory("the lengths of a SinkCache", 2 * bytes);
    }
    sa_status status = sa_cuda_store_read(store, NULL, NULL, lengths, lows, stream);
    if (status == SA_OK) {
        status = sa_check_cache_crop(&store->config, lengths, lows, length);
    }
    for (int64_t b = 0; b < batch; b++) {
        const sa_ring_state after = sa_ring_crop(&ring, (sa_ring_state){lengths[b], lows[b]}, length);
        lengths[b] = after.length;
        lows[b] = after.low;
    }
    if (status == SA_OK) {
        status = sa_device_stage("crop", scope, store->view.lengths, lengths, bytes, stream);
    }
    if (status == SA_OK) {
        status = sa_device_stage("crop", scope, store->view.lows, lows, bytes, stream);
    }
    free(lengths);
    return status;
}

static sa_status copy_row(sa_cuda_store *store, const sa_cuda_store *from, int64_t to_row, int64_t from_row, void *stream)
{
    static const char function[] = "reorder";
    const int64_t key_row = store->key_bytes / store->config.batch, value_row = store->value_bytes / store->config.batch;
    SA_TRY(sa_device_copy(function, (char *)store->view.keys + to_row * key_row, (const char *)from->view.keys + from_row * key_row, key_row,
                          stream));
    SA_TRY(sa_device_copy(function, (char *)store->view.values + to_row * value_row, (const char *)from->view.values + from_row * value_row,
                          value_row, stream));
    SA_TRY(sa_device_copy(function, store->view.lengths + to_row, from->view.lengths + from_row, sizeof(int64_t), stream));
    return sa_device_copy(function, store->view.lows + to_row, from->view.lows + from_row, sizeof(int64_t), stream);
}

sa_status sa_cuda_store_gather(sa_cuda_store *store, const sa_cuda_store *before, const int64_t *index, void *stream)
{
    for (int64_t b = 0; b < store->config.batch; b++) {
        if (index[b] != b) {
            SA_TRY(copy_row(store, before, b, index[b], stream));
        }
    }
    return SA_OK;
}

sa_status sa_cuda_store_copy(sa_cuda_store *store, const sa_cuda_store *from, void *stream)
{
    static const char function[] = "copy";
    SA_TRY(sa_device_copy(function, store->view.keys, from->view.keys, store->key_bytes, stream));
    SA_TRY(sa_device_copy(function, store->view.values, from->view.values, store->value_bytes, stream));
    SA_TRY(sa_device_fill(function, store->counters, 0, store->counter_count * (int64_t)sizeof(uint32_t), stream));
    const int64_t frequencies = store->config.inv_freq_count * (int64_t)sizeof(double);
    SA_TRY(sa_device_copy(function, (void *)(uintptr_t)store->view.inv_freq, from->view.inv_freq, frequencies, stream));
    SA_TRY(sa_device_copy(function, store->view.lengths, from->view.lengths, counter_bytes(&store->config), stream));
    return sa_device_copy(function, store->view.lows, from->view.lows, counter_bytes(&store->config), stream);
}
