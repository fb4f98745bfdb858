/* A call of KVCache while it runs: what its two halves, kv_attend.c and kv_evict.c, both know of it. */
#ifndef SA_KV_CALL_H
#define SA_KV_CALL_H

#include "../core/problem.h"
#include "kv_cache.h"

/* One call, and where its present part stands. */
typedef struct sa_kv_call {
    sa_kv_cache *cache;
    const sa_attend_params *params;
    const sa_kv_scorer *scorer;
    sa_poll poll;
    bool keep_mass, first_part;
    sa_mass_need need;
    int64_t first, count;       /* tokens of the part */
    int64_t most;               /* of a part */
    int64_t slots, stride;      /* most of a stream; candidates of one, rounded up */
    int64_t mass_rows;          /* 0, 1, or `most` */
    float *mass;                /* [streams, mass_rows, stride] */
    float *back;                /* [streams, slots in whole blocks], with ALiBi */
    double *scores;             /* [streams, stride], of a Custom policy */
    char *query;                /* [batch, heads_q, most, depth] turned; NULL: the caller's */
    char *key;                  /* [batch, heads_kv, most, depth] turned */
    char *held_key;             /* [streams, slots, depth] turned: positions in slots */
} sa_kv_call;

static inline int64_t sa_kv_new_tokens(const sa_kv_call *call, int64_t row)
{
    const sa_ints *lengths = &call->params->query_lengths;
    return lengths->data == NULL ? call->count : clamp_i64(lengths->data[row] - call->first, 0, call->count);
}

/* Are keys and queries turned by the cache? */
static inline bool sa_kv_turns(const sa_kv_config *config)
{
    return config->inv_freq_count > 0 && !config->applied;
}

/* Cuts memory that was counted in whole cache lines; NULL where nothing is wanted. */
static inline void *sa_kv_part_of(char **next, int64_t bytes)
{
    char *part = *next;
    *next += round_up(bytes, 64);
    return bytes > 0 ? part : NULL;
}

/* The new tokens of the part from `token` on, as they are stored: turned where the call has turned them. */
sa_run sa_kv_new_run(const sa_kv_call *call, int64_t stream, int64_t token, int64_t count, sa_run_kind kind);

/* Teaches the policy what the attention of the part has shown, lets tokens leave, and advances the lengths. */
sa_status sa_kv_evict_part(sa_kv_call *call);

#endif
