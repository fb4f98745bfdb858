/* Who leaves a cache: how many tokens stay, which of them may not leave, and the lowest scores of the others.
 *
 * Everything here follows from how many tokens were seen, not from how they were cut into calls: evictions stand at lengths that are
 * multiples of `every`, and what came behind the last such length stays. */
#ifndef SA_SELECT_H
#define SA_SELECT_H

#include <stdbool.h>
#include <stdint.h>

#include "integers.h"

/* How many tokens a kv head keeps. */
typedef struct sa_budget {
    int64_t slots; /* to which it is evicted; at least so many with a share */
    double share;  /* of the tokens seen; 0: slots alone */
    int64_t every; /* tokens between evictions */
} sa_budget;

/* Tokens that stay: positions below `pinned` and from `recent_from` on. */
typedef struct sa_guard {
    int64_t pinned, recent_from;
} sa_guard;

/* The length at which the last eviction before or at `length` stands. */
static inline int64_t sa_last_eviction(const sa_budget *budget, int64_t length)
{
    return length - length % budget->every;
}

/* Tokens kept right after an eviction at `length`. */
int64_t sa_budget_at(const sa_budget *budget, int64_t length);

/* Tokens held once `length` were seen. */
int64_t sa_held_at(const sa_budget *budget, int64_t length);

/* Slots that no length up to `length` needs more than. */
int64_t sa_slots_until(const sa_budget *budget, int64_t length);

/* Marks in gone[count] the `leaving` lowest scores among the candidates that the guard lets go; ties go to the newer, which stays; NaN is
 * lowest. order: the candidates by ascending position. work: [count]. There must be as many. */
void sa_select(const double *scores, const int64_t *positions, const int32_t *order, int64_t count, sa_guard guard, int64_t leaving,
               int32_t *work, bool *gone);

#endif
