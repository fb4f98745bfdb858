/* KVCache on a device: what the host hands to the kernels that append tokens to the slots and let tokens leave. Plain C, read by both sides.
 *
 * A stream is one kv head of one batch row, and has `stride` slots: what it may hold after a call, and behind that room for the tokens of
 * one part, which are appended before attention sees them. So all that may leave lies in one place, in any order of positions, and attention
 * is an ordinary call over `counts` keys of each stream. The state that csrc/core/policy.h keeps with each token lies by field here. */
#ifndef SA_CUDA_KV_SLOTS_H
#define SA_CUDA_KV_SLOTS_H

#include "../core/ledger.h"
#include "params.h"

enum {
    SA_KV_APPEND_WARPS = 4,
    SA_KV_EVICT_WARPS = 16,
    SA_KV_STEP_THREADS = 512, /* at most */
    SA_KV_SLOTS_A_THREAD = 8, /* of a step, at a time */
    SA_KV_STEP_SHARED = 1024,
    SA_KV_WEIGHT_KEYS = 64,
    SA_KV_WEIGHT_ROWS = 64,
    SA_KV_WEIGHT_SLAB = 64, /* columns at a time */
    SA_KV_WEIGHT_THREADS = 256
};

#define SA_KV_EVICT_SHARED 8192
#define SA_KV_SCRATCH(stride) (4 * 8 * (stride)) /* bytes of a stream, on top of it or in memory */
#define SA_KV_WEIGHT_SHARED (4 * (SA_KV_WEIGHT_KEYS + SA_KV_WEIGHT_ROWS) * (SA_KV_WEIGHT_SLAB + 4))

typedef struct sa_cuda_slots {
    sa_cuda_tensor key, value;   /* of the call: [batch, heads_kv, .., ..] */
    sa_cuda_tensor query;        /* the same: [batch, heads_q, .., depth], where it is turned */
    sa_cuda_numbers new_lengths; /* [batch, -]: real tokens of the call */
    int64_t first, tokens;       /* of the part: the call's token `first` .., and how many */
    void *keys;                  /* [streams, stride, depth] */
    void *values;                /* [streams, stride, depth_v] */
    int64_t *positions;          /* [streams, stride] */
    double *mass, *call;         /* [streams, stride] received since a token came; in this call, with keep_call */
    double *own;                 /* [2, streams, stride] the policy's */
    char *rings;                 /* [streams, stride, ring_bytes] floats or bits, one for each of the last `window` queries */
    int64_t *held, *lengths, *evicted_at; /* [streams] */
    int64_t *counts;             /* [streams] held and new: the keys that attention sees */
    int64_t *fresh;              /* [batch] new tokens of the part */
    sa_ledger *ledgers;          /* [streams] */
    sa_departure *log;           /* [streams, log_size] */
    int64_t *budgets;            /* [heads_kv] */
    double *inv_freq;            /* [pairs] */
    float *weights;              /* [streams, weight_rows, stride] mass by slot, of each new query or of all together; NULL: not tracked */
    uint64_t *scratch;           /* [streams, 4, stride]; NULL: there is room in shared memory */
    void *turned;                /* [batch, heads_q, tokens, depth] queries; NULL: nothing is turned */
    const float *lse;            /* [batch, heads_q, tokens] of a part, which goes into lse_out; NULL: it is there */
    float *lse_out;              /* [batch, heads_q, lse_length] */
    float *mass_out;             /* [streams, slots] */
    int64_t batch, heads_kv, group, stride, slots, depth, depth_v, weight_rows, ring_bytes, log_size, lse_length;
    int64_t pinned, recent, every, window, kernel, pairs;
    double decay, scaling;
    uint64_t seed;
    int32_t kind;        /* sa_policy_kind */
    int32_t dtype;       /* SA_CUDA_* */
    int32_t first_part;  /* of its call: `call` begins at zero */
    int32_t keep_call;
    int32_t waits;       /* the kernel began early */
    int32_t maximum;     /* SnapKV pools by maximum, else by mean */
    int32_t interleaved; /* pairs of the rotation */
} sa_cuda_slots;

/* A step whose attention also lets a token leave (decode_evict.cuh). Arrays as above. */
typedef struct sa_cuda_eviction {
    sa_cuda_problem problem;
    double *mass, *own;
    int64_t *positions, *held, *lengths, *evicted_at;
    const int64_t *budgets;
    sa_ledger *ledgers;
    sa_departure *log;
    int64_t stride, log_size, recent;
    double decay;
    int32_t kind;
    int32_t padding;
} sa_cuda_eviction;

#endif
