/* The second half of a part of a call of KVCache: the policy learns from the attention that was, and tokens leave.
 *
 * A stream is judged by one worker, from what it holds and the new tokens beside it. Those that stay of the new ones take the slots of those
 * that leave; nobody else moves, unless more leave than come. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/pool.h"
#include "kv_call.h"

/* What a worker needs to judge one stream. */
typedef struct bench {
    int64_t *positions; /* [stride] */
    int32_t *order;     /* [stride] */
    int32_t *work;      /* [stride] */
    bool *gone;         /* [stride] */
    double *scores;     /* [stride] */
    double *scratch;    /* [2 * stride + depth] */
    char *fresh_state;  /* [most, state_bytes] */
} bench;

static int64_t bench_bytes(const sa_kv_call *call)
{
    const int64_t state = sa_policy_state_bytes(&call->cache->config.policy);
    return call->stride * (8 + 4 + 4 + 1 + 8 + 16) + call->cache->config.depth * 8 + call->most * state + 7 * 64;
}

static bench bench_at(const sa_kv_call *call, char *memory)
{
    const int64_t stride = call->stride, state = sa_policy_state_bytes(&call->cache->config.policy);
    return (bench){
        .positions = sa_kv_part_of(&memory, stride * 8),
        .order = sa_kv_part_of(&memory, stride * 4),
        .work = sa_kv_part_of(&memory, stride * 4),
        .gone = sa_kv_part_of(&memory, stride),
        .scores = sa_kv_part_of(&memory, stride * 8),
        .scratch = sa_kv_part_of(&memory, (2 * stride + call->cache->config.depth) * 8),
        .fresh_state = sa_kv_part_of(&memory, call->most * state),
    };
}

static sa_candidates candidates_of(const sa_kv_call *call, const bench *at, int64_t stream)
{
    const sa_kv_cache *cache = call->cache;
    const sa_kv_config *config = &cache->config;
    const int64_t first = sa_kv_first_slot(cache, stream), row = stream / config->heads_kv, held = cache->held[stream];
    const int64_t fresh = sa_kv_new_tokens(call, row), length = cache->lengths[row];
    const sa_run keys = sa_kv_turns(config) && config->slot_positions ? (sa_run){0} : sa_kv_new_run(call, stream, 0, fresh, SA_RUN_PLAIN);
    const sa_tensor *key = &call->params->key, *value = &call->params->value;
    const int64_t key_offset = row * key->stride[0] + stream % config->heads_kv * key->stride[1] + call->first * key->stride[2];
    const int64_t value_offset = row * value->stride[0] + stream % config->heads_kv * value->stride[1] + call->first * value->stride[2];
    const sa_tensor *query = &call->params->query;
    const int64_t group = query->shape[1] / config->heads_kv;
    const int64_t query_offset = row * query->stride[0] + stream % config->heads_kv * group * query->stride[1] + call->first * query->stride[2];
    memcpy(at->positions, cache->storage.positions + first, (size_t)held * sizeof(int64_t));
    memcpy(at->order, cache->storage.order + first, (size_t)held * sizeof(int32_t));
    for (int64_t i = 0; i < fresh; i++) {
        at->positions[held + i] = length + i;
        at->order[held + i] = (int32_t)(held + i);
    }
    return (sa_candidates){
        .row = row,
        .head = stream % config->heads_kv,
        .heads = config->heads_kv,
        .held = held,
        .fresh = fresh,
        .positions = at->positions,
        .order = at->order,
        .length = length + fresh,
        .dtype = config->dtype,
        .depth = config->depth,
        .depth_v = config->depth_v,
        .held_keys = sa_at(cache->storage.keys, config->dtype, first * config->depth),
        .held_values = sa_at(cache->storage.values, config->dtype, first * config->depth_v),
        .fresh_keys = keys.key != NULL ? keys.key : sa_at(key->data, config->dtype, key_offset),
        .fresh_values = sa_at(value->data, config->dtype, value_offset),
        .fresh_key_stride = keys.key != NULL ? keys.key_stride : key->stride[2],
        .fresh_value_stride = value->stride[2],
        .held_state = cache->storage.states + first * sa_policy_state_bytes(&config->policy),
        .fresh_state = at->fresh_state,
        .tracked = call->mass_rows > 0,
        .mass = call->mass != NULL ? call->mass + stream * call->mass_rows * call->stride : NULL,
        .mass_rows = call->need == SA_MASS_EACH ? fresh : min_i64(call->mass_rows, fresh),
        .mass_stride = call->stride,
        .head_stride = call->mass_rows * call->stride,
        .scratch = at->scratch,
        .queries = sa_at(call->params->query.data, config->dtype, query_offset),
        .query_head_stride = call->params->query.stride[1],
        .query_stride = call->params->query.stride[2],
        .group = group,
        .rope = {config->inv_freq, config->inv_freq_count, config->attention_scaling, config->interleaved},
        .turned = config->applied,
        .pinned = config->pinned,
        .scale = call->params->has_scale ? call->params->scale : 1.0 / sqrt((double)config->depth),
        .statistics = cache->statistics + stream * sa_policy_statistics(&config->policy, config->depth),
    };
}

/* A token of the stream, held or new, into a slot. */
static void put_token(sa_kv_cache *cache, const sa_candidates *all, int64_t first, int64_t candidate, int64_t slot)
{
    const sa_kv_config *config = &cache->config;
    const int64_t size = sa_dtype_size(config->dtype), state = sa_policy_state_bytes(&config->policy), fresh = candidate - all->held;
    const bool is_new = candidate >= all->held;
    const void *key = is_new ? sa_at(all->fresh_keys, config->dtype, fresh * all->fresh_key_stride)
                             : sa_at(all->held_keys, config->dtype, candidate * config->depth);
    const void *value = is_new ? sa_at(all->fresh_values, config->dtype, fresh * all->fresh_value_stride)
                               : sa_at(all->held_values, config->dtype, candidate * config->depth_v);
    memcpy(cache->storage.keys + (first + slot) * config->depth * size, key, (size_t)(config->depth * size));
    memcpy(cache->storage.values + (first + slot) * config->depth_v * size, value, (size_t)(config->depth_v * size));
    memcpy(cache->storage.states + (first + slot) * state, sa_state_of(&config->policy, all, candidate), (size_t)state);
    cache->storage.positions[first + slot] = all->positions[candidate];
}

/* Those that stay, into slots 0 .. stay - 1: whoever is there already does not move, new ones take the gaps, then the last slots do. */
static void place_tokens(sa_kv_cache *cache, const sa_candidates *all, const bench *at, int64_t stream, int64_t stay)
{
    const int64_t first = sa_kv_first_slot(cache, stream), count = all->held + all->fresh;
    int64_t gap = 0;
    for (int64_t step = 0; step < count; step++) {
        const int64_t i = step < all->fresh ? all->held + step : step - all->fresh; /* new ones first */
        if (at->gone[i]) {
            continue;
        }
        if (i < stay && i < all->held) {
            at->work[i] = (int32_t)i;
            continue;
        }
        while (gap < all->held && !at->gone[gap]) {
            gap++;
        }
        at->work[i] = (int32_t)gap;
        put_token(cache, all, first, i, gap++);
    }
    int64_t rank = 0;
    for (int64_t r = 0; r < count; r++) {
        const int64_t i = at->order[r];
        if (!at->gone[i]) {
            cache->storage.order[first + rank++] = at->work[i];
        }
    }
}

static void record_departures(sa_kv_cache *cache, const sa_candidates *all, const bench *at, int64_t stream)
{
    const int64_t size = cache->config.log;
    for (int64_t r = 0; r < all->held + all->fresh; r++) {
        const int64_t i = at->order[r];
        if (at->gone[i]) {
            const double mass = sa_kv_tracks(cache) ? sa_state_of(&cache->config.policy, all, i)->mass : (double)NAN;
            sa_ledger_add(&cache->ledgers[stream], cache->log + stream * size, size, (sa_departure){all->positions[i], all->length, mass});
        }
    }
}

static void clear_call_mass(const sa_kv_call *call, const sa_candidates *all)
{
    for (int64_t i = 0; i < all->held && call->first_part && call->keep_mass; i++) {
        sa_state_of(&call->cache->config.policy, all, i)->call = 0.0;
    }
}

static void evict_stream(void *context, int64_t stream, sa_worker *worker)
{
    const sa_kv_call *call = context;
    sa_kv_cache *cache = call->cache;
    const sa_policy *policy = &cache->config.policy;
    const bench at = bench_at(call, worker->scratch);
    const sa_candidates all = candidates_of(call, &at, stream);
    memset(at.fresh_state, 0, (size_t)(all.fresh * sa_policy_state_bytes(policy)));
    clear_call_mass(call, &all);
    if (all.fresh == 0) {
        return;
    }
    sa_policy_observe(policy, &all);
    const sa_budget budget = sa_kv_budget(cache, all.head);
    const int64_t count = all.held + all.fresh, leaving = max_i64(count - sa_held_at(&budget, all.length), 0);
    const int64_t recent = max_i64(cache->config.recent, sa_policy_protects(policy));
    const sa_guard guard = {cache->config.pinned, sa_last_eviction(&budget, all.length) - recent};
    double *scores = at.scores;
    if (policy->kind == SA_POLICY_CUSTOM) {
        scores = call->scores + stream * call->stride;
    } else if (leaving > 0) {
        sa_policy_score(policy, &all, scores);
    }
    sa_select(scores, all.positions, all.order, count, guard, leaving, at.work, at.gone);
    record_departures(cache, &all, &at, stream);
    place_tokens(cache, &all, &at, stream, count - leaving);
    cache->held[stream] = count - leaving;
}

/* A Custom policy scores on the calling thread, before anything changes. */
static sa_status ask_scorer(const sa_kv_call *call)
{
    if (call->cache->config.policy.kind != SA_POLICY_CUSTOM) {
        return SA_OK;
    }
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, (size_t)bench_bytes(call)) != 0) {
        return sa_no_memory("the call of a KVCache", bench_bytes(call));
    }
    const bench at = bench_at(call, memory);
    sa_status status = SA_OK;
    for (int64_t stream = 0; stream < sa_kv_streams(call->cache) && status == SA_OK; stream++) {
        const sa_candidates all = candidates_of(call, &at, stream);
        status = all.fresh > 0 ? call->scorer->score(call->scorer->context, &all, call->scores + stream * call->stride) : SA_OK;
    }
    free(memory);
    return status;
}

sa_status sa_kv_evict_part(sa_kv_call *call)
{
    sa_kv_cache *cache = call->cache;
    const int64_t streams = sa_kv_streams(cache), heads = cache->config.heads_kv;
    SA_TRY(ask_scorer(call));
    int64_t *before = malloc((size_t)(streams * 8));
    if (before == NULL) {
        return sa_no_memory("the call of a KVCache", streams * 8);
    }
    memcpy(before, cache->held, (size_t)(streams * 8));
    /* Not to be stopped: half an eviction is no state. */
    const double flops = 64.0 * (double)(streams * call->stride * max_i64(call->mass_rows, 1));
    const sa_status status = sa_pool_run(streams, flops, bench_bytes(call), evict_stream, call, (sa_poll){0});
    for (int64_t stream = 0; stream < streams && status == SA_OK; stream++) {
        const int64_t b = stream / heads, fresh = sa_kv_new_tokens(call, b);
        if (before[stream] + fresh > cache->held[stream]) {
            cache->evicted_at[b] = cache->lengths[b] + fresh;
        }
    }
    for (int64_t b = 0; b < cache->config.batch && status == SA_OK; b++) {
        cache->lengths[b] += sa_kv_new_tokens(call, b);
    }
    free(before);
    return status;
}
