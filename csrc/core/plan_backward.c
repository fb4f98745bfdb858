/* The plan of the gradients: places of the results, and the sums over rows that no kernel task could write alone. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "plan.h"

/* Of what is summed up, the numbers of a row. */
typedef struct row_sums {
    int64_t logits, bias, learned;
} row_sums;

static row_sums sums_of(const sa_attend_backward_params *params)
{
    const sa_attend_params *attend = &params->attend;
    const int64_t heads = attend->query.shape[1], learned = attend->sink_key.rank ? attend->sink_key.shape[1] : 0;
    return (row_sums){
        .logits = params->sink_logits_gradient != NULL ? heads : 0,
        .bias = params->sink_bias_gradient != NULL ? heads * attend->pinned : 0,
        .learned = attend->key.shape[1] * learned * (attend->query.shape[3] + attend->value.shape[3]),
    };
}

static const float *lse_at(const sa_tensor *lse, const sa_place *at)
{
    return lse->rank == 0 ? NULL : sa_at(lse->data, SA_F32, at->batch * lse->stride[0] + at->query_begin * lse->stride[2]);
}

/* Results are dense [batch, heads, length, depth]. */
static void *result_at(void *data, sa_dtype dtype, int64_t heads, int64_t length, int64_t depth, int64_t batch, int64_t token)
{
    return data == NULL ? NULL : (void *)(uintptr_t)sa_at(data, dtype, (batch * heads * length + token) * depth);
}

static sa_backward_row place_row(const sa_attend_backward_params *params, const sa_place *at)
{
    const sa_tensor *query = &params->attend.query, *key = &params->attend.key, *gradient = &params->output_gradient;
    const int64_t heads = query->shape[1], queries = query->shape[2], depth = query->shape[3], begin = at->query_begin;
    const int64_t heads_kv = key->shape[1], keys = key->shape[2], depth_v = params->attend.value.shape[3];
    return (sa_backward_row){
        .output_gradient = sa_at(gradient->data, gradient->dtype, at->batch * gradient->stride[0] + begin * gradient->stride[2]),
        .lse = lse_at(&params->lse, at),
        .lse_gradient = lse_at(&params->lse_gradient, at),
        .query_gradient = result_at(params->query_gradient, query->dtype, heads, queries, depth, at->batch, begin),
        .sink_query_gradient = result_at(params->sink_query_gradient, query->dtype, heads, queries, depth, at->batch, begin),
        .key_gradient = result_at(params->key_gradient, query->dtype, heads_kv, keys, depth, at->batch, at->key_begin),
        .value_gradient = result_at(params->value_gradient, query->dtype, heads_kv, keys, depth_v, at->batch, at->key_begin),
    };
}

static void describe(const sa_attend_backward_params *params, const sa_problem *forward, sa_backward *backward)
{
    const sa_tensor *query = &params->attend.query, *key = &params->attend.key, *gradient = &params->output_gradient;
    const bool lse_gradient = params->lse_gradient.rank != 0;
    *backward = (sa_backward){
        .forward = *forward,
        .output_gradient_head_stride = gradient->stride[1],
        .output_gradient_stride = gradient->stride[2],
        .lse_head_stride = params->lse.stride[1],
        .lse_stride = params->lse.stride[2],
        .lse_gradient_head_stride = lse_gradient ? params->lse_gradient.stride[1] : 0,
        .lse_gradient_stride = lse_gradient ? params->lse_gradient.stride[2] : 0,
        .query_gradient_head_stride = query->shape[2] * query->shape[3],
        .key_gradient_head_stride = key->shape[2] * key->shape[3],
        .value_gradient_head_stride = key->shape[2] * params->attend.value.shape[3],
        .learned = params->attend.sink_key.rank ? params->attend.sink_key.shape[1] : 0,
    };
}

/* Keys that belong to no row keep this zero. */
static void clear_unused_keys(const sa_attend_backward_params *params)
{
    const sa_attend_params *attend = &params->attend;
    if (attend->starts.data == NULL && attend->lengths.data == NULL) {
        return;
    }
    const sa_tensor *key = &attend->key;
    const int64_t tokens = key->shape[0] * key->shape[1] * key->shape[2], size = sa_dtype_size(key->dtype);
    memset(params->key_gradient, 0, (size_t)(tokens * key->shape[3] * size));
    memset(params->value_gradient, 0, (size_t)(tokens * attend->value.shape[3] * size));
}

sa_status sa_plan_backward(const sa_attend_backward_params *params, sa_backward_plan *plan)
{
    sa_attend_params attend = params->attend;
    attend.output = params->output;
    *plan = (sa_backward_plan){0};
    SA_TRY(sa_plan_attend(&attend, &plan->forward));
    const sa_problem *forward = &plan->forward.problem;
    const row_sums sums = sums_of(params);
    const int64_t row_bytes = (int64_t)sizeof(sa_backward_row) + (sums.logits + sums.bias) * (int64_t)sizeof(double) +
                              sums.learned * (int64_t)sizeof(float);
    plan->memory = calloc((size_t)max_i64(forward->row_count, 1), (size_t)row_bytes);
    if (plan->memory == NULL) {
        sa_plan_end(&plan->forward);
        return sa_no_memory("the plan of the gradients", (long long)(forward->row_count * row_bytes));
    }
    describe(params, forward, &plan->backward);
    plan->backward.rows = plan->memory;
    double *doubles = (double *)(void *)(plan->backward.rows + forward->row_count);
    float *floats = (float *)(void *)(doubles + forward->row_count * (sums.logits + sums.bias));
    for (int64_t i = 0; i < forward->row_count; i++) {
        const sa_place at = sa_place_of_row(&attend, i);
        sa_backward_row *row = &plan->backward.rows[i];
        *row = place_row(params, &at);
        row->logit_sums = sums.logits > 0 ? doubles + i * sums.logits : NULL;
        row->bias_sums = sums.bias > 0 ? doubles + forward->row_count * sums.logits + i * sums.bias : NULL;
        row->learned_sums = sums.learned > 0 ? floats + i * sums.learned : NULL;
    }
    clear_unused_keys(params);
    return SA_OK;
}

void sa_plan_backward_end(sa_backward_plan *plan)
{
    sa_plan_end(&plan->forward);
    free(plan->memory);
    plan->memory = NULL;
}

/* A head's sum goes to its logits by their shares; an infinite one has none. */
static void finish_logits(const sa_attend_backward_params *params, const sa_backward *backward)
{
    const sa_floats *logits = &params->attend.sink_logits;
    const int64_t count = logits->rank == 2 ? logits->shape[1] : 1;
    double all = 0.0;
    for (int64_t head = 0; head < backward->forward.heads_q; head++) {
        const double sink = backward->forward.sinks[head];
        double sum = 0.0;
        for (int64_t i = 0; i < backward->forward.row_count; i++) {
            sum += backward->rows[i].logit_sums[head];
        }
        all += sum;
        for (int64_t l = 0; l < count && logits->rank > 0; l++) {
            const double share = isfinite(sink) ? exp((double)logits->data[head * count + l] - sink) : 0.0;
            params->sink_logits_gradient[head * count + l] = (float)(share == 0.0 ? 0.0 : share * sum);
        }
    }
    if (logits->rank == 0) {
        params->sink_logits_gradient[0] = (float)all;
    }
}

static void finish_bias(const sa_attend_backward_params *params, const sa_backward *backward)
{
    const int64_t count = backward->forward.heads_q * params->attend.pinned;
    for (int64_t i = 0; i < count; i++) {
        double sum = 0.0;
        for (int64_t row = 0; row < backward->forward.row_count; row++) {
            sum += backward->rows[row].bias_sums[i];
        }
        params->sink_bias_gradient[i] = (float)sum;
    }
}

static void store(sa_dtype dtype, void *data, int64_t i, double value)
{
    switch (dtype) {
    case SA_F32: ((float *)data)[i] = (float)value; break;
    case SA_F16: ((uint16_t *)data)[i] = sa_f32_to_f16((float)value); break;
    default: ((uint16_t *)data)[i] = sa_f32_to_bf16((float)value); break;
    }
}

static void finish_learned(const sa_attend_backward_params *params, const sa_backward *backward)
{
    const sa_problem *p = &backward->forward;
    const int64_t each = p->depth + p->depth_v, tokens = p->heads_kv * backward->learned;
    for (int64_t i = 0; i < tokens * each; i++) {
        double sum = 0.0;
        for (int64_t row = 0; row < p->row_count; row++) {
            sum += (double)backward->rows[row].learned_sums[i];
        }
        const int64_t token = i / each, d = i % each;
        if (d < p->depth) {
            store(p->dtype, params->sink_key_gradient, token * p->depth + d, sum);
        } else {
            store(p->dtype, params->sink_value_gradient, token * p->depth_v + d - p->depth, sum);
        }
    }
}

void sa_finish_backward(const sa_attend_backward_params *params, const sa_backward_plan *plan)
{
    if (params->sink_logits_gradient != NULL) {
        finish_logits(params, &plan->backward);
    }
    if (params->sink_bias_gradient != NULL) {
        finish_bias(params, &plan->backward);
    }
    if (params->sink_key_gradient != NULL) {
        finish_learned(params, &plan->backward);
    }
}
