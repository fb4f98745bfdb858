/* The only validation of what a user passes. Inner functions assert. sa_attend_check is declared in sinkattn.h. */
#ifndef SA_CHECK_H
#define SA_CHECK_H

#include "../sinkattn.h"

/* Ranks, dtypes, strides and sizes of query, key, value, output and the learned sinks, and how they fit together: all that a plain call
 * and a cache call have in common. */
sa_status sa_check_tensors(const sa_attend_params *params);

/* Arrays that change the score or the denominator: scale, softcap, sink_logits, sink_bias, alibi_slopes. */
sa_status sa_check_scores(const sa_attend_params *params);

/* An array that has one number for each query of each head. */
sa_status sa_check_per_query(const sa_attend_params *params, const char *name, const sa_floats *numbers);

/* Lengths of the given name: shape [batch], each within 0 .. limit. */
sa_status sa_check_lengths(const sa_attend_params *params, const sa_ints *lengths, const char *name, int64_t limit, const char *limit_name);

/* Extents of a new array: each >= 0 and the bytes within int64. `name` begins the message. */
sa_status sa_check_size(const char *function, const char *name, const int64_t *shape, int rank, int64_t item_size);

#endif
