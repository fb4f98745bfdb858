#include "rope.h"

#include <math.h>
#include <string.h>

#include "half.h"
#include "problem.h"

void sa_rope_angles(const sa_rope *rope, int64_t position, double scaling, float *table)
{
    for (int64_t pair = 0; pair < rope->pairs; pair++) {
        const double angle = fmod((double)position * rope->inv_freq[pair], 2.0 * 3.14159265358979323846);
        table[pair] = (float)(cos(angle) * scaling);
        table[rope->pairs + pair] = (float)(sin(angle) * scaling);
    }
}

static float load(sa_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case SA_F32: return ((const float *)data)[i];
    case SA_F16: return sa_f16_to_f32(((const uint16_t *)data)[i]);
    default: return sa_bf16_to_f32(((const uint16_t *)data)[i]);
    }
}

static void store(sa_dtype dtype, void *data, int64_t i, float value)
{
    switch (dtype) {
    case SA_F32: ((float *)data)[i] = value; break;
    case SA_F16: ((uint16_t *)data)[i] = sa_f32_to_f16(value); break;
    default: ((uint16_t *)data)[i] = sa_f32_to_bf16(value); break;
    }
}

void sa_rope_rotate(const sa_rope *rope, const float *table, sa_dtype dtype, const void *source, void *target, int64_t depth)
{
    const int64_t pairs = rope->pairs, step = rope->interleaved ? 2 : 1, partner = rope->interleaved ? 1 : pairs;
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t i = pair * step;
        const float x = load(dtype, source, i), y = load(dtype, source, i + partner);
        const float cosine = table[pair], sine = table[pairs + pair];
        store(dtype, target, i, x * cosine - y * sine);
        store(dtype, target, i + partner, y * cosine + x * sine);
    }
    if (source != target && 2 * pairs < depth) {
        const int64_t size = dtype == SA_F32 ? 4 : 2;
        memcpy((char *)target + 2 * pairs * size, (const char *)source + 2 * pairs * size, (size_t)((depth - 2 * pairs) * size));
    }
}
