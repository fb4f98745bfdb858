/* The gradients in C: scalar, fp64, one pair of query and key at a time, as sinkattn/reference.py has them. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "reference.h"

/* One query of one head, and what its pairs need: where lse is infinite no pair counts. */
typedef struct backward_at {
    const sa_backward *backward;
    const sa_backward_row *gradient;
    sa_query_at at;
    double lse, delta; /* <d(out), out> - d(lse) */
} backward_at;

/* Sums of one kv head of one row, in fp64. */
typedef struct head_sums {
    double *keys[SA_MAX_RUNS], *values[SA_MAX_RUNS]; /* [count, depth], [count, depth_v] of each run */
    double query[256], sink_query[256];              /* of the query at hand */
} head_sums;

static bool begin_query(const sa_backward *b, int64_t index, int64_t head, int64_t query, const sa_worker *worker, backward_at *out)
{
    const sa_problem *p = &b->forward;
    const sa_row *row = &p->rows[index];
    const sa_backward_row *gradient = &b->rows[index];
    *out = (backward_at){b, gradient, {p, row, worker, head, query, row->position + query}, 0.0, 0.0};
    out->lse = (double)gradient->lse[head * b->lse_head_stride + query * b->lse_stride];
    if (isinf(out->lse)) {
        return false;
    }
    const int64_t output = head * p->output_head_stride + query * p->output_stride;
    const int64_t output_gradient = head * b->output_gradient_head_stride + query * b->output_gradient_stride;
    for (int64_t d = 0; d < p->depth_v; d++) {
        out->delta += sa_load(p->dtype, gradient->output_gradient, output_gradient + d) * sa_load(p->dtype, row->output, output + d);
    }
    if (gradient->lse_gradient != NULL) {
        out->delta -= (double)gradient->lse_gradient[head * b->lse_gradient_head_stride + query * b->lse_gradient_stride];
    }
    return true;
}

/* Scores are capped before bias and slope: the cap's slope is taken at the product. */
static double slope_of_cap(const backward_at *q, const sa_run *run, int64_t key)
{
    const sa_problem *p = q->at.problem;
    if (p->softcap == 0.0f) {
        return 1.0;
    }
    const double wide = cosh(fmin(fabs(sa_reference_product(&q->at, run, key) / (double)p->softcap), 300.0));
    return 1.0 / (wide * wide);
}

static void add_pair(const backward_at *q, int r, int64_t key, head_sums *sums)
{
    const sa_backward *b = q->backward;
    const sa_problem *p = q->at.problem;
    const sa_run *run = &q->at.row->runs[r];
    const double score = sa_reference_score(&q->at, run, key);
    if (score == -(double)INFINITY) {
        return;
    }
    const int64_t kv_head = q->at.head / (p->heads_q / p->heads_kv);
    const int64_t value = kv_head * run->value_head_stride + key * run->value_stride;
    const int64_t key_at = kv_head * run->key_head_stride + key * run->key_stride;
    const int64_t gradient = q->at.head * b->output_gradient_head_stride + q->at.index * b->output_gradient_stride;
    const double weight = exp(score - q->lse);
    double product = 0.0;
    for (int64_t d = 0; d < p->depth_v; d++) {
        const double out = sa_load(p->dtype, q->gradient->output_gradient, gradient + d);
        product += out * sa_load(p->dtype, run->value, value + d);
        sums->values[r][key * p->depth_v + d] += weight * out;
    }
    const double of_score = weight * (product - q->delta);
    if (run->kind == SA_RUN_PINNED && q->gradient->bias_sums != NULL) {
        q->gradient->bias_sums[q->at.head * p->bias_stride + run->position + key] += of_score;
    }
    const double of_product = of_score * slope_of_cap(q, run, key) * (double)p->scale;
    const bool second = run->kind == SA_RUN_PINNED && q->at.row->sink_query != NULL;
    double *query_sum = second ? sums->sink_query : sums->query;
    for (int64_t d = 0; d < p->depth; d++) {
        query_sum[d] += of_product * sa_load(p->dtype, run->key, key_at + d);
        sums->keys[r][key * p->depth + d] += of_product * sa_reference_query(&q->at, run, d);
    }
}

static void add_query(const backward_at *q, head_sums *sums)
{
    const sa_problem *p = q->at.problem;
    for (int r = 0; r < q->at.row->run_count; r++) {
        const sa_run *run = &q->at.row->runs[r];
        const sa_range seen = sa_visible(run, p->causal, p->windows[q->at.head], q->at.position);
        for (int64_t key = seen.low; key < seen.high && !(key % 256 == 0 && sa_worker_stopped(q->at.worker)); key++) {
            add_pair(q, r, key, sums);
        }
    }
    if (q->gradient->logit_sums != NULL) {
        q->gradient->logit_sums[q->at.head] -= exp(p->sinks[q->at.head] - q->lse) * q->delta;
    }
}

static void store_all(sa_dtype dtype, void *data, int64_t offset, const double *values, int64_t count)
{
    for (int64_t i = 0; i < count && data != NULL; i++) {
        sa_store(dtype, data, offset + i, values[i]);
    }
}

static void write_keys(const sa_backward *b, int64_t index, int64_t kv_head, const head_sums *sums)
{
    const sa_problem *p = &b->forward;
    const sa_row *row = &p->rows[index];
    const sa_backward_row *to = &b->rows[index];
    for (int r = 0; r < row->run_count; r++) {
        const sa_run *run = &row->runs[r];
        for (int64_t key = 0; key < run->count; key++) {
            const double *own_key = sums->keys[r] + key * p->depth, *own_value = sums->values[r] + key * p->depth_v;
            const int64_t at = run->position + key;
            if (run->kind == SA_RUN_LEARNED) {
                float *learned = to->learned_sums + (kv_head * b->learned + key) * (p->depth + p->depth_v);
                store_all(SA_F32, learned, 0, own_key, p->depth);
                store_all(SA_F32, learned, p->depth, own_value, p->depth_v);
            } else {
                store_all(p->dtype, to->key_gradient, kv_head * b->key_gradient_head_stride + at * p->depth, own_key, p->depth);
                store_all(p->dtype, to->value_gradient, kv_head * b->value_gradient_head_stride + at * p->depth_v, own_value, p->depth_v);
            }
        }
    }
}

static int64_t keys_of(const sa_row *row)
{
    int64_t keys = 0;
    for (int r = 0; r < row->run_count; r++) {
        keys += row->runs[r].count;
    }
    return keys;
}

/* All pairs of one kv head of one row: keys, values and queries have one writer. */
static void backward_kv_head(void *context, int64_t task, sa_worker *worker)
{
    const sa_backward *b = context;
    const sa_problem *p = &b->forward;
    const int64_t index = task / p->heads_kv, kv_head = task % p->heads_kv, group = p->heads_q / p->heads_kv;
    const sa_row *row = &p->rows[index];
    const sa_backward_row *to = &b->rows[index];
    head_sums sums;
    double *next = worker->scratch;
    memset(next, 0, (size_t)(keys_of(row) * (p->depth + p->depth_v)) * sizeof *next);
    for (int r = 0; r < row->run_count; r++) {
        sums.keys[r] = next;
        sums.values[r] = next + row->runs[r].count * p->depth;
        next = sums.values[r] + row->runs[r].count * p->depth_v;
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t query = 0; query < row->query_total && !sa_worker_stopped(worker); query++) {
            backward_at at;
            memset(sums.query, 0, sizeof sums.query);
            memset(sums.sink_query, 0, sizeof sums.sink_query);
            if (query < row->query_count && begin_query(b, index, head, query, worker, &at)) {
                add_query(&at, &sums);
            }
            const int64_t offset = head * b->query_gradient_head_stride + query * p->depth;
            store_all(p->dtype, to->query_gradient, offset, sums.query, p->depth);
            store_all(p->dtype, to->sink_query_gradient, offset, sums.sink_query, p->depth);
        }
    }
    write_keys(b, index, kv_head, &sums);
}

sa_status sa_reference_backward(const sa_backward *backward, sa_poll poll)
{
    const sa_problem *p = &backward->forward;
    int64_t keys = 0;
    for (int64_t i = 0; i < p->row_count; i++) {
        sa_path_count_row(SA_PATH_REFERENCE);
        keys = max_i64(keys, keys_of(&p->rows[i]));
    }
    return sa_pool_run(p->row_count * p->heads_kv, 1e9, keys * (p->depth + p->depth_v) * (int64_t)sizeof(double), backward_kv_head,
                       (void *)(uintptr_t)backward, poll);
}
