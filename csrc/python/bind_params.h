/* What attend and SinkCache.attend parse and return alike. */
#ifndef SA_BIND_PARAMS_H
#define SA_BIND_PARAMS_H

#include "../cuda/kv_store.h"
#include "array.h"

typedef struct sa_score_arguments {
    PyObject *sink_logits, *sink_bias, *sink_kv, *scale, *softcap, *alibi_slopes;
} sa_score_arguments;

typedef struct sa_results {
    sa_like like;
    PyObject *out, *lse, *mass; /* owned; NULL where not asked for */
    bool out_given;
} sa_results;

/* An argument whose absence is rank 0: an array without axes is refused. */
int sa_view_given(sa_call *call, const char *name, PyObject *object, sa_tensor *tensor);

/* q, k, v and out (None: not given). `like` becomes the kind of q. */
int sa_parse_tensors(sa_call *call, PyObject *q, PyObject *k, PyObject *v, PyObject *out, sa_attend_params *params, sa_like *like);
int sa_parse_scores(sa_call *call, const sa_score_arguments *arguments, sa_attend_params *params);

/* The arguments that _core.attend and _core.attend_backward begin with: q to cu_seqlens_k, in the order of sinkattn.attend. */
enum { SA_ATTEND_ARGUMENTS = 18 };
int sa_parse_attend(sa_call *call, PyObject *const *arguments, PyObject *out, sa_attend_params *params, sa_like *like);

/* The arguments of Cache.attend, in order. */
/* clang-format off */
enum {
    SA_CACHE_Q, SA_CACHE_K, SA_CACHE_V, SA_CACHE_NEW_LENGTHS, SA_CACHE_SINK_LOGITS, SA_CACHE_SINK_BIAS, SA_CACHE_SINK_KV, SA_CACHE_SCALE,
    SA_CACHE_SOFTCAP, SA_CACHE_ALIBI_SLOPES, SA_CACHE_OUT, SA_CACHE_RETURN_LSE, SA_CACHE_RETURN_MASS, SA_CACHE_ARGUMENTS
};
/* clang-format on */
int sa_parse_cache_call(sa_call *call, PyObject *const *arguments, sa_attend_params *params, sa_like *like, bool *return_lse,
                        bool *return_mass);

/* What the other methods of every cache are given. */
int sa_parse_rows(PyObject *mask, int64_t batch, const bool **rows); /* of reset: bytes, a flag for each row, or None for all (NULL) */
int sa_parse_order(sa_call *call, PyObject *index, sa_ints *order); /* of reorder: whole numbers [batch] */
int sa_parse_crop(sa_call *call, PyObject *length, int64_t *tokens);

/* Allocates what is asked for and points params at it. Only after the check. */
int sa_make_results(sa_call *call, sa_attend_params *params, PyObject *out, bool lse, bool mass, int64_t mass_slots, sa_results *results);

/* Launches a checked call with its results in place; `cache` NULL: none. Memory for its length comes from the allocator of `like`. */
int sa_run_on_cuda(sa_call *call, const sa_attend_params *params, const sa_cuda_store *cache, const sa_like *like);

/* The same for a KVCache. */
int sa_run_kv_on_cuda(sa_call *call, const sa_attend_params *params, sa_cuda_kv *store, const sa_like *like);

/* The same for mass alone, and for gradients. */
int sa_run_mass_on_cuda(sa_call *call, const sa_mass_params *params, const sa_like *like);
int sa_run_backward_on_cuda(sa_call *call, const sa_attend_backward_params *params, const sa_like *like);

/* out, or the tuple of what was asked for. */
PyObject *sa_take_results(sa_call *call, sa_results *results);
void sa_drop_results(sa_results *results);

#endif
