/* A call of KVCache: in parts of at most config.part tokens, each attends to what is held and to itself, teaches the policy, and evicts.
 *
 * A stream (one kv head of one batch row) is a row of the problem that the kernels see, with its own run of slots: held keys are seen by
 * every query of a part, in whatever order they lie. A part changes nothing before its attention has succeeded; a call of more than one
 * part that fails is undone by a copy made before, or by emptying a cache that was empty. */
#include <stdlib.h>
#include <string.h>

#include "../core/kv_check.h"
#include "../core/plan.h"
#include "../core/pool.h"
#include "../core/rope.h"
#include "kv_call.h"
#include "table.h"

enum { BLOCK = 128, ROTATE_TOKENS = 16 };

sa_status sa_kv_attend_check(const sa_kv_cache *cache, const sa_attend_params *params)
{
    return sa_check_kv_call(&cache->config, cache->lengths, params);
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

static sa_status call_allocate(sa_kv_call *call, char **memory)
{
    const sa_kv_config *config = &call->cache->config;
    const int64_t streams = sa_kv_streams(call->cache), heads = call->params->query.shape[1], size = sa_dtype_size(config->dtype);
    call->slots = sa_kv_most_slots(call->cache);
    call->stride = round_up(call->slots + call->most, 16);
    call->mass_rows = call->need == SA_MASS_EACH ? call->most : call->need == SA_MASS_TOTAL ? 1 : 0;
    const bool alibi = call->params->alibi_slopes.data != NULL, custom = config->policy.kind == SA_POLICY_CUSTOM, raw = sa_kv_turns(config);
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
    call->mass = sa_kv_part_of(&next, mass);
    call->back = sa_kv_part_of(&next, back);
    call->scores = sa_kv_part_of(&next, scores);
    call->query = sa_kv_part_of(&next, query);
    call->key = sa_kv_part_of(&next, key);
    call->held_key = sa_kv_part_of(&next, held);
    return SA_OK;
}

/* --- positions --------------------------------------------------------------------------------------------------------------------------- */

/* Where the first new token of a stream stands. */
static int64_t first_position(const sa_kv_cache *cache, int64_t stream)
{
    return cache->config.slot_positions ? cache->held[stream] : cache->lengths[stream / cache->config.heads_kv];
}

static void turn_token(const sa_kv_call *call, const sa_rope *rope, int64_t stream, int64_t token)
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

static void turn_held(const sa_kv_call *call, const sa_rope *rope, int64_t stream, int64_t rank)
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
    const sa_kv_call *call;
    int64_t pieces; /* of a stream: held tokens, then new ones */
    int64_t held_pieces;
} turning;

static void turn_piece(void *context, int64_t task, sa_worker *worker)
{
    const turning *job = context;
    const sa_kv_call *call = job->call;
    const sa_kv_config *config = &call->cache->config;
    const sa_rope rope = {config->inv_freq, config->inv_freq_count, config->attention_scaling, config->interleaved};
    const int64_t stream = task / job->pieces, piece = task % job->pieces;
    const bool held = piece < job->held_pieces;
    const int64_t begin = (held ? piece : piece - job->held_pieces) * ROTATE_TOKENS;
    const int64_t end = min_i64(begin + ROTATE_TOKENS, held ? call->cache->held[stream] : sa_kv_new_tokens(call, stream / config->heads_kv));
    for (int64_t i = begin; i < end && !sa_worker_stopped(worker); i++) {
        if (held) {
            turn_held(call, &rope, stream, i);
        } else {
            turn_token(call, &rope, stream, i);
        }
    }
}

static sa_status turn_part(const sa_kv_call *call)
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

static sa_run held_run(const sa_kv_call *call, int64_t stream, int64_t slot, int64_t count, sa_run_kind kind)
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

sa_run sa_kv_new_run(const sa_kv_call *call, int64_t stream, int64_t token, int64_t count, sa_run_kind kind)
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
static void fill_runs(const sa_kv_call *call, int64_t stream, sa_row *row)
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
    add_run(row, sa_kv_new_run(call, stream, 0, pinned_new, SA_RUN_PINNED));
    add_run(row, sa_kv_new_run(call, stream, pinned_new, fresh - pinned_new, SA_RUN_PLAIN));
}

/* ALiBi: how far the tokens held lie before the first new one. */
static void fill_back(const sa_kv_call *call, int64_t stream)
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

static void fill_row(const sa_kv_call *call, int64_t stream, sa_row *row)
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
    row->query_count = sa_kv_new_tokens(call, b);
    row->query_total = call->count;
    row->position = first_position(call->cache, stream);
    row->first_head = head;
    fill_runs(call, stream, row);
}

static sa_status attend_part(const sa_kv_call *call)
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

/* --- one call ----------------------------------------------------------------------------------------------------------------------------------- */

static sa_status run_parts(sa_kv_call *call)
{
    const int64_t tokens = call->params->query.shape[2];
    int64_t polled_at = 0;
    for (call->first = 0; call->first == 0 || call->first < tokens; call->first += call->most) {
        call->count = min_i64(call->most, tokens - call->first);
        call->first_part = call->first == 0;
        SA_TRY(sa_pool_ask(call->poll, &polled_at));
        SA_TRY(turn_part(call));
        SA_TRY(attend_part(call));
        SA_TRY(sa_kv_evict_part(call));
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
    sa_kv_call call = {.cache = cache, .params = params, .scorer = scorer, .poll = poll, .keep_mass = keep_mass};
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
