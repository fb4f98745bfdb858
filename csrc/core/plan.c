#include "plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double log_sum_exp(const float *terms, int64_t count)
{
    double largest = -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        largest = (double)terms[i] > largest ? (double)terms[i] : largest; /* gcc 12 fails on fmax here, on aarch64 */
    }
    if (!isfinite(largest)) {
        return largest;
    }
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        sum += exp((double)terms[i] - largest);
    }
    return largest + log(sum);
}

static double sink_of_head(const sa_floats *logits, int64_t head)
{
    if (logits->data == NULL) {
        return -INFINITY;
    }
    if (logits->rank == 0) {
        return (double)logits->data[0];
    }
    const int64_t count = logits->rank == 2 ? logits->shape[1] : 1;
    return log_sum_exp(logits->data + head * count, count);
}

static int64_t window_of_head(const sa_ints *window, int64_t head)
{
    if (window->data == NULL) {
        return SA_NO_WINDOW;
    }
    const int64_t width = window->data[window->rank == 0 ? 0 : head];
    return width == 0 ? SA_NO_WINDOW : min_i64(width, SA_NO_WINDOW);
}

static sa_problem describe(const sa_attend_params *params)
{
    const sa_tensor *query = &params->query, *sink_query = &params->sink_query, *output = &params->output;
    return (sa_problem){
        .dtype = query->dtype,
        .heads_q = query->shape[1],
        .heads_kv = params->key.shape[1],
        .depth = query->shape[3],
        .depth_v = params->value.shape[3],
        .query_head_stride = query->stride[1],
        .query_stride = query->stride[2],
        .sink_query_head_stride = sink_query->rank ? sink_query->stride[1] : 0,
        .sink_query_stride = sink_query->rank ? sink_query->stride[2] : 0,
        .output_head_stride = output->stride[1],
        .output_stride = output->stride[2],
        .lse_head_stride = query->shape[2],
        .mass_head_stride = params->key.shape[2],
        .scale = (float)(params->has_scale ? params->scale : 1.0 / sqrt((double)query->shape[3])),
        .softcap = params->has_softcap ? (float)params->softcap : 0.0f,
        .causal = params->causal,
        .alibi = params->alibi_slopes.data != NULL,
        .sink_bias = params->sink_bias.data,
        .bias_stride = params->pinned,
        .pinned_query_limit = INT64_MAX,
        .mass_reduce = params->mass_reduce,
    };
}

sa_status sa_plan_begin(const sa_attend_params *params, int64_t row_count, sa_plan *plan)
{
    const int64_t heads = params->query.shape[1];
    const size_t row_bytes = (size_t)row_count * sizeof(sa_row);
    const size_t bytes = row_bytes + (size_t)heads * (sizeof(double) + sizeof(int64_t));
    plan->memory = calloc(1, bytes);
    if (plan->memory == NULL) {
        return sa_no_memory("the plan of a call", (long long)bytes);
    }
    double *sinks = (double *)(void *)((char *)plan->memory + row_bytes);
    int64_t *windows = (int64_t *)(void *)(sinks + heads);
    for (int64_t head = 0; head < heads; head++) {
        sinks[head] = sink_of_head(&params->sink_logits, head);
        windows[head] = window_of_head(&params->window, head);
    }
    plan->problem = describe(params);
    plan->problem.rows = plan->memory;
    plan->problem.row_count = row_count;
    plan->problem.sinks = sinks;
    plan->problem.windows = windows;
    return SA_OK;
}

void sa_plan_end(sa_plan *plan)
{
    free(plan->memory);
    plan->memory = NULL;
}

sa_run sa_learned_run(const sa_attend_params *params)
{
    const sa_tensor *key = &params->sink_key, *value = &params->sink_value;
    return (sa_run){
        .key = key->data,
        .value = value->data,
        .key_head_stride = key->stride[0],
        .key_stride = key->stride[1],
        .value_head_stride = value->stride[0],
        .value_stride = value->stride[1],
        .count = key->shape[1],
        .mass_index = -1,
        .kind = SA_RUN_LEARNED,
    };
}

int64_t sa_mass_first(const sa_attend_params *params, int64_t query_count)
{
    return params->mass_queries < 0 ? 0 : max_i64(query_count - params->mass_queries, 0);
}

static sa_run keys_at(const sa_attend_params *params, const sa_place *at, int64_t first, int64_t count, sa_run_kind kind)
{
    const sa_tensor *key = &params->key, *value = &params->value;
    const int64_t row = at->key_begin + first;
    return (sa_run){
        .key = sa_at(key->data, key->dtype, at->batch * key->stride[0] + row * key->stride[2]),
        .value = sa_at(value->data, value->dtype, at->batch * value->stride[0] + row * value->stride[2]),
        .key_head_stride = key->stride[1],
        .key_stride = key->stride[2],
        .value_head_stride = value->stride[1],
        .value_stride = value->stride[2],
        .count = count,
        .position = first,
        .mass_index = row,
        .kind = kind,
    };
}

static void fill_row(const sa_attend_params *params, const sa_problem *problem, const sa_place *at, sa_row *row)
{
    const sa_tensor *query = &params->query, *output = &params->output, *sink_query = &params->sink_query;
    row->query = sa_at(query->data, query->dtype, at->batch * query->stride[0] + at->query_begin * query->stride[2]);
    row->output = (void *)(uintptr_t)sa_at(output->data, output->dtype, at->batch * output->stride[0] + at->query_begin * output->stride[2]);
    if (sink_query->rank) {
        const int64_t offset = at->batch * sink_query->stride[0] + at->query_begin * sink_query->stride[2];
        row->sink_query = sa_at(sink_query->data, sink_query->dtype, offset);
    }
    if (params->lse != NULL) {
        row->lse = params->lse + at->batch * problem->heads_q * problem->lse_head_stride + at->query_begin;
    }
    if (params->mass != NULL) {
        row->mass = params->mass + at->batch * problem->heads_kv * problem->mass_head_stride;
    }
    if (problem->alibi) {
        row->alibi = params->alibi_slopes.data + (params->alibi_slopes.rank == 2 ? at->batch * problem->heads_q : 0);
    }
    row->query_count = at->query_count;
    row->query_total = at->query_total;
    row->position = at->key_count - at->query_count;
    row->mass_first = sa_mass_first(params, at->query_count);

    if (params->sink_key.rank && params->sink_key.shape[1] > 0) {
        row->runs[row->run_count++] = sa_learned_run(params);
    }
    /* Without a window, and with nothing that treats them apart, pinned keys are keys like the others. */
    const bool apart = params->window.data != NULL || sink_query->rank || params->sink_bias.data != NULL;
    const int64_t pinned = apart ? min_i64(params->pinned, at->key_count) : 0;
    if (pinned > 0) {
        row->runs[row->run_count++] = keys_at(params, at, 0, pinned, SA_RUN_PINNED);
    }
    if (at->key_count > pinned) {
        row->runs[row->run_count++] = keys_at(params, at, pinned, at->key_count - pinned, SA_RUN_PLAIN);
    }
}

static sa_place batch_row(const sa_attend_params *params, int64_t b)
{
    const int64_t query_total = params->query.shape[2], kv_length = params->key.shape[2];
    const int64_t start = params->starts.data != NULL ? params->starts.data[b] : 0;
    return (sa_place){
        .batch = b,
        .query_count = params->query_lengths.data != NULL ? params->query_lengths.data[b] : query_total,
        .query_total = query_total,
        .key_begin = start,
        .key_count = params->lengths.data != NULL ? params->lengths.data[b] : kv_length - start,
    };
}

static sa_place packed_row(const sa_attend_params *params, int64_t sequence)
{
    const int64_t *query = params->cumulative_query.data + sequence, *key = params->cumulative_key.data + sequence;
    return (sa_place){
        .query_begin = query[0],
        .query_count = query[1] - query[0],
        .query_total = query[1] - query[0],
        .key_begin = key[0],
        .key_count = key[1] - key[0],
    };
}

sa_place sa_place_of_row(const sa_attend_params *params, int64_t row)
{
    return params->cumulative_query.data != NULL ? packed_row(params, row) : batch_row(params, row);
}

sa_status sa_plan_attend(const sa_attend_params *params, sa_plan *plan)
{
    const bool packed = params->cumulative_query.data != NULL;
    const int64_t rows = packed ? params->cumulative_query.shape[0] - 1 : params->query.shape[0];
    SA_TRY(sa_plan_begin(params, rows, plan));
    sa_problem *problem = &plan->problem;
    for (int64_t i = 0; i < rows; i++) {
        const sa_place at = sa_place_of_row(params, i);
        fill_row(params, problem, &at, &problem->rows[i]);
    }
    if (params->mass != NULL) {
        const int64_t count = params->query.shape[0] * problem->heads_kv * problem->mass_head_stride;
        memset(params->mass, 0, (size_t)count * sizeof(float));
    }
    return SA_OK;
}
