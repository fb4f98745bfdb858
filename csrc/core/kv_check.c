#include "kv_check.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>

#include "cache_check.h"
#include "check.h"
#include "integers.h"
#include "ledger.h"
#include "policy.h"

static sa_status check_range(const char *name, int64_t value, int64_t low, int64_t high)
{
    if (value < low || value > high) {
        return sa_fail(SA_VALUE_ERROR, "KVCache(): %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, name, value, low, high);
    }
    return SA_OK;
}

static sa_status check_budgets(const sa_kv_config *config)
{
    const int64_t recent = max_i64(config->recent, sa_policy_protects(&config->policy));
    const int64_t least = max_i64(config->pinned + recent, 1);
    for (int64_t head = 0; head < config->heads_kv; head++) {
        if (config->budgets[head] < least || config->budgets[head] > INT32_MAX / 4) {
            return sa_fail(SA_VALUE_ERROR,
                           "KVCache(): budget is %" PRId64 " for kv head %" PRId64 ", expected at least %" PRId64
                           " (sinks %" PRId64 " and the last %" PRId64 " tokens never leave) and at most %d",
                           config->budgets[head], head, least, config->pinned, recent, INT32_MAX / 4);
        }
        if (config->policy.kind == SA_POLICY_TOVA && config->budgets[head] != config->budgets[0]) {
            return sa_fail(SA_VALUE_ERROR, "KVCache(): budget differs between kv heads, expected one for all: TOVA keeps one set for all heads");
        }
    }
    return SA_OK;
}

sa_status sa_check_kv_config(const sa_kv_config *config)
{
    const int64_t most = INT32_MAX / 4;
    SA_TRY(check_range("batch", config->batch, 1, INT32_MAX));
    SA_TRY(check_range("kv_heads", config->heads_kv, 1, INT32_MAX));
    SA_TRY(check_range("head_dim", config->depth, 1, 256));
    SA_TRY(check_range("v_head_dim", config->depth_v, 1, 256));
    SA_TRY(check_range("sinks", config->pinned, 0, most));
    SA_TRY(check_range("recent", config->recent, 0, most));
    SA_TRY(check_range("every", config->every, 1, most));
    SA_TRY(check_range("chunk", config->part, 1, most));
    SA_TRY(check_range("log", config->log, 0, most));
    if (2 * config->inv_freq_count > config->depth) {
        return sa_fail(SA_VALUE_ERROR, "KVCache(): rope has %" PRId64 " frequencies, expected at most %" PRId64 " (half of head_dim %" PRId64 ")",
                       config->inv_freq_count, config->depth / 2, config->depth);
    }
    SA_TRY(sa_policy_check(&config->policy, "KVCache"));
    SA_TRY(check_budgets(config));
    int64_t slots = 0;
    for (int64_t head = 0; head < config->heads_kv; head++) {
        slots = max_i64(slots, config->budgets[head] + config->every - 1);
    }
    const int64_t bytes = max_i64(max_i64(config->depth, config->depth_v) * 4, sa_policy_state_bytes(&config->policy));
    const int64_t shape[4] = {config->batch, config->heads_kv, slots + config->log, bytes};
    return sa_check_size("KVCache", "the cache", shape, 4, 1);
}

sa_status sa_check_kv_call(const sa_kv_config *config, const int64_t *lengths, const sa_attend_params *params)
{
    const sa_cache_config same = {.batch = config->batch,
                                  .heads_kv = config->heads_kv,
                                  .depth = config->depth,
                                  .depth_v = config->depth_v,
                                  .pinned = config->pinned,
                                  .dtype = config->dtype};
    SA_TRY(sa_check_cache_call(&same, params));
    for (int64_t b = 0; b < config->batch && lengths != NULL; b++) {
        if (lengths[b] > INT64_MAX / 8 - params->query.shape[2]) {
            return sa_fail(SA_VALUE_ERROR, "%s(): row %" PRId64 " is at the end of the countable positions", params->function, b);
        }
    }
    return SA_OK;
}

sa_status sa_check_kv_index(const sa_kv_config *config, const int64_t *index, int64_t count)
{
    return sa_check_cache_index(&(sa_cache_config){.batch = config->batch}, index, count);
}

static sa_status bad_state(int64_t row, int64_t head, const char *what)
{
    return sa_fail(SA_VALUE_ERROR, "load_state_dict(): row %" PRId64 ", kv head %" PRId64 ": %s", row, head, what);
}

static bool ledger_is_sound(const sa_ledger *ledger, int64_t evicted)
{
    if (ledger->evicted != evicted || ledger->logged < 0 || ledger->logged > evicted) {
        return false;
    }
    for (int bin = 0; bin < SA_LEDGER_BINS; bin++) {
        if (ledger->histogram[bin] < 0 || ledger->histogram[bin] > evicted) {
            return false;
        }
    }
    return true;
}

sa_status sa_check_kv_stream(const sa_kv_config *config, int64_t row, int64_t head, int64_t held, int64_t length, int64_t evicted_at,
                             const int64_t *positions, const int32_t *order, const sa_ledger *ledger)
{
    const int64_t pinned = min_i64(config->pinned, length), recent = min_i64(config->recent, length);
    if (held < min_i64(max_i64(pinned + recent, 1), length)) {
        return bad_state(row, head, "held is less than the tokens that never leave");
    }
    for (int64_t rank = 0; rank < held; rank++) {
        const int64_t position = positions[order[rank]];
        if (position < 0 || position >= length || (rank > 0 && position <= positions[order[rank - 1]])) {
            return bad_state(row, head, "positions are not distinct numbers below length");
        }
        if (rank < pinned && (position != rank || order[rank] != rank)) {
            return bad_state(row, head, "the pinned tokens are not in the first slots");
        }
        if (rank >= held - recent && position != length - held + rank) {
            return bad_state(row, head, "the most recent tokens are not all held");
        }
    }
    const int64_t since = length - evicted_at; /* nothing has left since: these lie behind the others, in order */
    for (int64_t rank = held - since; rank < held; rank++) {
        if (rank < 0 || order[rank] != rank || positions[rank] != length - held + rank) {
            return bad_state(row, head, "what came since evicted_at is not in the last slots");
        }
    }
    if (!ledger_is_sound(ledger, length - held)) {
        return bad_state(row, head, "the ledger does not add up: evicted is not length less what is held");
    }
    return SA_OK;
}
