/* A span: consecutive queries of one kv head's whole group, as rows [head in group][query]; and what happens to a block of its scores. */
#ifndef SA_KERNEL_SPAN_H
#define SA_KERNEL_SPAN_H

#include <float.h>
#include <math.h>

#include "../core/softmax.h"
#include "kernel_tile.h"

enum { CHUNK_ROWS = 4 * TILE_ROWS, DIRECT_ROWS = 8 };

typedef struct span {
    const sa_problem *problem;
    const sa_row *row;
    int64_t kv_head, first, count; /* queries first .. first + count - 1 of the row */
    int64_t group, rows;           /* rows = group * count */
    bool pairs;                    /* words are bf16 pairs */
    bool direct;                   /* keys and values are read where they lie */
    int64_t query_stride, acc_stride;
    float *query, *pinned_query; /* [rows padded, query_stride] words */
    float *acc;                  /* [rows padded, acc_stride] */
    float *maximum, *sum;        /* [rows padded] */
    int64_t *head, *position;    /* [rows] query head, position in the row's own count */
    float *keys, *values;        /* panels of one block */
    float *scores;               /* [CHUNK_ROWS, SCORE_STRIDE] */
    float *weights;              /* bf16 pairs [CHUNK_ROWS, SCORE_STRIDE / 2] */
    float *kept;                 /* direct, with mass: scores of every block of the span [blocks, rows, SCORE_STRIDE], NULL: none */
    float *anchors;              /* [blocks, rows] maxima that they were taken from */
} span;

/* Register tiles work on whole tiles of rows. */
static int64_t padded_rows(const span *s)
{
    return s->direct ? s->rows : round_up(s->rows, PAD_ROWS);
}

static void number_rows(const span *s)
{
    for (int64_t r = 0; r < s->rows; r++) {
        s->head[r] = s->kv_head * s->group + r / s->count;
        s->position[r] = s->row->position + s->first + r % s->count;
    }
}

static int64_t query_of(const span *s, int64_t r)
{
    return s->position[r] - s->row->position;
}

/* Converts query rows to words: fp32, or the bf16 pairs as they are. */
static void load_queries(const span *s, const void *data, int64_t head_stride, int64_t stride, float *out)
{
    const sa_dtype dtype = s->problem->dtype;
    const int64_t depth = s->problem->depth, words = words_of(s->pairs, depth);
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t offset = s->head[r] * head_stride + query_of(s, r) * stride;
        float *row = out + r * s->query_stride;
        for (int64_t word = 0; word < words; word += LANES) {
            vec_store(row + word, s->pairs ? load_pairs(data, offset + 2 * word, depth - 2 * word)
                                           : load_part(dtype, data, offset + word, depth - word));
        }
    }
    memset(out + s->rows * s->query_stride, 0, (size_t)((padded_rows(s) - s->rows) * s->query_stride) * sizeof *out);
}

static void load_span_queries(const span *s)
{
    const sa_problem *p = s->problem;
    number_rows(s);
    load_queries(s, s->row->query, p->query_head_stride, p->query_stride, s->query);
    if (s->row->sink_query != NULL) {
        load_queries(s, s->row->sink_query, p->sink_query_head_stride, p->sink_query_stride, s->pinned_query);
    }
}

static const float *query_for(const span *s, const sa_run *run)
{
    return run->kind == SA_RUN_PINNED && s->row->sink_query != NULL ? s->pinned_query : s->query;
}

/* Keys of a run that some query of the span sees. */
static sa_range span_visible(const span *s, const sa_run *run)
{
    const sa_problem *p = s->problem;
    int64_t window = 0;
    for (int64_t h = 0; h < s->group; h++) {
        window = max_i64(window, p->windows[s->kv_head * s->group + h]);
    }
    const sa_range oldest = sa_visible(run, p->causal, window, s->row->position + s->first);
    const sa_range newest = sa_visible(run, p->causal, window, s->row->position + s->first + s->count - 1);
    return (sa_range){oldest.low, newest.high};
}

/* Columns of the block at key `begin` that row r sees. */
static sa_range row_columns(const span *s, const sa_run *run, int64_t r, int64_t begin)
{
    const sa_problem *p = s->problem;
    const sa_range seen = sa_visible(run, p->causal, p->windows[s->head[r]], s->position[r]);
    return (sa_range){clamp_i64(seen.low - begin, 0, BLOCK_KEYS), clamp_i64(seen.high - begin, 0, BLOCK_KEYS)};
}

/* tanh, to about two units in the last place: a series near 0, where 1 - exp would cancel. */
VEC_INLINE vec_f32 vec_tanh(vec_f32 x)
{
    const vec_f32 size = vec_abs(x), square = vec_mul(x, x);
    vec_f32 series = vec_set1(-1382.0f / 155925.0f);
    series = vec_fma(series, square, vec_set1(62.0f / 2835.0f));
    series = vec_fma(series, square, vec_set1(-17.0f / 315.0f));
    series = vec_fma(series, square, vec_set1(2.0f / 15.0f));
    series = vec_fma(series, square, vec_set1(-1.0f / 3.0f));
    series = vec_fma(vec_mul(series, square), size, size);
    const vec_f32 decay = vec_exp2(vec_mul(size, vec_set1((float)(-2.0 * SA_LOG2E))));
    const vec_f32 far = vec_div(vec_sub(vec_set1(1.0f), decay), vec_add(vec_set1(1.0f), decay));
    return vec_copysign(vec_select_below(size, 0.35f, series, far), x);
}

/* What turns products of a block into scores in log2 units, for one row. */
typedef struct row_terms {
    float scale;         /* with log2 e, unless softcap */
    float softcap;       /* 0: none */
    const float *bias;   /* of column 0 of the block, NULL: none */
    int64_t bias_count;  /* columns that have one */
    float slope;         /* log2 units */
    float distance;      /* query position - position of column 0; with `back`: the query's number */
    const float *back;   /* how far each column lies before query 0, nullable */
} row_terms;

static row_terms terms_of(const span *s, const sa_run *run, int64_t r, int64_t begin)
{
    const sa_problem *p = s->problem;
    const int64_t head = s->head[r];
    row_terms terms = {.scale = p->softcap > 0.0f ? p->scale : (float)((double)p->scale * SA_LOG2E), .softcap = p->softcap};
    if (run->kind == SA_RUN_PINNED && p->sink_bias != NULL) {
        terms.bias = sa_bias(p, s->row, run, head) + begin;
        terms.bias_count = run->count - begin;
    }
    if (run->kind == SA_RUN_HELD && s->row->alibi != NULL) {
        terms.slope = (float)((double)s->row->alibi[head] * SA_LOG2E);
        terms.back = run->back + begin;
        terms.distance = (float)query_of(s, r);
    } else if (run->kind != SA_RUN_LEARNED && s->row->alibi != NULL) {
        const int64_t position = s->position[r];
        const int64_t from = run->kind == SA_RUN_PINNED ? min_i64(position, p->pinned_query_limit) : position;
        terms.slope = (float)((double)s->row->alibi[head] * SA_LOG2E);
        terms.distance = (float)(from - run->position - begin);
    }
    return terms;
}

VEC_INLINE vec_f32 score_of(vec_f32 product, const row_terms *terms, int64_t column)
{
    vec_f32 x = vec_mul(product, vec_set1(terms->scale));
    if (terms->softcap > 0.0f) {
        x = vec_mul(vec_tanh(vec_div(x, vec_set1(terms->softcap))), vec_set1((float)((double)terms->softcap * SA_LOG2E)));
    }
    if (terms->bias != NULL) {
        const vec_f32 bias = load_part(SA_F32, terms->bias, column, terms->bias_count - column);
        x = vec_fma(bias, vec_set1((float)SA_LOG2E), x);
        x = vec_select_below(bias, -FLT_MAX, vec_set1(-INFINITY), x); /* removed: not even its NaN counts */
    }
    if (terms->slope != 0.0f) {
        const vec_f32 away = terms->back != NULL ? vec_add(vec_load(terms->back + column), vec_set1(terms->distance))
                                                 : vec_sub(vec_set1(terms->distance - (float)column), vec_iota());
        x = vec_sub(x, vec_mul(vec_set1(terms->slope), vec_abs(away)));
    }
    return x;
}

/* Products -> scores, masked to `seen`, over columns low .. high - 1 (multiples of GRAIN). Returns the largest. */
static float finish_scores(float *scores, const row_terms *terms, sa_range seen, int64_t low, int64_t high)
{
    vec_f32 largest = vec_set1(-INFINITY);
    for (int64_t column = low; column < high; column += LANES) {
        vec_f32 x = score_of(vec_load(scores + column), terms, column);
        if (seen.low > column || seen.high < column + LANES) {
            x = vec_keep_range(x, seen.low - column, seen.high - column, vec_set1(-INFINITY));
        }
        vec_store(scores + column, x);
        largest = vec_max(largest, x);
    }
    return vec_largest(largest);
}

/* Moves a row's state to a new maximum. */
static void raise_maximum(const span *s, int64_t r, float maximum)
{
    const float factor = sa_softmax_factor(s->maximum[r], maximum);
    float *acc = s->acc + r * s->acc_stride;
    const vec_f32 times = vec_set1(factor);
    for (int64_t i = 0; i < s->acc_stride && s->maximum[r] != -INFINITY; i += LANES) {
        vec_store(acc + i, vec_mul(vec_load(acc + i), times));
    }
    s->sum[r] *= factor;
    s->maximum[r] = maximum;
}

/* Does every row of a chunk see the whole block? */
static bool sees_all(const span *s, const sa_run *run, int64_t r0, int64_t rows, int64_t begin)
{
    const sa_problem *p = s->problem;
    if (begin + BLOCK_KEYS > run->count) {
        return false;
    }
    for (int64_t r = r0; r < r0 + rows; r++) {
        const sa_range seen = row_columns(s, run, r, begin);
        if (seen.low > 0 || seen.high < BLOCK_KEYS) {
            return false;
        }
        /* Rows run through the queries of one head after the other: within a head its first and its last decide. */
        const int64_t last = min_i64(r0 + rows, (s->head[r] - s->kv_head * s->group + 1) * s->count) - 1;
        if (last > r) {
            const sa_range other = sa_visible(run, p->causal, p->windows[s->head[last]], s->position[last]);
            if (other.low > begin || other.high < begin + BLOCK_KEYS) {
                return false;
            }
            r = last;
        }
    }
    return true;
}

/* softmax_row for a block that is seen whole and whose scores are products times a scale: all in registers. */
static void softmax_row_plain(const span *s, int64_t r, float *scores, uint16_t *halves)
{
    enum { VECS = BLOCK_KEYS / LANES };
    const vec_f32 scale = vec_set1((float)((double)s->problem->scale * SA_LOG2E));
    vec_f32 x[VECS], largest = vec_set1(-INFINITY), sum = vec_zero();
#pragma GCC unroll 16
    for (int v = 0; v < VECS; v++) {
        x[v] = vec_mul(vec_load(scores + v * LANES), scale);
        largest = vec_max(largest, x[v]);
    }
    const float top = vec_largest(largest);
    if (top > s->maximum[r]) {
        raise_maximum(s, r, top);
    }
    const vec_f32 anchor = vec_set1(s->maximum[r] == -INFINITY ? 0.0f : s->maximum[r]);
#pragma GCC unroll 16
    for (int v = 0; v < VECS; v++) {
        const vec_f32 weight = vec_exp2(vec_sub(x[v], anchor));
        sum = vec_add(sum, weight);
        if (halves != NULL) {
            vec_store_bf16(halves + v * LANES, weight);
        } else {
            vec_store(scores + v * LANES, weight);
        }
    }
    s->sum[r] += vec_sum(sum);
}

/* One row of a block: products -> weights 2^(x - m) in place (or as bf16 pairs), the row's (m, s, acc) brought along. */
static void softmax_row(const span *s, const sa_run *run, int64_t r, int64_t begin, sa_range seen, int64_t low, int64_t high, float *scores,
                        uint16_t *halves)
{
    const row_terms terms = terms_of(s, run, r, begin);
    const float largest = finish_scores(scores, &terms, seen, low, high);
    if (largest > s->maximum[r]) {
        raise_maximum(s, r, largest);
    }
    const vec_f32 anchor = vec_set1(s->maximum[r] == -INFINITY ? 0.0f : s->maximum[r]);
    vec_f32 sum = vec_zero();
    for (int64_t column = low; column < high; column += LANES) {
        const vec_f32 weight = vec_exp2(vec_sub(vec_load(scores + column), anchor));
        sum = vec_add(sum, weight);
        if (halves != NULL) {
            vec_store_bf16(halves + column, weight);
        } else {
            vec_store(scores + column, weight);
        }
    }
    s->sum[r] += vec_sum(sum);
}

#endif
