/* Attention forward, one algorithm for every instruction set.
 *
 *   out = sum_j 2^(x_j - m) v_j / (sum_j 2^(x_j - m) + 2^(sigma - m)),   x_j = score of key j in log2 units, online in blocks of 128 keys
 *
 * A task is a span of queries of one kv head with its whole group of query heads, against the blocks that some query of it sees, so
 * time grows with what is visible. Each block of K and V is packed once for the span (many rows) or read in place (few rows: decode).
 * Few rows against many keys are split into pieces of 512 keys or more, merged in order by whoever finishes last.
 *
 * Nothing in a row's arithmetic depends on the span, the chunk or the thread that it was computed in: blocks lie on a grid fixed to the
 * run, sums run in key order, and a column that a row does not see adds an exact zero. So results do not depend on threads or on batch
 * companions, bit for bit.
 *
 *   flops = 2 * (depth + depth_v) * visible pairs      bytes (decode) = kv_length * (depth + depth_v) * heads_kv * item size
 *
 * Ladder, 2 threads, depth 128; torch 2.13 SDPA of the same run in brackets (decode: its enable_gqa form). `python -m sinkattn bench`.
 *                                             causal, 8 heads, N 2048, fp32    decode 32/8, N 4096, fp32 / bf16
 *   Intel Emerald Rapids, 2026-11-24, table avx512; fp32 FMA peak 344 GFLOP/s, plain read 27 GB/s:
 *   v1 tiles of 12 x 32, blocks of 64 keys     38 ms  224 GFLOP/s  (44 ms)     0.82 / 0.64 ms  (2.8 / 1.4 ms)
 *   v2 plain blocks in registers, rows         37 ms  230 GFLOP/s  (43 ms)     0.80 / 0.65 ms
 *      numbered once, packing by dtype
 *   v3 blocks of 128 keys                      36 ms  242 GFLOP/s  (43 ms)     0.78 / 0.60 ms; 4 pinned + window 256, N 2048: 14.3 ms (75.8 ms)
 *   AMD Zen 5, 2026-11-25, table avx512bf16; fp32 FMA peak 553 GFLOP/s, bf16 dot 1092, plain read 45 or 78 GB/s as the host lets it:
 *   v3                                         24 ms  356 GFLOP/s  (52 ms)     0.91 / 0.49 ms  (2.8 / 11.3 ms): 37 and 34 of 84 GB/s
 *   v4 decode: values a few at a time for      21 ms  400 GFLOP/s  (54 ms)     0.62 / 0.36 ms: 54 of 74 and 47 of 68 GB/s (N 32768: 58 of 70,
 *      all rows, keys in memory order, a page                                  53 of 69); where the host gives 45 GB/s 85 % of it and more
 *      asked for before it is read; workers    bf16 13 ms, 667 GFLOP/s (56 ms); 4 pinned + window 256, N 2048, fp32: 8.0 ms (94 ms)
 *      keep off the caller's processor
 *   One thread, where the host lets a core read 41 GB/s whatever its neighbours do (two threads: 45 or 78 GB/s by the minute), share of the
 *   read of the same run; `bench --suite decode,cache --threads 1`:   N 4096, N 32768 fp32    bf16       SinkCache step 4 + 4092, fp32 / bf16
 *   v4                                                                69 %, 69 %              67, 70 %   70 / 64 %
 *   v5 keys' lines asked for one a turn of a loop, values' with       80 %, 79 %              79, 80 %   85 / 80 %
 *      each load, no page touched ahead, -fno-wrapv
 *   v6 values asked for during softmax as well                        79 %, -                 81, -      84 / 84 %
 *   Two threads, v4 -> v6, medians of calls over medians of reads between them, all builds in one process (the host gave 46 to 51 GB/s):
 *   N 4096 fp32 80 -> 94 %, bf16 86 -> 93 %; N 32768 bf16 83 -> 89 %; step fp32 83 -> 100 %, bf16 85 -> 92 %; N 32768 fp32 78 -> 94 %
 *   there, and 70 -> 80 % in a minute when the host gave 76 GB/s.
 * Limited by: prefill by FMA (72 % of its peak, bf16 62 % of the dot products'); decode by how many lines a core keeps on their way: with all of
 * K and V in the second level a key of 4 heads costs 39 cycles in fp32 and 30 in bf16, against 105 and 52 for its bytes at 80 GB/s.
 * What is left of one thread's 20 %: values, whose lines come slower than the keys', and the start of each stream. Decode feels how its prefetches
 * are compiled: 32 unrolled before the keys that they hide 80 %, the same in a loop 97 %, with keys alone.
 * Tried and lost: no prefetch at all (the processor's own prefetchers do not cross a page while the sums are computed: 31 %), prefetch into the
 * second level, a whole block ahead, four keys at a time against four rows; K of a block beside V of the one before (both streams at once: 91 %
 * where nothing is computed, 72 % where it is), four rows by half the columns of values (bf16 76 % instead of 80), pieces of 8 and 32 blocks,
 * other distances than 6 KiB (4 KiB: bf16 74 %; 8 KiB: fp32 77 %), lines kept in the first level (the same), values' lines in a loop of their own
 * before each 4, 8 or 16 values (77, 68, 63 %) or with both pairs of rows (76 %), keys' lines with each load (77 %).
 * On Intel vdpbf16ps runs at half the arithmetic of fp32 FMA, so bf16 is widened there, or goes through AMX tiles. Intel Xeon with AMX, 16
 * processors (beside an H200), 2026-11-25, 16 threads, medians: causal, 8 heads, N 2048, bf16: table amx 3.5 ms, 2463 GFLOP/s (12 % of what its
 * tiles multiply in that run), avx512 7.7 ms, avx512bf16 13.3 ms; gradients 8.5 ms; beside torch in one process 4.9 ms (9.4 ms), fp32 13.1 ms
 * (27.2 ms). Decode 32/8, D 128, is far from memory there: N 4096 fp32 63 of 134 GB/s, N 32768 67 of 124, bf16 67 of 128; before v6 51 of 121,
 * 59 of 120, 59 of 121 in another run. Not known why; other kinds of prefetch were not tried there.
 */
#ifndef SA_KERNEL_ATTEND_H
#define SA_KERNEL_ATTEND_H

#include <stdatomic.h>
#include <stdlib.h>

#include "kernel_span.h"
#include "table.h"

enum {
    SPAN_ROWS = 384,   /* Q and O of a span stay in L2 */
    SPLIT_ROWS = 64,   /* at most so many rows are worth splitting the keys for */
    SPLIT_BLOCKS = 4,  /* a piece is not shorter */
    SPLIT_PIECES = 32, /* per kv head: more than enough for every thread, few enough that starting one costs little */
};

/* Partial results of the pieces of one (row, kv head). */
typedef struct row_plan {
    int64_t first_task; /* tasks of a row: [kv head][span or piece] */
    int64_t span_count, span_queries;
    int64_t pieces;      /* 1: not split */
    int64_t piece_blocks;
    float *partial;      /* [heads_kv, pieces, rows, acc_stride + 2] */
    atomic_int *missing; /* [heads_kv] pieces not finished */
    int64_t blocks;      /* of its keys, over all runs: the most of any kv head */
    float *kept;         /* [heads_kv, blocks, rows, SCORE_STRIDE + 1] weights of a fused mass and their anchors, NULL: none */
} row_plan;

typedef struct attend_job {
    const sa_problem *problem;
    row_plan *rows;
    float *partials;
    atomic_int *missing;
    int64_t tasks;
    int64_t acc_stride, query_stride, scratch_rows;
} attend_job;

/* --- one block ------------------------------------------------------------------------------------------------------------------- */

/* Scores are products times a scale: no cap, bias or slope. */
static bool is_plain(const span *s, const sa_run *run)
{
    const sa_problem *p = s->problem;
    return p->softcap == 0.0f && s->row->alibi == NULL && (p->sink_bias == NULL || run->kind != SA_RUN_PINNED);
}

/* The columns that each row of a chunk sees, and their hull. False: none sees any. */
static bool columns_of_chunk(const span *s, const sa_run *run, int64_t r0, int64_t rows, int64_t begin, sa_range *seen, sa_range *all)
{
    *all = (sa_range){BLOCK_KEYS, 0};
    for (int64_t r = 0; r < rows; r++) {
        seen[r] = row_columns(s, run, r0 + r, begin);
        if (seen[r].low < seen[r].high) {
            *all = (sa_range){min_i64(all->low, seen[r].low), max_i64(all->high, seen[r].high)};
        }
    }
    return all->low < all->high;
}

/* Is a pinned column removed for every head of a kv head's group? Then nobody sees what its key and value hold. */
static bool removed_for_group(const sa_problem *p, const sa_row *row, const sa_run *run, int64_t kv_head, int64_t key)
{
    const int64_t group = p->heads_q / p->heads_kv;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        if (!sa_removed(p, row, run, head, key)) {
            return false;
        }
    }
    return true;
}

static bool removed_for_all(const span *s, const sa_run *run, int64_t key)
{
    return removed_for_group(s->problem, s->row, run, s->kv_head, key);
}

static bool removes_any(const span *s, const sa_run *run, int64_t begin, sa_range need)
{
    for (int64_t column = need.low; column < need.high && s->problem->sink_bias != NULL && run->kind == SA_RUN_PINNED; column++) {
        if (removed_for_all(s, run, begin + column)) {
            return true;
        }
    }
    return false;
}

/* A weight of zero times NaN is NaN: the values of removed columns leave the panels. Their scores are masked by the bias itself. */
static void clear_removed(const span *s, const sa_run *run, int64_t begin, sa_range need)
{
    const int64_t rows = words_of(s->pairs, BLOCK_KEYS);
    for (int64_t column = need.low; column < need.high; column++) {
        if (!removed_for_all(s, run, begin + column)) {
            continue;
        }
        for (int64_t i = 0; i < s->acc_stride; i++) {
            float *panel = s->values + i / TILE_COLUMNS * rows * TILE_COLUMNS + i % TILE_COLUMNS;
            if (s->pairs) {
                ((uint16_t *)(void *)(panel + column / 2 * TILE_COLUMNS))[column % 2] = 0;
            } else {
                panel[column * TILE_COLUMNS] = 0.0f;
            }
        }
    }
}

static void block_packed(const span *s, const sa_run *run, int64_t begin, sa_range need, bool removes)
{
    const sa_problem *p = s->problem;
    const int64_t key = s->kv_head * run->key_head_stride + begin * run->key_stride;
    const int64_t value = s->kv_head * run->value_head_stride + begin * run->value_stride;
    const int64_t words = words_of(s->pairs, p->depth), value_words = words_of(s->pairs, BLOCK_KEYS);
    const float *query = query_for(s, run);
    key_packer(p->dtype, s->pairs)(sa_at(run->key, p->dtype, key), run->key_stride, p->depth, need.low, need.high, s->keys);
    value_packer(p->dtype, s->pairs)(sa_at(run->value, p->dtype, value), run->value_stride, p->depth_v, need.low, need.high, s->values);
    if (removes) {
        clear_removed(s, run, begin, need);
    }

    for (int64_t r0 = 0; r0 < s->rows; r0 += CHUNK_ROWS) {
        const int64_t rows = min_i64(CHUNK_ROWS, s->rows - r0);
        sa_range seen[CHUNK_ROWS], all = {0, BLOCK_KEYS};
        const bool whole = sees_all(s, run, r0, rows, begin), plain = whole && is_plain(s, run);
        if (!whole && !columns_of_chunk(s, run, r0, rows, begin, seen, &all)) {
            continue;
        }
        const int64_t panel = all.low / TILE_COLUMNS, low = all.low / GRAIN * GRAIN, high = round_up(all.high, GRAIN);
        multiply(s->pairs, query + r0 * s->query_stride, s->query_stride, s->keys + panel * words * TILE_COLUMNS, words * TILE_COLUMNS,
                 words, s->scores + panel * TILE_COLUMNS, SCORE_STRIDE, rows, high - panel * TILE_COLUMNS, false);
        for (int64_t r = 0; r < rows; r++) {
            uint16_t *halves = s->pairs ? (uint16_t *)(void *)s->weights + r * SCORE_STRIDE : NULL;
            if (plain) {
                softmax_row_plain(s, r0 + r, s->scores + r * SCORE_STRIDE, halves);
            } else {
                softmax_row(s, run, r0 + r, begin, whole ? all : seen[r], low, high, s->scores + r * SCORE_STRIDE, halves);
            }
        }
        const int64_t first = s->pairs ? all.low / 2 / PAD_WORDS * PAD_WORDS : all.low;
        const int64_t last = s->pairs ? round_up((all.high + 1) / 2, PAD_WORDS) : all.high;
        const float *weights = s->pairs ? s->weights : s->scores;
        multiply(s->pairs, weights + first, s->pairs ? SCORE_STRIDE / 2 : SCORE_STRIDE, s->values + first * TILE_COLUMNS,
                 value_words * TILE_COLUMNS, last - first, s->acc + r0 * s->acc_stride, s->acc_stride, rows, p->depth_v, true);
    }
}

static void block_direct(const span *s, const sa_run *run, int64_t begin, sa_range need)
{
    const sa_problem *p = s->problem;
    const int64_t key = s->kv_head * run->key_head_stride + begin * run->key_stride;
    const int64_t value = s->kv_head * run->value_head_stride + begin * run->value_stride;
    const int64_t size = sa_dtype_size(p->dtype), next_key = key + BLOCK_KEYS * run->key_stride;
    const int64_t key_step = run->key_stride * size, value_step = run->value_stride * size;
    const char *first_key = sa_at(run->key, p->dtype, key), *first_value = sa_at(run->value, p->dtype, value);
    const int64_t lead = AHEAD_BYTES / (p->depth * size), value_bytes = p->depth_v * size, each = SOFTMAX_BYTES / value_bytes;
    const direct_rows keys = {first_key, first_value + need.low * value_step, key_step, value_step, need.low, need.high, lead};
    const direct_rows values = {first_value, sa_at(run->key, p->dtype, next_key), value_step, key_step, need.low, need.high,
                                lead + s->rows * each};
    const int64_t low = need.low / LANES * LANES, high = round_up(need.high, LANES);
    score_direct(p->dtype, s->pairs, query_for(s, run), s->rows, &keys, p->depth, s->scores);
    for (int64_t r = 0; r < s->rows; r++) {
        float *scores = s->scores + r * SCORE_STRIDE;
        prefetch_rows(&values, need.low + lead + r * each, each, value_bytes);
        if (is_plain(s, run) && sees_all(s, run, r, 1, begin)) {
            softmax_row_plain(s, r, scores, NULL);
        } else {
            softmax_row(s, run, r, begin, row_columns(s, run, r, begin), low, high, scores, NULL);
        }
    }
    add_values_direct(p->dtype, s->scores, s->rows, &values, p->depth_v, s->acc);
}

/* Blocks first .. last - 1 of the span's visible ones, counted over all runs. */
static void span_blocks(const span *s, int64_t first, int64_t last, const sa_worker *worker)
{
    int64_t index = 0;
    for (int i = 0; i < s->row->run_count; i++) {
        const sa_run *run = &s->row->runs[i];
        const sa_range seen = span_visible(s, run);
        for (int64_t begin = seen.low / BLOCK_KEYS * BLOCK_KEYS; begin < seen.high && seen.low < seen.high; begin += BLOCK_KEYS, index++) {
            if (index < first || index >= last) {
                continue;
            }
            const sa_range need = {max_i64(seen.low - begin, 0), min_i64(seen.high - begin, BLOCK_KEYS)};
            if (sa_worker_stopped(worker)) {
                return;
            }
            if (s->kept != NULL) {
                span block = *s;
                block.scores = s->kept + index * s->rows * SCORE_STRIDE;
                block_direct(&block, run, begin, need);
                memcpy(s->anchors + index * s->rows, s->maximum, (size_t)s->rows * sizeof(float));
                continue;
            }
            const bool removes = removes_any(s, run, begin, need);
            if (s->direct && !removes) {
                block_direct(s, run, begin, need);
            } else {
                block_packed(s, run, begin, need, removes);
            }
        }
    }
}

static int64_t count_blocks(const span *s)
{
    int64_t count = 0;
    for (int i = 0; i < s->row->run_count; i++) {
        const sa_range seen = span_visible(s, &s->row->runs[i]);
        count += seen.low < seen.high ? ceil_div(seen.high, BLOCK_KEYS) - seen.low / BLOCK_KEYS : 0;
    }
    return count;
}

/* --- one span --------------------------------------------------------------------------------------------------------------------- */

static float *carve(float **next, int64_t count)
{
    float *part = *next;
    *next += round_up(count, 16);
    return part;
}

static bool use_pairs(const sa_problem *p, bool direct)
{
    return HAS_BF16_DOT && p->dtype == SA_BF16 && (!direct || (DIRECT_PAIRS && p->depth % (2 * LANES) == 0));
}

static bool use_direct(const sa_problem *p, int64_t rows)
{
    return rows <= DIRECT_ROWS && p->depth % LANES == 0 && p->depth_v % LANES == 0;
}

static span make_span(const attend_job *job, const sa_row *row, int64_t kv_head, int64_t first, int64_t count, bool direct, float *scratch)
{
    const sa_problem *p = job->problem;
    span s = {.problem = p, .row = row, .kv_head = kv_head, .first = first, .count = count, .direct = direct};
    s.group = p->heads_q / p->heads_kv;
    s.rows = s.group * count;
    s.pairs = use_pairs(p, direct);
    s.query_stride = job->query_stride;
    s.acc_stride = job->acc_stride;
    if (scratch != NULL) {
        s.query = carve(&scratch, job->scratch_rows * s.query_stride);
        s.pinned_query = carve(&scratch, job->scratch_rows * s.query_stride);
        s.acc = carve(&scratch, job->scratch_rows * s.acc_stride);
        s.maximum = carve(&scratch, job->scratch_rows);
        s.sum = carve(&scratch, job->scratch_rows);
        s.head = (int64_t *)(void *)carve(&scratch, 2 * job->scratch_rows);
        s.position = (int64_t *)(void *)carve(&scratch, 2 * job->scratch_rows);
        s.keys = carve(&scratch, BLOCK_KEYS * round_up(p->depth, LANES));
        s.values = carve(&scratch, BLOCK_KEYS * s.acc_stride);
        s.scores = carve(&scratch, CHUNK_ROWS * SCORE_STRIDE);
        s.weights = carve(&scratch, CHUNK_ROWS * SCORE_STRIDE / 2);
    }
    return s;
}

static int64_t span_scratch(const attend_job *job)
{
    const int64_t floats = job->scratch_rows * (2 * job->query_stride + job->acc_stride + 6) +
                           BLOCK_KEYS * (round_up(job->problem->depth, LANES) + job->acc_stride) + CHUNK_ROWS * SCORE_STRIDE * 2 + 320;
    return floats * (int64_t)sizeof(float);
}

static void clear_span(const span *s)
{
    for (int64_t r = 0; r < padded_rows(s); r++) {
        s->maximum[r] = -INFINITY;
        s->sum[r] = 0.0f;
    }
    memset(s->acc, 0, (size_t)(padded_rows(s) * s->acc_stride) * sizeof(float));
}

static void write_span(const span *s)
{
    const sa_problem *p = s->problem;
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t head = s->head[r], query = query_of(s, r);
        const sa_softmax_end end = sa_softmax_close(s->maximum[r], s->sum[r], p->sinks[s->row->first_head + head]);
        float *acc = s->acc + r * s->acc_stride;
        if (end.factor == 0.0f) { /* what was seen does not count: not even its NaN */
            memset(acc, 0, (size_t)s->acc_stride * sizeof *acc);
        }
        store_row(p->dtype, s->row->output, head * p->output_head_stride + query * p->output_stride, acc, end.factor, p->depth_v);
        if (s->row->lse != NULL) {
            s->row->lse[head * p->lse_head_stride + query] = end.lse;
        }
    }
}

/* Queries behind the real ones: output 0, lse -inf. Once for a kv head. */
static void write_padding(const sa_problem *p, const sa_row *row, int64_t kv_head)
{
    const int64_t group = p->heads_q / p->heads_kv, size = sa_dtype_size(p->dtype);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t query = row->query_count; query < row->query_total; query++) {
            const int64_t offset = head * p->output_head_stride + query * p->output_stride;
            memset((char *)row->output + offset * size, 0, (size_t)(p->depth_v * size));
            if (row->lse != NULL) {
                row->lse[head * p->lse_head_stride + query] = -INFINITY;
            }
        }
    }
}

/* --- mass of few rows -------------------------------------------------------------------------------------------------------------- */

/* Where keys are read in place for all queries of a row at once, their weights stay where the pass left them, until the sums are known: no
 * second pass. A bias of -inf goes through panels instead. */
static bool fuses_mass(const sa_problem *p, const sa_row *row)
{
    const int64_t rows = row->query_count * (p->heads_q / p->heads_kv);
    return row->mass != NULL && rows > 0 && use_direct(p, rows) && p->sink_bias == NULL;
}

static int64_t kept_floats(const row_plan *plan, int64_t rows)
{
    return plan->blocks * rows * (SCORE_STRIDE + 1);
}

/* Kept weights of query `query` against a block, mean over the group: total[BLOCK_KEYS]. */
static void mean_of_block(const span *s, int64_t index, int64_t query, const float *factors, float *total)
{
    memset(total, 0, BLOCK_KEYS * sizeof *total);
    for (int64_t h = 0; h < s->group; h++) {
        const int64_t r = h * s->count + query;
        const float *weights = s->kept + (index * s->rows + r) * SCORE_STRIDE;
        const float away = sa_softmax_factor(s->anchors[index * s->rows + r], s->maximum[r]);
        const vec_f32 factor = vec_set1(factors[r] * away);
        for (int64_t column = 0; column < BLOCK_KEYS; column += LANES) {
            vec_store(total + column, vec_fma(vec_load(weights + column), factor, vec_load(total + column)));
        }
    }
}

/* One query's share of the mass of a block's keys. */
static void reduce_block(const span *s, const sa_run *run, int64_t begin, sa_range need, int64_t query, const float *mean)
{
    const sa_problem *p = s->problem;
    float *mass = s->row->mass + s->kv_head * p->mass_head_stride;
    mass += p->mass_query_stride > 0 ? (query - s->row->mass_first) * p->mass_query_stride : 0;
    const bool first = query == s->row->mass_first || p->mass_query_stride > 0;
    const int64_t skip = run->mass_skip - begin;
    float *out = mass + run->mass_index - skip;
    for (int64_t i = max_i64(need.low, skip); i < need.high; i++) {
        if (first) {
            out[i] = mean[i];
        } else if (p->mass_reduce == SA_MASS_SUM) {
            out[i] += mean[i];
        } else {
            out[i] = mean[i] > out[i] || isnan(mean[i]) ? mean[i] : out[i];
        }
    }
}

static void write_fused_mass(const span *s)
{
    const sa_problem *p = s->problem;
    float factors[DIRECT_ROWS], mean[BLOCK_KEYS];
    for (int64_t r = 0; r < s->rows; r++) {
        factors[r] = sa_softmax_close(s->maximum[r], s->sum[r], p->sinks[s->row->first_head + s->head[r]]).factor / (float)s->group;
    }
    int64_t index = 0;
    for (int i = 0; i < s->row->run_count; i++) {
        const sa_run *run = &s->row->runs[i];
        const sa_range seen = span_visible(s, run);
        for (int64_t begin = seen.low / BLOCK_KEYS * BLOCK_KEYS; begin < seen.high && seen.low < seen.high; begin += BLOCK_KEYS, index++) {
            const sa_range need = {max_i64(seen.low - begin, 0), min_i64(seen.high - begin, BLOCK_KEYS)};
            for (int64_t query = s->row->mass_first; query < s->count && run->mass_index >= 0; query++) {
                mean_of_block(s, index, query, factors, mean);
                reduce_block(s, run, begin, need, query, mean);
            }
        }
    }
}

/* --- split keys ------------------------------------------------------------------------------------------------------------------- */

static float *piece_at(const row_plan *plan, const span *s, int64_t piece)
{
    return plan->partial + (s->kv_head * plan->pieces + piece) * s->rows * (s->acc_stride + 2);
}

static void save_piece(const row_plan *plan, const span *s, int64_t piece)
{
    float *partial = piece_at(plan, s, piece);
    memcpy(partial, s->acc, (size_t)(s->rows * s->acc_stride) * sizeof *partial);
    memcpy(partial + s->rows * s->acc_stride, s->maximum, (size_t)s->rows * sizeof *partial);
    memcpy(partial + s->rows * (s->acc_stride + 1), s->sum, (size_t)s->rows * sizeof *partial);
}

/* Joins the pieces in order into the span's state. */
static void join_pieces(const row_plan *plan, const span *s)
{
    clear_span(s);
    for (int64_t piece = 0; piece < plan->pieces; piece++) {
        const float *partial = piece_at(plan, s, piece);
        const float *maximum = partial + s->rows * s->acc_stride, *sum = maximum + s->rows;
        for (int64_t r = 0; r < s->rows; r++) {
            if (maximum[r] > s->maximum[r]) {
                raise_maximum(s, r, maximum[r]);
            }
            const float factor = sa_softmax_factor(maximum[r], s->maximum[r]);
            float *acc = s->acc + r * s->acc_stride;
            for (int64_t i = 0; i < s->acc_stride && maximum[r] != -INFINITY; i += LANES) {
                vec_store(acc + i, vec_fma(vec_load(partial + r * s->acc_stride + i), vec_set1(factor), vec_load(acc + i)));
            }
            s->sum[r] += sum[r] * factor;
        }
    }
}

/* --- tasks ------------------------------------------------------------------------------------------------------------------------ */

static int64_t row_of_task(const attend_job *job, int64_t task)
{
    int64_t low = 0, high = job->problem->row_count - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (job->rows[middle].first_task <= task) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

/* The span's part of what its row keeps for the mass. */
static void find_kept(const row_plan *plan, span *s)
{
    if (plan->kept != NULL) {
        s->kept = plan->kept + s->kv_head * kept_floats(plan, s->rows);
        s->anchors = s->kept + plan->blocks * s->rows * SCORE_STRIDE;
    }
}

static void end_span(const span *s)
{
    write_span(s);
    if (s->kept != NULL) {
        write_fused_mass(s);
    }
}

static void attend_part(const attend_job *job, int64_t task, sa_worker *worker)
{
    const int64_t index = row_of_task(job, task);
    const row_plan *plan = &job->rows[index];
    const sa_row *row = &job->problem->rows[index];
    const int64_t each = plan->pieces > 1 ? plan->pieces : plan->span_count;
    const int64_t kv_head = (task - plan->first_task) / each, part = (task - plan->first_task) % each;
    if (part == 0) {
        write_padding(job->problem, row, kv_head);
    }
    if (row->query_count == 0) {
        return;
    }
    /* The last queries see most: they begin first. */
    const int64_t number = plan->pieces > 1 ? 0 : plan->span_count - 1 - part;
    const int64_t first = number * plan->span_queries, count = min_i64(plan->span_queries, row->query_count - first);
    span s = make_span(job, row, kv_head, first, count, use_direct(job->problem, count * (job->problem->heads_q / job->problem->heads_kv)),
                             worker->scratch);
    find_kept(plan, &s);
    load_span_queries(&s);
    clear_span(&s);
    if (plan->pieces == 1) {
        span_blocks(&s, 0, INT64_MAX, worker);
        end_span(&s);
        return;
    }
    span_blocks(&s, part * plan->piece_blocks, (part + 1) * plan->piece_blocks, worker);
    save_piece(plan, &s, part);
    if (atomic_fetch_sub(&plan->missing[kv_head], 1) == 1) {
        join_pieces(plan, &s);
        end_span(&s);
    }
}

static void attend_task(void *context, int64_t task, sa_worker *worker)
{
    begin_task();
    attend_part(context, task, worker);
    end_task();
}

/* How a row's keys are cut into pieces: by its own shape alone. */
static void cut_row(const attend_job *job, const sa_row *row, row_plan *plan)
{
    plan->pieces = 1;
    const int64_t rows = row->query_count * (job->problem->heads_q / job->problem->heads_kv);
    if (row->query_count == 0 || rows > SPLIT_ROWS) {
        return;
    }
    int64_t most = 0;
    for (int64_t kv_head = 0; kv_head < job->problem->heads_kv; kv_head++) {
        const span s = make_span(job, row, kv_head, 0, row->query_count, false, NULL);
        most = max_i64(most, count_blocks(&s));
    }
    plan->blocks = most;
    plan->piece_blocks = max_i64(ceil_div(most, SPLIT_PIECES), SPLIT_BLOCKS);
    plan->pieces = max_i64(ceil_div(most, plan->piece_blocks), 1);
}

static double flops_of(const attend_job *job)
{
    const sa_problem *p = job->problem;
    double flops = 0.0;
    for (int64_t i = 0; i < p->row_count; i++) {
        double keys = 0.0;
        for (int r = 0; r < p->rows[i].run_count; r++) {
            keys += (double)p->rows[i].runs[r].count;
        }
        flops += 2.0 * (double)((p->depth + p->depth_v) * p->heads_q * p->rows[i].query_count) * keys;
    }
    return flops;
}

/* Spans as long as the scratch allows, shorter where that leaves threads idle: results do not depend on it. */
static int64_t choose_span_queries(const sa_problem *p)
{
    const int64_t group = p->heads_q / p->heads_kv;
    int64_t queries = max_i64(SPAN_ROWS / group, 1), total = 0;
    for (int64_t i = 0; i < p->row_count; i++) {
        total += p->rows[i].query_count;
    }
    while (queries * group > 2 * CHUNK_ROWS && queries > 1 && total * p->heads_kv / queries < 4 * sa_get_threads()) {
        queries = (queries + 1) / 2;
    }
    return queries >= PAD_ROWS ? queries / PAD_ROWS * PAD_ROWS : queries;
}

static sa_status plan_job(const sa_problem *p, attend_job *job)
{
    const int64_t group = p->heads_q / p->heads_kv, queries = choose_span_queries(p);
    int64_t partial = 0, longest = 1;
    *job = (attend_job){.problem = p};
    job->acc_stride = round_up(p->depth_v, TILE_COLUMNS);
    job->query_stride = round_up(p->depth, LANES);
    job->rows = calloc((size_t)max_i64(p->row_count, 1), sizeof *job->rows);
    if (job->rows == NULL) {
        return sa_no_memory("the plan of a kernel", p->row_count * (int64_t)sizeof *job->rows);
    }
    for (int64_t i = 0; i < p->row_count; i++) {
        row_plan *plan = &job->rows[i];
        const int64_t count = p->rows[i].query_count, rows = count * group;
        cut_row(job, &p->rows[i], plan);
        plan->span_queries = rows <= SPLIT_ROWS ? max_i64(count, 1) : queries;
        plan->span_count = max_i64(ceil_div(count, plan->span_queries), 1);
        plan->first_task = job->tasks;
        job->tasks += p->heads_kv * (plan->pieces > 1 ? plan->pieces : plan->span_count);
        partial += plan->pieces > 1 ? p->heads_kv * plan->pieces * rows * (job->acc_stride + 2) : 0;
        partial += fuses_mass(p, &p->rows[i]) ? p->heads_kv * kept_floats(plan, rows) : 0;
        longest = max_i64(longest, min_i64(plan->span_queries, count));
        sa_path_count_row(use_direct(p, min_i64(plan->span_queries, count) * group) ? SA_PATH_DIRECT : SA_PATH_PACKED);
    }
    job->scratch_rows = round_up(longest * group, PAD_ROWS);
    if (partial == 0) {
        return SA_OK;
    }
    job->partials = malloc((size_t)partial * sizeof(float));
    job->missing = malloc((size_t)(p->row_count * p->heads_kv) * sizeof *job->missing);
    if (job->partials == NULL || job->missing == NULL) {
        return sa_no_memory("partial results", partial * (int64_t)sizeof(float));
    }
    float *next = job->partials;
    for (int64_t i = 0; i < p->row_count; i++) {
        row_plan *plan = &job->rows[i];
        plan->partial = next;
        plan->missing = job->missing + i * p->heads_kv;
        for (int64_t kv_head = 0; kv_head < p->heads_kv; kv_head++) {
            atomic_init(&plan->missing[kv_head], (int)plan->pieces);
        }
        const int64_t rows = p->rows[i].query_count * group;
        next += plan->pieces > 1 ? p->heads_kv * plan->pieces * rows * (job->acc_stride + 2) : 0;
        if (fuses_mass(p, &p->rows[i])) {
            plan->kept = next;
            next += p->heads_kv * kept_floats(plan, rows);
            sa_path_count_row(SA_PATH_MASS);
        }
    }
    return SA_OK;
}

static sa_status attend_forward(const sa_problem *problem, sa_poll poll)
{
    attend_job job;
    sa_status status = plan_job(problem, &job);
    if (status == SA_OK) {
        status = sa_pool_run(job.tasks, flops_of(&job), span_scratch(&job), attend_task, &job, poll);
    }
    free(job.rows);
    free(job.partials);
    free(job.missing);
    return status;
}

#endif
