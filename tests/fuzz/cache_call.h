/* A fuzzer's bytes as a call of a cache: what SinkCache and KVCache are both given. */
#ifndef SA_FUZZ_CACHE_CALL_H
#define SA_FUZZ_CACHE_CALL_H

#include "fuzz.h"

typedef struct cache_extents {
    sa_dtype dtype;
    int64_t batch, heads_kv, depth, depth_v;
} cache_extents;

/* Query, key and value; odd: 252 .. 255 makes one of them too large. */
static inline void take_cache_tensors(fuzz_input *in, const cache_extents *of, uint8_t odd, int64_t heads, int64_t tokens, uint64_t *random,
                                      bool tame, fuzz_tensor tensors[3])
{
    const int64_t query[4] = {of->batch + (odd == 255), heads, tokens, of->depth + (odd == 254)};
    const int64_t key[4] = {of->batch, of->heads_kv, tokens + (odd == 253), of->depth};
    const int64_t value[4] = {of->batch, of->heads_kv, key[2], of->depth_v + (odd == 252)};
    tensors[0] = fuzz_make_tensor(in, of->dtype, 4, query, true);
    tensors[1] = fuzz_make_tensor(in, of->dtype, 4, key, true);
    tensors[2] = fuzz_make_tensor(in, of->dtype, 4, value, true);
    for (int i = 0; i < 3; i++) {
        fuzz_fill(&tensors[i], random, tame ? 0 : 9);
    }
}

/* Tensors, lengths and what scores are made of. longest: tokens of a row behind the call, at most. Returns what fp32 cannot tell apart in
 * the largest ALiBi term: two roundings of it, in the exponent. */
static inline double give_cache_arguments(sa_attend_params *p, const cache_extents *of, uint8_t given, const fuzz_tensor tensors[3],
                                          const int64_t *lengths, int64_t longest, uint64_t *random, float numbers[64])
{
    const int64_t heads = tensors[0].tensor.shape[1];
    p->query = tensors[0].tensor;
    p->key = tensors[1].tensor;
    p->value = tensors[2].tensor;
    if (given & 1) {
        p->query_lengths = (sa_ints){.data = lengths, .shape = {of->batch}, .rank = 1};
    }
    for (int i = 0; i < 64; i++) {
        numbers[i] = 2 * fuzz_uniform(random);
    }
    if (given & 2) {
        p->sink_logits = (sa_floats){.data = numbers, .shape = {heads}, .rank = 1};
    }
    if ((given & 4) && p->pinned > 0 && heads * p->pinned <= 64) {
        p->sink_bias = (sa_floats){.data = numbers, .shape = {heads, p->pinned}, .rank = 2};
    }
    if (given & 8) {
        p->alibi_slopes = (sa_floats){.data = numbers, .shape = {heads}, .rank = 1};
    }
    p->has_softcap = given & 16;
    p->softcap = 3.0;
    return given & 8 ? 4.0 * 0x1p-23 * (double)longest : 0.0;
}

#endif
