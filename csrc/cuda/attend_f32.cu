/* fp32 attention that stays fp32: FFMA throughout, for few rows (keys split over CTAs) and many.
 *
 * One CTA per (16 rows, split of the keys), 32 keys at a time; a warp owns 4 rows, a lane one key of the scores and every 32nd column of
 * the values. Sums run over 32 keys before they join the running ones, which keeps their rounding error far below that of one long chain.
 *   bytes = 4 * keys * (depth + depth_v) * heads_kv * batch for few rows,  flops = 4 * pairs * depth * heads_q
 * Right before fast: tiles are loaded without overlap. */
#include "finish.cuh"

namespace sa
{

constexpr int f32_rows = SA_F32_ROWS, f32_keys = SA_F32_KEYS, own_rows = SA_F32_ROWS / SA_F32_WARPS;
static_assert(f32_keys == 32, "a lane for each key");
static_assert(sizeof(tile<SA_F32_ROWS>) <= SA_ROWS_SHARED, "room for what is known of the rows");

/* Copies rows of `width` floats into shared rows of `stride`, zero up to a multiple of 4. */
__device__ void load_rows(const char *source, int64_t source_stride, int rows, int width, float *target, int stride)
{
    const int padded = (width + 3) / 4 * 4;
    for (int i = threadIdx.x; i < rows * padded; i += blockDim.x) {
        const int row = i / padded, d = i % padded;
        target[row * stride + d] = d < width ? ((const float *)(source + row * source_stride))[d] : 0.0f;
    }
}

__device__ void load_f32_queries(const sa_cuda_problem &p, const tile<f32_rows> &t, const sa_cuda_tensor &source, float *target, int stride)
{
    const int width = (int)p.depth, padded = (width + 3) / 4 * 4;
    for (int i = threadIdx.x; i < f32_rows * padded; i += blockDim.x) {
        const int row = i / padded, d = i % padded;
        const bool given = row < t.real && d < width;
        target[row * stride + d] =
            given ? ((const float *)element(source, t.at.batch, t.head[row], t.at.query_begin + t.token[row], 4))[d] : 0.0f;
    }
}

template <int depth> struct f32_state {
    float maximum[own_rows], sum[own_rows], values[own_rows][depth / 32];
};

/* Scores of the lane's key for the warp's rows, hidden where a row does not see it. */
__device__ __forceinline__ void f32_scores(const sa_cuda_problem &p, const tile<f32_rows> &t, const run &r, int64_t first, bool masked,
                                           const float *queries, const float *keys, int stride, float (&scores)[own_rows])
{
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * own_rows;
    float4 dot[own_rows] = {};
#pragma unroll 4
    for (int d = 0; d < (int)p.depth; d += 4) {
        const float4 key = *(const float4 *)(keys + lane * stride + d);
#pragma unroll
        for (int i = 0; i < own_rows; i++) {
            const float4 query = *(const float4 *)(queries + (row + i) * stride + d);
            dot[i].x = fmaf(query.x, key.x, dot[i].x);
            dot[i].y = fmaf(query.y, key.y, dot[i].y);
            dot[i].z = fmaf(query.z, key.z, dot[i].z);
            dot[i].w = fmaf(query.w, key.w, dot[i].w);
        }
    }
#pragma unroll
    for (int i = 0; i < own_rows; i++) {
        const float sum = (dot[i].x + dot[i].y) + (dot[i].z + dot[i].w);
        if (!masked && !is_featured(p, r)) {
            scores[i] = sum * p.scale * log2e;
            continue;
        }
        int low, high;
        row_range(p, t, r, row + i, first, low, high);
        const bool seen = lane >= low && lane < high;
        scores[i] = seen ? featured_score(p, r, t.head[row + i], t.position[row + i], t.slope[row + i], first + lane, sum) : -infinity;
    }
}

/* Joins 32 keys to the warp's rows. Weights pass through shared memory, where only this warp touches its rows. */
template <int depth>
__device__ __forceinline__ void f32_join(const float (&scores)[own_rows], const float *values, int stride, float *weights,
                                         f32_state<depth> &state)
{
    constexpr int columns = depth / 32, weight_stride = f32_keys + 4;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * own_rows;
    float factor[own_rows], sums[own_rows][columns] = {};
    bool any = false;
#pragma unroll
    for (int i = 0; i < own_rows; i++) {
        float maximum = fmaxf(state.maximum[i], scores[i]);
        for (int step = 16; step > 0; step /= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        }
        factor[i] = factor_to(state.maximum[i], maximum);
        state.maximum[i] = maximum;
        const float weight = exp2f(scores[i] - anchor_of(maximum));
        weights[(row + i) * weight_stride + lane] = weight;
        state.sum[i] = state.sum[i] * factor[i] + weight;
        any = any || weight != 0.0f;
    }
    unsigned left = __ballot_sync(~0u, any); /* keys that some row of the warp sees: the values of others may be anything */
    __syncwarp();
    while (left != 0) {
        const int key = __ffs(left) - 1;
        left &= left - 1;
#pragma unroll
        for (int c = 0; c < columns; c++) {
            const float value = values[key * stride + c * 32 + lane];
#pragma unroll
            for (int i = 0; i < own_rows; i++) {
                sums[i][c] = fmaf(weights[(row + i) * weight_stride + key], value, sums[i][c]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < own_rows; i++) {
#pragma unroll
        for (int c = 0; c < columns; c++) {
            state.values[i][c] = fmaf(state.values[i][c], factor[i], sums[i][c]);
        }
    }
    __syncwarp();
}

template <int depth> __device__ __forceinline__ void attend_f32(const sa_cuda_problem &p)
{
    constexpr int stride = depth + 4;
    extern __shared__ __align__(128) char memory[];
    tile<f32_rows> &t = *(tile<f32_rows> *)memory;
    float *queries = (float *)(memory + SA_ROWS_SHARED), *keys = queries + f32_rows * stride, *values = keys + f32_keys * stride;
    float *weights = values + f32_keys * stride;
    const uint32_t unit = blockIdx.x / p.splits;
    const int split = blockIdx.x % p.splits, lane = threadIdx.x % 32, row = threadIdx.x / 32 * own_rows;
    if (!begin_tile(p, unit, f32_keys, t)) {
        return;
    }
    if (threadIdx.x < t.real) {
        t.sink[threadIdx.x] = sink_of(p, t.head[threadIdx.x]);
    }
    f32_state<depth> state = {};
    for (int i = 0; i < own_rows; i++) {
        state.maximum[i] = -infinity;
    }
    int begin, end;
    share_slices(t.first_slice[t.list.count], split, p.splits, begin, end);
    for (int slice = begin, index = 0, loaded = -1; slice < end; slice++) {
        while (slice >= t.first_slice[index + 1]) {
            index++;
        }
        const run &r = t.list.runs[index];
        const int second = r.kind == run_pinned && has_second_query(p);
        const int64_t first = t.seen[index].low + (int64_t)(slice - t.first_slice[index]) * f32_keys;
        const int count = (int)least(f32_keys, t.seen[index].high - first);
        __syncthreads();
        if (loaded != second) {
            load_f32_queries(p, t, second ? second_query_tensor(p) : query_tensor(p), queries, stride);
            loaded = second;
        }
        load_rows(r.key + first * r.key_stride, r.key_stride, count, (int)p.depth, keys, stride);
        load_rows(r.value + first * r.value_stride, r.value_stride, count, (int)p.depth_v, values, stride);
        __syncthreads();
        float scores[own_rows];
        const bool masked = first < t.all[index].low || first + f32_keys > t.all[index].high;
        f32_scores(p, t, r, first, masked, queries, keys, stride, scores);
        f32_join<depth>(scores, values, stride, weights, state);
    }
    __syncthreads();
    const partial part = {keys, queries, depth}; /* the tiles are free now */
    for (int i = 0; i < own_rows; i++) {
        for (int step = 16; step > 0; step /= 2) {
            state.sum[i] += __shfl_xor_sync(~0u, state.sum[i], step);
        }
        if (lane == 0) {
            part.states[2 * (row + i)] = state.maximum[i];
            part.states[2 * (row + i) + 1] = state.sum[i];
        }
#pragma unroll
        for (int c = 0; c < depth / 32; c++) {
            part.values[(row + i) * depth + c * 32 + lane] = state.values[i][c];
        }
    }
    __syncthreads();
    if (split == 0) {
        pad_rows<f32>(p, t);
    }
    if (p.splits > 1) {
        finish_scratch<f32>(p, t, part, unit, split, (char *)values);
    } else {
        finish_alone<f32>(p, t, part);
    }
}

} // namespace sa

#define SA_ATTEND_F32(depth)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * SA_F32_WARPS) attend_f32_##depth(const __grid_constant__ sa_cuda_problem p)          \
    {                                                                                                                                      \
        sa::attend_f32<depth>(p);                                                                                                          \
    }

SA_ATTEND_F32(64)
SA_ATTEND_F32(128)
SA_ATTEND_F32(256)
