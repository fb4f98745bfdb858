/* What the host hands to the kernels of the backward pass: the problem of the forward, and what is wanted of it. Plain C. */
#ifndef SA_CUDA_BACKWARD_H
#define SA_CUDA_BACKWARD_H

#include "params.h"

typedef struct sa_cuda_backward {
    sa_cuda_problem forward;        /* output: what the call gave; lse and mass are not used */
    sa_cuda_tensor output_gradient; /* [batch, heads_q, query_length, depth_v] */
    sa_cuda_tensor lse;             /* [batch, heads_q, query_length] fp32 */
    sa_cuda_tensor lse_gradient;    /* the same; data NULL: not given */

    /* Dense, of the problem's dtype, written in full; NULL where the argument was not given. */
    void *query_gradient;      /* [batch, heads_q, query_length, depth] */
    void *key_gradient;        /* [batch, heads_kv, kv_length, depth] */
    void *value_gradient;      /* [batch, heads_kv, kv_length, depth_v] */
    void *sink_query_gradient; /* like query_gradient */
    void *sink_key_gradient;   /* [heads_kv, learned, depth] */
    void *sink_value_gradient; /* [heads_kv, learned, depth_v] */

    float *sink_logits_gradient; /* [logit_count] */
    float *sink_bias_gradient;   /* [heads_q, pinned] */
    int64_t logit_count;         /* 1: one logit for all heads, else heads_q * logits */
    int64_t logits_apart;        /* every head has logits of its own */

    int32_t one_pass; /* the device has wgmma, and sums need not have the same bits in every run */

    /* filled by sa_cuda_choose_backward */
    int64_t rows_offset;   /* bytes into scratch: sa_cuda_row [batch, heads_q, query_length] */
    int64_t bias_offset;   /* bytes: [rows, heads_q, pinned] fp32, zero before the plan runs; rows: batch rows or sequences */
    int64_t bias_bytes;    /* of it */
    int64_t key_tiles;     /* tiles of keys of one kv head: of one batch row, or of all packed sequences (an upper bound) */
    int64_t learned_tiles; /* tiles of learned keys of one kv head */
    int64_t query_tiles;   /* tiles of queries of one head */
    int64_t sums_offset;   /* bytes: [batch, heads_q, query_length, sums_width] fp32, zero before the plan runs */
    int64_t sums_bytes;    /* of it; 0: the gradient of the queries is not summed up in global memory */
    int64_t sums_width;    /* 64 or 128 */
    int32_t aligned;       /* every row of every tensor that is read in tiles is read in 16-byte pieces */
    int32_t sparse;        /* keys may belong to no row: their gradients are zeroed before the plan runs */
} sa_cuda_backward;

/* What a query row brings along. */
typedef struct sa_cuda_row {
    float lse;   /* log2 units; +inf where the row gives nothing to any key */
    float delta; /* <output gradient, output> - lse gradient */
} sa_cuda_row;

/* Tiles: rows of the side that stays, which are multiplied with slices of the other side. */
enum {
    SA_BACKWARD_WARPS = 4,
    SA_BACKWARD_SHARED_FACTS = 1024,
    SA_BACKWARD_ROW_WARPS = 8,
    SA_BACKWARD_NUMBER_THREADS = 256,
    SA_BACKWARD_F32_SLICE = 16,
    SA_ONE_PASS_KEYS = 128,
    SA_ONE_PASS_SLICE = 64,
    SA_ONE_PASS_THREADS = 256,
};

/* Blocks of 16 rows that a warp holds, and the length of a slice. `depth`: 64, 128 or 256. */
#define SA_BACKWARD_KEY_BLOCKS(depth) ((depth) == 64 ? 2 : 1)
#define SA_BACKWARD_QUERY_BLOCKS(depth) ((depth) == 256 ? 1 : 2)
#define SA_BACKWARD_SLICE(depth) ((depth) == 256 ? 16 : 32)
#define SA_BACKWARD_ROWS(blocks) (16 * SA_BACKWARD_WARPS * (blocks))
#define SA_BACKWARD_SHARED(depth, blocks)                                                                                         \
    (SA_BACKWARD_SHARED_FACTS + 4 * (depth) * (SA_BACKWARD_ROWS(blocks) + 2 * SA_BACKWARD_SLICE(depth)) + 16 * SA_BACKWARD_SLICE(depth))
#define SA_BACKWARD_F32_ROWS(depth) ((depth) == 256 ? 16 : 32)
#define SA_BACKWARD_F32_SHARED(depth)                                                                                             \
    (SA_BACKWARD_SHARED_FACTS + 8 * ((depth) + 4) * (SA_BACKWARD_F32_ROWS(depth) + SA_BACKWARD_F32_SLICE) +                       \
     8 * SA_BACKWARD_F32_ROWS(depth) * (SA_BACKWARD_F32_SLICE + 1) + 8 * SA_BACKWARD_F32_ROWS(depth)) /* the last: sa_cuda_row of a slice or tile */

#define SA_ONE_PASS_SHARED(depth)                                                                                                 \
    (SA_BACKWARD_SHARED_FACTS + 4 * (depth) * (SA_ONE_PASS_KEYS + 2 * SA_ONE_PASS_SLICE) + 2 * SA_ONE_PASS_KEYS * SA_ONE_PASS_SLICE +      \
     16 * SA_ONE_PASS_SLICE + 32)

#endif
