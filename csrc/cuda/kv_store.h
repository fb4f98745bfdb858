/* KVCache on a CUDA device: slots, what the policy remembers, ledgers and lengths in one block of memory that somebody else owns.
 *
 * All that changes lives on the device, so that a captured step can be replayed: nothing here remembers how much is held. What needs to
 * know (crop, a snapshot) waits for the stream. Every function wants the device current (sa_device_enter). */
#ifndef SA_CUDA_KV_STORE_H
#define SA_CUDA_KV_STORE_H

#include "../sinkattn.h"
#include "kv_slots.h"
#include "work.h"

typedef struct sa_cuda_kv {
    sa_kv_config config; /* budgets, inv_freq NULL: the device has them */
    sa_cuda_slots view;  /* what kernels get, but for what a call brings along */
    int64_t *budgets;    /* [heads_kv], of the host */
    int64_t vector_bytes;  /* of keys and values, which lie first */
    int64_t content_bytes; /* of all that a copy needs; the rest are counters */
    uint32_t *counters;    /* of the kernels that attend: calls of one cache never overlap */
    int64_t counter_count;
    char *memory;
} sa_cuda_kv;

/* Checks the configuration as sa_kv_new does, and takes it over; sa_cuda_kv_end frees what it needs on the host. */
sa_status sa_cuda_kv_begin(const sa_kv_config *config, sa_cuda_kv *store);
void sa_cuda_kv_end(sa_cuda_kv *store);

/* What sa_cuda_kv_lay_out needs, 256-byte aligned. */
int64_t sa_cuda_kv_bytes(const sa_cuda_kv *store);
void sa_cuda_kv_lay_out(sa_cuda_kv *store, void *memory);

/* Empties a store that was laid out. inv_freq: of the configuration. */
sa_status sa_cuda_kv_place(sa_cuda_kv *store, const double *inv_freq, const sa_device_scope *scope, void *stream);

int64_t sa_cuda_kv_slots(const sa_cuda_kv *store); /* of a stream, at most, after a call */

/* rows: [batch], NULL: all. */
sa_status sa_cuda_kv_reset(sa_cuda_kv *store, const bool *rows, void *stream);

/* Everything of a store of the same configuration; then, row i becomes what row index[i] was in `before`. */
sa_status sa_cuda_kv_copy(sa_cuda_kv *store, const sa_cuda_kv *from, void *stream);
sa_status sa_cuda_kv_gather(sa_cuda_kv *store, const sa_cuda_kv *before, const int64_t *index, void *stream);

/* A cache of the host with the same content, checked, for the caller to free; without `vectors` its keys and values are zero. It waits. */
sa_status sa_cuda_kv_read(const sa_cuda_kv *store, bool vectors, void *stream, sa_kv_cache **host);
sa_status sa_cuda_kv_write(sa_cuda_kv *store, const sa_kv_cache *host, void *stream);
sa_status sa_cuda_kv_lengths(const sa_cuda_kv *store, int64_t *lengths, void *stream); /* [batch] */
sa_status sa_cuda_kv_crop(sa_cuda_kv *store, const sa_device_scope *scope, int64_t length, void *stream);

/* --- a call ------------------------------------------------------------------------------------------------------------------------ */

/* A call in parts of at most config.part tokens. The order is that of work.h. */
typedef struct sa_cuda_kv_work {
    sa_cuda_kv *store;
    sa_attend_params params;
    sa_device_scope scope;
    sa_cuda_slots slots;
    sa_cuda_work full, last; /* attention of a part, and of the last one, where it is `shorter`: neither can be copied */
    bool shorter;
    int64_t most, parts;
    bool each;               /* weights of every query apart */
    bool step;               /* one token, which kv_step takes in */
    bool appends;            /* and the attention writes into its slot */
    bool evicts;             /* and does all the rest */
    int64_t weights_offset, scratch_offset, turned_offset, lse_offset, lengths_offset, attention_offset; /* in the caller's memory; < 0: not needed */
    float *part_lse;         /* [batch, heads_q, tokens of a part]; NULL: the caller's, or none */
    int64_t evict_shared;    /* bytes of shared memory */
    int64_t memory_bytes;
} sa_cuda_kv_work;

/* Every check of a call. params as of a SinkCache; mass: [batch, heads_kv, slots]. */
sa_status sa_cuda_kv_check(const sa_cuda_kv *store, const sa_attend_params *params);

sa_status sa_cuda_kv_plan(sa_cuda_kv *store, const sa_attend_params *params, void *stream, sa_cuda_kv_work *work);
sa_status sa_cuda_kv_run(sa_cuda_kv_work *work, void *memory, void *stream);

#endif
