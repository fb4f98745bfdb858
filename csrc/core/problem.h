/* What a kernel computes: rows of queries, each against a few runs of keys.
 *
 * A row is a batch row or a packed sequence. A run is keys at a constant stride with consecutive positions. Runs are how one kernel
 * serves everything: a plain call has one or two, a ring that wraps has two beside its pinned tokens, a chunk on its way into a cache is
 * one more, and learned sink K/V is a run that has no positions. */
#ifndef SA_PROBLEM_H
#define SA_PROBLEM_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "../sinkattn.h"
#include "integers.h"

#define SA_NO_WINDOW (INT64_MAX / 4)

typedef enum sa_run_kind {
    SA_RUN_PLAIN,   /* causality and window decide */
    SA_RUN_PINNED,  /* causality alone; sink_query and sink_bias apply */
    SA_RUN_LEARNED, /* seen by every query; neither bias nor ALiBi */
    SA_RUN_HELD,    /* seen by every query: keys in any order, all of them before query 0 */
} sa_run_kind;

typedef struct sa_run {
    const void *key;   /* kv head 0, first key */
    const void *value;
    int64_t key_head_stride, key_stride, value_head_stride, value_stride;
    int64_t count;
    int64_t position;   /* of the first key, in the row's own count; pinned runs: also the column of sink_bias */
    const float *back;  /* held runs: how far each key lies before query 0, for ALiBi; as many numbers as whole blocks have keys */
    int64_t mass_skip;  /* keys at the front whose mass is not reported */
    int64_t mass_index; /* where the mass of key `mass_skip` goes; < 0: no key of this run is reported */
    sa_run_kind kind;
} sa_run;

enum { SA_MAX_RUNS = 6 };

typedef struct sa_row {
    const void *query, *sink_query; /* head 0, query 0 */
    void *output;
    float *lse;          /* nullable */
    const float *weights; /* of its queries, placed as lse is: factors of their mass, nullable */
    float *mass;         /* [heads_kv, mass_head_stride] zeroed before the kernel runs, nullable */
    const float *alibi;  /* [heads_q], nullable */
    int64_t query_count; /* real queries */
    int64_t query_total; /* with the padded ones behind: output 0, lse -inf */
    int64_t position;    /* of query 0; may be negative */
    int64_t mass_first;  /* first query whose weights count for the mass */
    int64_t first_head;  /* in sinks and sink_bias, of the row's head 0: a row may be one kv head of a larger call */
    sa_run runs[SA_MAX_RUNS];
    int run_count;
} sa_row;

typedef struct sa_problem {
    sa_dtype dtype;
    int64_t heads_q, heads_kv, depth, depth_v;
    int64_t query_head_stride, query_stride, sink_query_head_stride, sink_query_stride;
    int64_t output_head_stride, output_stride, lse_head_stride, mass_head_stride;
    float scale;
    float softcap; /* 0: none */
    bool causal;
    bool alibi;                 /* some row has slopes */
    const int64_t *windows;     /* [heads_q], SA_NO_WINDOW for none */
    const double *sinks;        /* [heads_q] logsumexp of the sink logits, -inf for none */
    const float *sink_bias;     /* [heads_q, bias_stride], nullable */
    int64_t bias_stride;
    int64_t pinned_query_limit; /* ALiBi distances to pinned keys are taken as if the query stood at most here */
    sa_mass_reduce mass_reduce;
    int64_t mass_query_stride;  /* > 0: nothing is reduced, the mass of query mass_first + i goes to mass + i * mass_query_stride */
    sa_row *rows;
    int64_t row_count;
} sa_problem;

typedef struct sa_range {
    int64_t low, high; /* empty where low >= high */
} sa_range;

/* A row's gradients, beside its sa_row: head 0, query 0 or the key at position 0. */
typedef struct sa_backward_row {
    const void *output_gradient;
    const float *lse;          /* of the call that is differentiated */
    const float *lse_gradient; /* nullable */
    void *query_gradient, *key_gradient, *value_gradient;
    void *sink_query_gradient; /* nullable */
    double *logit_sums;        /* [heads_q] sum over queries of  weight of the sink * d(loss)/d(its score), zeroed */
    double *bias_sums;         /* [heads_q, bias_stride] zeroed, nullable */
    float *learned_sums;       /* [heads_kv, learned, depth + depth_v] d(sink_key) and d(sink_value) of this row, zeroed, nullable */
} sa_backward_row;

/* The gradients of a problem: `forward` has output, but neither lse nor mass. Each place of a row is written by one task. */
typedef struct sa_backward {
    sa_problem forward;
    sa_backward_row *rows;
    int64_t output_gradient_head_stride, output_gradient_stride, lse_head_stride, lse_stride, lse_gradient_head_stride, lse_gradient_stride;
    int64_t query_gradient_head_stride, key_gradient_head_stride, value_gradient_head_stride; /* tokens lie dense */
    int64_t learned; /* rows of the learned sink K/V */
} sa_backward;

/* Keys of a run, by their index in it, that a query at `position` sees. */
static inline sa_range sa_visible(const sa_run *run, bool causal, int64_t window, int64_t position)
{
    if (run->kind == SA_RUN_LEARNED || run->kind == SA_RUN_HELD || (run->kind == SA_RUN_PINNED && !causal)) {
        return (sa_range){0, run->count};
    }
    const int64_t ahead = causal ? 1 : window;
    const int64_t high = clamp_i64(position + ahead - run->position, 0, run->count);
    if (run->kind == SA_RUN_PINNED) {
        return (sa_range){0, high};
    }
    return (sa_range){clamp_i64(position - window + 1 - run->position, 0, run->count), high};
}

/* Queries of a row, by their index in it, that see key `key` of a run: sa_visible from the other side. */
static inline sa_range sa_seen_by(const sa_run *run, bool causal, int64_t window, const sa_row *row, int64_t key)
{
    if (run->kind == SA_RUN_LEARNED || run->kind == SA_RUN_HELD || (run->kind == SA_RUN_PINNED && !causal)) {
        return (sa_range){0, row->query_count};
    }
    const int64_t level = run->position + key - row->position; /* the query that stands at the key */
    const int64_t low = clamp_i64(causal ? level : level - window + 1, 0, row->query_count);
    return (sa_range){low, run->kind == SA_RUN_PINNED ? row->query_count : clamp_i64(level + window, low, row->query_count)};
}

/* The biases of a head, from the column of a run's first key on. NULL: none. */
static inline const float *sa_bias(const sa_problem *problem, const sa_row *row, const sa_run *run, int64_t head)
{
    const bool has = run->kind == SA_RUN_PINNED && problem->sink_bias != NULL;
    return has ? problem->sink_bias + (row->first_head + head) * problem->bias_stride + run->position : NULL;
}

/* A bias of -inf takes a pinned column away from a head, whatever its key and value hold. */
static inline bool sa_removed(const sa_problem *problem, const sa_row *row, const sa_run *run, int64_t head, int64_t key)
{
    const float *bias = sa_bias(problem, row, run, head);
    return bias != NULL && bias[key] == -INFINITY;
}

/* Where the mass of key `index` of a run goes, < 0 for nowhere. */
static inline int64_t sa_mass_slot(const sa_run *run, int64_t index)
{
    return run->mass_index < 0 || index < run->mass_skip ? -1 : run->mass_index + index - run->mass_skip;
}

/* Element `offset` of an array of a dtype. In integers: an empty array may have no memory to point into. */
static inline const void *sa_at(const void *data, sa_dtype dtype, int64_t offset)
{
    return (const void *)((uintptr_t)data + (uintptr_t)(offset * (dtype == SA_F32 ? 4 : 2)));
}

#endif
