/* What reference.c and reference_backward.c share. */
#ifndef SA_REFERENCE_H
#define SA_REFERENCE_H

#include "../core/half.h"
#include "table.h"

static inline double sa_load(sa_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case SA_F32: return (double)((const float *)data)[i];
    case SA_F16: return (double)sa_f16_to_f32(((const uint16_t *)data)[i]);
    default: return (double)sa_bf16_to_f32(((const uint16_t *)data)[i]);
    }
}

static inline void sa_store(sa_dtype dtype, void *data, int64_t i, double value)
{
    switch (dtype) {
    case SA_F32: ((float *)data)[i] = (float)value; break;
    case SA_F16: ((uint16_t *)data)[i] = sa_f32_to_f16((float)value); break;
    default: ((uint16_t *)data)[i] = sa_f32_to_bf16((float)value); break;
    }
}

/* One query of one head. */
typedef struct sa_query_at {
    const sa_problem *problem;
    const sa_row *row;
    const sa_worker *worker;
    int64_t head, index, position;
} sa_query_at;

/* Element d of the query that a run is scored with, its product with a key times the scale, and the score: capped, biased, sloped. */
double sa_reference_query(const sa_query_at *at, const sa_run *run, int64_t d);
double sa_reference_product(const sa_query_at *at, const sa_run *run, int64_t key);
double sa_reference_score(const sa_query_at *at, const sa_run *run, int64_t key);

sa_status sa_reference_backward(const sa_backward *backward, sa_poll poll);

#endif
