/* Gradients of attention, one algorithm for every instruction set.
 *
 *   p_ij = 2^(x_ij - lse_i)    dV_j = sum_i p_ij dO_i    dS_ij = p_ij (<dO_i, V_j> - delta_i)    dK_j = scale * sum_i dS_ij Q_i
 *   delta_i = <dO_i, O_i> - d(lse)_i                                                             dQ_i = scale * sum_j dS_ij K_j
 *   d(sink)_h = -sum_i 2^(sigma_h - lse_i) delta_i
 *
 * Three passes: delta for every query; keys against the queries that see them, five products a pair, with dK and dV of 128 keys kept and dQ
 * added up in memory; the parts of dQ joined. Weights come from lse: nothing of the size of the scores is kept, and only visible tiles are
 * touched.
 *
 * A task of the second pass is a segment: up to an eighth of a run's keys, 512 at least, of one kv head with its whole group of query heads.
 * Each segment has a dQ of its own for the queries that see it, so nobody waits and nobody adds to another's sum. Segments, blocks, tiles and
 * the order of every sum follow from a row's own shape: results do not depend on threads or on batch companions, bit for bit.
 *
 *   flops = 2 * (3 * depth + 2 * depth_v) * visible pairs      memory: at most 8 fp32 copies of dQ for a run, half of it where causal
 *
 * Ladder, 2 threads, 8 heads, N 2048, depth 128; torch 2.13's backward of SDPA in the same run in brackets (window: its dense bool mask).
 * `python -m sinkattn bench --suite backward --threads 2`.
 *                                             causal, fp32              causal, bf16              4 pinned + window 256, fp32
 *   AMD Zen 5, 2 cores, 2026-11-25, table avx512bf16; fp32 FMA peak 561 GFLOP/s, bf16 dot 1079:
 *   v1 turned scores, segments with own dQ     61.8 ms (144 ms)          35.9 ms (83 ms)           23.4 ms (235 ms)
 *   v2 zeros only where a tile is cut          59.5 ms (146 ms)          32.8 ms (83 ms)           19.2 ms (224 ms)
 *                                              361 GFLOP/s, 69 %         654 GFLOP/s, 61 %         266 GFLOP/s, 47 %
 * Relative L2 errors of these: 1.2e-6, 2.6e-3, 6.8e-7 (torch: 5.9e-7, 4.9e-3, 5.2e-7).
 * Limited by: the register tiles, as the forward; then packing (four panels a tile, packed again for each block of keys), and windows by the
 * halves of tiles that are hidden. Not on real AMX hardware yet: its tiles were checked with their instructions written out.
 */
#ifndef SA_KERNEL_BACKWARD_H
#define SA_KERNEL_BACKWARD_H

#include "kernel_backward_tile.h"

enum {
    SEGMENTS = 8,       /* of a run, at most: each costs a copy of dQ */
    SEGMENT_BLOCKS = 4, /* at least */
    JOIN_QUERIES = 512, /* of a task of the last pass */
};

typedef struct segment {
    int64_t row, begin, end; /* keys of the run */
    int run;
    int64_t tile, tiles; /* of the queries that see them: first, and how many */
    float *dquery;       /* [heads_q, tiles, TILE_QUERIES + SPARE_ROWS, acc_stride] */
} segment;

typedef struct backward_job {
    const sa_backward *backward;
    segment *segments;
    int64_t segment_count;
    int64_t *first_segment;  /* [row_count + 1] */
    float **terms;           /* [row_count] lse [heads_q, padded queries] in log2 units, then delta */
    float *memory;
    int64_t acc_stride, acc_stride_v, stride, stride_v;
    int64_t longest; /* queries of a row */
} backward_job;

static int64_t padded_queries(const sa_row *row)
{
    return round_up(row->query_count, TILE_QUERIES);
}

static bool second_query(const sa_row *row, const sa_run *run)
{
    return run->kind == SA_RUN_PINNED && row->sink_query != NULL;
}

/* --- delta ------------------------------------------------------------------------------------------------------------------------ */

static float dot_out(const sa_backward *b, int64_t index, int64_t head, int64_t query)
{
    const sa_problem *p = &b->forward;
    const int64_t out = head * p->output_head_stride + query * p->output_stride;
    const int64_t gradient = head * b->output_gradient_head_stride + query * b->output_gradient_stride;
    vec_f32 sum = vec_zero();
    for (int64_t i = 0; i < p->depth_v; i += LANES) {
        sum = vec_fma(load_part(p->dtype, p->rows[index].output, out + i, p->depth_v - i),
                      load_part(p->dtype, b->rows[index].output_gradient, gradient + i, p->depth_v - i), sum);
    }
    return vec_sum(sum);
}

/* One head of one row: what its queries' pairs need, and what its sink gets. */
static void delta_task(void *context, int64_t task, sa_worker *worker)
{
    const backward_job *job = context;
    const sa_backward *b = job->backward;
    const sa_problem *p = &b->forward;
    const int64_t index = task / p->heads_q, head = task % p->heads_q;
    const sa_row *row = &p->rows[index];
    const sa_backward_row *from = &b->rows[index];
    const int64_t padded = padded_queries(row);
    float *lse = job->terms[index] + head * padded, *delta = lse + p->heads_q * padded;
    double sink = 0.0;
    for (int64_t i = 0; i < padded && !sa_worker_stopped(worker); i++) {
        const float own = i < row->query_count ? from->lse[head * b->lse_head_stride + i * b->lse_stride] : INFINITY;
        lse[i] = INFINITY;
        delta[i] = 0.0f;
        if (isinf(own)) {
            continue;
        }
        const int64_t at = head * b->lse_gradient_head_stride + i * b->lse_gradient_stride;
        const float through_lse = from->lse_gradient != NULL ? from->lse_gradient[at] : 0.0f;
        lse[i] = (float)((double)own * SA_LOG2E);
        delta[i] = dot_out(b, index, head, i) - through_lse;
        if (from->logit_sums != NULL) {
            sink -= exp(p->sinks[head] - (double)own) * (double)delta[i];
        }
    }
    if (from->logit_sums != NULL) {
        from->logit_sums[head] = sink;
    }
}

/* --- keys ------------------------------------------------------------------------------------------------------------------------- */

static int64_t block_scratch(const backward_job *job)
{
    const int64_t rows = BLOCK_ROWS * (job->stride + job->stride_v + job->acc_stride + job->acc_stride_v);
    const int64_t panels = BLOCK_KEYS * (job->stride + job->stride_v + 2 * job->acc_stride + job->acc_stride_v);
    const int64_t chunk = (CHUNK_ROWS + SPARE_ROWS) * SCORE_STRIDE;
    return (rows + panels + 3 * chunk + (TILE_QUERIES + SPARE_ROWS) * SCORE_STRIDE + 16 * 16) * (int64_t)sizeof(float);
}

static key_block make_block(const backward_job *job, const segment *s, int64_t kv_head, float *scratch)
{
    const sa_problem *p = &job->backward->forward;
    const bool pairs = use_pairs(p, false);
    key_block b = {.backward = job->backward, .index = s->row, .kv_head = kv_head, .run = &p->rows[s->row].runs[s->run], .pairs = pairs};
    b.learns_bias = b.run->kind == SA_RUN_PINNED && job->backward->rows[s->row].bias_sums != NULL;
    b.words = words_of(pairs, p->depth);
    b.words_v = words_of(pairs, p->depth_v);
    b.stride = job->stride;
    b.stride_v = job->stride_v;
    b.acc_stride = job->acc_stride;
    b.acc_stride_v = job->acc_stride_v;
    const int64_t chunk = (CHUNK_ROWS + SPARE_ROWS) * SCORE_STRIDE;
    b.keys = carve(&scratch, BLOCK_ROWS * b.stride);
    b.values = carve(&scratch, BLOCK_ROWS * b.stride_v);
    b.dkey = carve(&scratch, BLOCK_ROWS * b.acc_stride);
    b.dvalue = carve(&scratch, BLOCK_ROWS * b.acc_stride_v);
    b.key_panels = carve(&scratch, BLOCK_KEYS * b.acc_stride);
    b.query_columns = carve(&scratch, BLOCK_KEYS * b.stride);
    b.out_columns = carve(&scratch, BLOCK_KEYS * b.stride_v);
    b.query_rows = carve(&scratch, BLOCK_KEYS * b.acc_stride);
    b.out_rows = carve(&scratch, BLOCK_KEYS * b.acc_stride_v);
    b.scores = carve(&scratch, chunk);
    b.dscores = carve(&scratch, chunk);
    b.weights = carve(&scratch, chunk / 2);
    b.halves = carve(&scratch, chunk / 2);
    b.turned = carve(&scratch, (TILE_QUERIES + SPARE_ROWS) * SCORE_STRIDE);
    return b;
}

/* Queries of any head of the group that see a key of `begin .. end - 1`. */
static sa_range queries_of_keys(const sa_problem *p, const sa_row *row, const sa_run *run, int64_t first_head, int64_t heads, int64_t begin,
                                int64_t end)
{
    int64_t window = 0;
    for (int64_t head = first_head; head < first_head + heads; head++) {
        window = max_i64(window, p->windows[head]);
    }
    return (sa_range){sa_seen_by(run, p->causal, window, row, begin).low, sa_seen_by(run, p->causal, window, row, end - 1).high};
}

/* Keys of the block that nobody sees may hold anything: they are not read, and stand as zeros. */
static void load_block(key_block *b, int64_t begin, int64_t end)
{
    const sa_problem *p = &b->backward->forward;
    const sa_row *row = &p->rows[b->index];
    const sa_run *run = b->run;
    const int64_t group = p->heads_q / p->heads_kv, head = b->kv_head * group;
    int64_t window = 0, low = 0, high = 0;
    b->begin = begin;
    b->count = end - begin;
    for (int64_t h = head; h < head + group; h++) {
        window = max_i64(window, p->windows[h]);
    }
    if (row->query_count > 0) { /* else low = high = 0 */
        low = clamp_i64(sa_visible(run, p->causal, window, row->position).low - begin, 0, b->count);
        high = clamp_i64(sa_visible(run, p->causal, window, row->position + row->query_count - 1).high - begin, low, b->count);
    }
    const void *key = sa_at(run->key, p->dtype, b->kv_head * run->key_head_stride + begin * run->key_stride);
    const void *value = sa_at(run->value, p->dtype, b->kv_head * run->value_head_stride + begin * run->value_stride);
    load_rows(b->pairs, p->dtype, key, run->key_stride, p->depth, low, high, b->count, b->keys, b->stride);
    load_rows(b->pairs, p->dtype, value, run->value_stride, p->depth_v, low, high, b->count, b->values, b->stride_v);
    pack_rows(b->pairs, p->dtype, key, run->key_stride, p->depth, low, high, b->key_panels);
    for (int64_t r = low; r < high; r++) {
        if (removed_for_group(p, row, run, b->kv_head, begin + r)) {
            memset(b->keys + r * b->stride, 0, (size_t)b->stride * sizeof(float));
            memset(b->values + r * b->stride_v, 0, (size_t)b->stride_v * sizeof(float));
            zero_panel_rows(b->pairs, b->key_panels, p->depth, r, r + 1);
        }
    }
    memset(b->dkey, 0, (size_t)((b->count + SPARE_ROWS) * b->acc_stride) * sizeof(float));
    memset(b->dvalue, 0, (size_t)((b->count + SPARE_ROWS) * b->acc_stride_v) * sizeof(float));
}

static void write_block(const key_block *b)
{
    const sa_backward *back = b->backward;
    const sa_problem *p = &back->forward;
    const sa_backward_row *to = &back->rows[b->index];
    for (int64_t r = 0; r < b->count; r++) {
        const float *dkey = b->dkey + r * b->acc_stride, *dvalue = b->dvalue + r * b->acc_stride_v;
        if (b->run->kind == SA_RUN_LEARNED) {
            float *learned = to->learned_sums + (b->kv_head * back->learned + b->begin + r) * (p->depth + p->depth_v);
            store_row(SA_F32, learned, 0, dkey, p->scale, p->depth);
            store_row(SA_F32, learned, p->depth, dvalue, 1.0f, p->depth_v);
        } else {
            const int64_t key = b->run->position + b->begin + r;
            store_row(p->dtype, to->key_gradient, b->kv_head * back->key_gradient_head_stride + key * p->depth, dkey, p->scale, p->depth);
            store_row(p->dtype, to->value_gradient, b->kv_head * back->value_gradient_head_stride + key * p->depth_v, dvalue, 1.0f, p->depth_v);
        }
    }
}

static void head_against_block(const backward_job *job, const segment *s, const key_block *b, int64_t head, const sa_worker *worker)
{
    const sa_problem *p = &job->backward->forward;
    const sa_row *row = &p->rows[s->row];
    const sa_range seen = queries_of_keys(p, row, b->run, head, 1, b->begin, b->begin + b->count);
    const sa_range all = {sa_seen_by(b->run, p->causal, p->windows[head], row, b->begin + b->count - 1).low,
                          sa_seen_by(b->run, p->causal, p->windows[head], row, b->begin).high};
    const int64_t padded = padded_queries(row), tile_size = (TILE_QUERIES + SPARE_ROWS) * job->acc_stride;
    const bool removes = b->run->kind == SA_RUN_PINNED && p->sink_bias != NULL;
    for (int64_t first = seen.low / TILE_QUERIES * TILE_QUERIES; first < seen.high && seen.low < seen.high; first += TILE_QUERIES) {
        if (sa_worker_stopped(worker)) {
            return;
        }
        query_tile t = {.head = head, .first = first};
        t.low = max_i64(seen.low - first, 0);
        t.high = min_i64(seen.high - first, TILE_QUERIES);
        t.lse = job->terms[s->row] + head * padded + first;
        t.delta = t.lse + p->heads_q * padded;
        t.dquery = s->dquery + (head * s->tiles + first / TILE_QUERIES - s->tile) * tile_size;
        t.whole = b->count == BLOCK_KEYS && !removes && all.low <= first && all.high >= first + TILE_QUERIES;
        backward_tile(b, &t);
    }
}

static void keys_part(const backward_job *job, int64_t task, sa_worker *worker)
{
    const sa_problem *p = &job->backward->forward;
    const segment *s = &job->segments[task / p->heads_kv];
    const int64_t kv_head = task % p->heads_kv, group = p->heads_q / p->heads_kv;
    const int64_t own = s->tiles * (TILE_QUERIES + SPARE_ROWS) * job->acc_stride;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group && !sa_worker_stopped(worker); head++) {
        memset(s->dquery + head * own, 0, (size_t)own * sizeof(float));
    }
    key_block b = make_block(job, s, kv_head, worker->scratch);
    for (int64_t begin = s->begin; begin < s->end; begin += BLOCK_KEYS) {
        load_block(&b, begin, min_i64(begin + BLOCK_KEYS, s->end));
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            head_against_block(job, s, &b, head, worker);
        }
        write_block(&b);
    }
}

static void keys_task(void *context, int64_t task, sa_worker *worker)
{
    begin_task();
    keys_part(context, task, worker);
    end_task();
}

/* --- queries ---------------------------------------------------------------------------------------------------------------------- */

/* dQ of one query from the segments of those runs that were scored with the second query, or of the others. */
static void join_query(const backward_job *job, int64_t index, int64_t head, int64_t query, bool second, float *sum)
{
    const sa_row *row = &job->backward->forward.rows[index];
    const bool counts = query < row->query_count && job->terms[index][head * padded_queries(row) + query] != INFINITY;
    memset(sum, 0, (size_t)job->acc_stride * sizeof *sum);
    for (int64_t i = job->first_segment[index]; i < job->first_segment[index + 1] && counts; i++) {
        const segment *s = &job->segments[i];
        const int64_t tile = query / TILE_QUERIES - s->tile;
        if (tile < 0 || tile >= s->tiles || second_query(row, &row->runs[s->run]) != second) {
            continue;
        }
        const float *part = s->dquery + ((head * s->tiles + tile) * (TILE_QUERIES + SPARE_ROWS) + query % TILE_QUERIES) * job->acc_stride;
        for (int64_t d = 0; d < job->acc_stride; d += LANES) {
            vec_store(sum + d, vec_add(vec_load(sum + d), vec_load(part + d)));
        }
    }
}

static void join_task(void *context, int64_t task, sa_worker *worker)
{
    const backward_job *job = context;
    const sa_backward *b = job->backward;
    const sa_problem *p = &b->forward;
    const int64_t chunks = ceil_div(job->longest, JOIN_QUERIES), index = task / chunks / p->heads_q, head = task / chunks % p->heads_q;
    const sa_row *row = &p->rows[index];
    const sa_backward_row *to = &b->rows[index];
    const int64_t first = task % chunks * JOIN_QUERIES;
    float *sum = worker->scratch;
    for (int64_t query = first; query < min_i64(first + JOIN_QUERIES, row->query_total) && !sa_worker_stopped(worker); query++) {
        const int64_t offset = head * b->query_gradient_head_stride + query * p->depth;
        join_query(job, index, head, query, false, sum);
        store_row(p->dtype, to->query_gradient, offset, sum, p->scale, p->depth);
        if (to->sink_query_gradient != NULL) {
            join_query(job, index, head, query, true, sum);
            store_row(p->dtype, to->sink_query_gradient, offset, sum, p->scale, p->depth);
        }
    }
}

/* --- the job ---------------------------------------------------------------------------------------------------------------------- */

/* Keys of a segment of a run: its own length decides. */
static int64_t segment_keys(const sa_run *run)
{
    return round_up(max_i64(ceil_div(run->count, SEGMENTS), SEGMENT_BLOCKS * BLOCK_KEYS), BLOCK_KEYS);
}

static int64_t count_segments(const sa_problem *p)
{
    int64_t count = 0;
    for (int64_t i = 0; i < p->row_count; i++) {
        for (int r = 0; r < p->rows[i].run_count; r++) {
            count += ceil_div(p->rows[i].runs[r].count, segment_keys(&p->rows[i].runs[r]));
        }
    }
    return count;
}

/* Fills the segments and returns the floats that they need; with `memory`, gives each its part. */
static int64_t cut_segments(backward_job *job, float *memory)
{
    const sa_problem *p = &job->backward->forward;
    int64_t floats = 0, next = 0;
    for (int64_t i = 0; i < p->row_count; i++) {
        const sa_row *row = &p->rows[i];
        job->first_segment[i] = next;
        job->longest = max_i64(job->longest, row->query_total);
        if (memory != NULL) {
            job->terms[i] = memory + floats;
        }
        floats += 2 * p->heads_q * padded_queries(row);
        for (int r = 0; r < row->run_count; r++) {
            const sa_run *run = &row->runs[r];
            const int64_t keys = segment_keys(run);
            for (int64_t begin = 0; begin < run->count; begin += keys) {
                const int64_t end = min_i64(begin + keys, run->count);
                const sa_range seen = queries_of_keys(p, row, run, 0, p->heads_q, begin, end);
                segment *s = &job->segments[next++];
                *s = (segment){.row = i, .begin = begin, .end = end, .run = r, .tile = seen.low / TILE_QUERIES};
                s->tiles = seen.low < seen.high ? ceil_div(seen.high, TILE_QUERIES) - s->tile : 0;
                s->dquery = memory != NULL ? memory + floats : NULL;
                floats += p->heads_q * s->tiles * (TILE_QUERIES + SPARE_ROWS) * job->acc_stride;
            }
        }
    }
    job->first_segment[p->row_count] = next;
    return floats;
}

static sa_status plan_backward_job(const sa_backward *backward, backward_job *job)
{
    const sa_problem *p = &backward->forward;
    *job = (backward_job){.backward = backward, .longest = 1, .segment_count = count_segments(p)};
    job->acc_stride = round_up(p->depth, TILE_COLUMNS);
    job->acc_stride_v = round_up(p->depth_v, TILE_COLUMNS);
    job->stride = round_up(p->depth, LANES);
    job->stride_v = round_up(p->depth_v, LANES);
    const int64_t bytes = job->segment_count * (int64_t)sizeof *job->segments + (p->row_count + 1) * (int64_t)(sizeof(int64_t) + sizeof(float *));
    job->segments = malloc((size_t)bytes);
    if (job->segments == NULL) {
        return sa_no_memory("the plan of the gradients' kernel", bytes);
    }
    job->first_segment = (int64_t *)(void *)(job->segments + job->segment_count);
    job->terms = (float **)(void *)(job->first_segment + p->row_count + 1);
    const int64_t floats = cut_segments(job, NULL);
    if (posix_memalign((void **)&job->memory, 64, (size_t)max_i64(floats, 16) * sizeof(float)) != 0) {
        job->memory = NULL;
        return sa_no_memory("partial gradients", floats * (int64_t)sizeof(float));
    }
    (void)cut_segments(job, job->memory);
    return SA_OK;
}

static sa_status attend_backward(const sa_backward *backward, sa_poll poll)
{
    const sa_problem *p = &backward->forward;
    backward_job job;
    sa_status status = plan_backward_job(backward, &job);
    const attend_job forward = {.problem = p};
    const double flops = flops_of(&forward), rows = (double)(p->row_count * p->heads_q) * (double)job.longest;
    for (int64_t i = 0; i < p->row_count; i++) {
        sa_path_count_row(SA_PATH_BACKWARD);
    }
    if (status == SA_OK) {
        status = sa_pool_run(p->row_count * p->heads_q, rows * 2.0 * (double)p->depth_v, 64, delta_task, &job, poll);
    }
    if (status == SA_OK) {
        status = sa_pool_run(job.segment_count * p->heads_kv, 2.5 * flops, block_scratch(&job), keys_task, &job, poll);
    }
    if (status == SA_OK) {
        const int64_t tasks = p->row_count * p->heads_q * ceil_div(job.longest, JOIN_QUERIES);
        status = sa_pool_run(tasks, rows * 2.0 * (double)p->depth, job.acc_stride * (int64_t)sizeof(float), join_task, &job, poll);
    }
    free(job.segments);
    free(job.memory);
    return status;
}

#endif
