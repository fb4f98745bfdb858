/* SinkCache: any sequence of calls on two caches, one served by a kernel table and one by the scalar reference, and beside them a list of
 * the positions that each row must hold. A refused call leaves every byte as it was. */
#include "../../csrc/cpu/table.h"
#include "cache_call.h"

enum { ROWS = 3, MOST_HELD = 64 };

typedef struct row_model {
    int64_t length, low;
} row_model;

typedef struct twins {
    sa_cache *fast, *slow;
    row_model rows[ROWS];
    sa_cache_config config;
    const char *table;
    uint64_t random;
    bool tame;    /* contents are finite: results can be compared */
    void *memory; /* where `fast` lies, NULL: in its own */
} twins;

/* What a refused call must not change. */
typedef struct snapshot {
    char *bytes;
    size_t keys, values, counters;
} snapshot;

static snapshot take_snapshot(const sa_cache *cache)
{
    const sa_cache_config *config = sa_cache_describe(cache);
    const size_t rows = (size_t)(config->batch * config->heads_kv * sa_cache_slots(cache) * sa_dtype_size(config->dtype));
    snapshot s = {.keys = rows * (size_t)config->depth, .values = rows * (size_t)config->depth_v, .counters = (size_t)config->batch * 8};
    s.bytes = fuzz_memory((int64_t)(s.keys + s.values + 2 * s.counters), 1);
    memcpy(s.bytes, sa_cache_keys(cache), s.keys);
    memcpy(s.bytes + s.keys, sa_cache_values(cache), s.values);
    memcpy(s.bytes + s.keys + s.values, sa_cache_lengths(cache), s.counters);
    memcpy(s.bytes + s.keys + s.values + s.counters, sa_cache_lows(cache), s.counters);
    return s;
}

static void require_unchanged(const snapshot *before, const sa_cache *cache)
{
    snapshot now = take_snapshot(cache);
    FUZZ_REQUIRE(memcmp(before->bytes, now.bytes, before->keys + before->values + 2 * before->counters) == 0);
    free(now.bytes);
}

static void require_positions(const twins *t)
{
    for (int64_t b = 0; b < t->config.batch; b++) {
        int64_t held[MOST_HELD], count = sa_cache_kept(t->fast, b, held), expected = 0;
        const row_model *row = &t->rows[b];
        for (int64_t j = 0; j < min_i64(row->length, t->config.pinned); j++) {
            FUZZ_REQUIRE(expected < count && held[expected++] == j);
        }
        for (int64_t j = row->low; j < row->length; j++) {
            FUZZ_REQUIRE(expected < count && held[expected++] == j);
        }
        FUZZ_REQUIRE(count == expected && sa_cache_lengths(t->fast)[b] == row->length && sa_cache_lengths(t->slow)[b] == row->length);
    }
}

/* --- attend ------------------------------------------------------------------------------------------------------------------------- */

typedef struct result {
    fuzz_tensor out;
    float *lse, *mass;
} result;

static sa_status run(twins *t, sa_cache *cache, const char *table, const sa_attend_params *given, fuzz_input layout, result *r)
{
    sa_attend_params p = *given;
    const int64_t shape[4] = {p.query.shape[0], p.query.shape[1], p.query.shape[2], t->config.depth_v};
    r->out = fuzz_make_tensor(&layout, t->config.dtype, 4, shape, false);
    r->lse = fuzz_memory(shape[0] * shape[1] * shape[2], sizeof(float));
    r->mass = fuzz_memory(shape[0] * t->config.heads_kv * sa_cache_slots(cache), sizeof(float));
    p.output = r->out.tensor;
    p.lse = r->lse;
    p.mass = r->mass;
    FUZZ_REQUIRE(sa_table_use(table) == SA_OK);
    const snapshot before = take_snapshot(cache);
    sa_status status = sa_cache_attend_check(cache, &p);
    if (status == SA_OK) {
        status = sa_cache_attend(cache, &p, (sa_poll){NULL, NULL});
        FUZZ_REQUIRE(status == SA_OK);
        fuzz_require_gaps(&r->out);
    } else {
        require_unchanged(&before, cache);
    }
    free(before.bytes);
    return status;
}

static void drop(result *r)
{
    free(r->out.memory);
    free(r->lse);
    free(r->mass);
}

static void advance(twins *t, const sa_attend_params *p)
{
    for (int64_t b = 0; b < t->config.batch; b++) {
        row_model *row = &t->rows[b];
        row->length += p->query_lengths.data != NULL ? p->query_lengths.data[b] : p->query.shape[2];
        row->low = max_i64(row->low, row->length - t->config.window - t->config.rollback);
    }
}

static void attend(twins *t, fuzz_input *in)
{
    const sa_cache_config *config = &t->config;
    const uint8_t given = fuzz_byte(in), odd = fuzz_byte(in);
    const int64_t heads = config->heads_kv * fuzz_range(in, 1, 3);
    const int64_t longest = clamp_i64(9000 / (heads * (config->depth + config->depth_v)), 5, 90);
    const int64_t tokens = fuzz_byte(in) < 200 ? fuzz_range(in, 0, 5) : fuzz_range(in, 0, longest);
    const cache_extents extents = {config->dtype, config->batch, config->heads_kv, config->depth, config->depth_v};
    fuzz_tensor tensors[3];
    take_cache_tensors(in, &extents, odd, heads, tokens, &t->random, t->tame, tensors);
    sa_attend_params p = {.function = "SinkCache.attend", .mass_queries = -1, .pinned = config->pinned};
    int64_t lengths[ROWS];
    for (int64_t b = 0; b < ROWS; b++) {
        lengths[b] = odd == 251 ? fuzz_hostile(in) : fuzz_range(in, 0, tokens);
    }
    int64_t most = 0;
    for (int64_t b = 0; b < config->batch; b++) {
        most = max_i64(most, t->rows[b].length + tokens);
    }
    float numbers[64];
    const double blur = give_cache_arguments(&p, &extents, given, tensors, lengths, most, &t->random, numbers);
    const fuzz_input layout = *in;
    result fast, slow;
    const sa_status status = run(t, t->fast, t->table, &p, layout, &fast);
    FUZZ_REQUIRE(run(t, t->slow, "reference", &p, layout, &slow) == status);
    if (status == SA_OK) {
        advance(t, &p);
        if (t->tame && blur < 0.1) {
            const double bound = fuzz_bound(config->dtype) + blur, tight = fmin(fuzz_bound(config->dtype), 2e-4) + blur;
            fuzz_require_close(&fast.out, &slow.out, bound);
            fuzz_require_floats(fast.lse, slow.lse, p.query.shape[0] * heads * tokens, tight);
            fuzz_require_floats(fast.mass, slow.mass, p.query.shape[0] * config->heads_kv * sa_cache_slots(t->fast), tight);
        }
    }
    drop(&fast);
    drop(&slow);
    for (int i = 0; i < 3; i++) {
        free(tensors[i].memory);
    }
}

/* --- the other calls ---------------------------------------------------------------------------------------------------------------- */

static void reset(twins *t, fuzz_input *in)
{
    const uint8_t mask = fuzz_byte(in);
    bool rows[ROWS];
    for (int64_t b = 0; b < ROWS; b++) {
        rows[b] = mask >> b & 1;
        if (mask > 250 || rows[b]) {
            t->rows[b] = (row_model){0, t->config.pinned};
        }
    }
    sa_cache_reset(t->fast, mask > 250 ? NULL : rows);
    sa_cache_reset(t->slow, mask > 250 ? NULL : rows);
}

static void reorder(twins *t, fuzz_input *in)
{
    const int64_t batch = t->config.batch, count = fuzz_byte(in) < 250 ? batch : fuzz_range(in, 0, ROWS);
    int64_t index[ROWS];
    bool fit = count == batch;
    for (int64_t b = 0; b < ROWS; b++) {
        index[b] = fuzz_byte(in) < 245 ? fuzz_range(in, 0, max_i64(batch - 1, 0)) : fuzz_hostile(in);
        fit = fit && (b >= batch || (index[b] >= 0 && index[b] < batch));
    }
    const snapshot before = take_snapshot(t->fast);
    FUZZ_REQUIRE((sa_cache_reorder(t->fast, index, count) == SA_OK) == fit && (sa_cache_reorder(t->slow, index, count) == SA_OK) == fit);
    if (!fit) {
        require_unchanged(&before, t->fast);
    }
    row_model old[ROWS];
    memcpy(old, t->rows, sizeof old);
    for (int64_t b = 0; b < batch && fit; b++) {
        t->rows[b] = old[index[b]];
    }
    free(before.bytes);
}

static void crop(twins *t, fuzz_input *in)
{
    const sa_cache_config *config = &t->config;
    const int64_t back = fuzz_range(in, 0, 12), longest = config->batch > 0 ? t->rows[0].length : 0;
    const int64_t length = fuzz_byte(in) < 240 ? longest - back : fuzz_hostile(in);
    bool fit = length >= 0 || config->batch == 0; /* a cache without rows has nothing to refuse */
    for (int64_t b = 0; b < config->batch && fit; b++) {
        const row_model *row = &t->rows[b];
        const int64_t needed = max_i64(length - config->window + 1, config->pinned);
        fit = fit && length <= row->length && (needed >= length || row->low <= needed);
    }
    const snapshot before = take_snapshot(t->fast);
    FUZZ_REQUIRE((sa_cache_crop(t->fast, length) == SA_OK) == fit && (sa_cache_crop(t->slow, length) == SA_OK) == fit);
    if (!fit) {
        require_unchanged(&before, t->fast);
    }
    for (int64_t b = 0; b < config->batch && fit; b++) {
        t->rows[b] = (row_model){length, min_i64(t->rows[b].low, max_i64(length, config->pinned))};
    }
    free(before.bytes);
}

/* A cache in memory of the caller, of exactly the size that it asks for; `memory` NULL: new. */
static sa_cache *placed(twins *t, void *memory)
{
    sa_cache *cache;
    FUZZ_REQUIRE(sa_cache_over(&t->config, &cache) == SA_OK);
    t->memory = memory != NULL ? memory : fuzz_memory(sa_cache_storage_bytes(cache), 1);
    FUZZ_REQUIRE(sa_cache_settle(cache, t->memory, memory != NULL) == SA_OK);
    return cache;
}

/* The cache goes on as a copy of itself, or as another one in the same memory. */
static void copy(twins *t)
{
    sa_cache *twin;
    if (t->memory != NULL) {
        twin = placed(t, t->memory);
    } else {
        FUZZ_REQUIRE(sa_cache_clone(t->fast, &twin) == SA_OK);
    }
    const snapshot before = take_snapshot(t->fast);
    require_unchanged(&before, twin);
    sa_cache_free(t->fast);
    t->fast = twin;
    free(before.bytes);
}

/* A state from outside: counters of any size, contents of any bits. */
static void restore(twins *t, fuzz_input *in)
{
    const sa_cache_config *config = &t->config;
    snapshot state = take_snapshot(t->fast);
    const snapshot before = take_snapshot(t->fast);
    const uint8_t kind = fuzz_byte(in);
    int64_t lengths[ROWS], lows[ROWS];
    bool fit = true;
    for (int64_t b = 0; b < config->batch; b++) {
        const int64_t capacity = config->window + config->rollback;
        lengths[b] = kind & 1 ? fuzz_hostile(in) : t->rows[b].length;
        const int64_t lowest = clamp_i64(lengths[b], 0, INT64_MAX / 4) - capacity;
        lows[b] = kind & 1 ? max_i64(config->pinned, lowest + fuzz_range(in, 0, 2)) : t->rows[b].low;
        lows[b] = kind & 2 ? fuzz_hostile(in) : lows[b];
        fit = fit && lengths[b] >= 0 && lengths[b] <= INT64_MAX / 4 && lows[b] >= max_i64(config->pinned, lengths[b] - capacity) &&
              lows[b] <= max_i64(lengths[b], config->pinned);
    }
    if (kind & 4) {
        t->tame = false;
        for (size_t i = 0; i < state.keys + state.values; i++) {
            state.bytes[i] = (char)fuzz_random(&t->random);
        }
    }
    const char *keys = state.bytes, *values = state.bytes + state.keys;
    FUZZ_REQUIRE((sa_cache_restore(t->fast, keys, values, lengths, lows) == SA_OK) == fit);
    FUZZ_REQUIRE((sa_cache_restore(t->slow, keys, values, lengths, lows) == SA_OK) == fit);
    if (!fit) {
        require_unchanged(&before, t->fast);
    }
    for (int64_t b = 0; b < config->batch && fit; b++) {
        t->rows[b] = (row_model){lengths[b], lows[b]};
    }
    free(state.bytes);
    free(before.bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    twins t = {.tame = true};
    static const double frequencies[8] = {1.0, 0.8, 0.4, 0.2, 0.1, 0.03, 0.01, 0.001};
    sa_cache_config *config = &t.config;
    const uint8_t kind = fuzz_byte(&in);
    *config = (sa_cache_config){.batch = fuzz_range(&in, 0, ROWS), .heads_kv = fuzz_range(&in, 1, 2), .depth = fuzz_depth(&in)};
    config->depth_v = kind & 1 ? config->depth : fuzz_depth(&in);
    config->dtype = (sa_dtype)fuzz_range(&in, 0, 2);
    config->pinned = fuzz_range(&in, 0, 6);
    config->window = fuzz_range(&in, 1, 30);
    config->rollback = fuzz_range(&in, 0, 5);
    config->inv_freq_count = min_i64(config->depth / 2, fuzz_range(&in, 0, 8));
    config->inv_freq = config->inv_freq_count > 0 ? frequencies : NULL;
    config->attention_scaling = kind & 2 ? 1.0 : 1.2;
    config->interleaved = kind & 4;
    config->applied = kind & 8;
    config->slot_positions = kind & 16;
    const int table = (kind >> 5) % sa_table_count();
    t.table = sa_table_usable(table) ? sa_table_name(table) : "reference";
    FUZZ_REQUIRE(sa_cache_new(config, &t.slow) == SA_OK);
    if (size % 2 == 1) {
        t.fast = placed(&t, NULL);
    } else {
        FUZZ_REQUIRE(sa_cache_new(config, &t.fast) == SA_OK);
    }
    const int64_t bytes = sa_cache_nbytes(t.fast);
    for (int64_t b = 0; b < ROWS; b++) {
        t.rows[b] = (row_model){0, config->pinned};
    }
    t.random = fuzz_word(&in);
    sa_set_threads(kind == 255 ? 3 : 1);
    for (int step = 0; step < 12 && in.size > 0; step++) {
        const uint8_t action = fuzz_byte(&in) % 16;
        switch (action) {
        case 10: reset(&t, &in); break;
        case 11: reorder(&t, &in); break;
        case 12: crop(&t, &in); break;
        case 13: crop(&t, &in); break;
        case 14: copy(&t); break;
        case 15: restore(&t, &in); break;
        default: attend(&t, &in);
        }
        require_positions(&t);
        FUZZ_REQUIRE(sa_cache_nbytes(t.fast) == bytes);
    }
    sa_cache_free(t.fast);
    sa_cache_free(t.slow);
    free(t.memory);
    return 0;
}
