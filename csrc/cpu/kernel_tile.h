/* Register tiles, packing, and the direct forms that read keys and values where they lie. Words: fp32 numbers, or pairs of bf16. */
#ifndef SA_KERNEL_TILE_H
#define SA_KERNEL_TILE_H

#include "../core/half.h"
#include "../core/problem.h"

enum {
    TILE_COLUMNS = TILE_VECS * LANES,
    BLOCK_KEYS = 128,                     /* keys of one block; blocks lie on a grid that starts at the run */
    SCORE_STRIDE = BLOCK_KEYS + LANES,    /* direct scores write up to three columns too many */
#ifdef VEC_AMX
    PAD_ROWS = 16,           /* rows of queries, scores and sums come in whole tiles */
    PAD_WORDS = 16,          /* words of pairs too, with zeros behind the last */
    GRAIN = TILE_COLUMNS,    /* columns of scores that are worked on together */
    DIRECT_PAIRS = 0,        /* outside tiles this processor is faster with fp32 */
#else
    PAD_ROWS = TILE_ROWS,
    PAD_WORDS = 1,
    GRAIN = LANES,
    DIRECT_PAIRS = 1,
#endif
};

/* Around all that a task does. */
static void begin_task(void)
{
#ifdef VEC_AMX
    amx_begin();
#endif
}

static void end_task(void)
{
#ifdef VEC_AMX
    amx_end();
#endif
}

/* c[rows, vecs * LANES] (+)= a[rows, words] * panel[words, TILE_COLUMNS]. One word of a against one row of the panel at a time, in order,
 * so that an element's sum does not depend on the tile it was computed in. */
#define DEFINE_MULTIPLY(NAME, ROWS, VECS, STEP)                                                                                    \
    static void NAME(const float *a, int64_t a_stride, const float *panel, int64_t words, float *c, int64_t c_stride, bool add)    \
    {                                                                                                                              \
        vec_f32 sum[ROWS][VECS];                                                                                                   \
        _Pragma("GCC unroll 16") for (int r = 0; r < (ROWS); r++)                                                                  \
        {                                                                                                                          \
            _Pragma("GCC unroll 4") for (int v = 0; v < (VECS); v++) sum[r][v] =                                                   \
                add ? vec_load(c + r * c_stride + v * LANES) : vec_zero();                                                         \
        }                                                                                                                          \
        for (int64_t i = 0; i < words; i++) {                                                                                      \
            vec_f32 column[VECS];                                                                                                  \
            _Pragma("GCC unroll 4") for (int v = 0; v < (VECS); v++) column[v] = vec_load(panel + i * TILE_COLUMNS + v * LANES);   \
            _Pragma("GCC unroll 16") for (int r = 0; r < (ROWS); r++)                                                              \
            {                                                                                                                      \
                const vec_f32 word = vec_set1(a[r * a_stride + i]);                                                                \
                _Pragma("GCC unroll 4") for (int v = 0; v < (VECS); v++) sum[r][v] = STEP(word, column[v], sum[r][v]);             \
            }                                                                                                                      \
        }                                                                                                                          \
        _Pragma("GCC unroll 16") for (int r = 0; r < (ROWS); r++)                                                                  \
        {                                                                                                                          \
            _Pragma("GCC unroll 4") for (int v = 0; v < (VECS); v++) vec_store(c + r * c_stride + v * LANES, sum[r][v]);           \
        }                                                                                                                          \
    }

typedef void (*multiply_function)(const float *a, int64_t a_stride, const float *panel, int64_t words, float *c, int64_t c_stride, bool add);

enum { THIRD_ROWS = TILE_ROWS / 3 };

#define DEFINE_MULTIPLIES(KIND, STEP)                                            \
    DEFINE_MULTIPLY(multiply_##KIND##_full_2, TILE_ROWS, 2, STEP)                \
    DEFINE_MULTIPLY(multiply_##KIND##_full_1, TILE_ROWS, 1, STEP)                \
    DEFINE_MULTIPLY(multiply_##KIND##_most_2, 2 * THIRD_ROWS, 2, STEP)           \
    DEFINE_MULTIPLY(multiply_##KIND##_most_1, 2 * THIRD_ROWS, 1, STEP)           \
    DEFINE_MULTIPLY(multiply_##KIND##_few_2, THIRD_ROWS, 2, STEP)                \
    DEFINE_MULTIPLY(multiply_##KIND##_few_1, THIRD_ROWS, 1, STEP)                \
    static const multiply_function multiplies_##KIND[3][2] = {                   \
        {multiply_##KIND##_few_1, multiply_##KIND##_few_2},                      \
        {multiply_##KIND##_most_1, multiply_##KIND##_most_2},                    \
        {multiply_##KIND##_full_1, multiply_##KIND##_full_2},                    \
    };

DEFINE_MULTIPLIES(f32, vec_fma)
#ifdef VEC_BF16_DOT
DEFINE_MULTIPLIES(bf16, vec_dot_bf16)
enum { HAS_BF16_DOT = 1 };
#else
static const multiply_function (*const multiplies_bf16)[2] = multiplies_f32; /* never called */
enum { HAS_BF16_DOT = 0 };
#endif

#ifdef VEC_AMX
static void multiply_tiles(const float *a, int64_t a_stride, const float *panels, int64_t panel_stride, int64_t words, float *c,
                           int64_t c_stride, int64_t rows, int64_t columns, bool add)
{
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
        const float *panel = panels + column / TILE_COLUMNS * panel_stride;
        int64_t r = 0;
        for (; r + AMX_SIDE < rows; r += 2 * AMX_SIDE) {
            amx_multiply_2(a + r * a_stride, a_stride, panel, words, c + r * c_stride + column, c_stride, add);
        }
        if (r < rows) {
            amx_multiply_1(a + r * a_stride, a_stride, panel, words, c + r * c_stride + column, c_stride, add);
        }
    }
}
#endif

/* rows x columns of c from packed panels; `rows` and `columns` may be any number, memory is padded to full tiles. */
static void multiply(bool pairs, const float *a, int64_t a_stride, const float *panels, int64_t panel_stride, int64_t words, float *c,
                     int64_t c_stride, int64_t rows, int64_t columns, bool add)
{
#ifdef VEC_AMX
    if (pairs) {
        multiply_tiles(a, a_stride, panels, panel_stride, words, c, c_stride, rows, columns, add);
        return;
    }
#endif
    const multiply_function(*functions)[2] = pairs ? multiplies_bf16 : multiplies_f32;
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
        const int wide = columns - column > LANES;
        const float *panel = panels + column / TILE_COLUMNS * panel_stride;
        for (int64_t r = 0; r < rows;) {
            const int64_t thirds = min_i64(ceil_div(rows - r, THIRD_ROWS), 3);
            functions[thirds - 1][wide](a + r * a_stride, a_stride, panel, words, c + r * c_stride + column, c_stride, add);
            r += thirds * THIRD_ROWS;
        }
    }
}

/* --- loading ---------------------------------------------------------------------------------------------------------------------- */

VEC_INLINE vec_f32 load_lanes(sa_dtype dtype, const void *data, int64_t offset)
{
    switch (dtype) {
    case SA_F32: return vec_load((const float *)data + offset);
    case SA_F16: return vec_load_f16((const uint16_t *)data + offset);
    default: return vec_load_bf16((const uint16_t *)data + offset);
    }
}

/* LANES elements as fp32, the ones from `count` on zero and not read. */
VEC_INLINE vec_f32 load_part(sa_dtype dtype, const void *data, int64_t offset, int64_t count)
{
    if (count >= LANES) {
        return load_lanes(dtype, data, offset);
    }
    uint32_t copy[LANES] = {0};
    const int64_t size = dtype == SA_F32 ? 4 : 2;
    if (count > 0) {
        memcpy(copy, (const char *)data + offset * size, (size_t)(count * size));
    }
    return load_lanes(dtype, copy, 0);
}

/* LANES pairs of bf16 as words. */
VEC_INLINE vec_f32 load_pairs(const uint16_t *data, int64_t offset, int64_t count)
{
    float copy[LANES] = {0};
    if (count >= 2 * LANES) {
        memcpy(copy, data + offset, sizeof copy);
    } else if (count > 0) {
        memcpy(copy, data + offset, (size_t)count * sizeof *data);
    }
    return vec_load(copy);
}

static void store_row(sa_dtype dtype, void *data, int64_t offset, const float *values, float factor, int64_t count)
{
    const vec_f32 times = vec_set1(factor);
    for (int64_t i = 0; i < count; i += LANES) {
        const vec_f32 value = vec_mul(vec_load(values + i), times);
        uint32_t copy[LANES];
        const bool whole = count - i >= LANES;
        void *target = whole ? (char *)data + (offset + i) * (dtype == SA_F32 ? 4 : 2) : (void *)copy;
        switch (dtype) {
        case SA_F32: vec_store(target, value); break;
        case SA_F16: vec_store_f16(target, value); break;
        default: vec_store_bf16(target, value); break;
        }
        if (!whole) {
            const int64_t size = dtype == SA_F32 ? 4 : 2;
            memcpy((char *)data + (offset + i) * size, copy, (size_t)((count - i) * size));
        }
    }
}

/* --- packing ---------------------------------------------------------------------------------------------------------------------- */

static int64_t words_of(bool pairs, int64_t depth)
{
    return pairs ? round_up((depth + 1) / 2, PAD_WORDS) : depth;
}

/* Keys low .. high - 1 of a block as panels [columns / TILE_COLUMNS][words][TILE_COLUMNS]; the other columns of touched panels are zero. */
VEC_INLINE void pack_keys_as(sa_dtype dtype, bool pairs, const void *key, int64_t key_stride, int64_t depth, int64_t low, int64_t high,
                             float *panels)
{
    const int64_t words = words_of(pairs, depth);
    for (int64_t group = low / LANES; group * LANES < round_up(high, TILE_COLUMNS) && group * LANES < BLOCK_KEYS; group++) {
        float *panel = panels + group / TILE_VECS * words * TILE_COLUMNS + group % TILE_VECS * LANES;
        for (int64_t word = 0; word < words; word += LANES) {
            vec_f32 rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t column = group * LANES + i, offset = column * key_stride;
                const bool inside = column >= low && column < high;
                rows[i] = !inside ? vec_zero()
                          : pairs ? load_pairs(key, offset + 2 * word, depth - 2 * word)
                                  : load_part(dtype, key, offset + word, depth - word);
            }
            vec_transpose(rows);
            for (int64_t i = 0; i < min_i64(LANES, words - word); i++) {
                vec_store(panel + (word + i) * TILE_COLUMNS, rows[i]);
            }
        }
    }
    /* A panel whose first half lies before `low` is touched too. */
    for (int64_t group = low / LANES / TILE_VECS * TILE_VECS; group < low / LANES; group++) {
        float *panel = panels + group / TILE_VECS * words * TILE_COLUMNS + group % TILE_VECS * LANES;
        for (int64_t word = 0; word < words; word++) {
            vec_store(panel + word * TILE_COLUMNS, vec_zero());
        }
    }
}

/* Values of keys low .. high - 1 as panels [depth_v / TILE_COLUMNS][keys or pairs][TILE_COLUMNS]; a pair's missing half is zero. */
VEC_INLINE void pack_values_as(sa_dtype dtype, bool pairs, const void *value, int64_t value_stride, int64_t depth, int64_t low,
                               int64_t high, float *panels)
{
    const int64_t rows = words_of(pairs, BLOCK_KEYS);
    for (int64_t column = 0; column < round_up(depth, TILE_COLUMNS); column += LANES) {
        float *panel = panels + column / TILE_COLUMNS * rows * TILE_COLUMNS + column % TILE_COLUMNS;
        const int64_t left = depth - column;
        for (int64_t key = low; key < high && !pairs; key++) {
            vec_store(panel + key * TILE_COLUMNS, load_part(dtype, value, key * value_stride + column, left));
        }
        for (int64_t pair = low / 2 / PAD_WORDS * PAD_WORDS; pair < round_up((high + 1) / 2, PAD_WORDS) && pairs; pair++) {
            uint16_t halves[2][LANES] = {{0}};
            for (int64_t i = 0; i < 2; i++) {
                const int64_t key = 2 * pair + i;
                if (key >= low && key < high && left > 0) {
                    memcpy(halves[i], (const uint16_t *)value + key * value_stride + column, (size_t)min_i64(left, LANES) * 2);
                }
            }
#ifdef VEC_BF16_DOT
            vec_store(panel + pair * TILE_COLUMNS, vec_interleave_halves(halves[0], halves[1]));
#endif
        }
    }
}

typedef void (*pack_function)(const void *data, int64_t stride, int64_t depth, int64_t low, int64_t high, float *panels);

#define DEFINE_PACK(NAME, DTYPE, PAIRS)                                                                                           \
    static void pack_keys_##NAME(const void *data, int64_t stride, int64_t depth, int64_t low, int64_t high, float *panels)       \
    {                                                                                                                             \
        pack_keys_as(DTYPE, PAIRS, data, stride, depth, low, high, panels);                                                       \
    }                                                                                                                             \
    static void pack_values_##NAME(const void *data, int64_t stride, int64_t depth, int64_t low, int64_t high, float *panels)     \
    {                                                                                                                             \
        pack_values_as(DTYPE, PAIRS, data, stride, depth, low, high, panels);                                                     \
    }

DEFINE_PACK(f32, SA_F32, false)
DEFINE_PACK(f16, SA_F16, false)
DEFINE_PACK(bf16, SA_BF16, false)
DEFINE_PACK(pairs, SA_BF16, true)

static pack_function key_packer(sa_dtype dtype, bool pairs)
{
    return pairs ? pack_keys_pairs : dtype == SA_F32 ? pack_keys_f32 : dtype == SA_F16 ? pack_keys_f16 : pack_keys_bf16;
}

static pack_function value_packer(sa_dtype dtype, bool pairs)
{
    return pairs ? pack_values_pairs : dtype == SA_F32 ? pack_values_f32 : dtype == SA_F16 ? pack_values_f16 : pack_values_bf16;
}

/* --- direct ----------------------------------------------------------------------------------------------------------------------- */

/* Keys or values of one block, where they lie. `next` is row 0 of what is read after them: values after keys, the next block's keys after
 * values, so that what is asked for early goes on across that border. */
typedef struct direct_rows {
    const char *data, *next;     /* row 0 of the block, the first row that is read after it */
    int64_t stride, next_stride; /* bytes */
    int64_t low, high;
    int64_t lead; /* rows from the one that is read to the one that is asked for */
} direct_rows;

/* Memory never waits for arithmetic: with every row that is read the one about AHEAD_BYTES away is asked for, past the second level. Softmax
 * reads none: it asks for about SOFTMAX_BYTES of values a row, and values keep that lead. */
enum { AHEAD_BYTES = 6144, SOFTMAX_BYTES = 512 };

VEC_INLINE int64_t bytes_of(sa_dtype dtype, int64_t count)
{
    return dtype == SA_F32 ? 4 * count : 2 * count;
}

/* The row to ask for with row `row`, whose bytes are at `at`; *step: from there to the next one. */
VEC_INLINE const char *row_ahead(const direct_rows *rows, const char *at, int64_t row, int64_t *step)
{
    const bool inside = row + rows->lead < rows->high;
    *step = inside ? rows->stride : rows->next_stride;
    return inside ? at + rows->lead * rows->stride : rows->next + (row + rows->lead - rows->high) * rows->next_stride;
}

static void prefetch_rows(const direct_rows *rows, int64_t row, int64_t count, int64_t bytes)
{
    const int64_t end = min_i64(row + count, rows->high);
    for (; row < end; row++) {
        for (int64_t byte = 0; byte < bytes; byte += 64) {
            __builtin_prefetch(rows->data + row * rows->stride + byte, 0, 0);
        }
    }
}

/* Asks for four rows, a line with each turn of a loop that must stay one: unrolled, the requests come faster than a core takes them, and a
 * fifth of the bandwidth is gone. */
VEC_INLINE void prefetch_four(const direct_rows *rows, const char *at, int64_t row, int64_t bytes)
{
    int64_t step;
    const char *soon = row_ahead(rows, at, row, &step);
#pragma GCC unroll 1
    for (int64_t i = 0; i < 4; i++, soon += step) {
#pragma GCC unroll 1
        for (int64_t byte = 0; byte < bytes; byte += 64) {
            __builtin_prefetch(soon + byte, 0, 0);
        }
    }
}

/* scores[rows, 4] = query rows . keys; depth is a multiple of the step. */
VEC_INLINE void dot_tile(sa_dtype dtype, bool pairs, int rows, const float *query, const char *const keys[4], int64_t depth, float *scores)
{
    vec_f32 sum[DIRECT_TILE_ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            sum[r][k] = vec_zero();
        }
    }
    const int64_t words = words_of(pairs, depth);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) { /* one key after the other, as they lie in memory */
#pragma GCC unroll 8
        for (int64_t word = 0; word < words; word += LANES) {
            const vec_f32 key = pairs ? vec_load((const float *)(const void *)keys[k] + word) : load_lanes(dtype, keys[k], word);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const vec_f32 q = vec_load(query + r * depth + word);
#ifdef VEC_BF16_DOT
                sum[r][k] = pairs ? vec_dot_bf16(q, key, sum[r][k]) : vec_fma(q, key, sum[r][k]);
#else
                sum[r][k] = vec_fma(q, key, sum[r][k]);
#endif
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        vec_store_four_sums(scores + r * SCORE_STRIDE, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
}

VEC_INLINE void score_rows(sa_dtype dtype, bool pairs, bool first, int rows, const float *query, const direct_rows *where, int64_t depth,
                           float *scores)
{
    const direct_rows copy = *where, *keys = &copy; /* nothing that is stored can change it */
    const char *row = keys->data + keys->low * keys->stride;
    for (int64_t key = keys->low; key < keys->high; key += 4, row += 4 * keys->stride) {
        const int64_t left = keys->high - key;
        const char *second = left > 1 ? row + keys->stride : row, *third = left > 2 ? second + keys->stride : second;
        const char *const four[4] = {row, second, third, left > 3 ? third + keys->stride : third};
        if (first) {
            prefetch_four(keys, row, key, bytes_of(dtype, depth));
        }
        dot_tile(dtype, pairs, rows, query, four, depth, scores + key);
    }
}

VEC_INLINE void score_direct_as(sa_dtype dtype, bool pairs, const float *query, int64_t rows, const direct_rows *keys, float *scores,
                                int64_t depth)
{
    int64_t r = 0;
    if (DIRECT_TILE_ROWS >= 4 && rows >= 4) {
        score_rows(dtype, pairs, true, DIRECT_TILE_ROWS, query, keys, depth, scores);
        r = DIRECT_TILE_ROWS;
    } else if (rows >= 2) {
        score_rows(dtype, pairs, true, 2, query, keys, depth, scores);
        r = 2;
    } else {
        score_rows(dtype, pairs, true, 1, query, keys, depth, scores);
        r = 1;
    }
    for (; r < rows;) {
        const float *from = query + r * depth;
        float *to = scores + r * SCORE_STRIDE;
        if (DIRECT_TILE_ROWS >= 4 && rows - r >= 4) {
            score_rows(dtype, pairs, false, DIRECT_TILE_ROWS, from, keys, depth, to);
            r += DIRECT_TILE_ROWS;
        } else if (rows - r >= 2) {
            score_rows(dtype, pairs, false, 2, from, keys, depth, to);
            r += 2;
        } else {
            score_rows(dtype, pairs, false, 1, from, keys, depth, to);
            r += 1;
        }
    }
}

/* FUNCTION with the depths of most models as constants. */
#define WITH_DEPTH(FUNCTION, depth, ...)            \
    do {                                            \
        switch (depth) {                            \
        case 64: FUNCTION(__VA_ARGS__, 64); break;  \
        case 128: FUNCTION(__VA_ARGS__, 128); break; \
        default: FUNCTION(__VA_ARGS__, depth);      \
        }                                           \
    } while (0)

static void score_direct(sa_dtype dtype, bool pairs, const float *query, int64_t rows, const direct_rows *keys, int64_t depth, float *scores)
{
    switch (dtype) {
    case SA_F32: WITH_DEPTH(score_direct_as, depth, SA_F32, false, query, rows, keys, scores); break;
    case SA_F16: WITH_DEPTH(score_direct_as, depth, SA_F16, false, query, rows, keys, scores); break;
    default:
        if (pairs) {
            WITH_DEPTH(score_direct_as, depth, SA_BF16, true, query, rows, keys, scores);
        } else {
            WITH_DEPTH(score_direct_as, depth, SA_BF16, false, query, rows, keys, scores);
        }
    }
}

/* acc[rows, vecs * LANES] += weights[rows, low .. high - 1] * values[low .. high - 1, column ..] */
VEC_INLINE void add_values_tile(sa_dtype dtype, bool first, int rows, int vecs, const float *weights, const direct_rows *where, int64_t low,
                                int64_t high, int64_t column, float *acc, int64_t acc_stride)
{
    const direct_rows copy = *where, *values = &copy;
    vec_f32 sum[2][DIRECT_TILE_VECS];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < vecs; v++) {
            sum[r][v] = vec_load(acc + r * acc_stride + column + v * LANES);
        }
    }
    const char *row = values->data + low * values->stride;
    for (int64_t key = low; key < high; key++, row += values->stride) {
        vec_f32 weight[2];
        int64_t step;
        const char *soon = row_ahead(values, row, key, &step);
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            weight[r] = vec_set1(weights[r * SCORE_STRIDE + key]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < vecs; v++) {
            if (first && bytes_of(dtype, v * LANES) % 64 == 0) {
                __builtin_prefetch(soon + bytes_of(dtype, column + v * LANES), 0, 0);
            }
            const vec_f32 value = load_lanes(dtype, row, column + v * LANES);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                sum[r][v] = vec_fma(weight[r], value, sum[r][v]);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < vecs; v++) {
            vec_store(acc + r * acc_stride + column + v * LANES, sum[r][v]);
        }
    }
}

VEC_INLINE void add_values_rows(sa_dtype dtype, bool first, int rows, const float *weights, const direct_rows *values, int64_t low,
                                int64_t high, int64_t depth, float *acc, int64_t acc_stride)
{
    int64_t column = 0;
    for (; depth - column >= DIRECT_TILE_VECS * LANES; column += DIRECT_TILE_VECS * LANES) {
        add_values_tile(dtype, first, rows, DIRECT_TILE_VECS, weights, values, low, high, column, acc, acc_stride);
    }
    for (; depth - column >= 4 * LANES; column += 4 * LANES) {
        add_values_tile(dtype, first, rows, 4, weights, values, low, high, column, acc, acc_stride);
    }
    for (; column < depth; column += LANES) {
        add_values_tile(dtype, first, rows, 1, weights, values, low, high, column, acc, acc_stride);
    }
}

/* A few values at a time for all rows, so that the second pair of rows finds them in the first level. */
enum { VALUE_STEP = 16 };

VEC_INLINE void add_values_as(sa_dtype dtype, const float *weights, int64_t rows, const direct_rows *values, float *acc, int64_t depth)
{
    const int64_t acc_stride = round_up(depth, TILE_COLUMNS);
    for (int64_t low = values->low; low < values->high; low += VALUE_STEP) {
        const int64_t high = min_i64(low + VALUE_STEP, values->high);
        if (rows == 1) {
            add_values_rows(dtype, true, 1, weights, values, low, high, depth, acc, acc_stride);
            continue;
        }
        add_values_rows(dtype, true, 2, weights, values, low, high, depth, acc, acc_stride);
        for (int64_t r = 2; r < rows; r += 2) {
            const float *from = weights + r * SCORE_STRIDE;
            float *to = acc + r * acc_stride;
            if (rows - r >= 2) {
                add_values_rows(dtype, false, 2, from, values, low, high, depth, to, acc_stride);
            } else {
                add_values_rows(dtype, false, 1, from, values, low, high, depth, to, acc_stride);
            }
        }
    }
}

static void add_values_direct(sa_dtype dtype, const float *weights, int64_t rows, const direct_rows *values, int64_t depth, float *acc)
{
    switch (dtype) {
    case SA_F32: WITH_DEPTH(add_values_as, depth, SA_F32, weights, rows, values, acc); break;
    case SA_F16: WITH_DEPTH(add_values_as, depth, SA_F16, weights, rows, values, acc); break;
    default: WITH_DEPTH(add_values_as, depth, SA_BF16, weights, rows, values, acc); break;
    }
}

#endif
