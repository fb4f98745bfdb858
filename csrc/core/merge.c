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

static double join(const float *const *lses, int64_t parts, int64_t row)
{
    double largest = -INFINITY, sum = 0.0;
    for (int64_t part = 0; part < parts; part++) {
        const double lse = (double)lses[part][row];
        largest = lse > largest || isnan(lse) ? lse : largest;
    }
    if (!isfinite(largest)) {
        return largest;
    }
    for (int64_t part = 0; part < parts; part++) {
        sum += exp((double)lses[part][row] - largest);
    }
    return largest + log(sum);
}

void sa_merge(const void *const *outs, const float *const *lses, int64_t parts, int64_t rows, int64_t depth, sa_dtype dtype, void *out,
              float *lse)
{
    for (int64_t row = 0; row < rows; row++) {
        const double joined = join(lses, parts, row);
        double values[256] = {0.0};
        for (int64_t part = 0; part < parts && !isinf(joined); part++) {
            const double weight = exp((double)lses[part][row] - joined);
            for (int64_t d = 0; d < depth && weight != 0.0; d++) {
                values[d] += weight * load(dtype, outs[part], row * depth + d);
            }
        }
        for (int64_t d = 0; d < depth; d++) {
            store(dtype, out, row * depth + d, values[d]);
        }
        lse[row] = (float)joined;
    }
}
