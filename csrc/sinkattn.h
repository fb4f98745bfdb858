/* sinkattn: the C interface between csrc/python and the kernels.
 *
 * Pointers address element [0, 0, ...]; extents count elements; strides count elements, not bytes.
 * The order of every call is: describe (sa_attend_params) -> check (sa_attend_check) -> allocate the results -> run (sa_attend).
 * docs/semantics.md says what is computed. */
#ifndef SINKATTN_H
#define SINKATTN_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

typedef enum sa_dtype { SA_F32, SA_F16, SA_BF16 } sa_dtype;

int64_t sa_dtype_size(sa_dtype dtype);
const char *sa_dtype_name(sa_dtype dtype);

/* A strided array that belongs to the caller. rank 0: not given. */
typedef struct sa_tensor {
    void *data;
    int64_t shape[4];
    int64_t stride[4];
    int rank;
    sa_dtype dtype;
    bool readonly;
} sa_tensor;

/* An auxiliary array that lies on a device, as it is: its dtype, any strides. The host never reads it. */
typedef struct sa_device_numbers {
    const void *data; /* NULL: the array is on the host */
    int64_t stride[4];
    int type; /* SA_NUMBER_* of cuda/params.h */
} sa_device_numbers;

/* Small auxiliary arrays. data NULL: not given. rank 0: one number for all. On the host they are already cast and dense (C order); with
 * device.data set, data is not NULL and not to be read. */
typedef struct sa_floats {
    const float *data;
    int64_t shape[4];
    int rank;
    sa_device_numbers device;
} sa_floats;

typedef struct sa_ints {
    const int64_t *data;
    int64_t shape[4];
    int rank;
    sa_device_numbers device;
} sa_ints;

typedef enum sa_mass_reduce { SA_MASS_SUM, SA_MASS_MAX } sa_mass_reduce;

/* One attention problem. A tensor of rank 0, or an array with data NULL, switches its feature off. */
typedef struct sa_attend_params {
    const char *function;     /* name in messages: "attend", "SinkCache.attend" */
    bool on_cuda;             /* tensors and results are on CUDA device `device`; else all is on the host */
    int device;
    sa_tensor query;          /* [batch, heads_q, query_length, depth] */
    sa_tensor key;            /* [batch, heads_kv, kv_length, depth] */
    sa_tensor value;          /* [batch, heads_kv, kv_length, depth_v] */
    sa_tensor output;         /* [batch, heads_q, query_length, depth_v], written in full */
    sa_tensor sink_query;     /* [batch, heads_q, query_length, depth], used against the pinned keys */
    sa_tensor sink_key;       /* [heads_kv, learned, depth] */
    sa_tensor sink_value;     /* [heads_kv, learned, depth_v] */
    sa_floats sink_logits;    /* [], [heads_q] or [heads_q, logits], natural log units */
    sa_floats sink_bias;      /* [heads_q, pinned] */
    sa_floats alibi_slopes;   /* [heads_q] or [batch, heads_q] */
    sa_ints window;           /* [] >= 1, or [heads_q] with 0 for none; not given: every key */
    sa_ints starts;           /* [batch] */
    sa_ints lengths;          /* [batch] */
    sa_ints query_lengths;    /* [batch]; new_lengths of a cache call */
    sa_ints cumulative_query; /* [sequences + 1] */
    sa_ints cumulative_key;   /* [sequences + 1] */
    int64_t pinned;           /* first keys that stay visible outside the window */
    bool causal;
    bool has_scale, has_softcap;
    double scale;   /* default 1 / sqrt(depth) */
    double softcap; /* > 0 */
    float *lse;     /* [batch, heads_q, query_length] dense, includes the sink logits, nullable */
    float *mass;    /* [batch, heads_kv, kv_length] dense (a cache: its slots in place of kv_length), nullable */
    sa_mass_reduce mass_reduce;
    int64_t mass_queries; /* only the last so many real queries of a row count; < 0: all */
} sa_attend_params;

/* Polled from the calling thread about every 10 ms of a long call; true stops it with SA_INTERRUPTED. `stop` may be NULL. */
typedef struct sa_poll {
    bool (*stop)(void *context);
    void *context;
} sa_poll;

/* Every check of a call, before the first read of query, key or value. output, lse and mass need not exist yet (output: rank 0). */
sa_status sa_attend_check(const sa_attend_params *params);

/* Runs a checked call with the results in place. SA_NO_MEMORY and SA_INTERRUPTED are the only failures; the results are then undefined. */
sa_status sa_attend(const sa_attend_params *params, sa_poll poll);

/* --- gradients ------------------------------------------------------------------------------------------------------------------- */

/* Gradients of  sum(output_gradient * output) + sum(lse_gradient * lse)  for the call that `attend` describes. */
typedef struct sa_attend_backward_params {
    sa_attend_params attend;    /* output, lse and mass are not used */
    sa_tensor output_gradient;  /* [batch, heads_q, query_length, depth_v], dtype of query */
    sa_tensor output;           /* like it: what the call gave */
    sa_tensor lse;              /* [batch, heads_q, query_length] float32, any strides: what the call gave */
    sa_tensor lse_gradient;     /* like lse, or not given */
    bool deterministic;         /* the same bits in every run; on the CPU always so */
    void *query_gradient;       /* this and all below: dense, written in full, NULL where the argument was not given */
    void *key_gradient, *value_gradient;
    void *sink_query_gradient;
    void *sink_key_gradient, *sink_value_gradient;
    float *sink_logits_gradient; /* as many numbers as sink_logits has */
    float *sink_bias_gradient;   /* [heads_q, pinned] */
} sa_attend_backward_params;

/* Every check of a call, before the first read of data. The results need not exist yet. */
sa_status sa_attend_backward_check(const sa_attend_backward_params *params);

/* Runs a checked call with its results in place. SA_NO_MEMORY and SA_INTERRUPTED are the only failures; the results are then undefined. */
sa_status sa_attend_backward(const sa_attend_backward_params *params, sa_poll poll);

/* Per-key mass for attention that was computed elsewhere. */
typedef struct sa_mass_params {
    sa_attend_params attend; /* value: as key; output, lse and the sinks beside the pinned keys are not used: lse has them */
    sa_floats lse;           /* [batch, heads_q, query_length], natural log: what every weight is divided by */
    sa_floats row_weights;   /* like lse: factors of the queries' weights; not given: 1 */
} sa_mass_params;

sa_status sa_mass_check(const sa_mass_params *params);
sa_status sa_mass(const sa_mass_params *params, sa_poll poll);

/* --- the streaming cache -------------------------------------------------------------------------------------------------------- */

typedef struct sa_cache sa_cache;

typedef struct sa_cache_config {
    int64_t batch, heads_kv, depth, depth_v;
    int64_t pinned, window, rollback;
    sa_dtype dtype;
    const double *inv_freq; /* [rotated / 2], copied; NULL: no rotation */
    int64_t inv_freq_count;
    double attention_scaling;
    bool interleaved;
    bool applied;        /* q and k arrive rotated at their absolute position */
    bool slot_positions; /* distances to pinned keys count cache slots (StreamingLLM), else text */
} sa_cache_config;

/* Checks the configuration ("SinkCache(): ..." messages) and allocates; memory never grows afterwards but for the scratch of a call. */
sa_status sa_cache_new(const sa_cache_config *config, sa_cache **cache);
void sa_cache_free(sa_cache *cache);

/* The same in memory of the caller, in two steps: a cache without memory, then its place, 16-byte aligned, which outlives it. `keep` takes
 * over what another cache of the same configuration left there, its lengths checked, else the place is emptied. Every other function is for
 * a settled cache. */
sa_status sa_cache_over(const sa_cache_config *config, sa_cache **cache);
int64_t sa_cache_storage_bytes(const sa_cache *cache);
sa_status sa_cache_settle(sa_cache *cache, void *memory, bool keep);
sa_status sa_cache_clone(const sa_cache *cache, sa_cache **copy);
const sa_cache_config *sa_cache_describe(const sa_cache *cache);
int64_t sa_cache_nbytes(const sa_cache *cache);
int64_t sa_cache_slots(const sa_cache *cache); /* pinned + window + rollback */

/* Append, evict, attend. params: query, key, value, output, query_lengths (= new_lengths), sink_logits, sink_bias, sink_key/value,
 * scale, softcap, alibi_slopes, lse, mass [batch, heads_kv, slots]. The cache changes only when SA_OK is returned. */
sa_status sa_cache_attend_check(const sa_cache *cache, const sa_attend_params *params);
sa_status sa_cache_attend(sa_cache *cache, const sa_attend_params *params, sa_poll poll);

const int64_t *sa_cache_lengths(const sa_cache *cache); /* [batch] tokens seen */
const int64_t *sa_cache_lows(const sa_cache *cache);    /* [batch] oldest position that the ring still holds, >= pinned */

/* Positions held by a row, ascending; `positions` has room for sa_cache_slots. Returns how many. */
int64_t sa_cache_kept(const sa_cache *cache, int64_t row, int64_t *positions);

void sa_cache_reset(sa_cache *cache, const bool *rows); /* [batch], NULL: all */
sa_status sa_cache_reorder(sa_cache *cache, const int64_t *index, int64_t count);
sa_status sa_cache_crop(sa_cache *cache, int64_t length);

/* The stored bits: keys [batch, heads_kv, slots, depth] and values [batch, heads_kv, slots, depth_v], dense. Slot of position j: j where
 * j < pinned, else pinned + (j - pinned) % (window + rollback). Unused slots are zero. */
const void *sa_cache_keys(const sa_cache *cache);
const void *sa_cache_values(const sa_cache *cache);

/* Takes over a state of the same configuration after checking it: lengths >= 0, pinned <= lows <= max(lengths, pinned), and no more held
 * than the ring has room for. Slots that the lengths say are unused are cleared. */
sa_status sa_cache_restore(sa_cache *cache, const void *keys, const void *values, const int64_t *lengths, const int64_t *lows);

/* --- eviction by policy --------------------------------------------------------------------------------------------------------- */

typedef enum sa_policy_kind {
    SA_POLICY_SINK_WINDOW,
    SA_POLICY_H2O,
    SA_POLICY_H2O_NORM,
    SA_POLICY_H2O_EMA,
    SA_POLICY_V_LENGTH_H2O,
    SA_POLICY_SCISSORHANDS,
    SA_POLICY_TOVA,
    SA_POLICY_SNAP_KV,
    SA_POLICY_KEY_DIFF,
    SA_POLICY_K_NORM,
    SA_POLICY_CUR,
    SA_POLICY_EXPECTED_ATTENTION,
    SA_POLICY_RANDOM,
    SA_POLICY_CUSTOM,
    SA_POLICY_COUNT,
} sa_policy_kind;

/* A rule and its numbers: those that it has no use for are 0. */
typedef struct sa_policy {
    sa_policy_kind kind;
    int64_t window; /* queries or tokens that it looks at together */
    int64_t kernel; /* neighbours that are pooled, odd */
    bool maximum;   /* pooled by maximum, else by mean */
    double decay;
    uint64_t seed;
} sa_policy;

typedef struct sa_kv_config {
    int64_t batch, heads_kv, depth, depth_v;
    const int64_t *budgets; /* [heads_kv] tokens of each kv head, copied; with a share: the least */
    double share;           /* of the tokens seen; 0: the budgets alone */
    int64_t pinned, recent; /* first and last tokens that always stay */
    int64_t every;          /* tokens between evictions */
    int64_t part;           /* a longer call is cut into parts of so many tokens, between which tokens leave */
    int64_t log;            /* departures that a ledger remembers one by one */
    bool track_mass;        /* for the ledger, where the policy needs none */
    sa_policy policy;
    sa_dtype dtype;
    const double *inv_freq; /* [rotated / 2], copied; NULL: no rotation */
    int64_t inv_freq_count;
    double attention_scaling;
    bool interleaved, applied;
    bool slot_positions; /* distances count the tokens held, else text */
} sa_kv_config;

typedef struct sa_kv_cache sa_kv_cache;
struct sa_candidates;
struct sa_ledger;
struct sa_departure;

/* The scores of a Custom policy, asked of the calling thread: [candidates]. Anything but SA_OK ends the call and nothing has changed. */
typedef struct sa_kv_scorer {
    sa_status (*score)(void *context, const struct sa_candidates *all, double *scores);
    void *context;
} sa_kv_scorer;

sa_status sa_kv_new(const sa_kv_config *config, sa_kv_cache **cache);
void sa_kv_free(sa_kv_cache *cache);
sa_status sa_kv_clone(const sa_kv_cache *cache, sa_kv_cache **copy);
const sa_kv_config *sa_kv_describe(const sa_kv_cache *cache);
int64_t sa_kv_nbytes(const sa_kv_cache *cache);
int64_t sa_kv_most_slots(const sa_kv_cache *cache); /* of a kv head: the extent of a call's mass */

/* Attend, learn, evict. params as of a SinkCache, without mass: sa_kv_take_mass gives it after a call with keep_mass. The cache changes
 * only when SA_OK is returned. */
sa_status sa_kv_attend_check(const sa_kv_cache *cache, const sa_attend_params *params);
sa_status sa_kv_reserve(sa_kv_cache *cache, const sa_attend_params *params); /* room for a checked call: sa_kv_most_slots is then that of after it */
sa_status sa_kv_attend(sa_kv_cache *cache, const sa_attend_params *params, const sa_kv_scorer *scorer, bool keep_mass, sa_poll poll);

/* Mass that the tokens held now received in the last call that kept it, in order of position, zero beyond: [batch, heads_kv, most_slots]. */
void sa_kv_take_mass(const sa_kv_cache *cache, float *mass);

const int64_t *sa_kv_lengths(const sa_kv_cache *cache); /* [batch] tokens seen */

/* Positions that a kv head of a row holds, ascending; room for sa_kv_most_slots. Returns how many. */
int64_t sa_kv_kept(const sa_kv_cache *cache, int64_t row, int64_t head, int64_t *positions);
const struct sa_ledger *sa_kv_ledger(const sa_kv_cache *cache, int64_t row, int64_t head);
const struct sa_departure *sa_kv_log(const sa_kv_cache *cache, int64_t row, int64_t head); /* [config->log] */
int64_t sa_kv_head_bytes(const sa_kv_cache *cache, int64_t head); /* keys and values of what fits a kv head of a row */

void sa_kv_reset(sa_kv_cache *cache, const bool *rows); /* [batch], NULL: all */
sa_status sa_kv_reorder(sa_kv_cache *cache, const int64_t *index, int64_t count);
sa_status sa_kv_crop(sa_kv_cache *cache, int64_t length);

/* Everything that a cache knows, in blocks of memory: keys, values, positions, states, held, lengths, evicted_at, ledgers, log, statistics.
 * sa_kv_restore checks what blocks say, and that they are as long as `slots` [heads_kv] of each kv head make them, before it takes them
 * over; on failure nothing has changed. */
typedef struct sa_kv_block {
    void *data;
    int64_t bytes;
} sa_kv_block;

enum { SA_KV_BLOCKS = 10 };
void sa_kv_blocks(const sa_kv_cache *cache, sa_kv_block blocks[SA_KV_BLOCKS]);
sa_status sa_kv_restore(sa_kv_cache *cache, const int64_t *slots, const sa_kv_block given[SA_KV_BLOCKS]);
const int64_t *sa_kv_slots(const sa_kv_cache *cache); /* [heads_kv] of each kv head of a row */

/* --- the machine ---------------------------------------------------------------------------------------------------------------- */

/* Kernel tables: "reference", "avx2", "avx512", "avx512bf16", "neon", "neonbf16". The best usable one is chosen once; SINKATTN_CPU=<name> overrides. */
int sa_table_count(void);
const char *sa_table_name(int index);
bool sa_table_built(int index);  /* compiled into this extension */
bool sa_table_usable(int index); /* built, and this processor has the instructions */
const char *sa_table_chosen(void);
const char *sa_table_reason(void); /* one sentence: why this one */
sa_status sa_table_use(const char *name);
const char *sa_cpu_features(void); /* space-separated names of the probed features that are present */

/* How often each path ran since the process started, e.g. "packed", "direct", "reference": a call that falls through is visible. */
int sa_path_count(void);
const char *sa_path_name(int index);
int64_t sa_path_calls(int index);

typedef enum sa_peak_kind {
    SA_PEAK_FMA,      /* fp32 multiply-adds, in FLOP/s */
    SA_PEAK_BF16_DOT, /* bf16 dot products into fp32, in FLOP/s */
    SA_PEAK_READ,     /* streaming read of `data`, in bytes/s */
} sa_peak_kind;

/* One trial, some milliseconds, of what this machine can do at most, on all threads; the best of several counts. data: at least 1 MiB for
 * SA_PEAK_READ (to mean memory, many times the last cache), else unused. *table: whose loop it was. SA_NOT_IMPLEMENTED where no table has one. */
sa_status sa_peak(sa_peak_kind kind, const void *data, int64_t bytes, sa_poll poll, double *rate, const char **table);

void sa_set_threads(int64_t count); /* >= 1 */
int64_t sa_get_threads(void);       /* default: SINKATTN_NUM_THREADS, else the affinity mask */

/* Attention over some of the keys. */
typedef struct sa_part {
    sa_tensor out; /* [..., depth], depth <= 256, rank >= 1 */
    sa_tensor lse; /* [...] fp32 */
} sa_part;

/* Joins `count` partial results over disjoint keys, all of one shape and dtype; out and lse are dense, of theirs. */
void sa_merge(const sa_part *parts, int64_t count, void *out, float *lse);

#endif
