/* What a KVCache holds: for each kv head of each batch row ("a stream") a dense prefix of its slots, in any order of positions.
 *
 * Streams of one kv head have as many slots in every row; kv heads may differ: a budget of its own for each head costs no more than it
 * says. A token that leaves gives its slot to one that comes; where more leave than come, the last slots move into the gaps. */
#ifndef SA_KV_CACHE_H
#define SA_KV_CACHE_H

#include "../core/ledger.h"
#include "../core/policy.h"
#include "../core/select.h"

typedef struct sa_kv_storage {
    int64_t *slots;      /* [heads_kv] of a kv head of a row */
    int64_t *first;      /* [heads_kv + 1] slots of the heads before, in a row */
    char *keys;          /* [batch, first[heads_kv], depth] */
    char *values;        /* [batch, first[heads_kv], depth_v] */
    char *states;        /* [batch, first[heads_kv], sa_policy_state_bytes] */
    int64_t *positions;  /* [batch, first[heads_kv]] */
    int32_t *order;      /* [batch, first[heads_kv]] slots of a stream by ascending position */
} sa_kv_storage;

struct sa_kv_cache {
    sa_kv_config config;
    int64_t *budgets;
    double *inv_freq;
    sa_kv_storage storage;
    int64_t *held;       /* [batch, heads_kv] */
    int64_t *lengths;    /* [batch] tokens seen */
    int64_t *evicted_at; /* [batch] tokens seen when something last left */
    sa_ledger *ledgers;  /* [batch, heads_kv] */
    sa_departure *log;   /* [batch, heads_kv, config.log] */
    double *statistics;  /* [batch, heads_kv, sa_policy_statistics] of the queries */
};

static inline int64_t sa_kv_streams(const sa_kv_cache *cache)
{
    return cache->config.batch * cache->config.heads_kv;
}

/* First slot of a stream among all slots. */
static inline int64_t sa_kv_first_slot(const sa_kv_cache *cache, int64_t stream)
{
    const int64_t heads = cache->config.heads_kv;
    return stream / heads * cache->storage.first[heads] + cache->storage.first[stream % heads];
}

static inline sa_budget sa_kv_budget(const sa_kv_cache *cache, int64_t head)
{
    return (sa_budget){cache->budgets[head], cache->config.share, cache->config.every};
}

/* Mass is part of what a token remembers. */
static inline bool sa_kv_tracks(const sa_kv_cache *cache)
{
    return cache->config.track_mass || sa_policy_need(&cache->config.policy) != SA_MASS_NONE;
}

/* Room for `length` tokens seen by some row; fails without having changed anything. */
sa_status sa_kv_grow(sa_kv_cache *cache, int64_t length);

/* The contents of two caches of one configuration change places. */
void sa_kv_swap(sa_kv_cache *a, sa_kv_cache *b);

#endif
