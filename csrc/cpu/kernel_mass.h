/* Per-key mass: the softmax weight that each key received, mean over the group, sum or maximum over the queries.
 *
 * A second, key-stationary pass: scores are computed again and weighed with the known lse, so that every key has one writer and nothing
 * depends on threads. A task is up to 512 keys of one run of one kv head. */
#ifndef SA_KERNEL_MASS_H
#define SA_KERNEL_MASS_H

#include "kernel_attend.h"

enum { MASS_BLOCKS = 4 };

typedef struct mass_job {
    attend_job attend; /* strides and scratch of the spans */
    int64_t *first_task; /* [row_count * SA_MAX_RUNS + 1]: tasks of run i of row r, [kv head][512 keys] */
    int64_t tile_queries;
} mass_job;

typedef struct mass_tile {
    span s;
    const sa_run *run;
    int64_t begin, blocks; /* first key, blocks of the task */
    float *panels;         /* [blocks] packed keys */
    float *mean;           /* [queries, BLOCK_KEYS] */
    double *total;         /* [blocks, BLOCK_KEYS] */
} mass_tile;

static int64_t panel_size(const span *s)
{
    return BLOCK_KEYS * round_up(s->problem->depth, LANES);
}

static void pack_task_keys(const mass_tile *m)
{
    const sa_problem *p = m->s.problem;
    for (int64_t b = 0; b < m->blocks; b++) {
        const int64_t begin = m->begin + b * BLOCK_KEYS;
        const int64_t offset = m->s.kv_head * m->run->key_head_stride + begin * m->run->key_stride;
        key_packer(p->dtype, m->s.pairs)(sa_at(m->run->key, p->dtype, offset), m->run->key_stride, p->depth, 0,
                                         min_i64(BLOCK_KEYS, m->run->count - begin), m->panels + b * panel_size(&m->s));
    }
}

/* Weights of row r of a chunk, added to the mean over the group. */
static void add_row_mass(const mass_tile *m, int64_t r, int64_t begin, float *scores)
{
    const span *s = &m->s;
    const int64_t query = query_of(s, r) - s->first;
    const int64_t place = s->head[r] * s->problem->lse_head_stride + s->first + query;
    const float lse = s->row->lse[place], times = s->row->weights != NULL ? s->row->weights[place] : 1.0f;
    if (!(fabsf(lse) < INFINITY) && !isnan(lse)) {
        return; /* sees nothing, or an infinite sink takes all */
    }
    const row_terms terms = terms_of(s, m->run, r, begin);
    (void)finish_scores(scores, &terms, row_columns(s, m->run, r, begin), 0, BLOCK_KEYS);
    const vec_f32 anchor = vec_set1((float)((double)lse * SA_LOG2E)), share = vec_set1(times / (float)s->group);
    for (int64_t column = 0; column < BLOCK_KEYS; column += LANES) {
        float *mean = m->mean + query * BLOCK_KEYS + column;
        vec_store(mean, vec_fma(vec_exp2(vec_sub(vec_load(scores + column), anchor)), share, vec_load(mean)));
    }
}

/* Nothing reduced: the means of the tile's queries as they are. */
static void write_query_mass(const mass_tile *m, int64_t begin)
{
    const span *s = &m->s;
    for (int64_t query = 0; query < s->count; query++) {
        float *mass = s->row->mass + (s->first + query - s->row->mass_first) * s->problem->mass_query_stride;
        for (int64_t i = 0; i < BLOCK_KEYS && begin + i < m->run->count; i++) {
            const int64_t slot = sa_mass_slot(m->run, begin + i);
            if (slot >= 0) {
                mass[slot] = m->mean[query * BLOCK_KEYS + i];
            }
        }
    }
}

static void add_tile_mass(const mass_tile *m, int64_t block)
{
    const span *s = &m->s;
    const int64_t begin = m->begin + block * BLOCK_KEYS, words = words_of(s->pairs, s->problem->depth);
    const float *panels = m->panels + block * panel_size(s), *query = query_for(s, m->run);
    double *total = m->total + block * BLOCK_KEYS;
    memset(m->mean, 0, (size_t)(s->count * BLOCK_KEYS) * sizeof(float));
    for (int64_t r0 = 0; r0 < s->rows; r0 += CHUNK_ROWS) {
        const int64_t rows = min_i64(CHUNK_ROWS, s->rows - r0);
        multiply(s->pairs, query + r0 * s->query_stride, s->query_stride, panels, words * TILE_COLUMNS, words, s->scores, SCORE_STRIDE, rows,
                 round_up(min_i64(BLOCK_KEYS, m->run->count - begin), GRAIN), false);
        for (int64_t r = 0; r < rows; r++) {
            add_row_mass(m, r0 + r, begin, s->scores + r * SCORE_STRIDE);
        }
    }
    if (s->problem->mass_query_stride > 0) {
        write_query_mass(m, begin);
        return;
    }
    const bool sum = s->problem->mass_reduce == SA_MASS_SUM;
    for (int64_t query_index = 0; query_index < s->count; query_index++) {
        for (int64_t i = 0; i < BLOCK_KEYS; i++) {
            const double weight = (double)m->mean[query_index * BLOCK_KEYS + i];
            total[i] = sum ? total[i] + weight : weight > total[i] || isnan(weight) ? weight : total[i];
        }
    }
}

static void write_mass(const mass_tile *m)
{
    const span *s = &m->s;
    if (s->problem->mass_query_stride > 0) {
        return;
    }
    float *mass = s->row->mass + s->kv_head * s->problem->mass_head_stride;
    for (int64_t i = 0; i < m->blocks * BLOCK_KEYS && m->begin + i < m->run->count; i++) {
        const int64_t slot = sa_mass_slot(m->run, m->begin + i);
        if (slot >= 0) {
            mass[slot] = (float)m->total[i];
        }
    }
}

static void mass_queries(mass_tile *m, const mass_job *job, const sa_worker *worker)
{
    span *s = &m->s;
    for (int64_t first = s->row->mass_first; first < s->row->query_count; first += job->tile_queries) {
        s->first = first;
        s->count = min_i64(job->tile_queries, s->row->query_count - first);
        s->rows = s->group * s->count;
        const sa_range seen = span_visible(s, m->run);
        if (seen.high <= m->begin || seen.low >= m->begin + m->blocks * BLOCK_KEYS) {
            continue;
        }
        if (sa_worker_stopped(worker)) {
            return;
        }
        load_span_queries(s);
        for (int64_t block = 0; block < m->blocks; block++) {
            const int64_t begin = m->begin + block * BLOCK_KEYS;
            if (seen.low < begin + BLOCK_KEYS && seen.high > begin) {
                add_tile_mass(m, block);
            }
        }
    }
}

static void mass_task(void *context, int64_t task, sa_worker *worker)
{
    const mass_job *job = context;
    const sa_problem *p = job->attend.problem;
    int64_t low = 0, high = p->row_count * SA_MAX_RUNS - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (job->first_task[middle] <= task) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const sa_row *row = &p->rows[low / SA_MAX_RUNS];
    const sa_run *run = &row->runs[low % SA_MAX_RUNS];
    const int64_t each = ceil_div(run->count, MASS_BLOCKS * BLOCK_KEYS), part = task - job->first_task[low];
    float *scratch = worker->scratch;
    mass_tile m = {.run = run, .begin = part % each * MASS_BLOCKS * BLOCK_KEYS};
    m.s = make_span(&job->attend, row, part / each, 0, job->tile_queries, false, scratch);
    scratch += span_scratch(&job->attend) / (int64_t)sizeof(float);
    m.blocks = min_i64(MASS_BLOCKS, ceil_div(run->count - m.begin, BLOCK_KEYS));
    m.total = (double *)(void *)carve(&scratch, 2 * MASS_BLOCKS * BLOCK_KEYS);
    m.panels = carve(&scratch, MASS_BLOCKS * panel_size(&m.s));
    m.mean = carve(&scratch, job->tile_queries * BLOCK_KEYS);
    memset(m.total, 0, MASS_BLOCKS * BLOCK_KEYS * sizeof(double));
    begin_task();
    pack_task_keys(&m);
    mass_queries(&m, job, worker);
    write_mass(&m);
    end_task();
}

/* unfused: of those rows alone whose mass the forward pass did not give. */
static sa_status mass_pass(const sa_problem *p, bool unfused, sa_poll poll)
{
    const int64_t group = p->heads_q / p->heads_kv;
    mass_job job = {.attend = {.problem = p}};
    job.tile_queries = max_i64(2 * CHUNK_ROWS / group, 1);
    job.attend.acc_stride = round_up(p->depth_v, TILE_COLUMNS);
    job.attend.query_stride = round_up(p->depth, LANES);
    job.attend.scratch_rows = round_up(job.tile_queries * group, PAD_ROWS);
    const int64_t entries = p->row_count * SA_MAX_RUNS;
    job.first_task = malloc((size_t)(entries + 1) * sizeof *job.first_task);
    if (job.first_task == NULL) {
        return sa_no_memory("the plan of the mass pass", entries * (int64_t)sizeof *job.first_task);
    }
    int64_t tasks = 0;
    for (int64_t i = 0; i < entries; i++) {
        const sa_row *row = &p->rows[i / SA_MAX_RUNS];
        const sa_run *run = &row->runs[i % SA_MAX_RUNS];
        const bool counts = i % SA_MAX_RUNS < row->run_count && row->query_count > 0 && run->mass_index >= 0 && !(unfused && fuses_mass(p, row));
        job.first_task[i] = tasks;
        tasks += counts ? p->heads_kv * ceil_div(run->count, MASS_BLOCKS * BLOCK_KEYS) : 0;
        if (i % SA_MAX_RUNS == 0 && !(unfused && fuses_mass(p, row))) {
            sa_path_count_row(SA_PATH_MASS);
        }
    }
    const int64_t floats = MASS_BLOCKS * BLOCK_KEYS * (2 + round_up(p->depth, LANES)) + job.tile_queries * BLOCK_KEYS + 64;
    const sa_status status = sa_pool_run(tasks, flops_of(&job.attend) / 2, span_scratch(&job.attend) + 64 + floats * (int64_t)sizeof(float),
                                         mass_task, &job, poll);
    free(job.first_task);
    return status;
}

static sa_status mass_alone(const sa_problem *problem, sa_poll poll)
{
    return mass_pass(problem, false, poll);
}

/* Every row of a call has a mass array or none has. The pass needs lse: a call that did not ask for it gets a temporary one. */
static sa_status attend(const sa_problem *problem, sa_poll poll)
{
    bool second_pass = false;
    for (int64_t i = 0; i < problem->row_count; i++) {
        second_pass = second_pass || (problem->rows[i].mass != NULL && !fuses_mass(problem, &problem->rows[i]));
    }
    if (!second_pass) {
        return attend_forward(problem, poll);
    }
    sa_problem with_lse = *problem;
    sa_row *rows = NULL;
    float *lse = NULL;
    sa_status status = SA_OK;
    if (problem->rows[0].lse == NULL) {
        int64_t queries = 0; /* of all rows: a head's lse holds them end to end */
        for (int64_t i = 0; i < problem->row_count; i++) {
            queries += problem->rows[i].query_total;
        }
        const int64_t count = queries * problem->heads_q;
        rows = malloc((size_t)problem->row_count * sizeof *rows);
        lse = malloc((size_t)max_i64(count, 1) * sizeof *lse);
        if (rows == NULL || lse == NULL) {
            status = sa_no_memory("lse", count * (int64_t)sizeof *lse);
        } else {
            memcpy(rows, problem->rows, (size_t)problem->row_count * sizeof *rows);
            float *next = lse;
            for (int64_t i = 0; i < problem->row_count; i++) {
                rows[i].lse = next;
                next += rows[i].query_total;
            }
            with_lse.rows = rows;
            with_lse.lse_head_stride = queries;
        }
    }
    status = status != SA_OK ? status : attend_forward(&with_lse, poll);
    status = status != SA_OK ? status : mass_pass(&with_lse, true, poll);
    free(rows);
    free(lse);
    return status;
}

#endif
