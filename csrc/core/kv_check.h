/* The validation of what a user passes to a KVCache. */
#ifndef SA_KV_CHECK_H
#define SA_KV_CHECK_H

#include "../sinkattn.h"

sa_status sa_check_kv_config(const sa_kv_config *config);
/* lengths: [batch] tokens seen; NULL where the host does not know them. */
sa_status sa_check_kv_call(const sa_kv_config *config, const int64_t *lengths, const sa_attend_params *params);
sa_status sa_check_kv_index(const sa_kv_config *config, const int64_t *index, int64_t count);

/* One stream of a state to be restored: its positions by ascending order, and its ledger. */
sa_status sa_check_kv_stream(const sa_kv_config *config, int64_t row, int64_t head, int64_t held, int64_t length, int64_t evicted_at,
                             const int64_t *positions, const int32_t *order, const struct sa_ledger *ledger);

#endif
