/* The validation of what a user passes to a SinkCache, whatever its device. */
#ifndef SA_CACHE_CHECK_H
#define SA_CACHE_CHECK_H

#include "../sinkattn.h"

sa_status sa_check_cache_config(const sa_cache_config *config);

/* A call of SinkCache.attend, but for the values of the lengths that the cache keeps. */
sa_status sa_check_cache_call(const sa_cache_config *config, const sa_attend_params *params);

/* lengths and lows [batch] of a state to be restored: lengths >= 0, pinned <= lows <= max(lengths, pinned), no more held than there is
 * room for. */
sa_status sa_check_cache_state(const char *function, const sa_cache_config *config, const int64_t *lengths, const int64_t *lows);

/* May every row forget all but its first `length` tokens? */
sa_status sa_check_cache_crop(const sa_cache_config *config, const int64_t *lengths, const int64_t *lows, int64_t length);

/* The index of a reorder: one row of the batch for each. */
sa_status sa_check_cache_index(const sa_cache_config *config, const int64_t *index, int64_t count);

#endif
