/* How a tile ends: alone, in a cluster, or in scratch where splits meet. Every sum has a fixed order. */
#ifndef SA_CUDA_FINISH_CUH
#define SA_CUDA_FINISH_CUH

#include "tile.cuh"

namespace sa
{

/* A finished or partial tile in shared memory. */
struct partial {
    float *values; /* weighted values [rows, stride] */
    float *states; /* maximum and sum [rows, 2] */
    int stride;
};

template <typename T, int row_limit>
__device__ __forceinline__ void store_output(const sa_cuda_problem &p, const tile<row_limit> &t, int row, int64_t d, float value)
{
    T::store((void *)element(p.output, t.at.batch, t.head[row], t.at.query_begin + t.token[row], T::size), d, value);
}

__device__ __forceinline__ float *lse_of(const sa_cuda_problem &p)
{
    return p.lse != nullptr ? p.lse : p.lse_offset >= 0 ? (float *)((char *)p.scratch + p.lse_offset) : nullptr;
}

template <int row_limit> __device__ __forceinline__ void store_lse(const sa_cuda_problem &p, const tile<row_limit> &t, int row, float value)
{
    float *lse = lse_of(p);
    if (lse != nullptr) {
        lse[(t.at.batch * p.heads_q + t.head[row]) * p.query_length + t.at.query_begin + t.token[row]] = value;
    }
}

/* Padded queries: output 0, lse -inf. */
template <typename T, int row_limit> __device__ void pad_rows(const sa_cuda_problem &p, const tile<row_limit> &t)
{
    for (int64_t i = threadIdx.x; i < (t.rows - t.real) * p.depth_v; i += blockDim.x) {
        const int row = t.real + (int)(i / p.depth_v);
        store_output<T>(p, t, row, i % p.depth_v, 0.0f);
        if (i % p.depth_v == 0) {
            store_lse(p, t, row, -infinity);
        }
    }
}

/* One split: the tile is finished in this CTA. */
template <typename T, int row_limit> __device__ void finish_alone(const sa_cuda_problem &p, const tile<row_limit> &t, const partial &part)
{
    const int width = (int)p.depth_v;
    for (int i = threadIdx.x; i < t.real * width; i += blockDim.x) {
        const int row = i / width, d = i % width;
        const softmax_end end = close(part.states[2 * row], part.states[2 * row + 1], t.sink[row]);
        store_output<T>(p, t, row, d, part.values[row * part.stride + d] * end.factor);
        if (d == 0) {
            store_lse(p, t, row, end.lse);
        }
    }
}

/* The splits are the CTAs of a cluster: each finishes a share of the outputs from everybody's shared memory. Eight lanes share two outputs,
 * a split each, so that every thread asks for one state and one pair of values. Needs no barrier before it, or has one
 * (`met`); the caller puts one behind it, as nobody leaves while others read. */
template <typename T, bool met = false, int row_limit>
__device__ __forceinline__ void finish_cluster(const sa_cuda_problem &p, const tile<row_limit> &t, const partial &part, int rank)
{
    static_assert(SA_DECODE_CLUSTER == 8, "eight lanes");
    if constexpr (!met) {
        cluster_arrive();
    }
    const int splits = p.splits, width = (int)p.depth_v, pairs = (width + 1) / 2, outputs = t.real * pairs,
              each = (outputs + splits - 1) / splits;
    const int end = (rank + 1) * each < outputs ? (rank + 1) * each : outputs, split = threadIdx.x % 8;
    if constexpr (!met) {
        cluster_wait();
    }
#pragma unroll 1
    for (int first = rank * each + threadIdx.x / 32 * 4; first < end; first += blockDim.x / 8) {
        const int i = first + threadIdx.x % 32 / 8, row = i / pairs, d = i % pairs * 2;
        float2 state = {-infinity, 0.0f}, values = {0.0f, 0.0f};
        if (i < end && split < splits) {
            state = cluster_load_pair(cluster_address(shared_address(part.states + 2 * row), split));
            values = cluster_load_pair(cluster_address(shared_address(part.values + row * part.stride + d), split));
        }
        float maximum = state.x;
        for (int step = 1; step < 8; step *= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        }
        const float factor = factor_to(state.x, maximum);
        state.y *= factor;
        values = {values.x * factor, values.y * factor};
#pragma unroll 1
        for (int step = 1; step < 8; step *= 2) {
            state.y += __shfl_xor_sync(~0u, state.y, step);
            values.x += __shfl_xor_sync(~0u, values.x, step);
            values.y += __shfl_xor_sync(~0u, values.y, step);
        }
        if (i < end && split == 0) {
            const softmax_end end_of_row = close(maximum, state.y, t.sink[row]);
            store_output<T>(p, t, row, d, values.x * end_of_row.factor);
            if (d + 1 < width) {
                store_output<T>(p, t, row, d + 1, values.y * end_of_row.factor);
            }
            if (d == 0) {
                store_lse(p, t, row, end_of_row.lse);
            }
        }
    }
}

/* Adds up a tile of few outputs: each thread takes four of them and every n-th split, then the threads of an output add up theirs. */
template <typename T, int row_limit>
__device__ __forceinline__ void add_splits(const sa_cuda_problem &p, const tile<row_limit> &t, const partial &part, const float *values,
                                           const float *factors, const softmax_end *ends)
{
    const int quarter = (int)p.depth_v / 4, items = t.real * quarter, groups = (int)blockDim.x / items;
    const int item = (int)threadIdx.x % items, group = (int)threadIdx.x / items, row = item / quarter;
    float4 *sums = (float4 *)part.values; /* its content is in scratch by now */
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (group < groups) {
#pragma unroll 8
        for (int k = group; k < p.splits; k += groups) {
            const float4 own = __ldcg((const float4 *)(values + k * row_limit * (int)p.depth_v) + item);
            const float factor = factors[k * row_limit + row];
            total = make_float4(total.x + factor * own.x, total.y + factor * own.y, total.z + factor * own.z, total.w + factor * own.w);
        }
        sums[group * items + item] = total;
    }
    __syncthreads();
    if (group == 0) {
        for (int g = 1; g < groups; g++) {
            const float4 own = sums[g * items + item];
            total = make_float4(total.x + own.x, total.y + own.y, total.z + own.z, total.w + own.w);
        }
        const int d = (item - row * quarter) * 4;
        store_output<T>(p, t, row, d, total.x * ends[row].factor);
        store_output<T>(p, t, row, d + 1, total.y * ends[row].factor);
        store_output<T>(p, t, row, d + 2, total.z * ends[row].factor);
        store_output<T>(p, t, row, d + 3, total.w * ends[row].factor);
    }
}

/* Partial results meet in scratch; the CTA that arrives last finishes the tile. `memory`: shared, [splits, row_limit] floats and 8 bytes a
 * row. */
template <typename T, int row_limit>
__device__ void finish_scratch(const sa_cuda_problem &p, tile<row_limit> &t, const partial &part, int64_t unit, int split, char *memory)
{
    const int width = (int)p.depth_v;
    float *values = (float *)((char *)p.scratch + p.partial_offset) + unit * p.splits * row_limit * width;
    float *states = (float *)((char *)p.scratch + p.state_offset) + unit * p.splits * row_limit * 2;
    for (int i = threadIdx.x; i < t.real * width; i += blockDim.x) {
        values[split * row_limit * width + i] = part.values[i / width * part.stride + i % width];
    }
    if (threadIdx.x < 2 * t.real) {
        states[split * row_limit * 2 + threadIdx.x] = part.states[threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        t.last = arrive(&p.counters[unit], p.splits);
    }
    __syncthreads();
    if (!t.last) {
        return;
    }
    float *factors = (float *)memory;
    softmax_end *ends = (softmax_end *)(factors + p.splits * row_limit);
    for (int row = threadIdx.x / 32; row < t.real; row += blockDim.x / 32) { /* a warp each */
        const int lane = threadIdx.x % 32;
        float maximum = -infinity, sum = 0.0f;
        for (int i = lane; i < p.splits; i += 32) {
            maximum = fmaxf(maximum, __ldcg(&states[(i * row_limit + row) * 2]));
        }
        for (int step = 16; step > 0; step /= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        }
        for (int i = lane; i < p.splits; i += 32) {
            const float factor = factor_to(__ldcg(&states[(i * row_limit + row) * 2]), maximum);
            factors[i * row_limit + row] = factor;
            sum += factor * __ldcg(&states[(i * row_limit + row) * 2 + 1]);
        }
        for (int step = 16; step > 0; step /= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
        }
        if (lane == 0) {
            ends[row] = close(maximum, sum, t.sink[row]);
            store_lse(p, t, row, ends[row].lse);
        }
    }
    __syncthreads();
    if (width % 4 == 0 && t.real > 0 && t.real * width <= 4 * (int)blockDim.x) {
        add_splits<T>(p, t, part, values, factors, ends);
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < t.real * width; i += blockDim.x) {
        const int row = i / width;
        float total = 0.0f;
#pragma unroll 8
        for (int k = 0; k < p.splits; k++) {
            total += factors[k * row_limit + row] * __ldcg(&values[k * row_limit * width + i]);
        }
        store_output<T>(p, t, row, i % width, total * ends[row].factor);
    }
}

} // namespace sa

#endif
