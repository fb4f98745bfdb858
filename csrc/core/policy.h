/* Eviction policies: what each remembers of a token, what it learns from a call, and the score by which the lowest leave.
 *
 * Formulas and sources: docs/policies.md, sinkattn/policy.py. A policy sees one kv head of one batch row at a time and knows nothing of
 * slots being overwritten: what it remembers of a token moves with the token. */
#ifndef SA_POLICY_H
#define SA_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "../sinkattn.h"
#include "rope.h"

/* Is a token's score its own, whoever else is held? */
static inline bool sa_policy_scores_alone(sa_policy_kind kind)
{
    return kind != SA_POLICY_SNAP_KV && kind != SA_POLICY_KEY_DIFF && kind != SA_POLICY_CUR;
}

/* What a policy asks of the attention pass. */
typedef enum sa_mass_need {
    SA_MASS_NONE,
    SA_MASS_TOTAL, /* summed over the queries of a part */
    SA_MASS_EACH,  /* of each query apart */
} sa_mass_need;

/* What one kv head of one batch row may lose: the tokens that it holds, by slot, and behind them the tokens on their way in. */
typedef struct sa_candidates {
    int64_t row, head, heads;  /* which; heads of the row */
    int64_t held, fresh;       /* candidates 0 .. held - 1 are slots, held .. held + fresh - 1 new tokens */
    const int64_t *positions;  /* [held + fresh] */
    const int32_t *order;      /* [held + fresh] candidates by ascending position */
    int64_t length;            /* tokens seen, the new ones included */
    sa_dtype dtype;
    int64_t depth, depth_v;
    const void *held_keys, *held_values;   /* dense */
    const void *fresh_keys, *fresh_values; /* first new token */
    int64_t fresh_key_stride, fresh_value_stride;
    char *held_state, *fresh_state; /* [.., sa_policy_state_bytes], fresh zeroed */
    bool tracked;                   /* mass is there */
    const float *mass;              /* [mass_rows, mass_stride]: by candidate, one row for each new query or one for all of them */
    int64_t mass_rows, mass_stride;
    int64_t head_stride;            /* from a head's mass to the next one's */
    double *scratch;                /* [2 * (held + fresh) + depth] */
    const void *queries;            /* of the new tokens, as they came: first token, first head of the group */
    int64_t query_head_stride, query_stride, group;
    sa_rope rope;                   /* pairs 0: none */
    bool turned;                    /* queries came turned to their position */
    int64_t pinned;
    double scale;
    double *statistics;             /* [sa_policy_statistics] */
} sa_candidates;

/* Beside the scores of a policy, every token remembers: */
typedef struct sa_token_state {
    double mass; /* received since it came */
    double call; /* received in this call */
    double own[2]; /* the policy's: see policy.c */
    /* behind it: a ring of floats or bits, one for each of the last `window` queries */
} sa_token_state;

sa_policy_kind sa_policy_named(const char *name); /* of the Python class; unknown: Custom */
sa_status sa_policy_check(const sa_policy *policy, const char *function);
int64_t sa_policy_state_bytes(const sa_policy *policy);
int64_t sa_policy_statistics(const sa_policy *policy, int64_t depth); /* numbers about the queries that a stream keeps */
sa_mass_need sa_policy_need(const sa_policy *policy);

/* Tokens that the policy's own rule never lets go: the last so many. */
int64_t sa_policy_protects(const sa_policy *policy);

/* Takes in what the queries of a part gave, and the new tokens. */
void sa_policy_observe(const sa_policy *policy, const sa_candidates *all);

/* scores: [held + fresh]; the highest stay. */
void sa_policy_score(const sa_policy *policy, const sa_candidates *all, double *scores);

static inline sa_token_state *sa_state_of(const sa_policy *policy, const sa_candidates *all, int64_t candidate)
{
    const int64_t bytes = sa_policy_state_bytes(policy);
    char *state = candidate < all->held ? all->held_state + candidate * bytes : all->fresh_state + (candidate - all->held) * bytes;
    return (sa_token_state *)(void *)state;
}

#endif
