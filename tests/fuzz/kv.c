/* KVCache: any sequence of calls, by every policy. Beside the cache stands a list of what each kv head may still hold: tokens only leave, the
 * pinned and the recent ones never, and as many stay as the budget says. Each call also runs on a copy with the scalar reference. A call that
 * is refused or fails leaves every byte as it was. */
#include "../../csrc/core/kv_check.h"
#include "../../csrc/core/ledger.h"
#include "../../csrc/core/policy.h"
#include "../../csrc/core/select.h"
#include "../../csrc/cpu/table.h"
#include "cache_call.h"

enum { ROWS = 3, HEADS = 2, MOST_HELD = 2048 };

typedef struct stream_model {
    int64_t held, positions[MOST_HELD];
} stream_model;

typedef struct twin {
    sa_kv_cache *cache;
    sa_kv_config config;
    int64_t budgets[HEADS];
    int64_t lengths[ROWS];
    stream_model streams[ROWS * HEADS];
    const char *table;
    uint64_t random;
    bool tame;     /* contents are finite: results can be compared */
    int refuses;   /* calls of the scorer until it fails; 0: it does not */
} twin;

/* A state may speak of more tokens than there is memory for: that is an answer, not a finding. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1";
}

/* --- what a cache holds, byte by byte -------------------------------------------------------------------------------------------------- */

typedef struct snapshot {
    sa_kv_block blocks[SA_KV_BLOCKS];
    int64_t slots[HEADS];
} snapshot;

static snapshot take_snapshot(const twin *t)
{
    snapshot s;
    sa_kv_blocks(t->cache, s.blocks);
    memcpy(s.slots, sa_kv_slots(t->cache), (size_t)t->config.heads_kv * sizeof(int64_t));
    for (int i = 0; i < SA_KV_BLOCKS; i++) {
        void *copy = fuzz_memory(s.blocks[i].bytes, 1);
        memcpy(copy, s.blocks[i].data, (size_t)s.blocks[i].bytes);
        s.blocks[i].data = copy;
    }
    return s;
}

static void drop_snapshot(snapshot *s)
{
    for (int i = 0; i < SA_KV_BLOCKS; i++) {
        free(s->blocks[i].data);
    }
}

/* Slots beyond the held ones may have been written to: only what a state gives back counts. */
static void require_unchanged(const snapshot *before, const twin *t)
{
    snapshot now = take_snapshot(t);
    for (int i = 0; i < SA_KV_BLOCKS; i++) {
        FUZZ_REQUIRE(before->blocks[i].bytes == now.blocks[i].bytes);
        FUZZ_REQUIRE(memcmp(before->blocks[i].data, now.blocks[i].data, (size_t)now.blocks[i].bytes) == 0);
    }
    drop_snapshot(&now);
}

/* --- the model ---------------------------------------------------------------------------------------------------------------------------- */

static bool was_there(const stream_model *m, int64_t position, int64_t from, int64_t *next)
{
    while (*next < m->held && m->positions[*next] < position) {
        ++*next;
    }
    return position >= from || (*next < m->held && m->positions[*next] == position);
}

static int64_t held_after(const twin *t, int64_t head, int64_t held, int64_t length, int64_t fresh)
{
    const sa_budget budget = {t->budgets[head], t->config.share, t->config.every};
    for (int64_t first = 0; first < fresh; first += t->config.part) {
        const int64_t count = min_i64(t->config.part, fresh - first);
        length += count;
        held = min_i64(held + count, sa_held_at(&budget, length));
    }
    return held;
}

/* What the cache says it holds is of what the model allows; the model then follows. fresh: new tokens of each row. */
static void follow(twin *t, const int64_t *fresh)
{
    for (int64_t stream = 0; stream < t->config.batch * t->config.heads_kv; stream++) {
        const int64_t b = stream / t->config.heads_kv, head = stream % t->config.heads_kv, length = t->lengths[b] + fresh[b];
        stream_model *m = &t->streams[stream], now = {0};
        FUZZ_REQUIRE(sa_kv_most_slots(t->cache) <= MOST_HELD);
        now.held = sa_kv_kept(t->cache, b, head, now.positions);
        FUZZ_REQUIRE(now.held == held_after(t, head, m->held, t->lengths[b], fresh[b]));
        FUZZ_REQUIRE(sa_kv_lengths(t->cache)[b] == length);
        int64_t next = 0;
        for (int64_t i = 0; i < now.held; i++) {
            FUZZ_REQUIRE(now.positions[i] >= 0 && now.positions[i] < length && (i == 0 || now.positions[i] > now.positions[i - 1]));
            FUZZ_REQUIRE(was_there(m, now.positions[i], t->lengths[b], &next));
        }
        const int64_t recent = min_i64(t->config.recent, length), pinned = min_i64(t->config.pinned, length);
        for (int64_t i = 0; i < recent; i++) {
            FUZZ_REQUIRE(now.positions[now.held - 1 - i] == length - 1 - i);
        }
        for (int64_t i = 0; i < pinned; i++) {
            FUZZ_REQUIRE(now.positions[i] == i);
        }
        const sa_ledger *ledger = sa_kv_ledger(t->cache, b, head);
        FUZZ_REQUIRE(ledger->evicted == length - now.held && sa_kv_slots(t->cache)[head] >= now.held);
        for (int64_t i = 0; i < min_i64(ledger->logged, t->config.log) && t->tame; i++) {
            FUZZ_REQUIRE(sa_kv_log(t->cache, b, head)[i].position < length);
        }
        *m = now;
    }
    for (int64_t b = 0; b < t->config.batch; b++) {
        t->lengths[b] += fresh[b];
    }
}

/* After a state from outside: what is there now is what may be there. */
static void follow_anything(twin *t)
{
    memcpy(t->lengths, sa_kv_lengths(t->cache), (size_t)t->config.batch * sizeof(int64_t));
    for (int64_t stream = 0; stream < t->config.batch * t->config.heads_kv; stream++) {
        FUZZ_REQUIRE(sa_kv_most_slots(t->cache) <= MOST_HELD);
        stream_model *m = &t->streams[stream];
        m->held = sa_kv_kept(t->cache, stream / t->config.heads_kv, stream % t->config.heads_kv, m->positions);
    }
}

/* --- attend ------------------------------------------------------------------------------------------------------------------------------- */

static sa_status score(void *context, const sa_candidates *all, double *scores)
{
    twin *t = context;
    if (t->refuses > 0 && --t->refuses == 0) {
        return sa_fail(SA_VALUE_ERROR, "the scorer fails");
    }
    for (int64_t i = 0; i < all->held + all->fresh; i++) {
        uint64_t state = t->random + (uint64_t)all->positions[i]; /* of the position alone: two runs agree */
        (void)fuzz_random(&state);
        scores[i] = fuzz_random(&state) % 11 == 0 ? (double)NAN : (double)fuzz_uniform(&state);
    }
    return SA_OK;
}

typedef struct result {
    fuzz_tensor out;
    float *lse, *mass;
    int64_t mass_count;
} result;

static sa_status run(twin *t, const char *table, const sa_attend_params *given, bool keep_mass, fuzz_input layout, result *r)
{
    sa_attend_params p = *given;
    const int64_t shape[4] = {p.query.shape[0], p.query.shape[1], p.query.shape[2], t->config.depth_v};
    *r = (result){.out = fuzz_make_tensor(&layout, t->config.dtype, 4, shape, false), .lse = fuzz_memory(shape[0] * shape[1] * shape[2], 4)};
    p.output = r->out.tensor;
    p.lse = r->lse;
    FUZZ_REQUIRE(sa_table_use(table) == SA_OK);
    const sa_kv_scorer scorer = {score, t};
    SA_TRY(sa_kv_attend_check(t->cache, &p));
    SA_TRY(sa_kv_reserve(t->cache, &p));
    const snapshot before = take_snapshot(t);
    const sa_status status = sa_kv_attend(t->cache, &p, &scorer, keep_mass, (sa_poll){NULL, NULL});
    if (status == SA_OK) {
        fuzz_require_gaps(&r->out);
        r->mass_count = t->config.batch * t->config.heads_kv * sa_kv_most_slots(t->cache);
        r->mass = fuzz_memory(r->mass_count, sizeof(float));
        sa_kv_take_mass(t->cache, r->mass);
    } else {
        FUZZ_REQUIRE(t->refuses == 0 && t->config.policy.kind == SA_POLICY_CUSTOM);
        follow(t, (int64_t[ROWS]){0});
    }
    snapshot dropped = before;
    drop_snapshot(&dropped);
    return status;
}

static void drop(result *r)
{
    free(r->out.memory);
    free(r->lse);
    free(r->mass);
}

/* Where attention alone decides who leaves, rounding may: only what came before the first departure can be compared. */
static void compare(const twin *t, const result *fast, const result *slow, int64_t tokens, double blur, bool keep_mass, const twin *copy)
{
    const bool by_mass = sa_policy_need(&t->config.policy) != SA_MASS_NONE, one_part = tokens <= t->config.part;
    if (!t->tame || blur > 0.1 || (by_mass && !one_part)) {
        return;
    }
    const double bound = fuzz_bound(t->config.dtype) + blur, tight = fmin(fuzz_bound(t->config.dtype), 2e-4) + blur;
    fuzz_require_close(&fast->out, &slow->out, bound);
    const int64_t *shape = fast->out.tensor.shape;
    fuzz_require_floats(fast->lse, slow->lse, shape[0] * shape[1] * shape[2], tight);
    if (!by_mass) {
        for (int64_t stream = 0; stream < t->config.batch * t->config.heads_kv; stream++) {
            int64_t held[MOST_HELD];
            const stream_model *m = &t->streams[stream];
            FUZZ_REQUIRE(sa_kv_kept(copy->cache, stream / t->config.heads_kv, stream % t->config.heads_kv, held) == m->held);
            FUZZ_REQUIRE(memcmp(held, m->positions, (size_t)m->held * sizeof *held) == 0);
        }
        FUZZ_REQUIRE(fast->mass_count == slow->mass_count);
        fuzz_require_floats(fast->mass, slow->mass, keep_mass ? fast->mass_count : 0, tight);
    }
}

/* The same call on the cache and on a copy of it. */
static void attend_both(twin *t, const sa_attend_params *p, const int64_t *fresh, bool keep_mass, double blur, fuzz_input layout)
{
    twin copy = *t;
    FUZZ_REQUIRE(sa_kv_clone(t->cache, &copy.cache) == SA_OK);
    result fast, slow;
    const snapshot before = take_snapshot(t);
    const sa_status status = run(t, t->table, p, keep_mass, layout, &fast);
    FUZZ_REQUIRE(run(&copy, "reference", p, keep_mass, layout, &slow) == status);
    if (status == SA_OK) {
        follow(t, fresh);
        compare(t, &fast, &slow, p->query.shape[2], blur, keep_mass, &copy);
    } else if (fast.mass == NULL && t->config.policy.kind != SA_POLICY_CUSTOM) {
        require_unchanged(&before, t);
    }
    snapshot dropped = before;
    drop_snapshot(&dropped);
    sa_kv_free(copy.cache);
    drop(&fast);
    drop(&slow);
}

static void attend(twin *t, fuzz_input *in)
{
    const sa_kv_config *config = &t->config;
    const uint8_t given = fuzz_byte(in), odd = fuzz_byte(in);
    const int64_t heads = config->heads_kv * fuzz_range(in, 1, 3), longest = clamp_i64(6000 / (heads * (config->depth + config->depth_v)), 5, 60);
    const int64_t tokens = fuzz_byte(in) < 180 ? fuzz_range(in, 0, 4) : fuzz_range(in, 0, longest);
    const cache_extents extents = {config->dtype, config->batch, config->heads_kv, config->depth, config->depth_v};
    fuzz_tensor tensors[3];
    take_cache_tensors(in, &extents, odd, heads, tokens, &t->random, t->tame, tensors);
    sa_attend_params p = {.function = "KVCache.attend", .mass_queries = -1, .pinned = config->pinned};
    int64_t lengths[ROWS], most = 0;
    for (int64_t b = 0; b < ROWS; b++) {
        lengths[b] = !(given & 1) ? tokens : odd == 251 ? fuzz_hostile(in) : fuzz_range(in, 0, tokens);
    }
    for (int64_t b = 0; b < config->batch; b++) {
        most = max_i64(most, t->lengths[b] + tokens);
    }
    float numbers[64];
    const double blur = give_cache_arguments(&p, &extents, given, tensors, lengths, most, &t->random, numbers);
    t->refuses = given >= 224 ? 1 + (given & 3) : 0;
    attend_both(t, &p, lengths, given & 32, blur, *in);
    for (int i = 0; i < 3; i++) {
        free(tensors[i].memory);
    }
}

/* --- the other calls ------------------------------------------------------------------------------------------------------------------------ */

static void reset(twin *t, fuzz_input *in)
{
    const uint8_t mask = fuzz_byte(in);
    bool rows[ROWS];
    for (int64_t b = 0; b < ROWS; b++) {
        rows[b] = mask > 250 || (mask >> b & 1);
    }
    sa_kv_reset(t->cache, mask > 250 ? NULL : rows);
    for (int64_t b = 0; b < t->config.batch; b++) {
        t->lengths[b] = rows[b] ? 0 : t->lengths[b];
        for (int64_t head = 0; head < t->config.heads_kv && rows[b]; head++) {
            t->streams[b * t->config.heads_kv + head].held = 0;
        }
    }
    follow(t, (int64_t[ROWS]){0});
}

static void reorder(twin *t, fuzz_input *in)
{
    const int64_t batch = t->config.batch, heads = t->config.heads_kv, count = fuzz_byte(in) < 250 ? batch : fuzz_range(in, 0, ROWS);
    int64_t index[ROWS];
    bool fit = count == batch;
    for (int64_t b = 0; b < ROWS; b++) {
        index[b] = fuzz_byte(in) < 245 ? fuzz_range(in, 0, batch - 1) : fuzz_hostile(in);
        fit = fit && (b >= batch || (index[b] >= 0 && index[b] < batch));
    }
    snapshot before = take_snapshot(t);
    FUZZ_REQUIRE((sa_kv_reorder(t->cache, index, count) == SA_OK) == fit);
    if (fit) {
        const twin old = *t;
        for (int64_t b = 0; b < batch; b++) {
            t->lengths[b] = old.lengths[index[b]];
            memcpy(&t->streams[b * heads], &old.streams[index[b] * heads], (size_t)heads * sizeof(stream_model));
        }
        follow(t, (int64_t[ROWS]){0});
    } else {
        require_unchanged(&before, t);
    }
    drop_snapshot(&before);
}

static void crop(twin *t, fuzz_input *in)
{
    const int64_t back = fuzz_range(in, 0, 12), length = fuzz_byte(in) < 240 ? t->lengths[0] - back : fuzz_hostile(in);
    snapshot before = take_snapshot(t);
    const int64_t *evicted_at = before.blocks[6].data;
    bool fit = length >= 0;
    for (int64_t b = 0; b < t->config.batch; b++) {
        fit = fit && length >= evicted_at[b] && length <= t->lengths[b];
    }
    FUZZ_REQUIRE((sa_kv_crop(t->cache, length) == SA_OK) == fit);
    if (!fit) {
        require_unchanged(&before, t);
    }
    for (int64_t stream = 0; stream < t->config.batch * t->config.heads_kv && fit; stream++) {
        const int64_t left = t->lengths[stream / t->config.heads_kv] - length;
        stream_model *m = &t->streams[stream];
        int64_t held[MOST_HELD];
        FUZZ_REQUIRE(sa_kv_kept(t->cache, stream / t->config.heads_kv, stream % t->config.heads_kv, held) == m->held - left);
        m->held -= left;
        FUZZ_REQUIRE(memcmp(held, m->positions, (size_t)m->held * sizeof *held) == 0);
    }
    for (int64_t b = 0; b < t->config.batch && fit; b++) {
        t->lengths[b] = length;
    }
    drop_snapshot(&before);
}

static void copy(twin *t)
{
    sa_kv_cache *other;
    FUZZ_REQUIRE(sa_kv_clone(t->cache, &other) == SA_OK);
    FUZZ_REQUIRE(sa_kv_nbytes(other) == sa_kv_nbytes(t->cache));
    sa_kv_free(t->cache);
    t->cache = other;
    follow(t, (int64_t[ROWS]){0});
}

/* One number of a block of integers becomes something else, or all of a block's bytes do. */
static void spoil(twin *t, fuzz_input *in, snapshot *state, uint8_t kind)
{
    static const int integers[] = {2, 4, 5, 6, 7};
    sa_kv_block *block = &state->blocks[kind & 1 ? integers[fuzz_byte(in) % 5] : fuzz_byte(in) % SA_KV_BLOCKS];
    if ((kind & 1) && block->bytes >= 8) {
        const int64_t at = fuzz_byte(in) % (block->bytes / 8), number = fuzz_hostile(in);
        /* A share of a length that is possible, but not of this test's memory. */
        ((int64_t *)block->data)[at] = t->config.share > 0.0 && number > 400 && number < 1LL << 52 ? 400 : number;
    } else {
        for (int64_t i = 0; i < block->bytes; i++) {
            ((uint8_t *)block->data)[i] = (uint8_t)fuzz_random(&t->random);
        }
    }
    if (kind & 4) {
        state->slots[0] += fuzz_range(in, -1, 1);
    }
    if (kind & 8) {
        block->bytes -= fuzz_range(in, 0, 8);
        block->bytes = max_i64(block->bytes, 0);
    }
}

static void restore(twin *t, fuzz_input *in)
{
    const uint8_t kind = fuzz_byte(in);
    snapshot state = take_snapshot(t), before = take_snapshot(t);
    if (kind & 16) {
        spoil(t, in, &state, kind);
    }
    const sa_status status = sa_kv_restore(t->cache, state.slots, state.blocks);
    FUZZ_REQUIRE(status == SA_OK || (kind & 16));
    if (status != SA_OK) {
        require_unchanged(&before, t);
    } else if (kind & 16) {
        t->tame = false;
        follow_anything(t);
    }
    drop_snapshot(&state);
    drop_snapshot(&before);
}

/* --- one input -------------------------------------------------------------------------------------------------------------------------------- */

static void hostile_config(fuzz_input *in)
{
    int64_t budgets[4];
    sa_kv_config config = {.batch = fuzz_hostile(in), .heads_kv = fuzz_range(in, 0, 4), .depth = fuzz_hostile(in), .depth_v = fuzz_hostile(in)};
    for (int i = 0; i < 4; i++) {
        budgets[i] = fuzz_hostile(in);
    }
    config.budgets = budgets;
    config.pinned = fuzz_hostile(in);
    config.recent = fuzz_hostile(in);
    config.every = fuzz_hostile(in);
    config.part = fuzz_hostile(in);
    config.log = fuzz_hostile(in);
    config.policy = (sa_policy){.kind = (sa_policy_kind)fuzz_range(in, 0, SA_POLICY_COUNT - 1), .window = fuzz_hostile(in), .kernel = fuzz_hostile(in)};
    config.inv_freq_count = fuzz_range(in, 0, 8);
    if (sa_check_kv_config(&config) == SA_OK) {
        FUZZ_REQUIRE(config.batch > 0 && config.heads_kv > 0 && config.part > 0 && config.every > 0);
    }
}

static void take_config(twin *t, fuzz_input *in, uint8_t kind)
{
    static const double frequencies[8] = {1.0, 0.8, 0.4, 0.2, 0.1, 0.03, 0.01, 0.001};
    sa_kv_config *config = &t->config;
    *config = (sa_kv_config){.batch = fuzz_range(in, 1, ROWS), .heads_kv = fuzz_range(in, 1, HEADS), .depth = fuzz_depth(in)};
    config->depth_v = kind & 1 ? config->depth : fuzz_depth(in);
    config->dtype = (sa_dtype)fuzz_range(in, 0, 2);
    config->pinned = fuzz_range(in, 0, 5);
    config->recent = fuzz_range(in, 0, 5);
    config->every = fuzz_byte(in) < 128 ? 1 : fuzz_range(in, 1, 9);
    config->part = fuzz_byte(in) < 128 ? 64 : fuzz_range(in, 1, 12);
    config->log = fuzz_range(in, 0, 6);
    config->track_mass = kind & 2;
    config->share = fuzz_byte(in) < 192 ? 0.0 : 0.1 * (double)fuzz_range(in, 1, 10);
    config->policy = (sa_policy){.kind = (sa_policy_kind)fuzz_range(in, 0, SA_POLICY_COUNT - 1),
                                 .window = fuzz_range(in, 1, 9),
                                 .kernel = 2 * fuzz_range(in, 0, 3) + 1,
                                 .maximum = kind & 4,
                                 .decay = 0.8,
                                 .seed = fuzz_byte(in)};
    const int64_t least = max_i64(config->pinned + max_i64(config->recent, sa_policy_protects(&config->policy)), 1);
    for (int64_t head = 0; head < HEADS; head++) {
        t->budgets[head] = config->policy.kind == SA_POLICY_TOVA && head > 0 ? t->budgets[0] : least + fuzz_range(in, 0, 40);
    }
    config->budgets = t->budgets;
    config->inv_freq_count = min_i64(config->depth / 2, fuzz_range(in, 0, 8));
    config->inv_freq = config->inv_freq_count > 0 ? frequencies : NULL;
    config->attention_scaling = kind & 8 ? 1.0 : 1.2;
    config->interleaved = kind & 16;
    config->applied = kind & 32;
    config->slot_positions = (kind & 64) && !config->applied;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    twin t = {.tame = true};
    const uint8_t kind = fuzz_byte(&in), table = fuzz_byte(&in);
    if (table == 255) {
        hostile_config(&in);
        return 0;
    }
    take_config(&t, &in, kind);
    const int index = (int)table % sa_table_count();
    t.table = sa_table_usable(index) ? sa_table_name(index) : "reference";
    FUZZ_REQUIRE(sa_kv_new(&t.config, &t.cache) == SA_OK);
    t.random = fuzz_word(&in);
    sa_set_threads(kind > 240 ? 3 : 1);
    for (int step = 0; step < 12 && in.size > 0; step++) {
        switch (fuzz_byte(&in) % 16) {
        case 11: reset(&t, &in); break;
        case 12: reorder(&t, &in); break;
        case 13: crop(&t, &in); break;
        case 14: copy(&t); break;
        case 15: restore(&t, &in); break;
        default: attend(&t, &in);
        }
    }
    sa_kv_free(t.cache);
    return 0;
}
