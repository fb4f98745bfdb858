/* Turns a checked call into a problem for the kernels. */
#ifndef SA_PLAN_H
#define SA_PLAN_H

#include "problem.h"

/* What a problem owns beside the caller's arrays. */
typedef struct sa_plan {
    sa_problem problem;
    void *memory;
} sa_plan;

/* Allocates the rows and per-head arrays and fills what does not depend on where the keys are. `row_count` rows are zeroed. */
sa_status sa_plan_begin(const sa_attend_params *params, int64_t row_count, sa_plan *plan);

/* The rows of a plain call: batch rows, or packed sequences. */
sa_status sa_plan_attend(const sa_attend_params *params, sa_plan *plan);

/* Where a row's queries and keys lie: batch index, and the ranges on the two length axes. */
typedef struct sa_place {
    int64_t batch, query_begin, query_count, query_total, key_begin, key_count;
} sa_place;

sa_place sa_place_of_row(const sa_attend_params *params, int64_t row);

void sa_plan_end(sa_plan *plan);

/* The gradients of a call, with what they are summed up in beside the caller's arrays. */
typedef struct sa_backward_plan {
    sa_plan forward;
    sa_backward backward;
    void *memory;
} sa_backward_plan;

sa_status sa_plan_backward(const sa_attend_backward_params *params, sa_backward_plan *plan);

/* Sums over rows, after the kernels: sink logits, sink bias, learned sink K/V. */
void sa_finish_backward(const sa_attend_backward_params *params, const sa_backward_plan *plan);

void sa_plan_backward_end(sa_backward_plan *plan);

/* The learned sink K/V as a run. */
sa_run sa_learned_run(const sa_attend_params *params);

/* First query whose weights count when only the last `mass_queries` do. */
int64_t sa_mass_first(const sa_attend_params *params, int64_t query_count);

#endif
