/* KVCache on the CPU: storage, and what changes it beside a call. The call itself is kv_attend.c. */
#include "kv_cache.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/kv_check.h"
#include "../core/problem.h"

static void *clear_memory(int64_t bytes)
{
    return calloc(1, (size_t)max_i64(bytes, 1));
}

/* Whole cache lines: kernels read keys and values in place. */
static void *clear_lines(int64_t bytes)
{
    void *memory;
    const size_t size = (size_t)max_i64(round_up(bytes, 64), 64);
    return posix_memalign(&memory, 64, size) != 0 ? NULL : memset(memory, 0, size);
}

static void storage_free(sa_kv_storage *storage)
{
    free(storage->slots);
    free(storage->first);
    free(storage->keys);
    free(storage->values);
    free(storage->states);
    free(storage->positions);
    free(storage->order);
    *storage = (sa_kv_storage){0};
}

/* slots: [heads_kv]. */
static sa_status storage_new(const sa_kv_config *config, const int64_t *slots, sa_kv_storage *storage)
{
    const int64_t heads = config->heads_kv, size = sa_dtype_size(config->dtype);
    *storage = (sa_kv_storage){.slots = clear_memory(heads * 8), .first = clear_memory((heads + 1) * 8)};
    int64_t count = 0;
    for (int64_t head = 0; head < heads && storage->slots != NULL && storage->first != NULL; head++) {
        storage->slots[head] = slots[head];
        storage->first[head + 1] = storage->first[head] + slots[head];
        count = config->batch * storage->first[head + 1];
    }
    const int64_t state_bytes = sa_policy_state_bytes(&config->policy);
    if (storage->slots != NULL && storage->first != NULL) {
        storage->keys = clear_lines(count * config->depth * size);
        storage->values = clear_lines(count * config->depth_v * size);
        storage->states = clear_lines(count * state_bytes);
        storage->positions = clear_memory(count * (int64_t)sizeof(int64_t));
        storage->order = clear_memory(count * (int64_t)sizeof(int32_t));
    }
    if (!storage->keys || !storage->values || !storage->states || !storage->positions || !storage->order) {
        storage_free(storage);
        return sa_no_memory("a KVCache", count * ((config->depth + config->depth_v) * size + state_bytes + 12));
    }
    return SA_OK;
}

static sa_status allocate(sa_kv_cache *cache)
{
    const sa_kv_config *config = &cache->config;
    const int64_t streams = sa_kv_streams(cache);
    cache->budgets = clear_memory(config->heads_kv * 8);
    cache->inv_freq = clear_memory(config->inv_freq_count * (int64_t)sizeof(double));
    cache->held = clear_memory(streams * 8);
    cache->lengths = clear_memory(config->batch * 8);
    cache->evicted_at = clear_memory(config->batch * 8);
    cache->ledgers = clear_memory(streams * (int64_t)sizeof(sa_ledger));
    cache->log = clear_memory(streams * config->log * (int64_t)sizeof(sa_departure));
    cache->statistics = clear_memory(streams * sa_policy_statistics(&config->policy, config->depth) * (int64_t)sizeof(double));
    if (!cache->budgets || !cache->inv_freq || !cache->held || !cache->lengths || !cache->evicted_at || !cache->ledgers || !cache->log ||
        !cache->statistics) {
        return sa_no_memory("a KVCache", streams * (int64_t)sizeof(sa_ledger));
    }
    memcpy(cache->budgets, config->budgets, (size_t)config->heads_kv * sizeof(int64_t));
    cache->config.budgets = cache->budgets;
    if (config->inv_freq != NULL) {
        memcpy(cache->inv_freq, config->inv_freq, (size_t)config->inv_freq_count * sizeof(double));
        cache->config.inv_freq = cache->inv_freq;
    }
    return SA_OK;
}

/* A cache without slots yet. */
static sa_status new_empty(const sa_kv_config *config, sa_kv_cache **out)
{
    sa_kv_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL) {
        return sa_no_memory("a KVCache", sizeof *cache);
    }
    cache->config = *config;
    const sa_status status = allocate(cache);
    if (status != SA_OK) {
        sa_kv_free(cache);
        return status;
    }
    *out = cache;
    return SA_OK;
}

static int64_t *slots_for(const sa_kv_cache *cache, int64_t length)
{
    int64_t *slots = clear_memory(cache->config.heads_kv * 8);
    for (int64_t head = 0; head < cache->config.heads_kv && slots != NULL; head++) {
        const sa_budget budget = sa_kv_budget(cache, head);
        /* A share grows by eighths: a step that needs one slot more does not move everything. */
        const int64_t most = max_i64(budget.slots + budget.every - 1, sa_slots_until(&budget, length));
        slots[head] = budget.share > 0.0 && length > 0 ? most + most / 8 : most;
    }
    return slots;
}

sa_status sa_kv_new(const sa_kv_config *config, sa_kv_cache **out)
{
    SA_TRY(sa_check_kv_config(config));
    sa_kv_cache *cache = NULL;
    SA_TRY(new_empty(config, &cache));
    int64_t *slots = slots_for(cache, 0);
    const sa_status status = slots == NULL ? sa_no_memory("a KVCache", config->heads_kv * 8) : storage_new(config, slots, &cache->storage);
    free(slots);
    if (status != SA_OK) {
        sa_kv_free(cache);
        return status;
    }
    *out = cache;
    return SA_OK;
}

void sa_kv_free(sa_kv_cache *cache)
{
    if (cache != NULL) {
        storage_free(&cache->storage);
        free(cache->budgets);
        free(cache->inv_freq);
        free(cache->held);
        free(cache->lengths);
        free(cache->evicted_at);
        free(cache->ledgers);
        free(cache->log);
        free(cache->statistics);
        free(cache);
    }
}

/* Stream `from` of one cache becomes stream `to` of another with at least as many slots. */
static void copy_stream(const sa_kv_cache *source, const sa_kv_storage *stored, int64_t first, const sa_kv_cache *target, int64_t to, int64_t held)
{
    const sa_kv_config *config = &source->config;
    const int64_t size = sa_dtype_size(config->dtype), at = sa_kv_first_slot(target, to), bytes = sa_policy_state_bytes(&config->policy);
    const int64_t key = config->depth * size, value = config->depth_v * size;
    const sa_kv_storage *out = &target->storage;
    memcpy(out->keys + at * key, stored->keys + first * key, (size_t)(held * key));
    memcpy(out->values + at * value, stored->values + first * value, (size_t)(held * value));
    memcpy(out->states + at * bytes, stored->states + first * bytes, (size_t)(held * bytes));
    memcpy(out->positions + at, stored->positions + first, (size_t)held * sizeof(int64_t));
    memcpy(out->order + at, stored->order + first, (size_t)held * sizeof(int32_t));
}

/* Storage of other extents, with what is held. */
static sa_status reshape(sa_kv_cache *cache, const int64_t *slots)
{
    sa_kv_storage bigger;
    SA_TRY(storage_new(&cache->config, slots, &bigger));
    const sa_kv_cache before = *cache;
    cache->storage = bigger;
    for (int64_t stream = 0; stream < sa_kv_streams(cache); stream++) {
        copy_stream(&before, &before.storage, sa_kv_first_slot(&before, stream), cache, stream, cache->held[stream]);
    }
    sa_kv_storage old = before.storage;
    storage_free(&old);
    return SA_OK;
}

sa_status sa_kv_grow(sa_kv_cache *cache, int64_t length)
{
    bool enough = true;
    for (int64_t head = 0; head < cache->config.heads_kv; head++) {
        const sa_budget budget = sa_kv_budget(cache, head);
        enough = enough && sa_slots_until(&budget, length) <= cache->storage.slots[head];
    }
    if (enough) {
        return SA_OK;
    }
    int64_t *slots = slots_for(cache, length);
    const sa_status status = slots == NULL ? sa_no_memory("a KVCache", cache->config.heads_kv * 8) : reshape(cache, slots);
    free(slots);
    return status;
}

const sa_kv_config *sa_kv_describe(const sa_kv_cache *cache)
{
    return &cache->config;
}

int64_t sa_kv_most_slots(const sa_kv_cache *cache)
{
    int64_t most = 0;
    for (int64_t head = 0; head < cache->config.heads_kv; head++) {
        most = max_i64(most, cache->storage.slots[head]);
    }
    return most;
}

const int64_t *sa_kv_slots(const sa_kv_cache *cache)
{
    return cache->storage.slots;
}

int64_t sa_kv_head_bytes(const sa_kv_cache *cache, int64_t head)
{
    return cache->storage.slots[head] * (cache->config.depth + cache->config.depth_v) * sa_dtype_size(cache->config.dtype);
}

const int64_t *sa_kv_lengths(const sa_kv_cache *cache)
{
    return cache->lengths;
}

int64_t sa_kv_kept(const sa_kv_cache *cache, int64_t row, int64_t head, int64_t *positions)
{
    const int64_t stream = row * cache->config.heads_kv + head, first = sa_kv_first_slot(cache, stream);
    for (int64_t rank = 0; rank < cache->held[stream]; rank++) {
        positions[rank] = cache->storage.positions[first + cache->storage.order[first + rank]];
    }
    return cache->held[stream];
}

const sa_ledger *sa_kv_ledger(const sa_kv_cache *cache, int64_t row, int64_t head)
{
    return &cache->ledgers[row * cache->config.heads_kv + head];
}

const sa_departure *sa_kv_log(const sa_kv_cache *cache, int64_t row, int64_t head)
{
    return cache->log + (row * cache->config.heads_kv + head) * cache->config.log;
}

void sa_kv_take_mass(const sa_kv_cache *cache, float *mass)
{
    const int64_t most = sa_kv_most_slots(cache), bytes = sa_policy_state_bytes(&cache->config.policy);
    memset(mass, 0, (size_t)(sa_kv_streams(cache) * most) * sizeof *mass);
    for (int64_t stream = 0; stream < sa_kv_streams(cache); stream++) {
        const int64_t first = sa_kv_first_slot(cache, stream);
        for (int64_t rank = 0; rank < cache->held[stream]; rank++) {
            const char *state = cache->storage.states + (first + cache->storage.order[first + rank]) * bytes;
            mass[stream * most + rank] = (float)((const sa_token_state *)(const void *)state)->call;
        }
    }
}

void sa_kv_blocks(const sa_kv_cache *cache, sa_kv_block blocks[SA_KV_BLOCKS])
{
    const sa_kv_config *config = &cache->config;
    const sa_kv_storage *storage = &cache->storage;
    const int64_t streams = sa_kv_streams(cache), slots = config->batch * storage->first[config->heads_kv];
    const int64_t size = sa_dtype_size(config->dtype), statistics = sa_policy_statistics(&config->policy, config->depth);
    const sa_kv_block all[SA_KV_BLOCKS] = {
        {storage->keys, slots * config->depth * size},
        {storage->values, slots * config->depth_v * size},
        {storage->positions, slots * (int64_t)sizeof(int64_t)},
        {storage->states, slots * sa_policy_state_bytes(&config->policy)},
        {cache->held, streams * (int64_t)sizeof(int64_t)},
        {cache->lengths, config->batch * (int64_t)sizeof(int64_t)},
        {cache->evicted_at, config->batch * (int64_t)sizeof(int64_t)},
        {cache->ledgers, streams * (int64_t)sizeof(sa_ledger)},
        {cache->log, streams * config->log * (int64_t)sizeof(sa_departure)},
        {cache->statistics, streams * statistics * (int64_t)sizeof(double)},
    };
    memcpy(blocks, all, sizeof all);
}

int64_t sa_kv_nbytes(const sa_kv_cache *cache)
{
    sa_kv_block blocks[SA_KV_BLOCKS];
    sa_kv_blocks(cache, blocks);
    int64_t bytes = cache->config.batch * cache->storage.first[cache->config.heads_kv] * (int64_t)sizeof(int32_t); /* order */
    for (int i = 0; i < SA_KV_BLOCKS; i++) {
        bytes += blocks[i].bytes;
    }
    return bytes;
}

static void reset_stream(sa_kv_cache *cache, int64_t stream)
{
    const int64_t log = cache->config.log, statistics = sa_policy_statistics(&cache->config.policy, cache->config.depth);
    cache->held[stream] = 0;
    memset(&cache->ledgers[stream], 0, sizeof(sa_ledger));
    memset(cache->log + stream * log, 0, (size_t)log * sizeof(sa_departure));
    memset(cache->statistics + stream * statistics, 0, (size_t)statistics * sizeof(double));
}

void sa_kv_reset(sa_kv_cache *cache, const bool *rows)
{
    for (int64_t b = 0; b < cache->config.batch; b++) {
        if (rows == NULL || rows[b]) {
            cache->lengths[b] = 0;
            cache->evicted_at[b] = 0;
            for (int64_t head = 0; head < cache->config.heads_kv; head++) {
                reset_stream(cache, b * cache->config.heads_kv + head);
            }
        }
    }
}

/* Row `to` becomes row `from` of a cache with the same slots. */
static void copy_row(const sa_kv_cache *source, int64_t from, sa_kv_cache *target, int64_t to)
{
    const int64_t heads = source->config.heads_kv, log = source->config.log;
    const int64_t statistics = sa_policy_statistics(&source->config.policy, source->config.depth);
    target->lengths[to] = source->lengths[from];
    target->evicted_at[to] = source->evicted_at[from];
    for (int64_t head = 0; head < heads; head++) {
        const int64_t a = from * heads + head, b = to * heads + head;
        target->held[b] = source->held[a];
        target->ledgers[b] = source->ledgers[a];
        memcpy(target->log + b * log, source->log + a * log, (size_t)log * sizeof(sa_departure));
        memcpy(target->statistics + b * statistics, source->statistics + a * statistics, (size_t)statistics * sizeof(double));
        copy_stream(source, &source->storage, sa_kv_first_slot(source, a), target, b, source->held[a]);
    }
}

sa_status sa_kv_clone(const sa_kv_cache *cache, sa_kv_cache **out)
{
    sa_kv_cache *copy = NULL;
    SA_TRY(new_empty(&cache->config, &copy));
    const sa_status status = storage_new(&cache->config, cache->storage.slots, &copy->storage);
    if (status != SA_OK) {
        sa_kv_free(copy);
        return status;
    }
    for (int64_t b = 0; b < cache->config.batch; b++) {
        copy_row(cache, b, copy, b);
    }
    *out = copy;
    return SA_OK;
}

void sa_kv_swap(sa_kv_cache *a, sa_kv_cache *b)
{
    const sa_kv_cache kept = *a;
    *a = *b;
    *b = kept;
}

sa_status sa_kv_reorder(sa_kv_cache *cache, const int64_t *index, int64_t count)
{
    SA_TRY(sa_check_kv_index(&cache->config, index, count));
    sa_kv_cache *before = NULL;
    SA_TRY(sa_kv_clone(cache, &before));
    for (int64_t b = 0; b < count; b++) {
        if (index[b] != b) {
            copy_row(before, index[b], cache, b);
        }
    }
    sa_kv_free(before);
    return SA_OK;
}

sa_status sa_kv_crop(sa_kv_cache *cache, int64_t length)
{
    for (int64_t b = 0; b < cache->config.batch; b++) {
        if (length < cache->evicted_at[b] || length > cache->lengths[b] || length < 0) {
            return sa_fail(SA_VALUE_ERROR,
                           "crop(): row %" PRId64 " has seen %" PRId64 " tokens and forgot some at %" PRId64 "; expected a length between the two, "
                           "not %" PRId64, b, cache->lengths[b], cache->evicted_at[b], length);
        }
    }
    for (int64_t stream = 0; stream < sa_kv_streams(cache); stream++) {
        const int64_t b = stream / cache->config.heads_kv;
        cache->held[stream] -= cache->lengths[b] - length; /* the newest lie behind the others: nothing has left since */
    }
    for (int64_t b = 0; b < cache->config.batch; b++) {
        cache->lengths[b] = length;
    }
    return SA_OK;
}

/* --- taking over a state -------------------------------------------------------------------------------------------------------------- */

/* Sinks entry `at` of a heap whose top stands furthest on. */
static void sift(const int64_t *positions, int32_t *heap, int64_t size, int64_t at)
{
    const int32_t moving = heap[at];
    for (int64_t child = 2 * at + 1; child < size; child = 2 * at + 1) {
        child += child + 1 < size && positions[heap[child]] < positions[heap[child + 1]];
        if (positions[moving] >= positions[heap[child]]) {
            break;
        }
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moving;
}

/* Slots by ascending position, whatever the state says in no more than n log n steps. */
static void sort_slots(const int64_t *positions, int32_t *order, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        order[i] = (int32_t)i;
    }
    for (int64_t i = count / 2 - 1; i >= 0; i--) {
        sift(positions, order, count, i);
    }
    for (int64_t end = count - 1; end > 0; end--) {
        const int32_t last = order[0];
        order[0] = order[end];
        order[end] = last;
        sift(positions, order, end, 0);
    }
}

/* The blocks of a state as what they are. */
typedef struct kv_state {
    const int64_t *positions, *held, *lengths, *evicted_at;
    const sa_ledger *ledgers;
} kv_state;

static sa_status check_row(const kv_state *state, int64_t b)
{
    if (state->lengths[b] < 0 || state->lengths[b] > INT64_MAX / 8) {
        return sa_fail(SA_VALUE_ERROR, "load_state_dict(): length[%" PRId64 "] is %" PRId64 ", expected 0 to 2^60", b, state->lengths[b]);
    }
    if (state->evicted_at[b] < 0 || state->evicted_at[b] > state->lengths[b]) {
        return sa_fail(SA_VALUE_ERROR, "load_state_dict(): evicted_at[%" PRId64 "] is %" PRId64 ", expected 0 to %" PRId64, b,
                       state->evicted_at[b], state->lengths[b]);
    }
    return SA_OK;
}

static sa_status check_stream(const sa_kv_cache *cache, const kv_state *state, int64_t stream, int32_t *order)
{
    const int64_t heads = cache->config.heads_kv, row = stream / heads, head = stream % heads;
    const int64_t held = state->held[stream], length = state->lengths[row];
    if (held < 0 || held > min_i64(cache->storage.slots[head], length)) {
        return sa_fail(SA_VALUE_ERROR, "load_state_dict(): held[%" PRId64 ", %" PRId64 "] is %" PRId64 ", expected 0 to %" PRId64, row, head, held,
                       min_i64(cache->storage.slots[head], length));
    }
    const int64_t *positions = state->positions + sa_kv_first_slot(cache, stream);
    sort_slots(positions, order, held);
    SA_TRY(sa_check_kv_stream(&cache->config, row, head, held, length, state->evicted_at[row], positions, order, &state->ledgers[stream]));
    const int64_t *first = state->positions + sa_kv_first_slot(cache, row * heads);
    const bool shared = cache->config.policy.kind == SA_POLICY_TOVA;
    if (shared && (held != state->held[row * heads] || memcmp(positions, first, (size_t)held * sizeof *positions) != 0)) {
        return sa_fail(SA_VALUE_ERROR, "load_state_dict(): row %" PRId64 ", kv head %" PRId64 ": TOVA keeps one set for all heads", row, head);
    }
    return SA_OK;
}

static sa_status check_slots(const sa_kv_cache *cache, const int64_t *slots)
{
    for (int64_t head = 0; head < cache->config.heads_kv; head++) {
        const int64_t least = cache->budgets[head] + cache->config.every - 1, most = cache->config.share > 0.0 ? INT32_MAX / 2 : least;
        if (slots[head] < least || slots[head] > most) {
            return sa_fail(SA_VALUE_ERROR, "load_state_dict(): slots[%" PRId64 "] is %" PRId64 ", expected %" PRId64 " to %" PRId64, head,
                           slots[head], least, most);
        }
    }
    return SA_OK;
}

/* Into a cache that holds nothing yet. */
static sa_status take_over(sa_kv_cache *cache, const sa_kv_block *given)
{
    const kv_state state = {given[2].data, given[4].data, given[5].data, given[6].data, given[7].data};
    sa_kv_block blocks[SA_KV_BLOCKS];
    sa_kv_blocks(cache, blocks);
    for (int i = 0; i < SA_KV_BLOCKS; i++) {
        if (given[i].bytes != blocks[i].bytes) {
            return sa_fail(SA_VALUE_ERROR, "load_state_dict(): block %d has %" PRId64 " bytes, expected %" PRId64, i, given[i].bytes, blocks[i].bytes);
        }
    }
    for (int64_t b = 0; b < cache->config.batch; b++) {
        SA_TRY(check_row(&state, b));
    }
    for (int64_t stream = 0; stream < sa_kv_streams(cache); stream++) {
        SA_TRY(check_stream(cache, &state, stream, cache->storage.order + sa_kv_first_slot(cache, stream)));
    }
    for (int i = 0; i < SA_KV_BLOCKS; i++) {
        memcpy(blocks[i].data, given[i].data, (size_t)blocks[i].bytes);
    }
    return SA_OK;
}

sa_status sa_kv_restore(sa_kv_cache *cache, const int64_t *slots, const sa_kv_block given[SA_KV_BLOCKS])
{
    SA_TRY(check_slots(cache, slots));
    sa_kv_cache *restored = NULL;
    SA_TRY(new_empty(&cache->config, &restored));
    sa_status status = storage_new(&cache->config, slots, &restored->storage);
    status = status != SA_OK ? status : take_over(restored, given);
    if (status == SA_OK) {
        sa_kv_swap(cache, restored);
    }
    sa_kv_free(restored);
    return status;
}
