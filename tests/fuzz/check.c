/* The checks alone: extents, strides and numbers of any size, of tensors that are never read. What passes must be safe to compute with:
 * every offset within 63 bits, and a plan that the arithmetic sanitizer has nothing to say about. */
#include "../../csrc/core/plan.h"
#include "fuzz.h"

enum { ENTRIES = 8 };

/* Hostile sizes are refused by the allocator, as on a machine that is full. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1:max_allocation_size_mb=64";
}

static sa_tensor hostile_tensor(fuzz_input *in, int rank, const sa_tensor *like)
{
    static char somewhere[64];
    sa_tensor out = {.data = somewhere, .rank = fuzz_byte(in) < 8 ? (int)fuzz_range(in, 0, 4) : rank};
    out.dtype = like != NULL && fuzz_byte(in) < 250 ? like->dtype : (sa_dtype)fuzz_range(in, 0, 2);
    out.readonly = fuzz_byte(in) > 250;
    int64_t dense = 1;
    for (int axis = 3; axis >= 0; axis--) {
        const uint8_t kind = fuzz_byte(in);
        out.shape[axis] = like != NULL && kind < 240 ? like->shape[axis] : axis == 3 && kind < 240 ? 1 + kind % 64 : fuzz_hostile(in);
        out.stride[axis] = axis == 3 || fuzz_byte(in) < 100 ? dense : fuzz_hostile(in);
        dense = (int64_t)((uint64_t)dense * (uint64_t)out.shape[axis]);
    }
    return out;
}

/* Arrays whose extents are true: the check reads them. */
static sa_ints honest_ints(fuzz_input *in, int64_t *place, int64_t count)
{
    sa_ints out = {.data = place, .rank = fuzz_byte(in) < 240 ? 1 : (int)fuzz_range(in, 0, 2)};
    out.shape[0] = fuzz_byte(in) < 240 ? clamp_i64(count, 0, ENTRIES) : fuzz_range(in, 0, ENTRIES);
    out.shape[1] = out.rank == 2 ? 1 : 0;
    int64_t sum = 0;
    const bool rising = fuzz_byte(in) & 1;
    for (int64_t i = 0; i < ENTRIES; i++) {
        const int64_t value = fuzz_hostile(in);
        place[i] = rising ? sum : value;
        sum = (int64_t)((uint64_t)sum + (uint64_t)max_i64(value, 0) % 3);
    }
    return out;
}

static sa_floats honest_floats(fuzz_input *in, float *place, int64_t count, int64_t second)
{
    sa_floats out = {.data = place, .rank = (int)fuzz_range(in, 0, 2)};
    out.shape[0] = clamp_i64(count, 0, ENTRIES);
    out.shape[1] = clamp_i64(second, 0, ENTRIES / max_i64(out.shape[0], 1));
    return out;
}

/* The offsets of a tensor that passed, in more bits than the code has. */
static void require_reach(const sa_tensor *tensor)
{
    __int128 low = 0, high = 0;
    for (int axis = 0; axis < tensor->rank; axis++) {
        FUZZ_REQUIRE(tensor->shape[axis] >= 0);
        const __int128 reach = (__int128)tensor->stride[axis] * max_i64(tensor->shape[axis], 1);
        low += reach < 0 ? reach : 0;
        high += reach > 0 ? reach : 0;
    }
    FUZZ_REQUIRE(low * 4 > -((__int128)1 << 62) && high * 4 < ((__int128)1 << 62));
}

static double number(fuzz_input *in)
{
    static const double numbers[] = {0.125, 0, -1, NAN, INFINITY, -INFINITY, 1e300, 1e-300};
    return numbers[fuzz_byte(in) % 8];
}

static void check_config(fuzz_input *in)
{
    sa_cache_config config = {.batch = fuzz_hostile(in), .heads_kv = fuzz_hostile(in), .depth = fuzz_hostile(in), .depth_v = fuzz_hostile(in)};
    config.pinned = fuzz_hostile(in);
    config.window = fuzz_hostile(in);
    config.rollback = fuzz_hostile(in);
    config.dtype = (sa_dtype)fuzz_range(in, 0, 2);
    const double frequencies[4] = {1, 0.5, 0.25, 0.125};
    config.inv_freq_count = fuzz_range(in, 0, 4);
    config.inv_freq = config.inv_freq_count > 0 ? frequencies : NULL;
    config.attention_scaling = 1.0;
    sa_cache *cache;
    if (sa_cache_new(&config, &cache) == SA_OK) {
        FUZZ_REQUIRE(sa_cache_slots(cache) == config.pinned + config.window + config.rollback);
        FUZZ_REQUIRE(sa_cache_nbytes(cache) >= 0);
        sa_cache_free(cache);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    int64_t ints[6][ENTRIES];
    float floats[3][ENTRIES] = {{0}};
    sa_attend_params params = {.function = "attend", .mass_queries = fuzz_hostile(&in)};
    const uint8_t given = fuzz_byte(&in), more = fuzz_byte(&in);
    if (given == 255) {
        check_config(&in);
        return 0;
    }
    params.pinned = fuzz_hostile(&in);
    params.causal = more & 1;
    params.query = hostile_tensor(&in, 4, NULL);
    params.key = hostile_tensor(&in, 4, &params.query);
    params.value = hostile_tensor(&in, 4, &params.key);
    const int64_t batch = params.query.shape[0], heads = params.query.shape[1];
    if (given & 1) {
        params.output = hostile_tensor(&in, 4, &params.query);
        params.output.data = fuzz_byte(&in) < 30 ? params.query.data : (void *)(uintptr_t)(1ull << 46);
    }
    if (given & 2) {
        params.sink_query = hostile_tensor(&in, 4, &params.query);
    }
    if (given & 4) {
        sa_tensor like = {.shape = {params.key.shape[1], fuzz_hostile(&in), params.key.shape[3]}, .dtype = params.query.dtype};
        params.sink_key = hostile_tensor(&in, 3, &like);
        like.shape[2] = params.value.shape[3];
        params.sink_value = hostile_tensor(&in, 3, &like);
    }
    if (given & 8) {
        params.window = honest_ints(&in, ints[0], heads);
    }
    if (given & 16) {
        params.starts = honest_ints(&in, ints[1], batch);
    }
    if (given & 32) {
        params.lengths = honest_ints(&in, ints[2], batch);
        params.query_lengths = honest_ints(&in, ints[3], batch);
    }
    if (given & 64) {
        params.cumulative_query = honest_ints(&in, ints[4], 3);
        params.cumulative_key = honest_ints(&in, ints[5], 3);
    }
    if (given & 128) {
        params.sink_logits = honest_floats(&in, floats[0], heads, 2);
        params.sink_bias = honest_floats(&in, floats[1], heads, params.pinned);
        params.alibi_slopes = honest_floats(&in, floats[2], more & 2 ? heads : batch, heads);
    }
    params.has_scale = more & 4;
    params.has_softcap = more & 8;
    params.scale = number(&in);
    params.softcap = number(&in);
    if (sa_attend_check(&params) != SA_OK) {
        FUZZ_REQUIRE(strncmp(sa_message(), "attend(): ", 10) == 0 && strlen(sa_message()) > 20);
        return 0;
    }
    const sa_tensor *const tensors[] = {&params.query, &params.key, &params.value, &params.output, &params.sink_query, &params.sink_key,
                                        &params.sink_value};
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        require_reach(tensors[i]);
    }
    if (params.output.rank == 0) { /* made by the caller once the check has passed */
        params.output = (sa_tensor){.dtype = params.query.dtype};
    }
    sa_plan plan;
    if (sa_plan_attend(&params, &plan) == SA_OK) {
        sa_plan_end(&plan);
    }
    return 0;
}
