/* One call on a CUDA device: describe (sa_attend_params) -> check -> allocate the results -> begin -> allocate its memory -> run -> end.
 *
 * The caller's memory serves three things at once: scratch of the kernels, their counters, and copies of auxiliary arrays that came from
 * the host. It may be reused by later work on the same stream as soon as sa_cuda_run has returned. */
#ifndef SA_WORK_H
#define SA_WORK_H

#include "cache.h"
#include "kv_slots.h"

enum { SA_MAX_STAGED = 11 };

/* An auxiliary array of the host, and where its copy goes. */
typedef struct sa_staged {
    const void **address;
    const void *source;
    int64_t bytes, offset;
} sa_staged;

enum { SA_MAX_CLEARED = 9 };

/* Memory to be zeroed; data NULL: in the caller's memory. */
typedef struct sa_cleared {
    void *data;
    int64_t offset, bytes;
} sa_cleared;

typedef struct sa_cuda_work {
    const char *function;
    sa_device_scope scope;
    union {
        sa_cuda_problem problem;
        sa_cuda_backward backward; /* begins with a problem */
        sa_cuda_prefill prefill;   /* the same */
        sa_cuda_eviction eviction; /* the same */
    };
    sa_cuda_plan plan;
    sa_staged staged[SA_MAX_STAGED];
    int staged_count;
    uint32_t *counters;     /* of the cache, at zero; NULL: to be found */
    int64_t counter_offset; /* in the caller's memory, where counters are NULL */
    sa_cleared cleared[SA_MAX_CLEARED]; /* before the plan runs */
    int cleared_count;
    int64_t memory_bytes; /* what sa_cuda_run wants, 256-byte aligned; 0: nothing */
} sa_cuda_work;

/* Plans a checked call with its results in place; `cache` NULL: none. On SA_OK the device is current until
 * sa_device_leave(&work->scope); otherwise nothing is to be left. */
sa_status sa_cuda_begin(const sa_attend_params *params, const sa_cuda_store *cache, void *stream, sa_cuda_work *work);
/* Slots of a KVCache. With keys and values of its own a call is a step, whose token is to be written behind the `lengths` that are held;
 * whether it can be, plan.append of the problem says. */
typedef struct sa_cuda_beside {
    const sa_tensor *keys, *values; /* NULL: they are the call's */
    bool evicts;                    /* such a step may let a token leave: the caller fills work->eviction where problem.evicts says so */
    uint32_t *counters;             /* of the cache, at zero */
    int64_t counter_count;
} sa_cuda_beside;

/* The same over the slots of a KVCache; lengths may be [batch, heads_kv], of a device. The device is current already, work->scope says which,
 * and stays so. Mass is not cleared before: what lies behind a row's length is not to be read. */
sa_status sa_cuda_begin_slots(const sa_attend_params *params, const sa_cuda_beside *slots, void *stream, sa_cuda_work *work);

sa_status sa_cuda_begin_mass(const sa_mass_params *params, sa_cuda_work *work);
sa_status sa_cuda_begin_backward(const sa_attend_backward_params *params, sa_cuda_work *work);
sa_status sa_cuda_run(sa_cuda_work *work, void *memory, void *stream);

/* sa_merge for arrays of a device. `memory` of the caller: so many bytes, 0 for few parts. */
int64_t sa_cuda_merge_bytes(int64_t count);
sa_status sa_cuda_merge(const char *function, int device, const sa_part *parts, int64_t count, void *out, float *lse, void *memory,
                        void *stream);

#endif
