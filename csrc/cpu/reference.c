/* The semantics in C: scalar, fp64 accumulation, one query at a time, no online trick. Portable, always built, always reachable
 * (SINKATTN_CPU=reference); every other table is tested against it and against sinkattn/reference.py. */
#include <math.h>
#include <string.h>

#include "reference.h"

/* Asked now and then among the keys; what an interrupted query gives is not used. */
static bool interrupted(const sa_query_at *at, int64_t key)
{
    return key % 256 == 0 && sa_worker_stopped(at->worker);
}

double sa_reference_query(const sa_query_at *at, const sa_run *run, int64_t d)
{
    const sa_problem *p = at->problem;
    const bool second = run->kind == SA_RUN_PINNED && at->row->sink_query != NULL;
    return second ? sa_load(p->dtype, at->row->sink_query, at->head * p->sink_query_head_stride + at->index * p->sink_query_stride + d)
                  : sa_load(p->dtype, at->row->query, at->head * p->query_head_stride + at->index * p->query_stride + d);
}

double sa_reference_product(const sa_query_at *at, const sa_run *run, int64_t key)
{
    const sa_problem *p = at->problem;
    const int64_t kv_head = at->head / (p->heads_q / p->heads_kv);
    const int64_t key_offset = kv_head * run->key_head_stride + key * run->key_stride;
    double dot = 0.0;
    for (int64_t d = 0; d < p->depth; d++) {
        dot += sa_reference_query(at, run, d) * sa_load(p->dtype, run->key, key_offset + d);
    }
    return (double)p->scale * dot;
}

double sa_reference_score(const sa_query_at *at, const sa_run *run, int64_t key)
{
    const sa_problem *p = at->problem;
    if (sa_removed(p, at->row, run, at->head, key)) {
        return -(double)INFINITY;
    }
    double s = sa_reference_product(at, run, key);
    if (p->softcap > 0.0f) {
        s = (double)p->softcap * tanh(s / (double)p->softcap);
    }
    const float *bias = sa_bias(p, at->row, run, at->head);
    if (bias != NULL) {
        s += (double)bias[key];
    }
    if (run->kind == SA_RUN_HELD && at->row->alibi != NULL) {
        s -= (double)at->row->alibi[at->head] * fabs((double)run->back[key] + (double)at->index);
    } else if (run->kind != SA_RUN_LEARNED && at->row->alibi != NULL) {
        const int64_t from = run->kind == SA_RUN_PINNED ? min_i64(at->position, p->pinned_query_limit) : at->position;
        s -= (double)at->row->alibi[at->head] * fabs((double)(from - run->position - key));
    }
    return s;
}

static double largest_score(const sa_query_at *at)
{
    double largest = -INFINITY;
    for (int r = 0; r < at->row->run_count; r++) {
        const sa_run *run = &at->row->runs[r];
        const sa_range seen = sa_visible(run, at->problem->causal, at->problem->windows[at->head], at->position);
        for (int64_t key = seen.low; key < seen.high && !interrupted(at, key); key++) {
            const double s = sa_reference_score(at, run, key);
            largest = isnan(s) ? s : s > largest ? s : largest;
        }
    }
    return largest;
}

static void add_values(const sa_query_at *at, const sa_run *run, int64_t key, double weight, double *values)
{
    const sa_problem *p = at->problem;
    const int64_t kv_head = at->head / (p->heads_q / p->heads_kv);
    const int64_t offset = kv_head * run->value_head_stride + key * run->value_stride;
    for (int64_t d = 0; d < p->depth_v; d++) {
        values[d] += weight * sa_load(p->dtype, run->value, offset + d);
    }
}

/* Writes one output row and returns its lse. */
static double attend_query(const sa_query_at *at)
{
    const sa_problem *p = at->problem;
    const double sink = p->sinks[at->row->first_head + at->head], largest = largest_score(at);
    const double anchor = fmax(largest, sink);
    double values[256] = {0.0}, sum = 0.0;
    const bool sees = anchor > -(double)INFINITY && sink < (double)INFINITY;
    for (int r = 0; r < at->row->run_count && (sees || isnan(largest)); r++) {
        const sa_run *run = &at->row->runs[r];
        const sa_range seen = sa_visible(run, p->causal, p->windows[at->head], at->position);
        for (int64_t key = seen.low; key < seen.high && !interrupted(at, key); key++) {
            const double s = sa_reference_score(at, run, key);
            const double weight = s == -(double)INFINITY ? 0.0 : exp(s - anchor);
            sum += weight;
            if (weight != 0.0) {
                add_values(at, run, key, weight, values);
            }
        }
    }
    const double total = sum + (sink == -(double)INFINITY ? 0.0 : exp(sink - anchor));
    void *output = (char *)at->row->output;
    const int64_t offset = at->head * p->output_head_stride + at->index * p->output_stride;
    for (int64_t d = 0; d < p->depth_v; d++) {
        sa_store(p->dtype, output, offset + d, sum == 0.0 || !sees ? (isnan(sum) ? sum : 0.0) : values[d] / total);
    }
    return sink == (double)INFINITY ? (double)INFINITY : sees || isnan(largest) ? anchor + log(total) : -(double)INFINITY;
}

static void add_mass(const sa_query_at *at, double lse, double *mean)
{
    const sa_problem *p = at->problem;
    const float *weights = at->row->weights;
    const double times = weights != NULL ? (double)weights[at->head * p->lse_head_stride + at->index] : 1.0;
    for (int r = 0; r < at->row->run_count; r++) {
        const sa_run *run = &at->row->runs[r];
        const sa_range seen = sa_visible(run, p->causal, p->windows[at->head], at->position);
        for (int64_t key = seen.low; key < seen.high && !interrupted(at, key); key++) {
            const int64_t slot = sa_mass_slot(run, key);
            if (slot >= 0 && lse > -(double)INFINITY && lse < (double)INFINITY) {
                mean[slot] += times * exp(sa_reference_score(at, run, key) - lse) * (double)p->heads_kv / (double)p->heads_q;
            }
        }
    }
}

static void pad_query(const sa_query_at *at)
{
    const sa_problem *p = at->problem;
    const int64_t offset = at->head * p->output_head_stride + at->index * p->output_stride;
    for (int64_t d = 0; d < p->depth_v; d++) {
        sa_store(p->dtype, at->row->output, offset + d, 0.0);
    }
    if (at->row->lse != NULL) {
        at->row->lse[at->head * p->lse_head_stride + at->index] = -INFINITY;
    }
}

/* All queries of one kv head of one row: the mass of its keys has one writer. scratch: [2, mass_head_stride] doubles. With a known lse
 * there is nothing but the mass to find. */
static void run_kv_head(const sa_problem *p, bool known, int64_t task, sa_worker *worker)
{
    const sa_row *row = &p->rows[task / p->heads_kv];
    const int64_t kv_head = task % p->heads_kv, group = p->heads_q / p->heads_kv;
    const int64_t slots = row->mass != NULL ? p->mass_head_stride : 0;
    double *mean = worker->scratch, *mass = mean + slots;
    memset(mass, 0, (size_t)slots * sizeof *mass);
    const int64_t first = known ? row->mass_first : 0, last = known ? row->query_count : row->query_total;
    for (int64_t i = first; i < last && !sa_worker_stopped(worker); i++) {
        memset(mean, 0, (size_t)slots * sizeof *mean);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            const sa_query_at at = {p, row, worker, head, i, row->position + i};
            if (i >= row->query_count) {
                pad_query(&at);
                continue;
            }
            const double lse = known ? (double)row->lse[head * p->lse_head_stride + i] : attend_query(&at);
            if (row->lse != NULL && !known) {
                row->lse[head * p->lse_head_stride + i] = (float)lse;
            }
            if (row->mass != NULL && i >= row->mass_first) {
                add_mass(&at, lse, mean);
            }
        }
        for (int64_t slot = 0; slot < slots && p->mass_query_stride > 0 && i >= row->mass_first && i < row->query_count; slot++) {
            row->mass[(i - row->mass_first) * p->mass_query_stride + slot] = (float)mean[slot];
        }
        for (int64_t slot = 0; slot < slots; slot++) {
            mass[slot] = p->mass_reduce == SA_MASS_SUM ? mass[slot] + mean[slot] : fmax(mass[slot], mean[slot]);
        }
    }
    /* Packed sequences share a mass row: write only the slots of this row's own keys. */
    for (int r = 0; r < row->run_count && row->mass != NULL && p->mass_query_stride == 0; r++) {
        for (int64_t key = 0; key < row->runs[r].count; key++) {
            const int64_t slot = sa_mass_slot(&row->runs[r], key);
            if (slot >= 0) {
                row->mass[kv_head * p->mass_head_stride + slot] = (float)mass[slot];
            }
        }
    }
}

static void attend_kv_head(void *context, int64_t task, sa_worker *worker)
{
    run_kv_head(context, false, task, worker);
}

static void mass_kv_head(void *context, int64_t task, sa_worker *worker)
{
    run_kv_head(context, true, task, worker);
}

static sa_status run(const sa_problem *problem, sa_task task, sa_poll poll)
{
    int64_t slots = 0;
    for (int64_t i = 0; i < problem->row_count; i++) {
        sa_path_count_row(SA_PATH_REFERENCE);
        slots = problem->rows[i].mass != NULL ? problem->mass_head_stride : slots;
    }
    return sa_pool_run(problem->row_count * problem->heads_kv, 1e9, 2 * slots * (int64_t)sizeof(double), task,
                       (void *)(uintptr_t)problem, poll);
}

static sa_status attend(const sa_problem *problem, sa_poll poll)
{
    return run(problem, attend_kv_head, poll);
}

static sa_status mass_alone(const sa_problem *problem, sa_poll poll)
{
    return run(problem, mass_kv_head, poll);
}

const sa_cpu_table sa_table_reference = {.name = "reference", .needs = 0, .attend = attend, .mass = mass_alone, .attend_backward = sa_reference_backward};
