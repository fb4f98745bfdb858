/* Gradients: what one tile of queries and one block of keys give each other.
 *
 * Scores are turned: rows are keys, columns are queries of one head. So weights and their gradients lie as dV and dK need them, what belongs
 * to a query (lse, delta) is a vector along the row, and what belongs to a key (bias, what sees it) is one number for the row. dQ needs them
 * turned back, sixteen by sixteen or as wide as the registers are. */
#ifndef SA_KERNEL_BACKWARD_TILE_H
#define SA_KERNEL_BACKWARD_TILE_H

#include "kernel_attend.h"

enum {
    TILE_QUERIES = BLOCK_KEYS,            /* columns of a tile: panels are packed by the same hands as keys */
    SPARE_ROWS = 16,                      /* whole register tiles of rows reach beyond a block */
    BLOCK_ROWS = BLOCK_KEYS + SPARE_ROWS,
};

/* What a key block keeps while all queries pass. */
typedef struct key_block {
    const sa_backward *backward;
    int64_t index, kv_head; /* row of the problem */
    const sa_run *run;
    int64_t begin, count;
    bool pairs, learns_bias;
    int64_t words, words_v;           /* of a key, of a value */
    int64_t stride, stride_v;         /* of rows of words */
    int64_t acc_stride, acc_stride_v; /* of rows of sums */
    float *keys, *values;             /* [BLOCK_ROWS] rows of words */
    float *key_panels;                /* keys as rows of panels, for dQ */
    float *dkey, *dvalue;             /* [BLOCK_ROWS] sums; d(key) without the scale */
    /* the tile at hand */
    float *query_columns, *out_columns; /* panels of columns: queries, d(output) */
    float *query_rows, *out_rows;       /* panels of rows */
    float *scores, *dscores;            /* [CHUNK_ROWS, SCORE_STRIDE] */
    float *weights, *halves;            /* the same as bf16 pairs */
    float *turned;                      /* [TILE_QUERIES + SPARE_ROWS, SCORE_STRIDE]: d(scores), rows are queries */
} key_block;

typedef struct query_tile {
    int64_t head, first;       /* queries first .. first + TILE_QUERIES - 1 of the row */
    int64_t low, high;         /* columns that some key of the block is seen by */
    const float *lse, *delta;  /* [TILE_QUERIES]: log2 units, +inf where no pair counts; <d(out), out> - d(lse) */
    float *dquery;             /* [TILE_QUERIES + SPARE_ROWS, acc_stride] sums without the scale */
    bool whole;                /* every key of a full block is seen by every query of a full tile */
} query_tile;

/* --- loading ---------------------------------------------------------------------------------------------------------------------- */

/* Rows low .. high - 1 as words; the others of `count`, and the spare ones behind them, are zero. */
static void load_rows(bool pairs, sa_dtype dtype, const void *data, int64_t step, int64_t depth, int64_t low, int64_t high, int64_t count,
                      float *out, int64_t stride)
{
    const int64_t words = words_of(pairs, depth);
    memset(out, 0, (size_t)(low * stride) * sizeof *out);
    memset(out + high * stride, 0, (size_t)((count + SPARE_ROWS - high) * stride) * sizeof *out);
    for (int64_t r = low; r < high; r++) {
        for (int64_t word = 0; word < words; word += LANES) {
            vec_store(out + r * stride + word, pairs ? load_pairs(data, r * step + 2 * word, depth - 2 * word)
                                                     : load_part(dtype, data, r * step + word, depth - word));
        }
    }
}

static int64_t panel_rows(bool pairs)
{
    return words_of(pairs, BLOCK_KEYS);
}

/* Rows from .. to - 1 of panels of rows. */
static void zero_panel_rows(bool pairs, float *panels, int64_t depth, int64_t from, int64_t to)
{
    for (int64_t panel = 0; panel < ceil_div(depth, TILE_COLUMNS) && to > from; panel++) {
        float *rows = panels + panel * panel_rows(pairs) * TILE_COLUMNS;
        if (pairs) {
            for (int64_t row = from; row < to; row++) {
                for (int64_t i = 0; i < TILE_COLUMNS; i++) {
                    ((uint16_t *)(void *)(rows + row / 2 * TILE_COLUMNS + i))[row % 2] = 0;
                }
            }
        } else {
            memset(rows + from * TILE_COLUMNS, 0, (size_t)((to - from) * TILE_COLUMNS) * sizeof *rows);
        }
    }
}

/* Panels of rows low .. high - 1, with zeros up to the next multiples of GRAIN: products run over whole grains. */
static void pack_rows(bool pairs, sa_dtype dtype, const void *data, int64_t step, int64_t depth, int64_t low, int64_t high, float *panels)
{
    value_packer(dtype, pairs)(data, step, depth, low, high, panels);
    zero_panel_rows(pairs, panels, depth, low / GRAIN * GRAIN, low);
    zero_panel_rows(pairs, panels, depth, high, round_up(high, GRAIN));
}

/* --- one row of scores ------------------------------------------------------------------------------------------------------------ */

/* What belongs to one key and one head. */
typedef struct key_terms {
    float scale;    /* with log2 e, unless softcap */
    float softcap;  /* 0: none */
    float bias;     /* log2 units */
    float slope;    /* log2 units */
    float distance; /* position of query 0 of the tile - position of the key */
} key_terms;

static key_terms terms_of_key(const key_block *b, const query_tile *t, int64_t r)
{
    const sa_problem *p = &b->backward->forward;
    const sa_row *row = &p->rows[b->index];
    key_terms terms = {.scale = p->softcap > 0.0f ? p->scale : (float)((double)p->scale * SA_LOG2E), .softcap = p->softcap};
    const float *bias = sa_bias(p, row, b->run, t->head);
    if (bias != NULL) {
        terms.bias = (float)((double)bias[b->begin + r] * SA_LOG2E);
    }
    if (b->run->kind != SA_RUN_LEARNED && row->alibi != NULL) {
        terms.slope = (float)((double)row->alibi[t->head] * SA_LOG2E);
        terms.distance = (float)(row->position + t->first - b->run->position - b->begin - r);
    }
    return terms;
}

/* Products -> log2 of the weights' numerators, and what their gradients are multiplied with on the way back through the cap:
 * tanh and 1 - tanh^2 from one exponential, without the cancellation of the second. */
VEC_INLINE vec_f32 turned_score(vec_f32 product, const key_terms *terms, int64_t column, vec_f32 *through_cap)
{
    vec_f32 x = vec_mul(product, vec_set1(terms->scale));
    *through_cap = vec_set1(1.0f);
    if (terms->softcap > 0.0f) {
        const vec_f32 inner = vec_div(x, vec_set1(terms->softcap)), one = vec_set1(1.0f);
        const vec_f32 decay = vec_exp2(vec_mul(vec_abs(inner), vec_set1((float)(-2.0 * SA_LOG2E))));
        const vec_f32 sum = vec_add(one, decay);
        *through_cap = vec_div(vec_mul(vec_set1(4.0f), decay), vec_mul(sum, sum));
        x = vec_mul(vec_tanh(inner), vec_set1((float)((double)terms->softcap * SA_LOG2E)));
    }
    x = vec_add(x, vec_set1(terms->bias));
    if (terms->slope != 0.0f) {
        const vec_f32 away = vec_add(vec_set1(terms->distance + (float)column), vec_iota());
        x = vec_sub(x, vec_mul(vec_set1(terms->slope), vec_abs(away)));
    }
    return x;
}

VEC_INLINE void store_weights(bool pairs, float *words, uint16_t *halves, int64_t column, vec_f32 x)
{
    if (pairs) {
        vec_store_bf16(halves + column, x);
    } else {
        vec_store(words + column, x);
    }
}

/* Where scores are products times a scale and everything is seen. */
VEC_INLINE void plain_row(bool pairs, const query_tile *t, float scale, float *scores, float *dscores, uint16_t *weights, uint16_t *halves)
{
    const vec_f32 times = vec_set1(scale);
#pragma GCC unroll 4
    for (int64_t column = 0; column < TILE_QUERIES; column += LANES) {
        const vec_f32 x = vec_sub(vec_mul(vec_load(scores + column), times), vec_load(t->lse + column));
        const vec_f32 weight = vec_exp2(x);
        const vec_f32 d = vec_mul(weight, vec_sub(vec_load(dscores + column), vec_load(t->delta + column)));
        store_weights(pairs, scores, weights, column, weight);
        vec_store(dscores + column, d);
        if (pairs) {
            vec_store_bf16(halves + column, d);
        }
    }
}

/* Any row: columns low .. high - 1 (multiples of GRAIN), of which `seen` count. Returns the sum of d(score) before the cap. */
static float any_row(bool pairs, const query_tile *t, const key_terms *terms, sa_range seen, int64_t low, int64_t high, float *scores,
                     float *dscores, uint16_t *weights, uint16_t *halves)
{
    vec_f32 sum = vec_zero();
    for (int64_t column = low; column < high; column += LANES) {
        vec_f32 through_cap;
        const vec_f32 x = turned_score(vec_load(scores + column), terms, column, &through_cap);
        vec_f32 weight = vec_exp2(vec_sub(x, vec_load(t->lse + column)));
        vec_f32 d = vec_mul(weight, vec_sub(vec_load(dscores + column), vec_load(t->delta + column)));
        weight = vec_select_below(vec_load(t->lse + column), FLT_MAX, weight, vec_zero()); /* of an idle query: not even its NaN */
        d = vec_select_below(vec_load(t->lse + column), FLT_MAX, d, vec_zero());
        if (seen.low > column || seen.high < column + LANES) {
            weight = vec_keep_range(weight, seen.low - column, seen.high - column, vec_zero());
            d = vec_keep_range(d, seen.low - column, seen.high - column, vec_zero());
        }
        sum = vec_add(sum, d);
        d = vec_mul(d, through_cap);
        store_weights(pairs, scores, weights, column, weight);
        vec_store(dscores + column, d);
        if (pairs) {
            vec_store_bf16(halves + column, d);
        }
    }
    return vec_sum(sum);
}

/* Columns of the tile that see key r of the block. */
static sa_range columns_of_key(const key_block *b, const query_tile *t, int64_t r)
{
    const sa_problem *p = &b->backward->forward;
    const sa_row *row = &p->rows[b->index];
    if (sa_removed(p, row, b->run, t->head, b->begin + r)) {
        return (sa_range){0, 0};
    }
    const sa_range seen = sa_seen_by(b->run, p->causal, p->windows[t->head], row, b->begin + r);
    return (sa_range){clamp_i64(seen.low - t->first, 0, TILE_QUERIES), clamp_i64(seen.high - t->first, 0, TILE_QUERIES)};
}

/* --- one tile --------------------------------------------------------------------------------------------------------------------- */

/* d(scores) of a chunk of rows (zero up to a whole square) -> columns r0 .. of the turned ones. */
static void turn_chunk(const key_block *b, int64_t r0, int64_t rows, int64_t low, int64_t high)
{
    for (int64_t column = low; column < high; column += LANES) {
        for (int64_t r = 0; r < rows; r += LANES) {
            vec_f32 square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                square[i] = vec_load(b->dscores + (r + i) * SCORE_STRIDE + column);
            }
            vec_transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                float *to = b->turned + (column + i) * SCORE_STRIDE;
                if (b->pairs) {
                    vec_store_bf16((uint16_t *)(void *)to + r0 + r, square[i]);
                } else {
                    vec_store(to + r0 + r, square[i]);
                }
            }
        }
    }
}

static void finish_chunk(const key_block *b, const query_tile *t, int64_t r0, int64_t rows, const sa_range *seen, int64_t low, int64_t high)
{
    const sa_problem *p = &b->backward->forward;
    const bool plain = t->whole && p->softcap == 0.0f && p->rows[b->index].alibi == NULL && (p->sink_bias == NULL || b->run->kind != SA_RUN_PINNED);
    const float scale = (float)((double)p->scale * SA_LOG2E);
    for (int64_t r = 0; r < rows; r++) {
        float *scores = b->scores + r * SCORE_STRIDE, *dscores = b->dscores + r * SCORE_STRIDE;
        uint16_t *weights = (uint16_t *)(void *)b->weights + r * SCORE_STRIDE, *halves = (uint16_t *)(void *)b->halves + r * SCORE_STRIDE;
        if (plain && b->pairs) {
            plain_row(true, t, scale, scores, dscores, weights, halves);
        } else if (plain) {
            plain_row(false, t, scale, scores, dscores, weights, halves);
        } else {
            const key_terms terms = terms_of_key(b, t, r0 + r);
            const float sum = any_row(b->pairs, t, &terms, seen[r], low, high, scores, dscores, weights, halves);
            if (b->learns_bias) {
                b->backward->rows[b->index].bias_sums[t->head * p->bias_stride + b->run->position + b->begin + r0 + r] += (double)sum;
            }
        }
    }
    for (int64_t r = rows; r < round_up(rows, LANES); r++) {
        memset(b->dscores + r * SCORE_STRIDE, 0, TILE_QUERIES * sizeof(float));
    }
}

/* Keys r0 .. r0 + rows - 1 against the tile: their d(value) and d(key), and d(score) turned. */
static void chunk_of_keys(const key_block *b, const query_tile *t, int64_t r0, int64_t rows)
{
    sa_range seen[CHUNK_ROWS], all = {TILE_QUERIES, 0};
    for (int64_t r = 0; r < rows; r++) {
        seen[r] = t->whole ? (sa_range){0, TILE_QUERIES} : columns_of_key(b, t, r0 + r);
        if (seen[r].low < seen[r].high) {
            all = (sa_range){min_i64(all.low, seen[r].low), max_i64(all.high, seen[r].high)};
        }
    }
    if (all.low >= all.high) {
        return;
    }
    const int64_t low = all.low / GRAIN * GRAIN, high = round_up(all.high, GRAIN), panel = low / TILE_COLUMNS;
    const int64_t columns = high - panel * TILE_COLUMNS, start = panel * TILE_COLUMNS;
    multiply(b->pairs, b->keys + r0 * b->stride, b->stride, b->query_columns + panel * b->words * TILE_COLUMNS, b->words * TILE_COLUMNS,
             b->words, b->scores + start, SCORE_STRIDE, rows, columns, false);
    multiply(b->pairs, b->values + r0 * b->stride_v, b->stride_v, b->out_columns + panel * b->words_v * TILE_COLUMNS,
             b->words_v * TILE_COLUMNS, b->words_v, b->dscores + start, SCORE_STRIDE, rows, columns, false);
    finish_chunk(b, t, r0, rows, seen, low, high);
    const int64_t first = b->pairs ? low / 2 : low, last = b->pairs ? high / 2 : high, stride = b->pairs ? SCORE_STRIDE / 2 : SCORE_STRIDE;
    const float *weights = b->pairs ? b->weights : b->scores, *dscores = b->pairs ? b->halves : b->dscores;
    const int64_t panel_stride = panel_rows(b->pairs) * TILE_COLUMNS;
    const sa_problem *p = &b->backward->forward;
    multiply(b->pairs, weights + first, stride, b->out_rows + first * TILE_COLUMNS, panel_stride, last - first,
             b->dvalue + r0 * b->acc_stride_v, b->acc_stride_v, rows, p->depth_v, true);
    multiply(b->pairs, dscores + first, stride, b->query_rows + first * TILE_COLUMNS, panel_stride, last - first,
             b->dkey + r0 * b->acc_stride, b->acc_stride, rows, p->depth, true);
    turn_chunk(b, r0, rows, low, high);
}

/* Queries c0 .. of the tile, with the keys that they see. */
static void chunk_of_queries(const key_block *b, const query_tile *t, int64_t c0, int64_t rows)
{
    const sa_problem *p = &b->backward->forward;
    const int64_t position = p->rows[b->index].position + t->first + c0, window = p->windows[t->head];
    const sa_range oldest = sa_visible(b->run, p->causal, window, position), newest = sa_visible(b->run, p->causal, window, position + rows - 1);
    const int64_t low = clamp_i64(oldest.low - b->begin, 0, b->count) / GRAIN * GRAIN;
    const int64_t high = round_up(clamp_i64(newest.high - b->begin, 0, b->count), GRAIN);
    if (low >= high) {
        return;
    }
    const int64_t first = b->pairs ? low / 2 : low, last = b->pairs ? high / 2 : high;
    multiply(b->pairs, b->turned + c0 * SCORE_STRIDE + first, SCORE_STRIDE, b->key_panels + first * TILE_COLUMNS,
             panel_rows(b->pairs) * TILE_COLUMNS, last - first, t->dquery + c0 * b->acc_stride, b->acc_stride, rows, p->depth, true);
}

static void pack_tile(const key_block *b, const query_tile *t)
{
    const sa_backward *back = b->backward;
    const sa_problem *p = &back->forward;
    const sa_row *row = &p->rows[b->index];
    const bool second = b->run->kind == SA_RUN_PINNED && row->sink_query != NULL;
    const int64_t step = second ? p->sink_query_stride : p->query_stride;
    const int64_t offset = t->head * (second ? p->sink_query_head_stride : p->query_head_stride) + t->first * step;
    const void *query = sa_at(second ? row->sink_query : row->query, p->dtype, offset);
    const int64_t out_offset = t->head * back->output_gradient_head_stride + t->first * back->output_gradient_stride;
    const void *out = sa_at(back->rows[b->index].output_gradient, p->dtype, out_offset);
    key_packer(p->dtype, b->pairs)(query, step, p->depth, t->low, t->high, b->query_columns);
    key_packer(p->dtype, b->pairs)(out, back->output_gradient_stride, p->depth_v, t->low, t->high, b->out_columns);
    pack_rows(b->pairs, p->dtype, query, step, p->depth, t->low, t->high, b->query_rows);
    pack_rows(b->pairs, p->dtype, out, back->output_gradient_stride, p->depth_v, t->low, t->high, b->out_rows);
}

/* A query is idle where it saw nothing or an infinite sink took all: its weights are 0, whatever the query and d(out) hold. True: some is. */
static bool clear_idle(const key_block *b, const query_tile *t)
{
    const sa_problem *p = &b->backward->forward;
    bool any = false;
    for (int64_t c = t->low; c < t->high; c++) {
        if (t->lse[c] != INFINITY) {
            continue;
        }
        any = true;
        float *query = b->query_columns + c / TILE_COLUMNS * b->words * TILE_COLUMNS + c % TILE_COLUMNS;
        float *out = b->out_columns + c / TILE_COLUMNS * b->words_v * TILE_COLUMNS + c % TILE_COLUMNS;
        for (int64_t word = 0; word < b->words; word++) {
            query[word * TILE_COLUMNS] = 0.0f;
        }
        for (int64_t word = 0; word < b->words_v; word++) {
            out[word * TILE_COLUMNS] = 0.0f;
        }
        zero_panel_rows(b->pairs, b->query_rows, p->depth, c, c + 1);
        zero_panel_rows(b->pairs, b->out_rows, p->depth_v, c, c + 1);
    }
    return any;
}

static void backward_tile(const key_block *b, query_tile *t)
{
    pack_tile(b, t);
    t->whole = !clear_idle(b, t) && t->whole;
    if (!t->whole) {
        memset(b->turned, 0, (size_t)((t->high + SPARE_ROWS) * SCORE_STRIDE) * sizeof(float));
    }
    for (int64_t r0 = 0; r0 < b->count; r0 += CHUNK_ROWS) {
        chunk_of_keys(b, t, r0, min_i64(CHUNK_ROWS, b->count - r0));
    }
    for (int64_t c0 = t->low / CHUNK_ROWS * CHUNK_ROWS; c0 < t->high; c0 += CHUNK_ROWS) {
        chunk_of_queries(b, t, c0, min_i64(CHUNK_ROWS, t->high - c0));
    }
}

#endif
