/* SinkCache on a CUDA device: keys, values, lengths and lows in one block of memory that somebody else owns.
 *
 * The lengths live on the device, so that a captured step can be replayed: nothing here remembers them. What needs their values (crop,
 * save) waits for the stream. Every function wants the device current (sa_device_enter). */
#ifndef SA_CUDA_CACHE_H
#define SA_CUDA_CACHE_H

#include "../sinkattn.h"
#include "driver.h"

/* Counters of a cache: enough for a step of up to 16 query rows of a kv head at once; a longer part takes others. */
static inline int64_t sa_step_counters(int64_t batch, int64_t heads_kv)
{
    return batch * (heads_kv * 16 + 1);
}

/* How many rows from `first` on have the same flag; rows: [batch], NULL: all. */
static inline int64_t sa_rows_alike(const bool *rows, int64_t first, int64_t batch)
{
    int64_t count = 1;
    while (first + count < batch && (rows == NULL || rows[first + count] == rows[first])) {
        count++;
    }
    return count;
}

typedef struct sa_cuda_store {
    sa_cache_config config; /* inv_freq NULL: the device has them */
    sa_cuda_cache view;     /* what kernels get */
    int64_t key_bytes, value_bytes;
    uint32_t *counters; /* of the kernels that attend: calls of one cache never overlap */
    int64_t counter_count;
} sa_cuda_store;

/* What sa_cuda_store_place needs: a multiple of 256. `config` was checked. */
int64_t sa_cuda_store_bytes(const sa_cache_config *config);

/* Lays the cache out in `memory` (16-byte aligned) and empties it. config->inv_freq is read. */
sa_status sa_cuda_store_place(const sa_cache_config *config, void *memory, const sa_device_scope *scope, void *stream, sa_cuda_store *store);

int64_t sa_cuda_store_nbytes(const sa_cuda_store *store); /* keys, values and counters, as sa_cache_nbytes */
int64_t sa_cuda_store_slots(const sa_cuda_store *store);

/* rows: [batch], NULL: all. */
sa_status sa_cuda_store_reset(sa_cuda_store *store, const sa_device_scope *scope, const bool *rows, void *stream);
sa_status sa_cuda_store_crop(sa_cuda_store *store, const sa_device_scope *scope, int64_t length, void *stream);

/* Row i becomes what row index[i] was in `before`, a store of the same configuration with other memory. */
sa_status sa_cuda_store_gather(sa_cuda_store *store, const sa_cuda_store *before, const int64_t *index, void *stream);

/* Everything but the configuration; `store` was only laid out. */
void sa_cuda_store_lay_out(const sa_cache_config *config, void *memory, sa_cuda_store *store);
sa_status sa_cuda_store_copy(sa_cuda_store *store, const sa_cuda_store *from, void *stream);

/* To and from the host; both wait. Any of the four may be NULL in a read. A write expects what sa_check_cache_state has passed. */
sa_status sa_cuda_store_read(const sa_cuda_store *store, void *keys, void *values, int64_t *lengths, int64_t *lows, void *stream);
sa_status sa_cuda_store_write(sa_cuda_store *store, const void *keys, const void *values, const int64_t *lengths, const int64_t *lows,
                              void *stream);

#endif
