/* What the host hands to a kernel: one POD, passed by value (__grid_constant__). Plain C, read by both sides.
 *
 * Every pointer is a device address. What lies behind `sa_cuda_numbers` (lengths, windows, logits ..) is read by the kernels alone, with
 * its own dtype, and clamped to ranges that cannot leave the arrays; the host never reads it. The last axis of every tensor has stride 1.
 *
 * The host fills the problem, calls sa_cuda_choose (choose.h), which fills the last block and says what to launch, provides scratch and
 * counters, and passes the same problem to every launch of the plan, in order, on one stream. */
#ifndef SA_CUDA_PARAMS_H
#define SA_CUDA_PARAMS_H

#include <stddef.h>
#include <stdint.h>

enum { SA_CUDA_F32, SA_CUDA_F16, SA_CUDA_BF16 }; /* = sa_dtype */

/* Element types of auxiliary arrays. */
enum {
    SA_NUMBER_F32,
    SA_NUMBER_F16,
    SA_NUMBER_BF16,
    SA_NUMBER_F64,
    SA_NUMBER_I8,
    SA_NUMBER_I16,
    SA_NUMBER_I32,
    SA_NUMBER_I64,
    SA_NUMBER_U8,
    SA_NUMBER_U16,
    SA_NUMBER_U32,
    SA_NUMBER_U64, /* bool is U8 */
};

/* Which keys a decode kernel that weighs meets. */
enum { SA_WEIGHS_NONE, SA_WEIGHS_SOME, SA_WEIGHS_ALL };

/* A tensor; strides count elements, any sign, 0 allowed. Axes that it does not have have stride 0. data NULL: not given. */
typedef struct sa_cuda_tensor {
    void *data;
    int64_t batch, head, token;
} sa_cuda_tensor;

/* A small array, or one number for all. */
typedef struct sa_cuda_numbers {
    const void *data; /* nullable: `value` everywhere */
    double value;
    int64_t stride[2]; /* elements, of the two axes named at the declaration; 0 repeats */
    int32_t type;      /* SA_NUMBER_* of data */
    int32_t given;     /* 0 switches the feature off */
} sa_cuda_numbers;

/* A number for every query row. */
typedef struct sa_cuda_rows {
    const void *data;             /* NULL: not given */
    int64_t batch, head, token;   /* strides in elements */
    int32_t type;                 /* SA_NUMBER_* */
    int32_t padding;
} sa_cuda_rows;

/* Pinned slots and a ring, as csrc/core/ring.h has them. keys NULL: the call has no cache. */
typedef struct sa_cuda_cache {
    void *keys;             /* [batch, heads_kv, slots, depth] dense, 16-byte aligned */
    void *values;           /* [batch, heads_kv, slots, depth_v] dense, 16-byte aligned */
    int64_t *lengths;       /* [batch] tokens seen; the plan's last launch advances them */
    int64_t *lows;          /* [batch] oldest position held by the ring, >= pinned; the same */
    const double *inv_freq; /* [pairs] */
    int64_t window;         /* ring: keys visible, >= 1 */
    int64_t capacity;       /* window + rollback; slots = pinned + capacity */
    int64_t pairs;          /* rotated depth / 2; 0: no rotation */
    double scaling;         /* attention scaling of the rotation */
    int32_t interleaved, applied, slot_positions;
    int32_t padding;
} sa_cuda_cache;

typedef struct sa_cuda_problem {
    sa_cuda_tensor query;             /* [batch, heads_q, query_length, depth] */
    sa_cuda_tensor key;               /* [batch, heads_kv, kv_length, depth]; with a cache: the chunk, kv_length = query_length */
    sa_cuda_tensor value;             /* [batch, heads_kv, kv_length, depth_v] */
    sa_cuda_tensor output;            /* [batch, heads_q, query_length, depth_v], written in full */
    sa_cuda_tensor sink_query;        /* [batch, heads_q, query_length, depth], against the pinned keys; not with a cache */
    sa_cuda_tensor sink_key;          /* [heads_kv, learned, depth] */
    sa_cuda_tensor sink_value;        /* [heads_kv, learned, depth_v] */
    sa_cuda_numbers sink_logits;      /* [heads_q, logits] natural log units */
    sa_cuda_numbers sink_bias;        /* [heads_q, pinned] */
    sa_cuda_numbers alibi_slopes;     /* [batch, heads_q] */
    sa_cuda_numbers window;           /* [heads_q, -] 0: none; not with a cache */
    sa_cuda_numbers starts;           /* [batch, -] */
    sa_cuda_numbers lengths;          /* [batch, heads_kv] */
    sa_cuda_numbers query_lengths;    /* [batch, -]; new_lengths of a cache */
    sa_cuda_numbers cumulative_query; /* [sequences + 1, -] */
    sa_cuda_numbers cumulative_key;   /* [sequences + 1, -] */
    sa_cuda_cache cache;
    sa_cuda_rows row_lse;     /* [batch, heads_q, query_length], natural log, where mass alone is wanted; data NULL: lse */
    sa_cuda_rows row_weights; /* the same axes: what the mass of a row is multiplied with; data NULL: 1 */
    float *lse;  /* [batch, heads_q, query_length] dense, nullable */
    float *mass; /* [batch, heads_kv, mass_length] dense, nullable; zeroed on the stream before the plan runs unless it `weighs` */
    int64_t batch, heads_q, heads_kv, query_length, kv_length, depth, depth_v;
    int64_t sequences;    /* packed sequences; 0: batch rows */
    int64_t logits;       /* sink logits a head */
    int64_t pinned;       /* first keys that stay visible outside the window */
    int64_t learned;      /* rows of sink_key */
    int64_t mass_length;  /* kv_length, or the slots of a cache */
    int64_t mass_queries; /* only the last so many real queries of a row count; < 0: all */
    float scale;          /* finite */
    float softcap;        /* > 0; 0: none */
    int32_t dtype;        /* SA_CUDA_* of every tensor and of the cache */
    int32_t causal;
    int32_t mass_maximum; /* over the queries; 0: sum */
    int32_t prefetch;     /* sa_cuda_choose: bytes of keys, and as many rows of values, that a CTA of decode asks for before all else */

    /* filled by the host after sa_cuda_choose */
    void *scratch;      /* plan.scratch_bytes, 256-byte aligned, any content; must not be shared by launches that may overlap */
    uint32_t *counters; /* plan.counter_count, zero before the plan runs and zero again after it; not shared either */

    /* filled by sa_cuda_choose */
    int64_t partial_offset; /* bytes into scratch: [units, splits, rows of a tile, depth_v] weighted values of a split, fp32 */
    int64_t state_offset;   /* bytes: [units, splits, rows of a tile, 2] maximum and sum of a split, fp32 */
    int64_t lse_offset;     /* bytes: lse for the mass pass where the caller wants none; < 0: not needed */
    int64_t rotated_offset; /* bytes: query, pinned query, key of a chunk that the rotate kernel turned; < 0: not needed */
    int64_t row_tiles;      /* tiles of query rows of one kv head: of one batch row, or of all packed sequences (an upper bound) */
    int32_t splits;         /* parts that the keys of a tile are cut into */
    int32_t clustered;      /* the splits of a tile are one cluster: partial results meet in distributed shared memory */
    int32_t append;         /* decode also appends the chunk to the cache and advances it */
    int32_t aligned;        /* every row of key, value, cache and learned rows is read in 16-byte pieces */
    int32_t lean;           /* one query a row and one window for all: every head sees the same keys */
    int32_t group;          /* query heads of a kv head */
    int32_t apart;          /* pinned keys are treated otherwise than the others */
    int32_t weighs;         /* SA_WEIGHS_*: the decode kernel gives the mass as well, and writes all of it */
    int64_t common_window;               /* of all heads, as the kernels count it; 0: it differs or is on the device */
    sa_cuda_tensor held_key, held_value; /* where a row's keys lie: the call's tensors, or the cache; of `slots` the host fills them */
    int32_t slots; /* of the host: `lengths` are held in slots of a KVCache, and the call's keys come behind them: a step of one token */
    int32_t evicts; /* of the host: such a step may let a token leave as well; sa_cuda_choose: whether it does */
} sa_cuda_problem;

/* A tensor as Hopper's copy engine sees it: the driver's CUtensorMap. */
typedef struct sa_cuda_map {
#ifdef __cplusplus
    alignas(64)
#else
    _Alignas(64)
#endif
    uint64_t words[16];
} sa_cuda_map;

/* What the prefill kernels of Hopper take: a problem, and its tensors as boxes of 64 columns. */
typedef struct sa_cuda_prefill {
    sa_cuda_problem problem;
    sa_cuda_map query, second_query;  /* the heads of a group, as many tokens as a tile holds; the second where it is given */
    sa_cuda_map key, value;           /* the keys of a slice */
    sa_cuda_map few_keys, few_values; /* SA_HOPPER_FEW keys */
} sa_cuda_prefill;

/* Tiles, known to choose.c and to the kernels. A row of a tile is one query of one head of a group. A slice is what a warp of the decode
 * kernel works on at a time; each warp has a ring of SA_DECODE_STAGES slices of keys and values. */
enum {
    SA_DECODE_ROWS = 16,
    SA_DECODE_STAGES = 3,
    SA_DECODE_WARPS = 8,   /* at most */
    SA_DECODE_CLUSTER = 8, /* at most */
    SA_DECODE_RUNS = 6,    /* slices that runs leave unfilled, at most */
    SA_F32_ROWS = 16,
    SA_F32_KEYS = 32,
    SA_F32_WARPS = 4,
    SA_PREFILL_ROWS = 64,
    SA_PREFILL_WIDE_ROWS = 128,
    SA_PREFILL_KEYS = 64,
    SA_PREFILL_WARPS = 4,
    SA_HOPPER_HEADS = 64,   /* of a group, at most */
    SA_HOPPER_FEW = 16,     /* keys of a small box: the pinned ones, and pieces of what whole slices leave */
    SA_WINDOW_KEYS = 144,   /* of a tile of 64 rows, the pinned ones apart, or 136 where that is enough */
    SA_WINDOW_FEWER_KEYS = 136,
    SA_WINDOW_GROUPS = 3,   /* warpgroups that multiply */
    SA_WINDOW_THREADS = 128 * (1 + SA_WINDOW_GROUPS),
    SA_WINDOW_REGISTERS = 160,
    SA_WINDOW_COPYING_REGISTERS = 32,
    SA_WINDOW_HEADS = 64,   /* of a group, at most */
    SA_WINDOW_PINNED = 16,  /* at most */
    SA_WINDOW_BIASES = 256, /* of a group, at most */
    SA_MASS_KEYS = 64,
    SA_MASS_ROWS = 16,
    SA_MASS_WARPS = 8,
    SA_MASS_HALF_ROWS = 64, /* of the tensor-core form */
    SA_MASS_HALF_WARPS = 4,
    SA_MASS_HOPPER_KEYS = 256,
    SA_MASS_HOPPER_ROWS = 128,
    SA_MASS_HOPPER_STAGES = 3,
    SA_MASS_HOPPER_THREADS = 256,
    SA_CACHE_WARPS = 4,
    SA_COMMIT_TOKENS = 64, /* tokens of a CTA */
};

#define SA_DECODE_SLICE(depth) ((depth) == 64 ? 32 : 16) /* keys; depth: 64, 128 or 256 */
#define SA_PREFILL_WIDE_KEYS(depth) ((depth) == 64 ? 128 : 64)
#define SA_DECODE_WEIGHING_WARPS(depth) ((depth) == 256 ? 2 : 4) /* at least, where scores are kept beside the rings */

/* Forms of the prefill kernel of Hopper, X(name, depth of queries and keys, of values, rows of a tile, keys of a slice, slices held, tiles
 * of queries held, scores are more than scaled and hidden): a call takes the first that it fits in. A warpgroup multiplies 64 rows, and one
 * more copies. */
#define SA_HOPPER_FORMS(X)                          \
    X(64, 64, 64, 192, 128, 3, 2, 0)                \
    X(96, 96, 96, 192, 96, 2, 2, 0)                 \
    X(128, 128, 128, 192, 80, 3, 2, 0)              \
    X(192, 192, 128, 192, 80, 2, 1, 0)              \
    X(256, 256, 256, 128, 64, 2, 1, 0)              \
    X(featured_64, 64, 64, 192, 96, 3, 1, 1)        \
    X(featured_128, 128, 128, 192, 80, 3, 1, 1)
#define SA_HOPPER_THREADS(rows) (2 * (rows) + 128)

#define SA_CUDA_NO_WINDOW (INT64_MAX / 4)

/* Dynamic shared memory: what is known of the rows of a tile, then queries, keys and values. The decode kernel's rings come on top. */
#define SA_ROWS_SHARED 3072
#define SA_DECODE_ROWS_SHARED 6144
#define SA_DECODE_SCORE_STRIDE(rows) ((rows) < 3 ? (rows) : ((rows) + 3) / 4 * 4) /* floats of a key's scores */
#define SA_DECODE_SHARED(depth) (SA_DECODE_ROWS_SHARED + 2 * SA_DECODE_ROWS * (depth) * 2)
#define SA_F32_SHARED(depth) (SA_ROWS_SHARED + 4 * ((SA_F32_ROWS + 2 * SA_F32_KEYS) * ((depth) + 4) + SA_F32_ROWS * (SA_F32_KEYS + 4)))
#define SA_PREFILL_ROWS_SHARED(rows) ((rows) > 64 ? 5120 : 3072)
#define SA_PREFILL_SHARED(depth, rows, keys) (SA_PREFILL_ROWS_SHARED(rows) + 2 * (depth) * ((rows) + 2 * (keys)))
#define SA_HOPPER_STATE 7168 /* a multiple of 1024, to which swizzled panels are aligned */
#define SA_HOPPER_PANELS(depth) (((depth) + 63) / 64 * 128)         /* bytes of a row */
#define SA_HOPPER_SHARED(depth, width, rows, keys, stages, query_tiles, featured)                                              \
    (SA_HOPPER_STATE + SA_HOPPER_PANELS(depth) * ((featured ? 2 : 1) * (query_tiles) * (rows) + (stages) * (keys)) + \
     SA_HOPPER_PANELS(width) * (stages) * (keys))

/* Keys from the first that the first row of a tile may see to the last that the last may, without the window: positions of a tile, and up to
 * seven more where tiles don't begin at multiples of eight. */
#define SA_WINDOW_SPAN(group) (64 % ((group) * 8) == 0 ? 64 / (group) : (63 + (group) - 1) / (group) + 1 + 7)
#define SA_WINDOW_STATE_SHARED 3072
#define SA_WINDOW_BUNDLES(depth) ((depth) == 64 ? 32 : 15) /* of 16 keys, in the ring */
#define SA_WINDOW_SHARED(depth)                                                                                                            \
    (SA_WINDOW_STATE_SHARED + 2 * (depth) * (2 * 16 * (SA_WINDOW_BUNDLES(depth) + 1) + SA_WINDOW_GROUPS * 64 * 2))

#define SA_MASS_SHARED_TOTALS(stride) ((4 * (SA_MASS_KEYS + SA_MASS_ROWS) * (stride) + 7) / 8 * 8)
#define SA_MASS_SHARED(depth) (SA_ROWS_SHARED + SA_MASS_SHARED_TOTALS((depth) + 1) + 8 * 32 * SA_MASS_WARPS)
#define SA_MASS_HALF_KEYS(depth) ((depth) == 256 ? 64 : 128)
#define SA_MASS_HALF_KNOWN (2 * SA_MASS_HALF_ROWS * 32)
#define SA_MASS_HALF_SHARED(depth) (SA_ROWS_SHARED + SA_MASS_HALF_KNOWN + 2 * SA_MASS_HALF_ROWS * (depth) * 2)
#define SA_MASS_HOPPER_FACTS (SA_MASS_HOPPER_STAGES * SA_MASS_HOPPER_ROWS * 8)
#define SA_MASS_HOPPER_SHARED(depth)                                                                                                       \
    (SA_ROWS_SHARED + SA_MASS_HOPPER_FACTS + 2 * (depth) * (SA_MASS_HOPPER_KEYS + SA_MASS_HOPPER_STAGES * SA_MASS_HOPPER_ROWS))
#define SA_ROTATE_SHARED (2 * 2 * 128 * 4)

#ifdef __cplusplus
#define SA_CUDA_ASSERT static_assert
#else
#define SA_CUDA_ASSERT _Static_assert
#endif
SA_CUDA_ASSERT(sizeof(sa_cuda_tensor) == 32, "layout of sa_cuda_tensor");
SA_CUDA_ASSERT(sizeof(sa_cuda_numbers) == 40, "layout of sa_cuda_numbers");
SA_CUDA_ASSERT(sizeof(sa_cuda_rows) == 40, "layout of sa_cuda_rows");
SA_CUDA_ASSERT(sizeof(sa_cuda_cache) == 88, "layout of sa_cuda_cache");
SA_CUDA_ASSERT(offsetof(sa_cuda_problem, sink_logits) == 224, "layout of sa_cuda_problem");
SA_CUDA_ASSERT(offsetof(sa_cuda_problem, cache) == 584, "layout of sa_cuda_problem");
SA_CUDA_ASSERT(offsetof(sa_cuda_problem, batch) == 768, "layout of sa_cuda_problem");
SA_CUDA_ASSERT(offsetof(sa_cuda_problem, scratch) == 896, "layout of sa_cuda_problem");
SA_CUDA_ASSERT(sizeof(sa_cuda_problem) == 1064, "layout of sa_cuda_problem");
SA_CUDA_ASSERT(sizeof(sa_cuda_prefill) == 1088 + 6 * 128, "layout of sa_cuda_prefill");

#endif
