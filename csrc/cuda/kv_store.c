#include "kv_store.h"

#include <stdlib.h>
#include <string.h>

#include "../core/integers.h"
#include "../core/kv_check.h"
#include "../core/policy.h"
#include "kernels.h"

enum { ALIGNMENT = 256, PARTS = 14 };

static int64_t streams_of(const sa_cuda_kv *store)
{
    return store->config.batch * store->config.heads_kv;
}

/* --- where everything lies --------------------------------------------------------------------------------------------------------- */

/* An array of a store; `row_bytes`: of a batch row. */
typedef struct part {
    void *data;
    int64_t row_bytes;
} part;

/* What differs between rows, in the order in which it lies. */
static void parts_of(const sa_cuda_kv *store, part parts[PARTS])
{
    const sa_cuda_slots *v = &store->view;
    const int64_t heads = store->config.heads_kv, slots = heads * v->stride, size = sa_dtype_size(store->config.dtype);
    const int64_t number = heads * (int64_t)sizeof(int64_t);
    const part all[PARTS] = {{v->keys, slots * v->depth * size},
                             {v->values, slots * v->depth_v * size},
                             {v->positions, slots * 8},
                             {v->mass, slots * 8},
                             {v->call, slots * 8},
                             {v->own, slots * 8},
                             {v->own != NULL ? v->own + store->config.batch * slots : NULL, slots * 8},
                             {v->rings, slots * v->ring_bytes},
                             {v->held, number},
                             {v->lengths, number},
                             {v->evicted_at, number},
                             {v->counts, number},
                             {v->ledgers, heads * (int64_t)sizeof(sa_ledger)},
                             {v->log, heads * v->log_size * (int64_t)sizeof(sa_departure)}};
    memcpy(parts, all, sizeof all);
}

static void *take(char *memory, int64_t *at, int64_t bytes)
{
    void *place = memory != NULL ? memory + *at : NULL;
    *at += round_up(bytes, ALIGNMENT);
    return place;
}

/* Places everything, from memory NULL on for its extent alone. Returns the bytes. */
static int64_t lay_out(sa_cuda_kv *store, char *memory)
{
    sa_cuda_slots *v = &store->view;
    const int64_t batch = store->config.batch, streams = streams_of(store), slots = streams * v->stride;
    const int64_t size = sa_dtype_size(store->config.dtype), number = streams * (int64_t)sizeof(int64_t);
    int64_t at = 0;
    v->keys = take(memory, &at, slots * v->depth * size);
    v->values = take(memory, &at, slots * v->depth_v * size);
    store->vector_bytes = at;
    v->positions = take(memory, &at, slots * 8);
    v->mass = take(memory, &at, slots * 8);
    v->call = take(memory, &at, slots * 8);
    v->own = take(memory, &at, 2 * slots * 8);
    v->rings = take(memory, &at, slots * v->ring_bytes);
    v->held = take(memory, &at, number);
    v->lengths = take(memory, &at, number);
    v->evicted_at = take(memory, &at, number);
    v->counts = take(memory, &at, number);
    v->ledgers = take(memory, &at, streams * (int64_t)sizeof(sa_ledger));
    v->log = take(memory, &at, streams * v->log_size * (int64_t)sizeof(sa_departure));
    v->budgets = take(memory, &at, store->config.heads_kv * (int64_t)sizeof(int64_t));
    v->inv_freq = take(memory, &at, v->pairs * (int64_t)sizeof(double));
    store->content_bytes = at;
    v->fresh = take(memory, &at, batch * (int64_t)sizeof(int64_t));
    store->counters = take(memory, &at, store->counter_count * (int64_t)sizeof(uint32_t));
    store->memory = memory;
    return at;
}

static void describe(sa_cuda_kv *store)
{
    const sa_kv_config *config = &store->config;
    const sa_policy *policy = &config->policy;
    int64_t slots = 0;
    for (int64_t head = 0; head < config->heads_kv; head++) {
        slots = max_i64(slots, store->budgets[head] + config->every - 1);
    }
    store->view = (sa_cuda_slots){
        .batch = config->batch,
        .heads_kv = config->heads_kv,
        .stride = round_up(slots + config->part, 16),
        .slots = slots,
        .depth = config->depth,
        .depth_v = config->depth_v,
        .ring_bytes = sa_policy_state_bytes(policy) - (int64_t)sizeof(sa_token_state),
        .log_size = config->log,
        .pinned = config->pinned,
        .recent = max_i64(config->recent, sa_policy_protects(policy)),
        .every = config->every,
        .window = policy->window,
        .kernel = policy->kernel,
        .pairs = config->inv_freq_count,
        .decay = policy->decay,
        .scaling = config->attention_scaling,
        .seed = policy->seed,
        .kind = (int32_t)policy->kind,
        .dtype = (int32_t)config->dtype,
        .maximum = policy->maximum,
        .interleaved = config->interleaved,
    };
    store->counter_count = sa_step_counters(config->batch, config->heads_kv);
}

sa_status sa_cuda_kv_begin(const sa_kv_config *config, sa_cuda_kv *store)
{
    *store = (sa_cuda_kv){.config = *config};
    SA_TRY(sa_check_kv_config(config));
    store->budgets = malloc((size_t)config->heads_kv * sizeof(int64_t));
    if (store->budgets == NULL) {
        return sa_no_memory("a KVCache", config->heads_kv * 8);
    }
    memcpy(store->budgets, config->budgets, (size_t)config->heads_kv * sizeof(int64_t));
    store->config.budgets = store->budgets;
    store->config.inv_freq = NULL;
    describe(store);
    return SA_OK;
}

void sa_cuda_kv_end(sa_cuda_kv *store)
{
    free(store->budgets);
    store->budgets = NULL;
}

int64_t sa_cuda_kv_bytes(const sa_cuda_kv *store)
{
    sa_cuda_kv measured = *store;
    return lay_out(&measured, NULL);
}

void sa_cuda_kv_lay_out(sa_cuda_kv *store, void *memory)
{
    (void)lay_out(store, memory);
}

int64_t sa_cuda_kv_slots(const sa_cuda_kv *store)
{
    return store->view.slots;
}

/* --- beside a call ----------------------------------------------------------------------------------------------------------------- */

sa_status sa_cuda_kv_place(sa_cuda_kv *store, const double *inv_freq, const sa_device_scope *scope, void *stream)
{
    static const char function[] = "KVCache";
    const int64_t frequencies = store->view.pairs * (int64_t)sizeof(double);
    SA_TRY(sa_device_fill(function, store->memory, 0, sa_cuda_kv_bytes(store), stream));
    SA_TRY(sa_device_stage(function, scope, store->view.inv_freq, inv_freq, frequencies, stream));
    return sa_device_stage(function, scope, store->view.budgets, store->budgets, store->config.heads_kv * (int64_t)sizeof(int64_t), stream);
}

sa_status sa_cuda_kv_reset(sa_cuda_kv *store, const bool *rows, void *stream)
{
    part parts[PARTS];
    parts_of(store, parts);
    for (int64_t first = 0, count; first < store->config.batch; first += count) {
        const bool wanted = rows == NULL || rows[first];
        count = sa_rows_alike(rows, first, store->config.batch);
        for (int i = 8; i < PARTS && wanted; i++) { /* from `held` on: slots that nobody holds say nothing */
            SA_TRY(sa_device_fill("reset", (char *)parts[i].data + first * parts[i].row_bytes, 0, count * parts[i].row_bytes, stream));
        }
    }
    return SA_OK;
}

sa_status sa_cuda_kv_copy(sa_cuda_kv *store, const sa_cuda_kv *from, void *stream)
{
    SA_TRY(sa_device_copy("copy", store->memory, from->memory, from->content_bytes, stream));
    return sa_device_fill("copy", store->memory + store->content_bytes, 0, sa_cuda_kv_bytes(store) - store->content_bytes, stream);
}

sa_status sa_cuda_kv_gather(sa_cuda_kv *store, const sa_cuda_kv *before, const int64_t *index, void *stream)
{
    part to[PARTS], from[PARTS];
    parts_of(store, to);
    parts_of(before, from);
    for (int64_t b = 0; b < store->config.batch; b++) {
        for (int i = 0; i < PARTS && index[b] != b; i++) {
            const int64_t bytes = to[i].row_bytes;
            SA_TRY(sa_device_copy("reorder", (char *)to[i].data + b * bytes, (const char *)from[i].data + index[b] * bytes, bytes, stream));
        }
    }
    return SA_OK;
}

sa_status sa_cuda_kv_lengths(const sa_cuda_kv *store, int64_t *lengths, void *stream)
{
    const int64_t heads = store->config.heads_kv, streams = streams_of(store);
    int64_t *all = malloc((size_t)(streams * 8));
    if (all == NULL) {
        return sa_no_memory("the lengths of a KVCache", streams * 8);
    }
    sa_status status = sa_device_copy_out("length", all, store->view.lengths, streams * 8, stream);
    status = status != SA_OK ? status : sa_device_wait("length", stream);
    for (int64_t b = 0; b < store->config.batch; b++) {
        lengths[b] = all[b * heads];
    }
    free(all);
    return status;
}

/* --- to and from a cache of the host ----------------------------------------------------------------------------------------------- */

/* One store in two layouts: its own, in memory of the host, and the blocks of csrc/cpu/kv_cache.c. */
typedef struct both {
    const sa_cuda_kv *store; /* laid out on the host */
    const int64_t *slots;    /* [heads_kv] */
    sa_kv_block blocks[SA_KV_BLOCKS];
    bool out; /* from the store into the blocks */
} both;

static void exchange(const both *at, void *stored, void *block, int64_t bytes)
{
    memcpy(at->out ? block : stored, at->out ? stored : block, (size_t)bytes);
}

/* Slots of a stream: `first` in the store, `other` in the blocks. */
static void exchange_slots(const both *at, int64_t first, int64_t other, int64_t held)
{
    const sa_cuda_slots *v = &at->store->view;
    const int64_t size = sa_dtype_size(at->store->config.dtype), key = v->depth * size, value = v->depth_v * size;
    const int64_t all = v->batch * v->heads_kv * v->stride, state_bytes = (int64_t)sizeof(sa_token_state) + v->ring_bytes;
    exchange(at, (char *)v->keys + first * key, (char *)at->blocks[0].data + other * key, held * key);
    exchange(at, (char *)v->values + first * value, (char *)at->blocks[1].data + other * value, held * value);
    exchange(at, v->positions + first, (int64_t *)at->blocks[2].data + other, held * 8);
    for (int64_t i = 0; i < held; i++) {
        char *bytes = (char *)at->blocks[3].data + (other + i) * state_bytes;
        sa_token_state *state = (sa_token_state *)(void *)bytes;
        exchange(at, v->mass + first + i, &state->mass, 8);
        exchange(at, v->call + first + i, &state->call, 8);
        exchange(at, v->own + first + i, &state->own[0], 8);
        exchange(at, v->own + all + first + i, &state->own[1], 8);
        exchange(at, v->rings + (first + i) * v->ring_bytes, bytes + sizeof *state, v->ring_bytes);
    }
}

/* evicted_at: of a row on the host, where it is that of the head which evicted last. */
static void exchange_all(const both *at)
{
    const sa_cuda_slots *v = &at->store->view;
    int64_t other = 0;
    for (int64_t b = 0; b < v->batch; b++) {
        int64_t *length = (int64_t *)at->blocks[5].data + b, *evicted_at = (int64_t *)at->blocks[6].data + b;
        for (int64_t head = 0; head < v->heads_kv; head++) {
            const int64_t stream = b * v->heads_kv + head;
            int64_t *held = (int64_t *)at->blocks[4].data + stream;
            exchange(at, v->held + stream, held, 8);
            exchange(at, v->lengths + stream, length, 8);
            if (at->out) {
                *evicted_at = max_i64(*evicted_at, v->evicted_at[stream]);
                *held = clamp_i64(*held, 0, at->slots[head]);
            } else {
                v->evicted_at[stream] = *evicted_at;
                v->counts[stream] = *held;
            }
            exchange(at, v->ledgers + stream, (sa_ledger *)at->blocks[7].data + stream, (int64_t)sizeof(sa_ledger));
            exchange(at, v->log + stream * v->log_size, (sa_departure *)at->blocks[8].data + stream * v->log_size,
                     v->log_size * (int64_t)sizeof(sa_departure));
            exchange_slots(at, stream * v->stride, other, *held);
            other += at->slots[head];
        }
    }
}

static sa_status on_host(const sa_cuda_kv *store, sa_cuda_kv *image)
{
    *image = *store;
    char *memory = calloc(1, (size_t)store->content_bytes);
    if (memory == NULL) {
        return sa_no_memory("the state of a KVCache", store->content_bytes);
    }
    (void)lay_out(image, memory);
    return SA_OK;
}

sa_status sa_cuda_kv_read(const sa_cuda_kv *store, bool vectors, void *stream, sa_kv_cache **host)
{
    static const char function[] = "KVCache";
    sa_cuda_kv image;
    sa_kv_cache *raw = NULL, *checked = NULL;
    const int64_t first = vectors ? 0 : store->vector_bytes;
    SA_TRY(on_host(store, &image));
    sa_status status = sa_device_copy_out(function, image.memory + first, store->memory + first, store->content_bytes - first, stream);
    status = status != SA_OK ? status : sa_device_wait(function, stream);
    sa_kv_config config = store->config;
    config.inv_freq_count = 0; /* a cache that only says what it holds turns nothing */
    status = status != SA_OK ? status : sa_kv_new(&config, &raw);
    status = status != SA_OK ? status : sa_kv_new(&config, &checked);
    if (status == SA_OK) {
        both at = {.store = &image, .slots = sa_kv_slots(raw), .out = true};
        sa_kv_blocks(raw, at.blocks);
        exchange_all(&at);
        status = sa_kv_restore(checked, at.slots, at.blocks);
    }
    free(image.memory);
    sa_kv_free(raw);
    if (status != SA_OK) {
        sa_kv_free(checked);
        return status;
    }
    *host = checked;
    return SA_OK;
}

sa_status sa_cuda_kv_write(sa_cuda_kv *store, const sa_kv_cache *host, void *stream)
{
    static const char function[] = "load_state_dict";
    sa_cuda_kv image;
    SA_TRY(on_host(store, &image));
    both at = {.store = &image, .slots = sa_kv_slots(host), .out = false};
    sa_kv_blocks(host, at.blocks);
    exchange_all(&at);
    char *const fixed = (char *)image.view.budgets; /* this and what follows stay as they are */
    const sa_status status = sa_device_copy_in(function, store->memory, image.memory, fixed - image.memory, stream);
    free(image.memory);
    return status != SA_OK ? status : sa_device_wait(function, stream);
}

sa_status sa_cuda_kv_crop(sa_cuda_kv *store, const sa_device_scope *scope, int64_t length, void *stream)
{
    const int64_t streams = streams_of(store), heads = store->config.heads_kv;
    sa_kv_cache *host;
    SA_TRY(sa_cuda_kv_read(store, false, stream, &host));
    sa_status status = sa_kv_crop(host, length);
    sa_kv_block blocks[SA_KV_BLOCKS];
    sa_kv_blocks(host, blocks);
    int64_t *lengths = malloc((size_t)(streams * 8));
    if (status == SA_OK && lengths == NULL) {
        status = sa_no_memory("the lengths of a KVCache", streams * 8);
    }
    for (int64_t stream_index = 0; stream_index < streams && status == SA_OK; stream_index++) {
        lengths[stream_index] = sa_kv_lengths(host)[stream_index / heads];
    }
    status = status != SA_OK ? status : sa_device_stage("crop", scope, store->view.lengths, lengths, streams * 8, stream);
    status = status != SA_OK ? status : sa_device_stage("crop", scope, store->view.held, blocks[4].data, streams * 8, stream);
    free(lengths);
    sa_kv_free(host);
    return status;
}
