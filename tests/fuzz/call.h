/* A fuzzer's bytes as a call of attend: everything it may be given, in memory of exactly its size. Most calls pass the check. */
#ifndef SA_FUZZ_CALL_H
#define SA_FUZZ_CALL_H

#include "fuzz.h"

typedef struct call {
    sa_attend_params params;
    fuzz_tensor tensors[10];
    void *memory[16];
    int tensor_count, memory_count;
    uint64_t random;
    int wild; /* of 256 elements */
} call;

static inline sa_tensor take_tensor(call *c, fuzz_input *in, sa_dtype dtype, int rank, const int64_t *shape)
{
    fuzz_tensor *t = &c->tensors[c->tensor_count++];
    *t = fuzz_make_tensor(in, dtype, rank, shape, true);
    fuzz_fill(t, &c->random, c->wild);
    return t->tensor;
}

static inline float *take_floats(call *c, int64_t count, float scale)
{
    float *data = fuzz_memory(count, sizeof *data);
    c->memory[c->memory_count++] = data;
    for (int64_t i = 0; i < count; i++) {
        const float value = fuzz_uniform(&c->random);
        data[i] = fuzz_random(&c->random) % 19 == 0 ? -INFINITY : scale * value;
    }
    return data;
}

static inline sa_ints take_ints(call *c, fuzz_input *in, int64_t count, int64_t low, int64_t high)
{
    int64_t *data = fuzz_memory(count, sizeof *data);
    c->memory[c->memory_count++] = data;
    for (int64_t i = 0; i < count; i++) {
        data[i] = low + (int64_t)(fuzz_word(in) % (uint64_t)(high - low + 1));
    }
    return (sa_ints){.data = data, .shape = {count}, .rank = 1};
}

/* Offsets that rise from 0 to `end`. */
static inline sa_ints take_offsets(call *c, fuzz_input *in, int64_t sequences, int64_t end)
{
    sa_ints out = take_ints(c, in, sequences + 1, 0, end);
    int64_t *data = (int64_t *)(uintptr_t)out.data;
    data[0] = 0;
    data[sequences] = end;
    for (int64_t i = 1; i < sequences; i++) {
        data[i] = data[i - 1] + (end - data[i - 1]) * (data[i] % 4) / 8;
    }
    return out;
}

static inline void take_lengths(call *c, fuzz_input *in, uint8_t given)
{
    sa_attend_params *p = &c->params;
    const int64_t batch = p->query.shape[0], queries = p->query.shape[2], keys = p->key.shape[2];
    if (batch == 1 && (given & 0xc) == 0xc) {
        const int64_t sequences = fuzz_range(in, 1, 4);
        p->cumulative_query = take_offsets(c, in, sequences, queries);
        p->cumulative_key = take_offsets(c, in, sequences, keys);
        return;
    }
    if (given & 1) {
        p->starts = take_ints(c, in, batch, 0, given & 2 ? keys / 2 : keys);
    }
    if (given & 2) {
        p->lengths = take_ints(c, in, batch, 0, keys - keys / 2);
    }
    if (given & 4) {
        p->query_lengths = take_ints(c, in, batch, 0, queries);
    }
}

static inline void take_sinks(call *c, fuzz_input *in, uint8_t given)
{
    sa_attend_params *p = &c->params;
    const int64_t heads = p->query.shape[1], batch = p->query.shape[0];
    if (given & 1) {
        const int64_t logits = fuzz_range(in, 0, 3);
        p->sink_logits = (sa_floats){.data = take_floats(c, heads * logits + 1, 4.0f), .shape = {heads, logits}, .rank = given & 2 ? 2 : 0};
    }
    if ((given & 4) && p->pinned > 0) {
        p->sink_bias = (sa_floats){.data = take_floats(c, heads * p->pinned, 3.0f), .shape = {heads, p->pinned}, .rank = 2};
    }
    if ((given & 8) && p->pinned > 0) {
        p->sink_query = take_tensor(c, in, p->query.dtype, 4, p->query.shape);
    }
    if (given & 16) {
        const int64_t count = fuzz_range(in, 0, 5), heads_kv = p->key.shape[1];
        p->sink_key = take_tensor(c, in, p->query.dtype, 3, (const int64_t[]){heads_kv, count, p->key.shape[3]});
        p->sink_value = take_tensor(c, in, p->query.dtype, 3, (const int64_t[]){heads_kv, count, p->value.shape[3]});
    }
    if (given & 32) {
        p->alibi_slopes = (sa_floats){.data = take_floats(c, batch * heads, 0.5f),
                                      .shape = {given & 64 ? batch : heads, heads},
                                      .rank = given & 64 ? 2 : 1};
        for (int64_t i = 0; i < batch * heads; i++) {
            float *slope = (float *)(uintptr_t)p->alibi_slopes.data + i;
            *slope = isinf(*slope) ? 0.0f : *slope;
        }
    }
}

/* most: products of a call, about. */
static inline void take_call(call *c, fuzz_input *in, int64_t most)
{
    sa_attend_params *p = &c->params;
    const sa_dtype dtype = (sa_dtype)fuzz_range(in, 0, 2);
    const uint8_t contents = fuzz_byte(in);
    c->wild = contents > 200 ? contents - 200 : 0;
    int64_t batch = fuzz_range(in, 0, 3), heads_kv = fuzz_range(in, 1, 3), group = fuzz_range(in, 1, 6);
    int64_t queries = fuzz_length(in), keys = fuzz_length(in);
    const int64_t depth = fuzz_depth(in), depth_v = fuzz_depth(in);
    if (batch * heads_kv * group * queries * keys * (depth + depth_v) > most) {
        batch = heads_kv = 1;
        group = depth > 100 ? 1 : group;
        queries = min_i64(queries, max_i64(most / (group * max_i64(keys, 1) * (depth + depth_v)), 1));
    }
    for (int i = 0; i < 8; i++) {
        c->random = c->random << 8 | fuzz_byte(in);
    }
    p->query = take_tensor(c, in, dtype, 4, (const int64_t[]){batch, heads_kv * group, queries, depth});
    p->key = take_tensor(c, in, dtype, 4, (const int64_t[]){batch, heads_kv, keys, depth});
    p->value = take_tensor(c, in, dtype, 4, (const int64_t[]){batch, heads_kv, keys, depth_v});
    const uint8_t given = fuzz_byte(in);
    p->causal = given & 1;
    p->pinned = given & 2 ? fuzz_range(in, 0, 9) : given & 4 ? fuzz_length(in) : 0;
    if (given & 8) {
        p->window = take_ints(c, in, heads_kv * group, given & 16 ? 1 : 0, max_i64(keys, 3));
        p->window.rank = given & 16 ? 0 : 1;
    }
    p->has_scale = given & 32;
    p->scale = (double)fuzz_uniform(&c->random);
    p->has_softcap = given & 64;
    p->softcap = 0.5 + (double)fuzz_range(in, 0, 20);
    p->mass_reduce = given & 128 ? SA_MASS_MAX : SA_MASS_SUM;
    p->mass_queries = fuzz_range(in, -1, 5);
    take_lengths(c, in, fuzz_byte(in));
    take_sinks(c, in, fuzz_byte(in));
}

static inline void drop_call(call *c)
{
    for (int i = 0; i < c->tensor_count; i++) {
        free(c->tensors[i].memory);
    }
    for (int i = 0; i < c->memory_count; i++) {
        free(c->memory[i]);
    }
}

#endif
