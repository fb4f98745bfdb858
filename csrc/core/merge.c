/* sa_merge: partial results over disjoint keys, joined by their lse. A part that saw nothing (lse -inf) is not read. */
#include <math.h>

#include "../sinkattn.h"
#include "half.h"

static double load(sa_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case SA_F32: return (double)((const float *)data)[i];
    case SA_F16: return (double)sa_f16_to_f32(((const uint16_t *)data)[i]);
    default: return (double)sa_bf16_to_f32(((const uint16_t *)data)[i]);
    }
}

static void store(sa_dtype dtype, void *data, int64_t i, double value)
{
    switch (dtype) {
    case SA_F32: ((float *)data)[i] = (float)value; break;
    case SA_F16: ((uint16_t *)data)[i] = sa_f32_to_f16((float)value); break;
    default: ((uint16_t *)data)[i] = sa_f32_to_bf16((float)value); break;
    }
}

/* Elements from the first to row `row` of the first `axes` axes. */
static int64_t offset_of(const sa_tensor *tensor, int axes, int64_t row)
{
    int64_t offset = 0;
    for (int axis = axes - 1; axis >= 0; axis--) {
        offset += row % tensor->shape[axis] * tensor->stride[axis];
        row /= tensor->shape[axis];
    }
    return offset;
}

static double lse_at(const sa_part *part, int64_t row)
{
    return (double)((const float *)part->lse.data)[offset_of(&part->lse, part->lse.rank, row)];
}

static double join(const sa_part *parts, int64_t count, int64_t row)
{
    double largest = -INFINITY, sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        const double lse = lse_at(&parts[i], row);
        largest = lse > largest || isnan(lse) ? lse : largest;
    }
    if (!isfinite(largest)) {
        return largest;
    }
    for (int64_t i = 0; i < count; i++) {
        sum += exp(lse_at(&parts[i], row) - largest);
    }
    return largest + log(sum);
}

static void merge_row(const sa_part *parts, int64_t count, int64_t row, int64_t depth, double joined, double *values)
{
    const int axes = parts[0].lse.rank;
    for (int64_t i = 0; i < count && !isinf(joined); i++) {
        const sa_tensor *out = &parts[i].out;
        const double weight = exp(lse_at(&parts[i], row) - joined);
        const int64_t at = offset_of(out, axes, row);
        for (int64_t d = 0; d < depth && weight != 0.0; d++) {
            values[d] += weight * load(out->dtype, out->data, at + d * out->stride[axes]);
        }
    }
}

void sa_merge(const sa_part *parts, int64_t count, void *out, float *lse)
{
    const sa_tensor *first = &parts[0].out;
    const int64_t depth = first->shape[first->rank - 1];
    int64_t rows = 1;
    for (int axis = 0; axis < first->rank - 1; axis++) {
        rows *= first->shape[axis];
    }
    for (int64_t row = 0; row < rows; row++) {
        const double joined = join(parts, count, row);
        double values[256] = {0.0};
        merge_row(parts, count, row, depth, joined, values);
        for (int64_t d = 0; d < depth; d++) {
            store(first->dtype, out, row * depth + d, values[d]);
        }
        lse[row] = (float)joined;
    }
}
