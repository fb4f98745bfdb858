/* SinkCache on the CPU: pinned slots and a ring in one block of memory, consumed in place by the kernels.
 *
 * A call attends first and commits after: the chunk's keys are runs of their own beside the ring, so that a chunk of any length costs no
 * copy of what is held, and a call that fails leaves the cache as it was. */
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../core/cache_check.h"
#include "../core/plan.h"
#include "../core/ring.h"
#include "../core/rope.h"
#include "table.h"

enum { ROTATE_TOKENS = 16 };

struct sa_cache {
    sa_cache_config config;
    sa_ring ring;
    double *inv_freq;
    char *keys;   /* [batch, heads_kv, slots, depth] */
    char *values; /* [batch, heads_kv, slots, depth_v] */
    int64_t *lengths, *lows; /* [batch] */
    int64_t key_bytes, value_bytes;
    bool borrowed; /* all of these four from the caller's memory */
};

static void *clear_memory(int64_t bytes)
{
    return calloc(1, (size_t)max_i64(bytes, 1));
}

/* Keys or values, zeroed: rows on the borders of cache lines, and in large pages where the system has them, since every step walks it all. */
static void *clear_storage(int64_t bytes)
{
    const size_t page = (size_t)2 << 20, size = (size_t)max_i64(bytes, 1);
    void *memory;
    if (posix_memalign(&memory, size >= 2 * page ? page : 64, size) != 0) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (size >= 2 * page) {
        (void)madvise(memory, size, MADV_HUGEPAGE);
    }
#endif
    return memset(memory, 0, size);
}

/* Everything but memory for what is held. */
static sa_status new_cache(const sa_cache_config *config, sa_cache **out)
{
    SA_TRY(sa_check_cache_config(config));
    sa_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL) {
        return sa_no_memory("a SinkCache", sizeof *cache);
    }
    cache->config = *config;
    cache->ring = (sa_ring){config->pinned, config->window, config->window + config->rollback};
    const int64_t rows = config->batch * config->heads_kv * sa_cache_slots(cache) * sa_dtype_size(config->dtype);
    cache->key_bytes = rows * config->depth;
    cache->value_bytes = rows * config->depth_v;
    cache->inv_freq = clear_memory(config->inv_freq_count * (int64_t)sizeof(double));
    if (cache->inv_freq == NULL) {
        sa_cache_free(cache);
        return sa_no_memory("a SinkCache", config->inv_freq_count * (int64_t)sizeof(double));
    }
    if (config->inv_freq != NULL) {
        memcpy(cache->inv_freq, config->inv_freq, (size_t)config->inv_freq_count * sizeof(double));
        cache->config.inv_freq = cache->inv_freq;
    }
    *out = cache;
    return SA_OK;
}

sa_status sa_cache_new(const sa_cache_config *config, sa_cache **out)
{
    sa_cache *cache;
    SA_TRY(new_cache(config, &cache));
    cache->keys = clear_storage(cache->key_bytes);
    cache->values = clear_storage(cache->value_bytes);
    cache->lengths = clear_memory(config->batch * (int64_t)sizeof(int64_t));
    cache->lows = clear_memory(config->batch * (int64_t)sizeof(int64_t));
    if (!cache->keys || !cache->values || !cache->lengths || !cache->lows) {
        const int64_t bytes = cache->key_bytes + cache->value_bytes;
        sa_cache_free(cache);
        return sa_no_memory("a SinkCache", bytes);
    }
    sa_cache_reset(cache, NULL);
    *out = cache;
    return SA_OK;
}

static int64_t padded(int64_t bytes)
{
    return round_up(bytes, 64);
}

int64_t sa_cache_storage_bytes(const sa_cache *cache)
{
    return padded(cache->key_bytes) + padded(cache->value_bytes) + 2 * cache->config.batch * (int64_t)sizeof(int64_t);
}

sa_status sa_cache_over(const sa_cache_config *config, sa_cache **out)
{
    SA_TRY(new_cache(config, out));
    (*out)->borrowed = true;
    return SA_OK;
}

sa_status sa_cache_settle(sa_cache *cache, void *memory, bool keep)
{
    char *at = memory;
    const int64_t batch = cache->config.batch;
    assert(cache->borrowed);
    cache->keys = at;
    cache->values = at + padded(cache->key_bytes);
    cache->lengths = (int64_t *)(void *)(cache->values + padded(cache->value_bytes));
    cache->lows = cache->lengths + batch;
    if (keep) {
        return sa_check_cache_state("SinkCache", &cache->config, cache->lengths, cache->lows);
    }
    memset(memory, 0, (size_t)sa_cache_storage_bytes(cache));
    sa_cache_reset(cache, NULL);
    return SA_OK;
}

void sa_cache_free(sa_cache *cache)
{
    if (cache != NULL) {
        if (!cache->borrowed) {
            free(cache->keys);
            free(cache->values);
            free(cache->lengths);
            free(cache->lows);
        }
        free(cache->inv_freq);
        free(cache);
    }
}

const sa_cache_config *sa_cache_describe(const sa_cache *cache)
{
    return &cache->config;
}

int64_t sa_cache_slots(const sa_cache *cache)
{
    return cache->ring.pinned + cache->ring.capacity;
}

int64_t sa_cache_nbytes(const sa_cache *cache)
{
    return cache->key_bytes + cache->value_bytes + 2 * cache->config.batch * (int64_t)sizeof(int64_t);
}

const int64_t *sa_cache_lengths(const sa_cache *cache)
{
    return cache->lengths;
}

const int64_t *sa_cache_lows(const sa_cache *cache)
{
    return cache->lows;
}

const void *sa_cache_keys(const sa_cache *cache)
{
    return cache->keys;
}

const void *sa_cache_values(const sa_cache *cache)
{
    return cache->values;
}

static sa_ring_state state_of(const sa_cache *cache, int64_t row)
{
    return (sa_ring_state){cache->lengths[row], cache->lows[row]};
}

static void set_state(sa_cache *cache, int64_t row, sa_ring_state state)
{
    cache->lengths[row] = state.length;
    cache->lows[row] = state.low;
}

int64_t sa_cache_kept(const sa_cache *cache, int64_t row, int64_t *positions)
{
    const sa_ring_state state = state_of(cache, row);
    int64_t count = 0;
    for (int64_t j = 0; j < sa_ring_pinned_held(&cache->ring, state); j++) {
        positions[count++] = j;
    }
    for (int64_t j = state.low; j < state.length; j++) {
        positions[count++] = j;
    }
    return count;
}

void sa_cache_reset(sa_cache *cache, const bool *rows)
{
    for (int64_t b = 0; b < cache->config.batch; b++) {
        if (rows == NULL || rows[b]) {
            set_state(cache, b, (sa_ring_state){0, cache->ring.pinned});
        }
    }
}

sa_status sa_cache_crop(sa_cache *cache, int64_t length)
{
    SA_TRY(sa_check_cache_crop(&cache->config, cache->lengths, cache->lows, length));
    for (int64_t b = 0; b < cache->config.batch; b++) {
        set_state(cache, b, sa_ring_crop(&cache->ring, state_of(cache, b), length));
    }
    return SA_OK;
}

sa_status sa_cache_clone(const sa_cache *cache, sa_cache **copy)
{
    SA_TRY(sa_cache_new(&cache->config, copy));
    memcpy((*copy)->keys, cache->keys, (size_t)cache->key_bytes);
    memcpy((*copy)->values, cache->values, (size_t)cache->value_bytes);
    memcpy((*copy)->lengths, cache->lengths, (size_t)cache->config.batch * sizeof(int64_t));
    memcpy((*copy)->lows, cache->lows, (size_t)cache->config.batch * sizeof(int64_t));
    return SA_OK;
}

sa_status sa_cache_reorder(sa_cache *cache, const int64_t *index, int64_t count)
{
    const int64_t batch = cache->config.batch;
    SA_TRY(sa_check_cache_index(&cache->config, index, count));
    sa_cache *before;
    SA_TRY(sa_cache_clone(cache, &before));
    for (int64_t b = 0; b < batch; b++) {
        const int64_t key_row = cache->key_bytes / batch, value_row = cache->value_bytes / batch;
        if (index[b] != b) {
            memcpy(cache->keys + b * key_row, before->keys + index[b] * key_row, (size_t)key_row);
            memcpy(cache->values + b * value_row, before->values + index[b] * value_row, (size_t)value_row);
            set_state(cache, b, state_of(before, index[b]));
        }
    }
    sa_cache_free(before);
    return SA_OK;
}

static void clear_slots(sa_cache *cache, int64_t row, int64_t slot, int64_t count)
{
    const int64_t size = sa_dtype_size(cache->config.dtype), slots = sa_cache_slots(cache);
    for (int64_t head = 0; head < cache->config.heads_kv; head++) {
        const int64_t at = (row * cache->config.heads_kv + head) * slots + slot;
        memset(cache->keys + at * cache->config.depth * size, 0, (size_t)(count * cache->config.depth * size));
        memset(cache->values + at * cache->config.depth_v * size, 0, (size_t)(count * cache->config.depth_v * size));
    }
}

sa_status sa_cache_restore(sa_cache *cache, const void *keys, const void *values, const int64_t *lengths, const int64_t *lows)
{
    const sa_ring *ring = &cache->ring;
    SA_TRY(sa_check_cache_state("load_state_dict", &cache->config, lengths, lows));
    memcpy(cache->keys, keys, (size_t)cache->key_bytes);
    memcpy(cache->values, values, (size_t)cache->value_bytes);
    for (int64_t b = 0; b < cache->config.batch; b++) {
        set_state(cache, b, (sa_ring_state){lengths[b], lows[b]});
        const int64_t pinned_held = min_i64(ring->pinned, lengths[b]);
        clear_slots(cache, b, pinned_held, ring->pinned - pinned_held);
        sa_slots free_runs[2];
        const int runs = sa_ring_runs(ring, max_i64(lengths[b], ring->pinned), lows[b] + ring->capacity, free_runs);
        for (int i = 0; i < runs; i++) {
            clear_slots(cache, b, free_runs[i].slot, free_runs[i].count);
        }
    }
    return SA_OK;
}

/* --- one call ------------------------------------------------------------------------------------------------------------------- */

sa_status sa_cache_attend_check(const sa_cache *cache, const sa_attend_params *params)
{
    SA_TRY(sa_check_cache_call(&cache->config, params));
    for (int64_t b = 0; b < cache->config.batch; b++) {
        if (cache->lengths[b] > INT64_MAX / 4 - params->query.shape[2]) {
            return sa_fail(SA_VALUE_ERROR, "%s(): row %" PRId64 " is at the end of the countable positions", params->function, b);
        }
    }
    return SA_OK;
}

/* One call's chunk: how many tokens are new for a row, and rotated copies where the cache rotates. Copies are dense. */
typedef struct cache_chunk {
    const sa_attend_params *params;
    int64_t tokens;
    char *memory;
    char *query;        /* [batch, heads_q, tokens, depth] */
    char *pinned_query; /* the same, NULL if one query serves both */
    char *key;          /* [batch, heads_kv, tokens, depth] */
} cache_chunk;

static int64_t new_tokens(const cache_chunk *chunk, int64_t row)
{
    return chunk->params->query_lengths.data != NULL ? chunk->params->query_lengths.data[row] : chunk->tokens;
}

static int64_t slot_limit(const sa_cache *cache)
{
    return cache->ring.pinned + cache->ring.window - 1;
}

static bool needs_pinned_query(const sa_cache *cache, const cache_chunk *chunk)
{
    const sa_cache_config *config = &cache->config;
    if (!config->slot_positions || config->pinned == 0 || config->inv_freq_count == 0) {
        return false;
    }
    for (int64_t b = 0; b < config->batch; b++) {
        if (cache->lengths[b] + new_tokens(chunk, b) - 1 > slot_limit(cache)) {
            return true;
        }
    }
    return false;
}

static sa_status chunk_allocate(const sa_cache *cache, cache_chunk *chunk)
{
    const sa_cache_config *config = &cache->config;
    const sa_tensor *query = &chunk->params->query;
    const int64_t token = config->batch * chunk->tokens * config->depth * sa_dtype_size(config->dtype);
    const int64_t query_bytes = token * query->shape[1], key_bytes = token * config->heads_kv;
    const bool raw = config->inv_freq_count > 0 && !config->applied, second = needs_pinned_query(cache, chunk);
    const int64_t bytes = (raw ? query_bytes + key_bytes : 0) + (second ? query_bytes : 0);
    if (bytes == 0) {
        return SA_OK;
    }
    chunk->memory = malloc((size_t)bytes);
    if (chunk->memory == NULL) {
        return sa_no_memory("the rotated chunk", bytes);
    }
    char *next = chunk->memory;
    if (second) {
        chunk->pinned_query = next;
        next += query_bytes;
    }
    if (raw) {
        chunk->query = next;
        chunk->key = next + query_bytes;
    }
    return SA_OK;
}

/* Rotates one token of every head of a row from a strided tensor into a dense copy. */
static void rotate_token(const sa_rope *rope, const float *table, const sa_tensor *source, int64_t row, int64_t token, char *target)
{
    const int64_t heads = source->shape[1], tokens = source->shape[2], depth = source->shape[3], size = sa_dtype_size(source->dtype);
    for (int64_t head = 0; head < heads; head++) {
        const int64_t offset = row * source->stride[0] + head * source->stride[1] + token * source->stride[2];
        sa_rope_rotate(rope, table, source->dtype, sa_at(source->data, source->dtype, offset),
                       target + ((row * heads + head) * tokens + token) * depth * size, depth);
    }
}

static void rotate_position(const sa_cache *cache, const cache_chunk *chunk, int64_t row, int64_t token)
{
    const sa_cache_config *config = &cache->config;
    const sa_rope rope = {cache->inv_freq, config->inv_freq_count, config->attention_scaling, config->interleaved};
    const int64_t position = cache->lengths[row] + token, pinned = min_i64(position, slot_limit(cache));
    float table[256];
    if (chunk->query != NULL) {
        sa_rope_angles(&rope, position, rope.scaling, table);
        rotate_token(&rope, table, &chunk->params->query, row, token, chunk->query);
        rotate_token(&rope, table, &chunk->params->key, row, token, chunk->key);
    }
    if (chunk->pinned_query != NULL) {
        sa_rope_angles(&rope, config->applied ? pinned - position : pinned, config->applied ? 1.0 : rope.scaling, table);
        rotate_token(&rope, table, &chunk->params->query, row, token, chunk->pinned_query);
    }
}

typedef struct rotation {
    const sa_cache *cache;
    const cache_chunk *chunk;
    int64_t pieces; /* of a row */
} rotation;

static void rotate_piece(void *context, int64_t task, sa_worker *worker)
{
    const rotation *job = context;
    const int64_t row = task / job->pieces, first = task % job->pieces * ROTATE_TOKENS;
    const int64_t last = min_i64(first + ROTATE_TOKENS, new_tokens(job->chunk, row));
    for (int64_t token = first; token < last && !sa_worker_stopped(worker); token++) {
        rotate_position(job->cache, job->chunk, row, token);
    }
}

/* By the pool: a long chunk is worth it, and it can be interrupted there. */
static sa_status chunk_rotate(const sa_cache *cache, const cache_chunk *chunk, sa_poll poll)
{
    if (chunk->memory == NULL) {
        return SA_OK;
    }
    rotation job = {cache, chunk, ceil_div(chunk->tokens, ROTATE_TOKENS)};
    const int64_t pairs = cache->config.batch * chunk->tokens * chunk->params->query.shape[1] * cache->config.inv_freq_count;
    return sa_pool_run(cache->config.batch * job.pieces, 6.0 * (double)pairs, 0, rotate_piece, &job, poll);
}

/* Where the keys of a chunk lie: in the caller's tensor, or in the rotated copy. */
static sa_tensor chunk_keys(const cache_chunk *chunk)
{
    sa_tensor key = chunk->params->key;
    if (chunk->key != NULL) {
        key.data = chunk->key;
        key.stride[2] = key.shape[3];
        key.stride[1] = key.shape[2] * key.shape[3];
        key.stride[0] = key.shape[1] * key.stride[1];
    }
    return key;
}

/* Mass goes to the place that a position has in kept() after the call. */
static void place_mass(const sa_ring *ring, sa_ring_state after, sa_run *run)
{
    if (run->kind == SA_RUN_PINNED) {
        run->mass_index = run->position;
        return;
    }
    run->mass_skip = clamp_i64(after.low - run->position, 0, run->count);
    const int64_t first = run->position + run->mass_skip;
    run->mass_index = run->mass_skip < run->count ? sa_ring_pinned_held(ring, after) + first - after.low : -1;
}

static void add_run(sa_row *row, const sa_ring *ring, sa_ring_state after, sa_run run)
{
    if (run.count > 0) {
        place_mass(ring, after, &run);
        row->runs[row->run_count++] = run;
    }
}

static sa_run held_run(const sa_cache *cache, int64_t row, sa_slots slots, sa_run_kind kind)
{
    const sa_cache_config *config = &cache->config;
    const int64_t count = sa_cache_slots(cache), at = row * config->heads_kv * count + slots.slot;
    return (sa_run){
        .key = sa_at(cache->keys, config->dtype, at * config->depth),
        .value = sa_at(cache->values, config->dtype, at * config->depth_v),
        .key_head_stride = count * config->depth,
        .key_stride = config->depth,
        .value_head_stride = count * config->depth_v,
        .value_stride = config->depth_v,
        .count = slots.count,
        .position = slots.position,
        .kind = kind,
    };
}

static sa_run new_run(const cache_chunk *chunk, int64_t row, int64_t first, int64_t count, int64_t position, sa_run_kind kind)
{
    const sa_tensor key = chunk_keys(chunk), *value = &chunk->params->value;
    return (sa_run){
        .key = sa_at(key.data, key.dtype, row * key.stride[0] + first * key.stride[2]),
        .value = sa_at(value->data, value->dtype, row * value->stride[0] + first * value->stride[2]),
        .key_head_stride = key.stride[1],
        .key_stride = key.stride[2],
        .value_head_stride = value->stride[1],
        .value_stride = value->stride[2],
        .count = count,
        .position = position,
        .kind = kind,
    };
}

static void fill_runs(const sa_cache *cache, const cache_chunk *chunk, int64_t b, sa_row *row)
{
    const sa_ring *ring = &cache->ring;
    const sa_ring_state state = state_of(cache, b);
    const int64_t count = new_tokens(chunk, b);
    const sa_ring_state after = sa_ring_append(ring, state, count);
    if (chunk->params->sink_key.rank && chunk->params->sink_key.shape[1] > 0) {
        row->runs[row->run_count++] = sa_learned_run(chunk->params);
    }
    const int64_t pinned_held = sa_ring_pinned_held(ring, state), pinned_new = clamp_i64(ring->pinned - state.length, 0, count);
    add_run(row, ring, after, held_run(cache, b, (sa_slots){0, 0, pinned_held}, SA_RUN_PINNED));
    add_run(row, ring, after, new_run(chunk, b, 0, pinned_new, state.length, SA_RUN_PINNED));
    sa_slots runs[2];
    const int64_t first_seen = max_i64(state.low, state.length - ring->window + 1);
    const int held = sa_ring_runs(ring, first_seen, state.length, runs);
    for (int i = 0; i < held; i++) {
        add_run(row, ring, after, held_run(cache, b, runs[i], SA_RUN_PLAIN));
    }
    add_run(row, ring, after, new_run(chunk, b, pinned_new, count - pinned_new, state.length + pinned_new, SA_RUN_PLAIN));
}

static void fill_row(const sa_cache *cache, const cache_chunk *chunk, const sa_problem *problem, int64_t b, sa_row *row)
{
    const sa_attend_params *params = chunk->params;
    const int64_t heads = problem->heads_q, size = sa_dtype_size(problem->dtype);
    const int64_t dense = b * heads * chunk->tokens * problem->depth;
    row->query = chunk->query != NULL ? chunk->query + dense * size
                                      : sa_at(params->query.data, problem->dtype, b * params->query.stride[0]);
    row->sink_query = chunk->pinned_query != NULL ? chunk->pinned_query + dense * size : NULL;
    row->output = (void *)(uintptr_t)sa_at(params->output.data, problem->dtype, b * params->output.stride[0]);
    row->lse = params->lse != NULL ? params->lse + b * heads * chunk->tokens : NULL;
    row->mass = params->mass != NULL ? params->mass + b * problem->heads_kv * problem->mass_head_stride : NULL;
    row->alibi = problem->alibi ? params->alibi_slopes.data + (params->alibi_slopes.rank == 2 ? b * heads : 0) : NULL;
    row->query_count = new_tokens(chunk, b);
    row->query_total = chunk->tokens;
    row->position = cache->lengths[b];
    fill_runs(cache, chunk, b, row);
}

static sa_status run_chunk(const sa_cache *cache, const cache_chunk *chunk, sa_poll poll)
{
    sa_attend_params params = *chunk->params;
    params.window = (sa_ints){.data = &cache->ring.window};
    params.pinned = cache->ring.pinned;
    params.causal = true;
    sa_plan plan;
    SA_TRY(sa_plan_begin(&params, cache->config.batch, &plan));
    sa_problem *problem = &plan.problem;
    if (chunk->query != NULL) {
        problem->query_stride = problem->depth;
        problem->query_head_stride = chunk->tokens * problem->depth;
    }
    problem->sink_query_stride = problem->depth;
    problem->sink_query_head_stride = chunk->tokens * problem->depth;
    problem->mass_head_stride = sa_cache_slots(cache);
    problem->pinned_query_limit = cache->config.slot_positions ? slot_limit(cache) : INT64_MAX;
    for (int64_t b = 0; b < cache->config.batch; b++) {
        fill_row(cache, chunk, problem, b, &problem->rows[b]);
    }
    if (params.mass != NULL) {
        memset(params.mass, 0, (size_t)(cache->config.batch * problem->heads_kv * problem->mass_head_stride) * sizeof(float));
    }
    const sa_status status = sa_table()->attend(problem, poll);
    sa_plan_end(&plan);
    return status;
}

/* Copies tokens first .. first + slots.count - 1 of a tensor into slots. */
static void write_slots(const sa_tensor *source, int64_t row, int64_t first, sa_slots slots, char *target, int64_t slot_count)
{
    const int64_t depth = source->shape[3], size = sa_dtype_size(source->dtype);
    for (int64_t head = 0; head < source->shape[1]; head++) {
        char *to = target + ((row * source->shape[1] + head) * slot_count + slots.slot) * depth * size;
        for (int64_t i = 0; i < slots.count; i++) {
            const int64_t offset = row * source->stride[0] + head * source->stride[1] + (first + i) * source->stride[2];
            memcpy(to + i * depth * size, sa_at(source->data, source->dtype, offset), (size_t)(depth * size));
        }
    }
}

static void commit(sa_cache *cache, const cache_chunk *chunk, int64_t b)
{
    const sa_ring *ring = &cache->ring;
    const sa_ring_state state = state_of(cache, b), after = sa_ring_append(ring, state, new_tokens(chunk, b));
    const sa_tensor key = chunk_keys(chunk), *value = &chunk->params->value;
    const int64_t slots = sa_cache_slots(cache);
    sa_slots runs[3] = {{state.length, state.length, clamp_i64(ring->pinned - state.length, 0, after.length - state.length)}};
    const int64_t first = max_i64(max_i64(state.length, ring->pinned), after.low);
    const int count = 1 + sa_ring_runs(ring, first, after.length, runs + 1);
    for (int i = runs[0].count > 0 ? 0 : 1; i < count; i++) {
        write_slots(&key, b, runs[i].position - state.length, runs[i], cache->keys, slots);
        write_slots(value, b, runs[i].position - state.length, runs[i], cache->values, slots);
    }
    set_state(cache, b, after);
}

sa_status sa_cache_attend(sa_cache *cache, const sa_attend_params *params, sa_poll poll)
{
    cache_chunk chunk = {.params = params, .tokens = params->query.shape[2]};
    SA_TRY(chunk_allocate(cache, &chunk));
    sa_status status = chunk_rotate(cache, &chunk, poll);
    status = status != SA_OK ? status : run_chunk(cache, &chunk, poll);
    for (int64_t b = 0; b < cache->config.batch && status == SA_OK; b++) {
        commit(cache, &chunk, b);
    }
    free(chunk.memory);
    return status;
}
