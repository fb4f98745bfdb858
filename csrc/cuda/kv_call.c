/* A call of KVCache on a device: in parts of at most config.part tokens, each appended to the slots, attended to, and evicted from. */
#include <stdint.h>

#include "../core/integers.h"
#include "../core/kv_check.h"
#include "../core/policy.h"
#include "kernels.h"
#include "kv_store.h"

enum { ALIGNMENT = 256 };

sa_status sa_cuda_kv_check(const sa_cuda_kv *store, const sa_attend_params *params)
{
    SA_TRY(sa_check_kv_call(&store->config, NULL, params));
    if (params->alibi_slopes.data != NULL) {
        return sa_fail(SA_NOT_IMPLEMENTED, "%s(): alibi_slopes with a cache on CUDA; the backends that have it: cpu", params->function);
    }
    return SA_OK;
}

/* --- planning ---------------------------------------------------------------------------------------------------------------------- */

static sa_tensor slots_tensor(const sa_cuda_kv *store, void *data, int64_t depth, int64_t count)
{
    const sa_cuda_slots *v = &store->view;
    return (sa_tensor){
        .data = data,
        .shape = {v->batch, v->heads_kv, min_i64(v->slots + count, v->stride), depth},
        .stride = {v->heads_kv * v->stride * depth, v->stride * depth, depth, 1},
        .rank = 4,
        .dtype = store->config.dtype,
    };
}

static sa_ints device_numbers(const int64_t *data, int64_t rows, int64_t columns)
{
    return (sa_ints){
        .data = data,
        .shape = {rows, columns},
        .rank = columns > 0 ? 2 : 1,
        .device = {.data = data, .stride = {columns > 0 ? columns : 1, 1}, .type = SA_NUMBER_I64},
    };
}

static sa_cuda_tensor part_of(const sa_tensor *from)
{
    return (sa_cuda_tensor){from->data, from->stride[0], from->stride[1], from->stride[2]};
}

/* Attention of a part of `count` tokens: an ordinary call over the slots. */
static sa_status plan_part(const sa_cuda_kv_work *work, int64_t count, void *stream, sa_cuda_work *part)
{
    const sa_cuda_kv *store = work->store;
    sa_attend_params params = work->params;
    params.causal = true;
    params.pinned = store->config.pinned;
    params.query.shape[2] = params.output.shape[2] = count;
    if (work->slots.pairs > 0 && !store->config.applied) { /* the address comes with the memory */
        const int64_t heads = params.query.shape[1], depth = store->config.depth;
        params.query.stride[0] = heads * count * depth;
        params.query.stride[1] = count * depth;
        params.query.stride[2] = depth;
    }
    params.key = slots_tensor(store, store->view.keys, store->config.depth, count);
    params.value = slots_tensor(store, store->view.values, store->config.depth_v, count);
    params.lengths = device_numbers(store->view.counts, store->config.batch, store->config.heads_kv);
    params.query_lengths = params.query_lengths.data != NULL ? device_numbers(store->view.fresh, store->config.batch, 0) : (sa_ints){0};
    params.mass = work->weights_offset >= 0 && !work->each ? (float *)(uintptr_t)ALIGNMENT : NULL;
    params.lse = work->lse_offset >= 0 ? (float *)(uintptr_t)ALIGNMENT : work->params.lse;
    const sa_cuda_beside slots = {.counters = store->counters, .counter_count = store->counter_count};
    return sa_cuda_begin_slots(&params, &slots, stream, part);
}

/* What a step that lets a token leave needs beside the problem. */
static void describe_eviction(const sa_cuda_slots *slots, sa_cuda_eviction *e)
{
    e->mass = slots->mass;
    e->own = slots->own;
    e->positions = slots->positions;
    e->held = slots->held;
    e->lengths = slots->lengths;
    e->evicted_at = slots->evicted_at;
    e->budgets = slots->budgets;
    e->ledgers = slots->ledgers;
    e->log = slots->log;
    e->stride = slots->stride;
    e->log_size = slots->log_size;
    e->recent = slots->recent;
    e->decay = slots->decay;
    e->kind = slots->kind;
}

/* A step whose attention also appends; part->problem.append says whether it does, and .evicts whether it lets a token leave as well. */
static sa_status plan_step(const sa_cuda_kv_work *work, void *stream, sa_cuda_work *part)
{
    const sa_cuda_kv *store = work->store;
    sa_attend_params params = work->params;
    const sa_tensor keys = slots_tensor(store, store->view.keys, store->config.depth, 1);
    const sa_tensor values = slots_tensor(store, store->view.values, store->config.depth_v, 1);
    const int32_t kind = store->view.kind;
    const bool evicts = kind == SA_POLICY_SINK_WINDOW || kind == SA_POLICY_H2O || kind == SA_POLICY_H2O_NORM || kind == SA_POLICY_H2O_EMA;
    const sa_cuda_beside slots = {&keys, &values, evicts, store->counters, store->counter_count};
    params.causal = true;
    params.pinned = store->config.pinned;
    params.lengths = device_numbers(store->view.held, store->config.batch, store->config.heads_kv);
    params.mass = work->weights_offset >= 0 ? (float *)(uintptr_t)ALIGNMENT : NULL;
    return sa_cuda_begin_slots(&params, &slots, stream, part);
}

static int64_t reserve(sa_cuda_kv_work *work, int64_t bytes)
{
    const int64_t offset = work->memory_bytes;
    work->memory_bytes += round_up(bytes, ALIGNMENT);
    return bytes > 0 ? offset : -1;
}

static void describe_slots(sa_cuda_kv_work *work)
{
    const sa_attend_params *params = &work->params;
    sa_cuda_slots *slots = &work->slots;
    *slots = work->store->view;
    slots->key = part_of(&params->key);
    slots->value = part_of(&params->value);
    slots->query = part_of(&params->query);
    slots->group = params->query.shape[1] / slots->heads_kv;
    slots->mass_out = params->mass;
    slots->keep_call = params->mass != NULL;
    slots->lse_length = params->query.shape[2];
    slots->pairs = work->store->config.applied ? 0 : slots->pairs;
    if (params->query_lengths.data != NULL) {
        const sa_device_numbers *device = &params->query_lengths.device;
        slots->new_lengths = (sa_cuda_numbers){.data = device->data, .stride = {device->stride[0]}, .type = device->type, .given = 1};
    }
}

static void lay_out_memory(sa_cuda_kv_work *work, bool tracks)
{
    const sa_attend_params *params = &work->params;
    const sa_cuda_slots *slots = &work->slots;
    const int64_t streams = slots->batch * slots->heads_kv, rows = slots->batch * params->query.shape[1] * work->most;
    const bool lse_apart = work->each || (work->parts > 1 && params->lse != NULL), staged = slots->new_lengths.given && slots->new_lengths.data == NULL;
    work->weights_offset = reserve(work, tracks ? streams * (work->each ? work->most : 1) * slots->stride * (int64_t)sizeof(float) : 0);
    work->evict_shared = SA_KV_EVICT_SHARED + SA_KV_SCRATCH(slots->stride);
    const bool fits = work->evict_shared <= work->scope.device->shared_limit;
    work->evict_shared = fits ? work->evict_shared : SA_KV_EVICT_SHARED;
    work->scratch_offset = reserve(work, fits || work->step ? 0 : streams * SA_KV_SCRATCH(slots->stride));
    work->turned_offset = reserve(work, slots->pairs > 0 ? rows * slots->depth * sa_dtype_size(work->store->config.dtype) : 0);
    work->lse_offset = reserve(work, lse_apart ? rows * (int64_t)sizeof(float) : 0);
    work->lengths_offset = reserve(work, staged ? slots->batch * (int64_t)sizeof(int64_t) : 0);
}

static sa_status plan(sa_cuda_kv_work *work, void *stream)
{
    const sa_kv_config *config = &work->store->config;
    const int64_t tokens = work->params.query.shape[2];
    const sa_mass_need need = sa_policy_need(&config->policy);
    work->most = clamp_i64(tokens, 1, config->part);
    work->parts = max_i64(ceil_div(tokens, work->most), 1);
    work->each = need == SA_MASS_EACH && work->most > 1;
    work->step = tokens == 1 && config->every == 1 && work->params.mass == NULL && sa_policy_scores_alone(config->policy.kind);
    work->appends = work->evicts = false;
    work->memory_bytes = 0;
    describe_slots(work);
    lay_out_memory(work, need != SA_MASS_NONE || config->track_mass || work->params.mass != NULL);
    if (work->step && work->slots.pairs == 0) {
        SA_TRY(plan_step(work, stream, &work->full));
        work->appends = work->full.problem.append;
        work->evicts = work->appends && work->full.problem.evicts;
    }
    if (!work->appends) {
        SA_TRY(plan_part(work, min_i64(tokens, work->most), stream, &work->full));
    }
    const int64_t rest = tokens - (work->parts - 1) * work->most;
    work->shorter = rest != min_i64(tokens, work->most);
    if (work->shorter) {
        SA_TRY(plan_part(work, rest, stream, &work->last));
    }
    work->attention_offset = work->memory_bytes;
    (void)reserve(work, max_i64(work->full.memory_bytes, work->shorter ? work->last.memory_bytes : 0));
    return SA_OK;
}

sa_status sa_cuda_kv_plan(sa_cuda_kv *store, const sa_attend_params *params, void *stream, sa_cuda_kv_work *work)
{
    work->store = store;
    work->params = *params;
    SA_TRY(sa_device_enter(params->function, params->device, &work->scope));
    work->full.scope = work->last.scope = work->scope;
    const sa_status status = plan(work, stream);
    if (status != SA_OK) {
        sa_device_leave(&work->scope);
    }
    return status;
}

/* --- running ----------------------------------------------------------------------------------------------------------------------- */

static sa_status launch_slots(const sa_cuda_kv_work *work, int kernel, int64_t grid, int64_t block, int64_t shared, sa_cuda_slots *slots, void *stream)
{
    const sa_cuda_launch launch = {sa_cuda_kernel_count + kernel, (uint32_t)grid, (uint32_t)block, 1, (uint32_t)shared, (uint32_t)slots->waits};
    return sa_device_launch(work->params.function, &work->scope, &launch, slots, stream);
}

/* The addresses that a part of `count` tokens gives to its attention. */
static void address(const sa_cuda_kv_work *work, sa_cuda_work *part)
{
    const sa_cuda_slots *slots = &work->slots;
    const sa_tensor *query = &work->params.query, *output = &work->params.output;
    const int64_t size = sa_dtype_size(work->store->config.dtype);
    sa_cuda_problem *problem = &part->problem;
    problem->query.data = slots->turned != NULL ? slots->turned : (char *)query->data + slots->first * query->stride[2] * size;
    problem->output.data = (char *)output->data + slots->first * output->stride[2] * size;
    problem->lse = work->part_lse != NULL ? work->part_lse : work->params.lse;
    problem->mass = work->each ? NULL : slots->weights;
    problem->mass_length = slots->stride;
}

/* What the queries of a part gave, query by query. */
static sa_status weigh(const sa_cuda_kv_work *work, const sa_cuda_work *part, void *stream)
{
    sa_cuda_problem problem = part->problem;
    problem.mass = work->slots.weights;
    const int64_t tiles = ceil_div(problem.kv_length, SA_KV_WEIGHT_KEYS);
    const sa_cuda_launch launch = {sa_cuda_kernel_count + SA_KERNEL_KV_WEIGHTS, (uint32_t)(tiles * problem.batch * problem.heads_kv),
                                   SA_KV_WEIGHT_THREADS, 1, SA_KV_WEIGHT_SHARED, 0};
    return sa_device_launch(work->params.function, &work->scope, &launch, &problem, stream);
}

static int step_kernel(int32_t kind)
{
    return kind == SA_POLICY_RANDOM   ? SA_KERNEL_KV_STEP_DRAWN
           : kind == SA_POLICY_K_NORM ? SA_KERNEL_KV_STEP_K_NORM
                                      : SA_KERNEL_KV_STEP + kind; /* those before SnapKV, in order */
}

/* One token: the attention writes it into its slot, or a kernel before it does; kv_step has the rest, where the attention has it not. */
static sa_status run_step(sa_cuda_kv_work *work, void *memory, void *stream)
{
    sa_cuda_slots *slots = &work->slots;
    const int64_t streams = slots->batch * slots->heads_kv, vectors = slots->turned != NULL ? slots->group + 1 : 1;
    slots->weight_rows = 1;
    if (!work->appends) {
        SA_TRY(launch_slots(work, SA_KERNEL_KV_APPEND, streams * ceil_div(vectors, SA_KV_APPEND_WARPS), 32 * SA_KV_APPEND_WARPS, 0, slots, stream));
    }
    address(work, &work->full);
    if (work->evicts) {
        describe_eviction(slots, &work->full.eviction);
    }
    SA_TRY(sa_cuda_run(&work->full, memory, stream));
    if (work->evicts) {
        return SA_OK;
    }
    slots->waits = work->appends && sa_device_has_wgmma(&work->scope); /* the attention lets it begin */
    const int64_t threads = slots->slots <= 1024 ? 128 : slots->slots <= 2048 ? 256 : SA_KV_STEP_THREADS;
    return launch_slots(work, step_kernel(slots->kind), streams, threads, SA_KV_STEP_SHARED, slots, stream);
}

static sa_status run_part(sa_cuda_kv_work *work, sa_cuda_work *part, void *memory, void *stream)
{
    sa_cuda_slots *slots = &work->slots;
    const int64_t streams = slots->batch * slots->heads_kv, vectors = slots->tokens * (slots->turned != NULL ? slots->group + 1 : 1);
    const int64_t ctas = max_i64(ceil_div(vectors, SA_KV_APPEND_WARPS), 1);
    slots->weight_rows = work->each ? slots->tokens : 1;
    SA_TRY(launch_slots(work, SA_KERNEL_KV_APPEND, streams * ctas, 32 * SA_KV_APPEND_WARPS, 0, slots, stream));
    address(work, part);
    SA_TRY(sa_cuda_run(part, memory, stream));
    if (work->each && slots->tokens > 0) {
        SA_TRY(weigh(work, part, stream));
    }
    return launch_slots(work, SA_KERNEL_KV_EVICT, streams, 32 * SA_KV_EVICT_WARPS, work->evict_shared, slots, stream);
}

static void *at_offset(void *memory, int64_t offset)
{
    return offset >= 0 ? (char *)memory + offset : NULL;
}

sa_status sa_cuda_kv_run(sa_cuda_kv_work *work, void *memory, void *stream)
{
    sa_cuda_slots *slots = &work->slots;
    const sa_ints *lengths = &work->params.query_lengths;
    const int64_t tokens = work->params.query.shape[2], attention = work->attention_offset;
    slots->weights = at_offset(memory, work->weights_offset);
    slots->scratch = at_offset(memory, work->scratch_offset);
    slots->turned = at_offset(memory, work->turned_offset);
    work->part_lse = at_offset(memory, work->lse_offset);
    slots->lse_out = work->params.lse;
    slots->lse = work->params.lse != NULL ? work->part_lse : NULL;
    if (work->lengths_offset >= 0) {
        void *staged = at_offset(memory, work->lengths_offset);
        slots->new_lengths = (sa_cuda_numbers){.data = staged, .stride = {1}, .type = SA_NUMBER_I64, .given = 1};
        SA_TRY(sa_device_stage(work->params.function, &work->scope, staged, lengths->data, slots->batch * (int64_t)sizeof(int64_t), stream));
    }
    for (int64_t index = 0; index < work->parts; index++) {
        slots->first = index * work->most;
        slots->tokens = min_i64(tokens - slots->first, work->most);
        slots->first_part = index == 0;
        SA_TRY(work->step ? run_step(work, (char *)memory + attention, stream)
                          : run_part(work, work->shorter && index + 1 == work->parts ? &work->last : &work->full, (char *)memory + attention, stream));
    }
    return slots->mass_out == NULL
               ? SA_OK
               : launch_slots(work, SA_KERNEL_KV_MASS, slots->batch * slots->heads_kv, 32 * SA_KV_EVICT_WARPS, 0, slots, stream);
}
