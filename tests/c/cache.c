/* The streaming cache: however a stream is cut, each token gets what attention over the whole stream with pinned tokens and a window
 * gives. */
#include "test.h"

enum { TOKENS = 90, HEADS_Q = 4, HEADS_KV = 2, DEPTH = 24, PINNED = 3, WINDOW = 17 };

static sa_tensor part_of(const sa_tensor *all, int64_t first, int64_t count)
{
    sa_tensor part = *all;
    part.data = (char *)all->data + first * all->stride[2] * sa_dtype_size(all->dtype);
    part.shape[2] = count;
    return part;
}

static void stream(sa_cache *cache, const sa_attend_params *whole, int64_t step)
{
    for (int64_t first = 0; first < TOKENS; first += step) {
        const int64_t count = min_i64(step, TOKENS - first);
        sa_attend_params params = {.function = "SinkCache.attend",
                                   .query = part_of(&whole->query, first, count),
                                   .key = part_of(&whole->key, first, count),
                                   .value = part_of(&whole->value, first, count),
                                   .output = part_of(&whole->output, first, count),
                                   .mass_queries = -1};
        EXPECT(sa_cache_attend_check(cache, &params) == SA_OK, "%s", sa_message());
        EXPECT(sa_cache_attend(cache, &params, no_poll) == SA_OK, "%s", sa_message());
    }
}

static void check_kept(const sa_cache *cache)
{
    int64_t kept[PINNED + WINDOW];
    const int64_t count = sa_cache_kept(cache, 0, kept);
    EXPECT(count == PINNED + WINDOW, "%lld kept", (long long)count);
    for (int64_t i = 0; i < count; i++) {
        EXPECT(kept[i] == (i < PINNED ? i : TOKENS - WINDOW + i - PINNED), "position %lld at %lld", (long long)kept[i], (long long)i);
    }
}

static int64_t test_dtype(sa_dtype dtype)
{
    uint64_t random = 11;
    const int64_t window = WINDOW, outputs = HEADS_Q * TOKENS * DEPTH;
    sa_attend_params whole = {.function = "attend",
                              .query = new_tensor(dtype, 1, HEADS_Q, TOKENS, DEPTH, 0, &random),
                              .key = new_tensor(dtype, 1, HEADS_KV, TOKENS, DEPTH, 0, &random),
                              .value = new_tensor(dtype, 1, HEADS_KV, TOKENS, DEPTH, 0, &random),
                              .output = new_tensor(dtype, 1, HEADS_Q, TOKENS, DEPTH, 0, &random),
                              .window = {.data = &window},
                              .pinned = PINNED,
                              .causal = true,
                              .mass_queries = -1};
    EXPECT(sa_attend_check(&whole) == SA_OK && sa_attend(&whole, no_poll) == SA_OK, "%s", sa_message());
    void *expected = allocate(outputs * sa_dtype_size(dtype));
    memcpy(expected, whole.output.data, (size_t)(outputs * sa_dtype_size(dtype)));

    const int64_t steps[] = {1, 7, 40, TOKENS};
    for (int i = 0; i < 4; i++) {
        const sa_cache_config config = {.batch = 1, .heads_kv = HEADS_KV, .depth = DEPTH, .depth_v = DEPTH, .pinned = PINNED,
                                        .window = WINDOW, .dtype = dtype, .attention_scaling = 1.0, .slot_positions = true};
        sa_cache *cache;
        EXPECT(sa_cache_new(&config, &cache) == SA_OK, "%s", sa_message());
        memset(whole.output.data, 0, (size_t)(outputs * sa_dtype_size(dtype)));
        stream(cache, &whole, steps[i]);
        const double error = relative_error(dtype, whole.output.data, expected, outputs);
        EXPECT(error <= bound_of(dtype), "%s, %s, chunks of %lld: %g", sa_table_chosen(), sa_dtype_name(dtype), (long long)steps[i], error);
        check_kept(cache);
        sa_cache_free(cache);
    }
    free(expected);
    free(whole.query.data);
    free(whole.key.data);
    free(whole.value.data);
    free(whole.output.data);
    return 4;
}

int64_t test_cache(void)
{
    return test_dtype(SA_F32) + test_dtype(SA_F16) + test_dtype(SA_BF16);
}
