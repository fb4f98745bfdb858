#include "cache_check.h"

#include <inttypes.h>
#include <stddef.h>

#include "check.h"
#include "ring.h"

sa_status sa_check_cache_config(const sa_cache_config *config)
{
    const struct {
        const char *name;
        int64_t value, low, high;
    } numbers[] = {{"batch", config->batch, 0, INT64_MAX},      {"kv_heads", config->heads_kv, 1, INT64_MAX},
                   {"head_dim", config->depth, 1, 256},         {"v_head_dim", config->depth_v, 1, 256},
                   {"sinks", config->pinned, 0, INT64_MAX / 4}, {"window", config->window, 1, INT64_MAX / 4},
                   {"rollback", config->rollback, 0, INT64_MAX / 4}};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        if (numbers[i].value < numbers[i].low || numbers[i].value > numbers[i].high) {
            return sa_fail(SA_VALUE_ERROR, "SinkCache(): %s is %" PRId64 ", expected %" PRId64 "%s%" PRId64, numbers[i].name,
                           numbers[i].value, numbers[i].low, " to ", numbers[i].high);
        }
    }
    if (2 * config->inv_freq_count > config->depth) {
        return sa_fail(SA_VALUE_ERROR, "SinkCache(): rope has %" PRId64 " frequencies, expected at most %" PRId64 " (half of head_dim %" PRId64 ")",
                       config->inv_freq_count, config->depth / 2, config->depth);
    }
    const int64_t slots = config->pinned + config->window + config->rollback;
    const int64_t shape[4] = {config->batch, config->heads_kv, slots, max_i64(config->depth, config->depth_v)};
    return sa_check_size("SinkCache", "the cache", shape, 4, sa_dtype_size(config->dtype));
}

sa_status sa_check_cache_call(const sa_cache_config *config, const sa_attend_params *params)
{
    SA_TRY(sa_check_tensors(params));
    const struct {
        const char *name, *axis;
        int64_t came, expected;
    } axes[] = {{"k", "batch", params->key.shape[0], config->batch},
                {"k", "heads", params->key.shape[1], config->heads_kv},
                {"k", "head_dim", params->key.shape[3], config->depth},
                {"v", "head_dim", params->value.shape[3], config->depth_v}};
    for (size_t i = 0; i < sizeof axes / sizeof axes[0]; i++) {
        if (axes[i].came != axes[i].expected) {
            return sa_fail(SA_VALUE_ERROR, "%s(): %s has %s %" PRId64 ", expected %" PRId64 " (as the cache was made)", params->function,
                           axes[i].name, axes[i].axis, axes[i].came, axes[i].expected);
        }
    }
    if (params->query.shape[2] != params->key.shape[2]) {
        return sa_fail(SA_VALUE_ERROR, "%s(): q has %" PRId64 " tokens, expected %" PRId64 " (same as k)", params->function,
                       params->query.shape[2], params->key.shape[2]);
    }
    if (params->query.dtype != config->dtype) {
        return sa_fail(SA_TYPE_ERROR, "%s(): q is %s, expected %s (the dtype of the cache)", params->function,
                       sa_dtype_name(params->query.dtype), sa_dtype_name(config->dtype));
    }
    SA_TRY(sa_check_scores(params));
    return sa_check_lengths(params, &params->query_lengths, "new_lengths", params->query.shape[2], "the tokens of q");
}

static sa_ring ring_of(const sa_cache_config *config)
{
    return (sa_ring){config->pinned, config->window, config->window + config->rollback};
}

sa_status sa_check_cache_state(const char *function, const sa_cache_config *config, const int64_t *lengths, const int64_t *lows)
{
    const sa_ring ring = ring_of(config);
    for (int64_t b = 0; b < config->batch; b++) {
        if (lengths[b] < 0 || lengths[b] > INT64_MAX / 4) {
            return sa_fail(SA_VALUE_ERROR, "%s(): length[%" PRId64 "] is %" PRId64 ", expected 0 to 2^61", function, b, lengths[b]);
        }
        const int64_t lowest = max_i64(ring.pinned, lengths[b] - ring.capacity), highest = max_i64(lengths[b], ring.pinned);
        if (lows[b] < lowest || lows[b] > highest) {
            return sa_fail(SA_VALUE_ERROR, "%s(): low[%" PRId64 "] is %" PRId64 ", expected %" PRId64 " to %" PRId64, function, b, lows[b], lowest,
                           highest);
        }
    }
    return SA_OK;
}

sa_status sa_check_cache_crop(const sa_cache_config *config, const int64_t *lengths, const int64_t *lows, int64_t length)
{
    const sa_ring ring = ring_of(config);
    for (int64_t b = 0; b < config->batch; b++) {
        const sa_ring_state row = {lengths[b], lows[b]};
        if (length < 0 || !sa_ring_may_crop(&ring, row, length)) {
            return sa_fail(SA_VALUE_ERROR,
                           "crop(): row %" PRId64 " has seen %" PRId64 " tokens and holds its ring from %" PRId64 "; what token %" PRId64
                           " would see is not all held, expected a length that is (rollback= keeps more)",
                           b, row.length, row.low, length);
        }
    }
    return SA_OK;
}

sa_status sa_check_cache_index(const sa_cache_config *config, const int64_t *index, int64_t count)
{
    if (count != config->batch) {
        return sa_fail(SA_VALUE_ERROR, "reorder(): index has %" PRId64 " entries, expected %" PRId64 " (the batch)", count, config->batch);
    }
    for (int64_t b = 0; b < config->batch; b++) {
        if (index[b] < 0 || index[b] >= config->batch) {
            return sa_fail(SA_VALUE_ERROR, "reorder(): index[%" PRId64 "] is %" PRId64 ", expected 0 to %" PRId64, b, index[b],
                           config->batch - 1);
        }
    }
    return SA_OK;
}
