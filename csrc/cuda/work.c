#include "work.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "../core/integers.h"
#include "counters.h"
#include "kernels.h"
#include "maps.h"

enum { ALIGNMENT = 256 };
static const int64_t WIDEST = (int64_t)1 << 53; /* windows beyond are all alike; a double holds it exactly */

/* --- the problem ----------------------------------------------------------------------------------------------------------------- */

static sa_cuda_tensor tensor_of(const sa_tensor *from)
{
    if (from->rank == 0) {
        return (sa_cuda_tensor){0};
    }
    const int skip = from->rank == 4 ? 1 : 0; /* learned rows have no batch */
    return (sa_cuda_tensor){.data = from->data, .batch = skip ? from->stride[0] : 0, .head = from->stride[skip], .token = from->stride[skip + 1]};
}

/* Strides of the last axes of an array over the two axes of a declaration; `rank` 1 arrays lie along `axis`. */
static void place(sa_cuda_numbers *numbers, const int64_t *stride, int rank, int axis)
{
    if (rank == 2) {
        numbers->stride[0] = stride[0];
        numbers->stride[1] = stride[1];
    } else if (rank == 1) {
        numbers->stride[axis] = stride[0];
    }
}

/* An array on the device, by its address; one of the host is noted and gets its address when the memory is known. */
static sa_cuda_numbers array_of(const sa_device_numbers *device, const int64_t *shape, int rank, int axis)
{
    sa_cuda_numbers numbers = {.given = 1};
    if (device->data != NULL) {
        numbers.data = device->data;
        numbers.type = device->type;
        place(&numbers, device->stride, rank, axis);
    } else {
        const int64_t dense[2] = {rank == 2 ? shape[1] : 1, 1};
        place(&numbers, dense, rank, axis);
    }
    return numbers;
}

/* `address` is where the kernels look for it. */
static void stage_later(sa_cuda_work *work, const void **address, const void *source, const int64_t *shape, int rank, int64_t size)
{
    int64_t bytes = size;
    for (int i = 0; i < rank; i++) {
        bytes *= shape[i];
    }
    *address = source; /* until its copy has an address: no number for all */
    work->staged[work->staged_count++] = (sa_staged){.address = address, .source = source, .bytes = bytes};
}

static void take_floats(sa_cuda_work *work, const sa_floats *from, int axis, sa_cuda_numbers *to)
{
    if (from->data == NULL) {
        return;
    }
    *to = array_of(&from->device, from->shape, from->rank, axis);
    if (from->device.data == NULL && from->rank == 0) {
        to->value = (double)from->data[0];
    } else if (from->device.data == NULL) {
        to->type = SA_NUMBER_F32;
        stage_later(work, &to->data, from->data, from->shape, from->rank, sizeof(float));
    }
}

static void take_ints(sa_cuda_work *work, const sa_ints *from, sa_cuda_numbers *to)
{
    if (from->data == NULL) {
        return;
    }
    *to = array_of(&from->device, from->shape, from->rank, 0);
    if (from->device.data == NULL && from->rank == 0) {
        to->value = (double)clamp_i64(from->data[0], -WIDEST, WIDEST);
    } else if (from->device.data == NULL) {
        to->type = SA_NUMBER_I64;
        stage_later(work, &to->data, from->data, from->shape, from->rank, sizeof(int64_t));
    }
}

static void take_arrays(const sa_attend_params *params, sa_cuda_work *work)
{
    sa_cuda_problem *problem = &work->problem;
    take_floats(work, &params->sink_logits, 0, &problem->sink_logits);
    take_floats(work, &params->sink_bias, 0, &problem->sink_bias);
    take_floats(work, &params->alibi_slopes, 1, &problem->alibi_slopes);
    take_ints(work, &params->window, &problem->window);
    take_ints(work, &params->starts, &problem->starts);
    take_ints(work, &params->lengths, &problem->lengths);
    take_ints(work, &params->query_lengths, &problem->query_lengths);
    take_ints(work, &params->cumulative_query, &problem->cumulative_query);
    take_ints(work, &params->cumulative_key, &problem->cumulative_key);
}

static void describe(const sa_attend_params *params, const sa_cuda_store *cache, sa_cuda_problem *problem)
{
    const sa_tensor *query = &params->query, *key = &params->key, *value = &params->value;
    const int64_t slots = cache != NULL ? sa_cuda_store_slots(cache) : 0;
    *problem = (sa_cuda_problem){
        .query = tensor_of(query),
        .key = tensor_of(key),
        .value = tensor_of(value),
        .output = tensor_of(&params->output),
        .sink_query = tensor_of(&params->sink_query),
        .sink_key = tensor_of(&params->sink_key),
        .sink_value = tensor_of(&params->sink_value),
        .lse = params->lse,
        .mass = params->mass,
        .batch = query->shape[0],
        .heads_q = query->shape[1],
        .heads_kv = key->shape[1],
        .query_length = query->shape[2],
        .kv_length = key->shape[2],
        .depth = query->shape[3],
        .depth_v = value->shape[3],
        .sequences = params->cumulative_query.data != NULL ? params->cumulative_query.shape[0] - 1 : 0,
        .logits = params->sink_logits.rank == 2 ? params->sink_logits.shape[1] : 1,
        .pinned = params->pinned,
        .learned = params->sink_key.rank ? params->sink_key.shape[1] : 0,
        .mass_length = cache != NULL ? slots : key->shape[2],
        .mass_queries = params->mass_queries,
        .scale = (float)(params->has_scale ? params->scale : 1.0 / sqrt((double)query->shape[3])),
        .softcap = params->has_softcap ? (float)params->softcap : 0.0f,
        .dtype = (int32_t)query->dtype,
        .causal = cache != NULL || params->causal,
        .mass_maximum = params->mass_reduce == SA_MASS_MAX,
    };
    if (cache != NULL) {
        problem->cache = cache->view;
    }
}

/* --- the device's cluster limit, once ---------------------------------------------------------------------------------------------- */

static sa_status full_facts(const char *function, const sa_device_scope *scope, sa_cuda_device *facts)
{
    static atomic_int limits[SA_MAX_DEVICES]; /* + 1; 0: not known */
    int32_t limit = atomic_load_explicit(&limits[scope->ordinal], memory_order_relaxed) - 1;
    if (limit < 0) {
        SA_TRY(sa_device_cluster_limit(function, scope, &limit));
        atomic_store_explicit(&limits[scope->ordinal], limit + 1, memory_order_relaxed);
    }
    *facts = *scope->device;
    facts->cluster_limit = limit;
    facts->wgmma = sa_device_has_wgmma(scope);
    return SA_OK;
}

/* --- a call ------------------------------------------------------------------------------------------------------------------------ */

/* Counters of a cache (own), of the stream, or of the graph; where there are none, some of the caller's memory, which is cleared. */
static sa_status find_counters(uint32_t *own, int64_t own_count, void *stream, sa_cuda_work *work)
{
    const int64_t count = work->plan.counter_count;
    work->counters = NULL;
    if (count == 0) {
        return SA_OK;
    }
    if (count <= own_count) {
        work->counters = own;
        return SA_OK;
    }
    return sa_counters_take(work->function, &work->scope, stream, count, &work->counters);
}

static void lay_out_memory(sa_cuda_work *work)
{
    int64_t bytes = round_up(work->plan.scratch_bytes, ALIGNMENT);
    work->counter_offset = bytes;
    if (work->counters == NULL) {
        bytes += round_up(work->plan.counter_count * (int64_t)sizeof(uint32_t), ALIGNMENT);
    }
    for (int i = 0; i < work->staged_count; i++) {
        work->staged[i].offset = bytes;
        bytes += round_up(work->staged[i].bytes, ALIGNMENT);
    }
    work->memory_bytes = bytes;
}

static void clear_first(sa_cuda_work *work, void *data, int64_t offset, int64_t bytes)
{
    if (bytes > 0) {
        work->cleared[work->cleared_count++] = (sa_cleared){data, offset, bytes};
    }
}

static void clear_mass(sa_cuda_work *work)
{
    const sa_cuda_problem *p = &work->problem;
    if (p->mass != NULL && p->weighs == SA_WEIGHS_NONE) {
        clear_first(work, p->mass, 0, p->batch * p->heads_kv * p->mass_length * (int64_t)sizeof(float));
    }
}

static sa_status too_large(const sa_cuda_work *work)
{
    return sa_fail(SA_VALUE_ERROR, "%s(): q has %" PRId64 " rows of %" PRId64 " heads and %" PRId64 " queries, more than a launch can hold",
                   work->function, work->problem.batch, work->problem.heads_q, work->problem.query_length);
}

static sa_status plan(const sa_attend_params *params, const sa_cuda_store *cache, const sa_cuda_beside *slots, sa_cuda_work *work)
{
    sa_cuda_device facts;
    SA_TRY(full_facts(params->function, &work->scope, &facts));
    describe(params, cache, &work->problem);
    if (slots != NULL && slots->keys != NULL) {
        work->problem.slots = 1;
        work->problem.evicts = slots->evicts;
        work->problem.held_key = tensor_of(slots->keys);
        work->problem.held_value = tensor_of(slots->values);
        work->problem.kv_length = work->problem.mass_length = slots->keys->shape[2];
    }
    work->staged_count = work->cleared_count = 0;
    take_arrays(params, work);
    return sa_cuda_choose(&work->problem, &facts, &work->plan) != 0 ? too_large(work) : SA_OK;
}

static sa_status plan_call(const sa_attend_params *params, const sa_cuda_store *cache, void *stream, sa_cuda_work *work)
{
    SA_TRY(plan(params, cache, NULL, work));
    SA_TRY(find_counters(cache != NULL ? cache->counters : NULL, cache != NULL ? cache->counter_count : 0, stream, work));
    lay_out_memory(work);
    clear_mass(work);
    return SA_OK;
}

sa_status sa_cuda_begin(const sa_attend_params *params, const sa_cuda_store *cache, void *stream, sa_cuda_work *work)
{
    work->function = params->function;
    SA_TRY(sa_device_enter(params->function, params->device, &work->scope));
    const sa_status status = plan_call(params, cache, stream, work);
    if (status != SA_OK) {
        sa_device_leave(&work->scope);
    }
    return status;
}

sa_status sa_cuda_begin_slots(const sa_attend_params *params, const sa_cuda_beside *slots, void *stream, sa_cuda_work *work)
{
    work->function = params->function;
    SA_TRY(plan(params, NULL, slots, work));
    SA_TRY(find_counters(slots->counters, slots->counter_count, stream, work));
    lay_out_memory(work);
    return SA_OK;
}

/* --- mass alone -------------------------------------------------------------------------------------------------------------------- */

static void take_rows(sa_cuda_work *work, const sa_floats *from, sa_cuda_rows *to)
{
    if (from->data == NULL) {
        return;
    }
    const int64_t dense[3] = {from->shape[1] * from->shape[2], from->shape[2], 1};
    const bool on_device = from->device.data != NULL;
    const int64_t *stride = on_device ? from->device.stride : dense;
    *to = (sa_cuda_rows){from->device.data, stride[0], stride[1], stride[2], on_device ? from->device.type : SA_NUMBER_F32, 0};
    if (!on_device) {
        stage_later(work, &to->data, from->data, from->shape, from->rank, sizeof(float));
    }
}

static sa_status plan_mass(const sa_mass_params *params, sa_cuda_work *work)
{
    sa_cuda_device facts;
    SA_TRY(full_facts(work->function, &work->scope, &facts));
    describe(&params->attend, NULL, &work->problem);
    work->staged_count = work->cleared_count = 0;
    work->counters = NULL;
    take_arrays(&params->attend, work);
    take_rows(work, &params->lse, &work->problem.row_lse);
    take_rows(work, &params->row_weights, &work->problem.row_weights);
    if (sa_cuda_choose_mass(&work->problem, &facts, &work->plan) != 0) {
        return too_large(work);
    }
    lay_out_memory(work);
    clear_mass(work);
    return SA_OK;
}

sa_status sa_cuda_begin_mass(const sa_mass_params *params, sa_cuda_work *work)
{
    work->function = params->attend.function;
    SA_TRY(sa_device_enter(work->function, params->attend.device, &work->scope));
    const sa_status status = plan_mass(params, work);
    if (status != SA_OK) {
        sa_device_leave(&work->scope);
    }
    return status;
}

/* --- gradients --------------------------------------------------------------------------------------------------------------------- */

static sa_cuda_tensor rows_of(const sa_tensor *from)
{
    return from->rank == 0 ? (sa_cuda_tensor){0} : (sa_cuda_tensor){from->data, from->stride[0], from->stride[1], from->stride[2]};
}

static void describe_backward(const sa_attend_backward_params *params, sa_cuda_backward *b)
{
    const sa_cuda_problem forward = b->forward;
    const int rank = params->attend.sink_logits.rank;
    *b = (sa_cuda_backward){
        .forward = forward,
        .output_gradient = tensor_of(&params->output_gradient),
        .lse = rows_of(&params->lse),
        .lse_gradient = rows_of(&params->lse_gradient),
        .query_gradient = params->query_gradient,
        .key_gradient = params->key_gradient,
        .value_gradient = params->value_gradient,
        .sink_query_gradient = params->sink_query_gradient,
        .sink_key_gradient = params->sink_key_gradient,
        .sink_value_gradient = params->sink_value_gradient,
        .sink_logits_gradient = params->sink_logits_gradient,
        .sink_bias_gradient = params->sink_bias_gradient,
        .logit_count = params->attend.sink_logits.data == NULL ? 0 : rank == 0 ? 1 : forward.heads_q * forward.logits,
        .logits_apart = rank > 0,
    };
    b->forward.output = tensor_of(&params->output);
}

/* What no kernel writes: gradients of keys that belong to no row, or all of them where there is nothing to launch. */
static void clear_gradients(sa_cuda_work *work)
{
    const sa_cuda_backward *b = &work->backward;
    const sa_cuda_problem *p = &b->forward;
    const int64_t size = p->dtype == SA_CUDA_F32 ? 4 : 2, keys = p->batch * p->heads_kv * p->kv_length, learned = p->heads_kv * p->learned;
    const bool nothing = work->plan.launch_count == 0;
    clear_first(work, NULL, b->bias_offset, nothing ? 0 : b->bias_bytes);
    clear_first(work, NULL, b->sums_offset, b->sums_bytes);
    if (b->sparse || nothing) {
        clear_first(work, b->key_gradient, 0, keys * p->depth * size);
        clear_first(work, b->value_gradient, 0, keys * p->depth_v * size);
    }
    if (nothing) { /* no queries */
        clear_first(work, b->sink_key_gradient, 0, learned * p->depth * size);
        clear_first(work, b->sink_value_gradient, 0, learned * p->depth_v * size);
        clear_first(work, b->sink_logits_gradient, 0, b->logit_count * (int64_t)sizeof(float));
        clear_first(work, b->sink_bias_gradient, 0, p->sink_bias.given ? p->heads_q * p->pinned * (int64_t)sizeof(float) : 0);
    }
}

static sa_status plan_backward(const sa_attend_backward_params *params, sa_cuda_work *work)
{
    describe(&params->attend, NULL, &work->problem);
    describe_backward(params, &work->backward);
    work->backward.one_pass = !params->deterministic && sa_device_has_wgmma(&work->scope);
    work->staged_count = work->cleared_count = 0;
    work->counters = NULL;
    take_arrays(&params->attend, work);
    if (sa_cuda_choose_backward(&work->backward, &work->plan) != 0) {
        return too_large(work);
    }
    lay_out_memory(work);
    clear_gradients(work);
    return SA_OK;
}

sa_status sa_cuda_begin_backward(const sa_attend_backward_params *params, sa_cuda_work *work)
{
    work->function = params->attend.function;
    SA_TRY(sa_device_enter(work->function, params->attend.device, &work->scope));
    const sa_status status = plan_backward(params, work);
    if (status != SA_OK) {
        sa_device_leave(&work->scope);
    }
    return status;
}

/* --- both -------------------------------------------------------------------------------------------------------------------------- */

sa_status sa_cuda_run(sa_cuda_work *work, void *memory, void *stream)
{
    const char *function = work->function;
    work->problem.scratch = memory;
    work->problem.counters = work->counters;
    if (work->counters == NULL && work->plan.counter_count > 0) {
        work->problem.counters = (uint32_t *)(void *)((char *)memory + work->counter_offset);
        SA_TRY(sa_device_fill(function, work->problem.counters, 0, work->plan.counter_count * (int64_t)sizeof(uint32_t), stream));
    }
    for (int i = 0; i < work->staged_count; i++) {
        const sa_staged *staged = &work->staged[i];
        *staged->address = (char *)memory + staged->offset;
        SA_TRY(sa_device_stage(function, &work->scope, (char *)memory + staged->offset, staged->source, staged->bytes, stream));
    }
    for (int i = 0; i < work->cleared_count; i++) {
        const sa_cleared *cleared = &work->cleared[i];
        void *data = cleared->data != NULL ? cleared->data : (char *)memory + cleared->offset;
        SA_TRY(sa_device_fill(function, data, 0, cleared->bytes, stream));
    }
    if (work->plan.form >= 0) {
        SA_TRY(sa_device_map(function, &sa_cuda_forms[work->plan.form], &work->prefill));
    }
    for (int i = 0; i < work->plan.launch_count; i++) {
        SA_TRY(sa_device_launch(function, &work->scope, &work->plan.launches[i], &work->problem, stream));
    }
    return SA_OK;
}
