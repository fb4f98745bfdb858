/* Partial attention over disjoint keys, joined by lse; csrc/core/merge.c has the words.
 *
 *   out = sum_i e^(lse_i - m) out_i / sum_i e^(lse_i - m),   lse = m + log sum_i e^(lse_i - m),   m = max_i lse_i
 *
 * A thread for every 16 bytes of a row, which weighs the parts by itself: neighbours ask for the same lse, and nothing is shared.
 *   bytes = rows * ((parts + 1) * depth * size + 4 * (parts + 1)),   sums in fp32, rounded once.
 * Not timed yet. */
#include "merge.h"
#include "params.h"
#include "softmax.cuh"

namespace sa
{

template <typename T> constexpr int merge_width = 16 / T::size; /* elements of a piece */

template <typename T> __device__ __forceinline__ float wide_at(const void *data, int64_t at)
{
    if constexpr (T::size == 4) {
        return ((const float *)data)[at];
    } else {
        return T::wide(((const uint16_t *)data)[at]);
    }
}

/* Element e of a piece in registers. */
template <typename T> __device__ __forceinline__ float element_of(const uint32_t (&words)[4], int e)
{
    if constexpr (T::size == 4) {
        return __uint_as_float(words[e]);
    } else {
        return T::wide((uint16_t)(words[e / 2] >> 16 * (e % 2)));
    }
}

/* Adds a piece of a part's row, `count` elements of it, with its weight. */
template <typename T>
__device__ __forceinline__ void add_piece(const char *from, int64_t stride, int count, bool aligned, float weight,
                                          float (&values)[merge_width<T>])
{
    uint32_t words[4] = {};
    if (aligned) {
        const uint4 whole = *(const uint4 *)from;
        words[0] = whole.x;
        words[1] = whole.y;
        words[2] = whole.z;
        words[3] = whole.w;
    }
#pragma unroll
    for (int e = 0; e < merge_width<T>; e++) {
        if (aligned) {
            values[e] = fmaf(weight, element_of<T>(words, e), values[e]);
        } else if (e < count) {
            values[e] = fmaf(weight, wide_at<T>(from, e * stride), values[e]);
        }
    }
}

template <typename T>
__device__ __forceinline__ void store_piece(char *to, int count, bool aligned, float factor, const float (&values)[merge_width<T>])
{
    if (aligned && T::size == 4) {
        *(float4 *)to = make_float4(values[0] * factor, values[1] * factor, values[2] * factor, values[3] * factor);
        return;
    }
#pragma unroll
    for (int e = 0; e < merge_width<T>; e += 2) {
        if constexpr (T::size == 2) {
            if (aligned) {
                ((uint32_t *)to)[e / 2] = T::pack(values[e] * factor, values[e + 1] * factor);
                continue;
            }
        }
        for (int i = e; i < e + 2 && i < count; i++) {
            T::store(to, i, values[i] * factor);
        }
    }
}

/* lse of a part's row. NaN wins, then +inf. */
__device__ __forceinline__ float lse_at(const sa_merge_part &part, const int64_t (&index)[3])
{
    return part.lse[index[0] * part.lse_stride[0] + index[1] * part.lse_stride[1] + index[2] * part.lse_stride[2]];
}

template <typename T>
__device__ __forceinline__ void merge_piece(const sa_merge_problem &p, const sa_merge_part *parts, int64_t row, int64_t piece)
{
    const int64_t rest = row / p.extent[2], index[3] = {rest / p.extent[1], rest % p.extent[1], row % p.extent[2]};
    const int64_t first = piece * merge_width<T>;
    const int count = (int)(p.depth - first < merge_width<T> ? p.depth - first : merge_width<T>);
    float largest = -infinity, sum = 0.0f, values[merge_width<T>] = {};
    for (int64_t i = 0; i < p.count; i++) {
        const float lse = lse_at(parts[i], index);
        largest = lse > largest || lse != lse ? lse : largest;
    }
    const bool finite = fabsf(largest) != infinity; /* elsewhere out is 0: nothing was seen, or a sink is infinite */
    for (int64_t i = 0; i < p.count && finite; i++) {
        const sa_merge_part &part = parts[i];
        const float weight = expf(lse_at(part, index) - largest);
        sum += weight;
        if (weight != 0.0f) { /* what saw nothing is not read */
            const int64_t at = index[0] * part.out_stride[0] + index[1] * part.out_stride[1] + index[2] * part.out_stride[2];
            add_piece<T>((const char *)part.out + (at + first * part.out_stride[3]) * T::size, part.out_stride[3], count, p.aligned, weight,
                         values);
        }
    }
    store_piece<T>((char *)p.out + (row * p.depth + first) * T::size, count, p.aligned, finite ? 1.0f / sum : 0.0f, values);
    if (piece == 0) {
        p.lse[row] = finite ? largest + logf(sum) : largest;
    }
}

template <typename T> __device__ __forceinline__ void merge(const sa_merge_problem &p)
{
    const sa_merge_part *parts = p.more != nullptr ? p.more : p.parts;
    const int64_t pieces = (p.depth + merge_width<T> - 1) / merge_width<T>;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.rows * pieces; i += (int64_t)gridDim.x * blockDim.x) {
        merge_piece<T>(p, parts, i / pieces, i % pieces);
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(SA_MERGE_THREADS) merge(const __grid_constant__ sa_merge_problem p)
{
    if (p.dtype == SA_CUDA_F32) {
        sa::merge<sa::f32>(p);
    } else if (p.dtype == SA_CUDA_F16) {
        sa::merge<sa::f16>(p);
    } else {
        sa::merge<sa::bf16>(p);
    }
}
