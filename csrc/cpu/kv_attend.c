/* A call of KVCache: in parts of at most config.part tokens, each attends to what is held and to itself, teaches the policy, and evicts.
 *
 * A stream (one kv head of one batch row) is a row of the problem that the kernels see, with its own run of slots: held keys are seen by
 * every query of a part, in whatever order they lie. A part changes nothing before its attention has succeeded; a call of more than one
 * part that fails is undone by a copy made before, or by emptying a cache that was empty. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/kv_check.h"
#include "../core/plan.h"
#include "../core/rope.h"
#include "kv_cache.h"
#include "table.h"

enum { BLOCK = 128, ROTATE_TOKENS = 16 };

/* One call, and where its present part stands. */
typedef struct kv_call {
    sa_kv_cache *cache;
    const sa_attend_params *params;
    const sa_kv_scorer *scorer;
    sa_poll poll;
    bool keep_mass, first_part;
    sa_mass_need need;
    int64_t first, count;       /* tokens of the part */
    int64_t most;               /* of a part */
    int64_t slots, stride;      /* most of a stream; candidates of one, rounded up */
    int64_t mass_rows;          /* 0, 1, or `most` */
    float *mass;                /* [streams, mass_rows, stride] */
    float *back;                /* [streams, slots in whole blocks], with ALiBi */
    double *scores;             /* [streams, stride], of a Custom policy */
    char *query;                /* [batch, heads_q, most, depth] turned; NULL: the caller's */
    char *key;                  /* [batch, heads_kv, most, depth] turned */
    char *held_key;             /* [streams, slots, depth] turned: positions in slots */
} kv_call;

sa_status sa_kv_attend_check(const sa_kv_cache *cache, const sa_attend_params *params)
{
    return sa_check_kv_call(&cache->config, cache->lengths, params);
}

static int64_t new_tokens(const kv_call *call, int64_t row)
{
    const sa_ints *lengths = &call->params->query_lengths;
    return lengths->data == NULL ? call->count : clamp_i64(lengths->data[row] - call->first, 0, call->count);
}

sa_status sa_kv_reserve(sa_kv_cache *cache, const sa_attend_params *params)
{
    int64_t longest = 0;
    for (int64_t b = 0; b < cache->config.batch; b++) {
        const int64_t fresh = params->query_lengths.data != NULL ? params->query_lengths.data[b] : params->query.shape[2];
        longest = max_i64(longest, cache->lengths[b] + fresh);
    }
    return sa_kv_grow(cache, longest);
}

/* --- memory of a call ------------------------------------------------------------------------------------------------------------------ */

static bool turns(const sa_kv_config *config)
{
    return config->inv_freq_count > 0 && !config->applied;
}

static void *part_of(char **next, int64_t bytes)
{
    char *part = *next;
    *next += round_up(bytes, 64);
    return bytes > 0 ? part : NULL;
}

static sa_status call_allocate(kv_call *call, char **memory)
{
    const sa_kv_config *config = &call->cache->config;
    const int64_t streams = sa_kv_streams(call->cache), heads = call->params->query.shape[1], size = sa_dtype_size(config->dtype);
    call->slots = sa_kv_most_slots(call->cache);
    call->stride = round_up(call->slots + call->most, 16);
    call->mass_rows = call->need == SA_MASS_EACH ? call->most : call->need == SA_MASS_TOTAL ? 1 : 0;
    const bool alibi = call->params->alibi_slopes.data != NULL, custom = config->policy.kind == SA_POLICY_CUSTOM, raw = turns(config);
    const int64_t mass = streams * call->mass_rows * call->stride * (int64_t)sizeof(float);
    const int64_t back = alibi ? streams * round_up(call->slots, BLOCK) * (int64_t)sizeof(float) : 0;
    const int64_t scores = custom ? streams * call->stride * (int64_t)sizeof(double) : 0;
    const int64_t query = raw ? config->batch * heads * call->most * config->depth * size : 0;
    const int64_t key = raw ? streams * call->most * config->depth * size : 0;
    const int64_t held = raw && config->slot_positions ? streams * call->slots * config->depth * size : 0;
    const int64_t bytes = mass + back + scores + query + key + held + 7 * 64;
    if (posix_memalign((void **)memory, 64, (size_t)bytes) != 0) {
        *memory = NULL;
        return sa_no_memory("the call of a KVCache", bytes);
    }
    char *next = *memory;
    call->mass = part_of(&next, mass);
    call->back = part_of(&next, back);
    call->scores = part_of(&next, scores);
    call->query = part_of(&next, query);
    call->key = part_of(&next, key);
    call->held_key = part_of(&next, held);
    return SA_OK;
}

/* --- positions --------------------------------------------------------------------------------------------------------------------------- */

/* Where the first new token of a stream stands. */
static int64_t first_position(const sa_kv_cache *cache, int64_t stream)
{
    return cache->config.slot_positions ? cache->held[stream] : cache->lengths[stream / cache->config.heads_kv];
}

static void turn_token(const kv_call *call, const sa_rope *rope, int64_t stream, int64_t token)
{
    const sa_kv_config *config = &call->cache->config;
    const int64_t heads = call->params->query.shape[1], group = heads / config->heads_kv, size = sa_dtype_size(config->dtype);
    const int64_t row = stream / config->heads_kv, head = stream % config->heads_kv, depth = config->depth;
    const sa_tensor *query = &call->params->query, *key = &call->params->key;
    float table[256];
    sa_rope_angles(rope, first_position(call->cache, stream) + token, rope->scaling, table);
    for (int64_t h = head * group; h < (head + 1) * group; h++) {
        const int64_t offset = row * query->stride[0] + h * query->stride[1] + (call->first + token) * query->stride[2];
        sa_rope_rotate(rope, table, config->dtype, sa_at(query->data, config->dtype, offset),
                       call->query + ((row * heads + h) * call->most + token) * depth * size, depth);
    }
    const int64_t offset = row * key->stride[0] + head * key->stride[1] + (call->first + token) * key->stride[2];
    sa_rope_rotate(rope, table, config->dtype, sa_at(key->data, config->dtype, offset),
                   call->key + (stream * call->most + token) * depth * size, depth);
}

static void turn_held(const kv_call *call, const sa_rope *rope, int64_t stream, int64_t rank)
{
    const sa_kv_cache *cache = call->cache;
    const int64_t first = sa_kv_first_slot(cache, stream), slot = cache->storage.order[first + rank], depth = cache->config.depth;
    const int64_t size = sa_dtype_size(cache->config.dtype);
    float table[256];
    sa_rope_angles(rope, rank, rope->scaling, table);
    sa_rope_rotate(rope, table, cache->config.dtype, cache->storage.keys + (first + slot) * depth * size,
                   call->held_key + (stream * call->slots + slot) * depth * size, depth);
}

typedef struct turning {
    const kv_call *call;
    int64_t pieces; /* of a stream: held tokens, then new ones */
    int64_t held_pieces;
} turning;

static void turn_piece(void *context, int64_t task, sa_worker *worker)
{
    const turning *job = context;
    const kv_call *call = job->call;
    const sa_kv_config *config = &call->cache->config;
    const sa_rope rope = {config->inv_freq, config->inv_freq_count, config->attention_scaling, config->interleaved};
    const int64_t stream = task / job->pieces, piece = task % job->pieces;
    const bool held = piece < job->held_pieces;
    const int64_t begin = (held ? piece : piece - job->held_pieces) * ROTATE_TOKENS;
    const int64_t end = min_i64(begin + ROTATE_TOKENS, held ? call->cache->held[stream] : new_tokens(call, stream / config->heads_kv));
    for (int64_t i = begin; i < end && !sa_worker_stopped(worker); i++) {
        if (held) {
            turn_held(call, &rope, stream, i);
        } else {
            turn_token(call, &rope, stream, i);
        }
    }
}

static sa_status turn_part(const kv_call *call)
{
    if (call->query == NULL) {
        return SA_OK;
    }
    const int64_t held = call->held_key != NULL ? ceil_div(call->slots, ROTATE_TOKENS) : 0;
    turning job = {call, held + ceil_div(call->count, ROTATE_TOKENS), held};
    const int64_t streams = sa_kv_streams(call->cache), heads = call->params->query.shape[1];
    const int64_t vectors = streams * (call->held_key != NULL ? call->slots : 0) + call->cache->config.batch * call->count * heads;
    const double flops = 6.0 * (double)vectors * (double)call->cache->config.inv_freq_count;
    return sa_pool_run(streams * job.pieces, flops, 0, turn_piece, &job, call->poll);
}

/* --- attention ------------------------------------------------------------------------------------------------------------------------------ */

static void add_run(sa_row *row, sa_run run)
{
    if (run.count > 0) {
        row->runs[row->run_count++] = run;
    }
}

static sa_run held_run(const kv_call *call, int64_t stream, int64_t slot, int64_t count, sa_run_kind kind)
{
    const sa_kv_cache *cache = call->cache;
    const sa_kv_config *config = &cache->config;
    const int64_t at = sa_kv_first_slot(cache, stream) + slot;
    const void *key = call->held_key != NULL ? sa_at(call->held_key, config->dtype, (stream * call->slots + slot) * config->depth)
                                             : sa_at(cache->storage.keys, config->dtype, at * config->depth);
    return (sa_run){
        .key = key,
        .value = sa_at(cache->storage.values, config->dtype, at * config->depth_v),
        .key_stride = config->depth,
        .value_stride = config->depth_v,
        .count = count,
        .position = slot,
        .back = call->back != NULL ? call->back + stream * round_up(call->slots, BLOCK) : NULL,
        .mass_index = call->mass_rows > 0 ? slot : -1,
        .kind = kind,
    };
}

static sa_run new_run(const kv_call *call, int64_t stream, int64_t token, int64_t count, sa_run_kind kind)
{
    const sa_kv_config *config = &call->cache->config;
    const sa_tensor *key = &call->params->key, *value = &call->params->value;
    const int64_t row = stream / config->heads_kv, head = stream % config->heads_kv;
    const int64_t key_offset = row * key->stride[0] + head * key->stride[1] + (call->first + token) * key->stride[2];
    const int64_t value_offset = row * value->stride[0] + head * value->stride[1] + (call->first + token) * value->stride[2];
    return (sa_run){
        .key = call->key != NULL ? sa_at(call->key, config->dtype, (stream * call->most + token) * config->depth)
                                 : sa_at(key->data, config->dtype, key_offset),
        .value = sa_at(value->data, config->dtype, value_offset),
        .key_stride = call->key != NULL ? config->depth : key->stride[2],
        .value_stride = value->stride[2],
        .count = count,
        .position = first_position(call->cache, stream) + token,
        .mass_index = call->mass_rows > 0 ? call->cache->held[stream] + token : -1,
        .kind = kind,
    };
}

/* With a bias the pinned tokens are runs of their own: they lie in the first slots, in order. */
static void fill_runs(const kv_call *call, int64_t stream, sa_row *row)
{
    const sa_kv_config *config = &call->cache->config;
    const int64_t held = call->cache->held[stream], fresh = row->query_count;
    const int64_t length = call->cache->lengths[stream / config->heads_kv];
    const bool apart = call->params->sink_bias.data != NULL;
    if (call->params->sink_key.rank && call->params->sink_key.shape[1] > 0) {
        sa_run learned = sa_learned_run(call->params);
        const int64_t head = stream % config->heads_kv;
        learned.key = sa_at(learned.key, config->dtype, head * learned.key_head_stride);
        learned.value = sa_at(learned.value, config->dtype, head * learned.value_head_stride);
        row->runs[row->run_count++] = learned;
    }
    const int64_t pinned = apart ? min_i64(config->pinned, held) : 0, pinned_new = apart ? clamp_i64(config->pinned - length, 0, fresh) : 0;
    add_run(row, held_run(call, stream, 0, pinned, SA_RUN_PINNED));
    sa_run rest = held_run(call, stream, pinned, held - pinned, SA_RUN_HELD);
    rest.back = rest.back != NULL ? rest.back + pinned : NULL;
    add_run(row, rest);
    add_run(row, new_run(call, stream, 0, pinned_new, SA_RUN_PINNED));
    add_run(row, new_run(call, stream, pinned_new, fresh - pinned_new, SA_RUN_PLAIN));
}

/* ALiBi: how far the tokens held lie before the first new one. */
static void fill_back(const kv_call *call, int64_t stream)
{
    const sa_kv_cache *cache = call->cache;
    const int64_t first = sa_kv_first_slot(cache, stream), from = first_position(cache, stream);
    float *back = call->back + stream * round_up(call->slots, BLOCK);
    memset(back, 0, (size_t)round_up(call->slots, BLOCK) * sizeof *back);
    for (int64_t rank = 0; rank < cache->held[stream]; rank++) {
        const int64_t slot = cache->storage.order[first + rank];
        back[slot] = (float)(from - (cache->config.slot_positions ? rank : cache->storage.positions[first + slot]));
    }
}

static void fill_row(const kv_call *call, int64_t stream, sa_row *row)
{
    const sa_attend_params *params = call->params;
    const sa_kv_config *config = &call->cache->config;
    const int64_t heads = params->query.shape[1], group = heads / config->heads_kv;
    const int64_t b = stream / config->heads_kv, head = stream % config->heads_kv * group;
    const int64_t query = b * params->query.stride[0] + head * params->query.stride[1] + call->first * params->query.stride[2];
    const int64_t output = b * params->output.stride[0] + head * params->output.stride[1] + call->first * params->output.stride[2];
    row->query = call->query != NULL ? sa_at(call->query, config->dtype, (b * heads + head) * call->most * config->depth)
                                     : sa_at(params->query.data, config->dtype, query);
    row->output = (void *)(uintptr_t)sa_at(params->output.data, config->dtype, output);
    row->lse = params->lse != NULL ? params->lse + (b * heads + head) * params->query.shape[2] + call->first : NULL;
    row->mass = call->mass != NULL ? call->mass + stream * call->mass_rows * call->stride : NULL;
    if (params->alibi_slopes.data != NULL) {
        row->alibi = params->alibi_slopes.data + (params->alibi_slopes.rank == 2 ? b * heads : 0) + head;
        fill_back(call, stream);
    }
    row->query_count = new_tokens(call, b);
    row->query_total = call->count;
    row->position = first_position(call->cache, stream);
    row->first_head = head;
    fill_runs(call, stream, row);
}

static sa_status attend_part(const kv_call *call)
{
    const sa_kv_config *config = &call->cache->config;
    const int64_t streams = sa_kv_streams(call->cache);
    sa_attend_params params = *call->params;
    params.causal = true;
    params.pinned = config->pinned;
    sa_plan plan;
    SA_TRY(sa_plan_begin(&params, streams, &plan));
    sa_problem *problem = &plan.problem;
    problem->heads_q = params.query.shape[1] / config->heads_kv;
    problem->heads_kv = 1;
    problem->mass_head_stride = call->stride;
    problem->mass_query_stride = call->need == SA_MASS_EACH ? call->stride : 0;
    if (call->query != NULL) {
        problem->query_stride = config->depth;
        problem->query_head_stride = call->most * config->depth;
    }
    for (int64_t stream = 0; stream < streams; stream++) {
        fill_row(call, stream, &problem->rows[stream]);
    }
    if (call->mass != NULL) {
        memset(call->mass, 0, (size_t)(streams * call->mass_rows * call->stride) * sizeof(float));
    }
    const sa_status status = sa_table()->attend(problem, call->poll);
    sa_plan_end(&plan);
    return status;
}

/* --- eviction ------------------------------------------------------------------------------------------------------------------------------- */

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

static int64_t bench_bytes(const kv_call *call)
{
    const int64_t state = sa_policy_state_bytes(&call->cache->config.policy);
    return call->stride * (8 + 4 + 4 + 1 + 8 + 16) + call->cache->config.depth * 8 + call->most * state + 7 * 64;
}

static bench bench_at(const kv_call *call, char *memory)
{
    const int64_t stride = call->stride, state = sa_policy_state_bytes(&call->cache->config.policy);
    return (bench){
        .positions = part_of(&memory, stride * 8),
        .order = part_of(&memory, stride * 4),
        .work = part_of(&memory, stride * 4),
        .gone = part_of(&memory, stride),
        .scores = part_of(&memory, stride * 8),
        .scratch = part_of(&memory, (2 * stride + call->cache->config.depth) * 8),
        .fresh_state = part_of(&memory, call->most * state),
    };
}

static sa_candidates candidates_of(const kv_call *call, const bench *at, int64_t stream)
{
    const sa_kv_cache *cache = call->cache;
    const sa_kv_config *config = &cache->config;
    const int64_t first = sa_kv_first_slot(cache, stream), row = stream / config->heads_kv, held = cache->held[stream];
    const int64_t fresh = new_tokens(call, row), length = cache->lengths[row];
    const sa_run keys = turns(config) && config->slot_positions ? (sa_run){0} : new_run(call, stream, 0, fresh, SA_RUN_PLAIN);
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

static void clear_call_mass(const kv_call *call, const sa_candidates *all)
{
    for (int64_t i = 0; i < all->held && call->first_part && call->keep_mass; i++) {
        sa_state_of(&call->cache->config.policy, all, i)->call = 0.0;
    }
}

static void evict_stream(void *context, int64_t stream, sa_worker *worker)
{
    const kv_call *call = context;
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
static sa_status ask_scorer(const kv_call *call)
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

static sa_status evict_part(kv_call *call)
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
        const int64_t b = stream / heads, fresh = new_tokens(call, b);
        if (before[stream] + fresh > cache->held[stream]) {
            cache->evicted_at[b] = cache->lengths[b] + fresh;
        }
    }
    for (int64_t b = 0; b < cache->config.batch && status == SA_OK; b++) {
        cache->lengths[b] += new_tokens(call, b);
    }
    free(before);
    return status;
}

/* --- one call ----------------------------------------------------------------------------------------------------------------------------------- */

static sa_status run_parts(kv_call *call)
{
    const int64_t tokens = call->params->query.shape[2];
    int64_t polled_at = 0;
    for (call->first = 0; call->first == 0 || call->first < tokens; call->first += call->most) {
        call->count = min_i64(call->most, tokens - call->first);
        call->first_part = call->first == 0;
        SA_TRY(sa_pool_ask(call->poll, &polled_at));
        SA_TRY(turn_part(call));
        SA_TRY(attend_part(call));
        SA_TRY(evict_part(call));
    }
    return SA_OK;
}

static bool is_empty(const sa_kv_cache *cache)
{
    for (int64_t b = 0; b < cache->config.batch; b++) {
        if (cache->lengths[b] > 0) {
            return false;
        }
    }
    return true;
}

sa_status sa_kv_attend(sa_kv_cache *cache, const sa_attend_params *params, const sa_kv_scorer *scorer, bool keep_mass, sa_poll poll)
{
    SA_TRY(sa_kv_reserve(cache, params));
    const int64_t tokens = params->query.shape[2];
    kv_call call = {.cache = cache, .params = params, .scorer = scorer, .poll = poll, .keep_mass = keep_mass};
    call.most = clamp_i64(tokens, 1, cache->config.part);
    call.need = sa_policy_need(&cache->config.policy);
    if (call.need == SA_MASS_NONE && (cache->config.track_mass || keep_mass)) {
        call.need = SA_MASS_TOTAL;
    }
    const bool empty = is_empty(cache), undo = tokens > call.most && !empty;
    sa_kv_cache *before = NULL;
    char *memory = NULL;
    sa_status status = undo ? sa_kv_clone(cache, &before) : SA_OK;
    status = status != SA_OK ? status : call_allocate(&call, &memory);
    status = status != SA_OK ? status : run_parts(&call);
    if (status != SA_OK && undo && before != NULL) {
        sa_kv_swap(cache, before);
    } else if (status != SA_OK && empty) {
        sa_kv_reset(cache, NULL);
    }
    sa_kv_free(before);
    free(memory);
    return status;
}
