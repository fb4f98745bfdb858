/* The thread pool: one job at a time, its tasks taken in order from a counter by the caller and the workers.
 *
 * Results must not depend on who runs a task. A second caller that finds the pool busy runs its job alone, on its own thread.
 * Workers are started at the first parallel job, never hold the GIL, block all signals, and are forgotten in a forked child, where new
 * ones start on demand. */
#ifndef SA_POOL_H
#define SA_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "../sinkattn.h"

typedef struct sa_job sa_job;

/* What a task may use: scratch of its own (64-byte aligned, contents undefined). */
typedef struct sa_worker {
    void *scratch;
    sa_job *job;
    bool caller;
} sa_worker;

typedef void (*sa_task)(void *context, int64_t index, sa_worker *worker);

/* Runs task 0 .. count-1. `flops` decides whether waking the workers is worth it. SA_NO_MEMORY before any task ran, SA_INTERRUPTED when
 * the poll asked to stop: the tasks not yet begun were skipped. */
sa_status sa_pool_run(int64_t count, double flops, int64_t scratch_bytes, sa_task task, void *context, sa_poll poll);

/* For a call of many short jobs, none of which lasts until the poll is due: asked between them, SA_INTERRUPTED where the poll says stop.
 * *polled_at: 0 at first. */
sa_status sa_pool_ask(sa_poll poll, int64_t *polled_at);

/* Long tasks ask about every 100 microseconds and return early on true. */
bool sa_worker_stopped(const sa_worker *worker);

#endif
