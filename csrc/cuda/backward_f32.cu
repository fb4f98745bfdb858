/* Gradients of fp32 attention that stay fp32: FFMA throughout, the algebra and the two kernels of backward_sm80.cu.
 *
 * A tile of 32 rows (16 for depths above 128) stays, slices of 16 rows pass. A thread computes the weights of one row of the slice and every
 * eighth row of the tile; they cross shared memory, and a warp adds up a quarter of the tile, a lane every 32nd column. Sums run over a
 * slice before they join the running ones. flops = 14 * depth * visible pairs * heads_q * batch. Right before fast: slices are loaded
 * without overlap. Not timed yet. */
#include "backward.cuh"

namespace sa
{

static_assert(sizeof(key_tile) <= SA_BACKWARD_SHARED_FACTS && sizeof(query_tile) <= SA_BACKWARD_SHARED_FACTS, "room for facts");

template <int columns, bool keys> struct f32_shape {
    static constexpr int depth = columns, stride = columns + 4, rows = SA_BACKWARD_F32_ROWS(columns), slice = SA_BACKWARD_F32_SLICE;
    static constexpr bool keys_stay = keys;
    static constexpr int owned = rows / SA_BACKWARD_WARPS, weighed = rows * slice / (32 * SA_BACKWARD_WARPS);
    static constexpr int weight_stride = slice + 1;
};

template <typename S> struct f32_layout {
    float *left, *right, *slice_left, *slice_right, *weights, *gradients;
    sa_cuda_row *passing;
    __device__ f32_layout(char *memory)
        : left((float *)(memory + SA_BACKWARD_SHARED_FACTS)), right(left + S::rows * S::stride), slice_left(right + S::rows * S::stride),
          slice_right(slice_left + S::slice * S::stride), weights(slice_right + S::slice * S::stride),
          gradients(weights + S::rows * S::weight_stride), passing((sa_cuda_row *)(gradients + S::rows * S::weight_stride))
    {
    }
};

template <typename S> struct f32_sums {
    float left[S::owned][S::depth / 32], right[S::keys_stay ? S::owned : 1][S::depth / 32];
};

/* Rows in global memory, `stride` in bytes. */
struct f32_rows_at {
    const char *first;
    int64_t stride;
};

__device__ __forceinline__ f32_rows_at rows_in(const sa_cuda_tensor &tensor, int64_t batch, int64_t head, int64_t token)
{
    return {element(tensor, batch, head, token, 4), tensor.token * 4};
}

/* Copies `count` of `rows` rows; what is beyond, in either direction, is zero. */
template <typename S> __device__ void load_f32(const f32_rows_at &from, int count, int rows, int64_t width, float *target)
{
    for (int i = threadIdx.x; i < rows * S::depth; i += blockDim.x) {
        const int row = i / S::depth, d = i % S::depth;
        target[row * S::stride + d] = row < count && d < width ? ((const float *)(from.first + row * from.stride))[d] : 0.0f;
    }
}

__device__ __forceinline__ float dot_of(const float *a, const float *b, int64_t width)
{
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int d = 0; d < width; d += 4) {
        const float4 x = *(const float4 *)(a + d), y = *(const float4 *)(b + d);
        sums = make_float4(fmaf(x.x, y.x, sums.x), fmaf(x.y, y.y, sums.y), fmaf(x.z, y.z, sums.z), fmaf(x.w, y.w, sums.w));
    }
    return (sums.x + sums.y) + (sums.z + sums.w);
}

/* Weights and gradients of the scores of the thread's pairs, into shared memory. Returns nothing; `bias` collects the gradients of the
 * thread's rows. */
template <typename S>
__device__ __forceinline__ void weigh_f32(const sa_cuda_problem &p, const place &at, const run &r, const meeting &m, const f32_layout<S> &where,
                                          float (&bias)[S::weighed])
{
    const int column = threadIdx.x % S::slice;
    const float slope = p.alibi_slopes.given ? number_at(p.alibi_slopes, at.batch, m.head) * log2e : 0.0f;
#pragma unroll
    for (int i = 0; i < S::weighed; i++) {
        const int row = threadIdx.x / S::slice * S::weighed + i, query = S::keys_stay ? column : row, key = S::keys_stay ? row : column;
        const int offset = query - key;
        const bool seen = column < m.count && offset >= m.low && offset <= m.high;
        const sa_cuda_row facts = where.passing[query];
        const float dot = dot_of(where.left + row * S::stride, where.slice_left + column * S::stride, p.depth);
        float weight = 0.0f, gradient = 0.0f;
        if (seen && facts.lse != infinity) {
            weight = exp2f(featured_score(p, r, m.head, m.query + query, slope, least(m.key + key, r.count - 1), dot) - facts.lse);
        }
        if (weight != 0.0f) { /* unseen keys may hold anything */
            gradient = weight * (dot_of(where.right + row * S::stride, where.slice_right + column * S::stride, p.depth_v) - facts.delta);
        }
        bias[i] += gradient;
        if (p.softcap > 0.0f && gradient != 0.0f) {
            const float capped = tanhf(dot * p.scale / p.softcap);
            gradient *= 1.0f - capped * capped;
        }
        where.weights[row * S::weight_stride + column] = weight;
        where.gradients[row * S::weight_stride + column] = gradient;
    }
}

/* sums += weights * slice, for the rows of the warp. */
template <typename S>
__device__ __forceinline__ void add_f32(const float *weights, const float *slice, float (&sums)[S::owned][S::depth / 32])
{
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * S::owned;
#pragma unroll
    for (int c = 0; c < S::depth / 32; c++) {
        float part[S::owned] = {};
#pragma unroll 4
        for (int j = 0; j < S::slice; j++) {
            const float value = slice[j * S::stride + c * 32 + lane];
#pragma unroll
            for (int i = 0; i < S::owned; i++) {
                part[i] = fmaf(weights[(row + i) * S::weight_stride + j], value, part[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < S::owned; i++) {
            sums[i][c] += part[i];
        }
    }
}

/* A slice against the tile, everything loaded. Begins and ends with a barrier. */
template <typename S>
__device__ __forceinline__ void meet_f32(const sa_cuda_problem &p, const place &at, const run &r, const meeting &m, const f32_layout<S> &where,
                                         float (&bias)[S::weighed], f32_sums<S> &total)
{
    __syncthreads();
    weigh_f32<S>(p, at, r, m, where, bias);
    __syncthreads();
    add_f32<S>(where.gradients, where.slice_left, total.left);
    if constexpr (S::keys_stay) {
        add_f32<S>(where.weights, where.slice_right, total.right);
    }
    __syncthreads();
}

template <typename S>
__device__ __forceinline__ void store_f32(void *gradient, int64_t first, int64_t width, int rows, int real, float factor,
                                          const float (&sums)[S::owned][S::depth / 32])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < S::owned; i++) {
        const int row = threadIdx.x / 32 * S::owned + i;
#pragma unroll
        for (int c = 0; c < S::depth / 32; c++) {
            if (row < rows && c * 32 + lane < width) {
                ((float *)gradient)[(first + row) * width + c * 32 + lane] = row < real ? sums[i][c] * factor : 0.0f;
            }
        }
    }
}

/* What a head of a row has given to the bias of the tile's keys, which begins again. Sixteen lanes share a row. */
template <typename S>
__device__ __forceinline__ void store_f32_bias(const sa_cuda_backward &b, const key_tile &t, int head, float (&bias)[S::weighed])
{
    float *to = (float *)((char *)b.forward.scratch + b.bias_offset) + (t.row * b.forward.heads_q + head) * b.forward.pinned;
#pragma unroll
    for (int i = 0; i < S::weighed; i++) {
        const int row = threadIdx.x / S::slice * S::weighed + i;
        float sum = bias[i];
        bias[i] = 0.0f;
        for (int step = S::slice / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
        }
        if (threadIdx.x % S::slice == 0 && row < t.count) {
            to[t.keys.position + t.first + row] = sum;
        }
    }
}

/* Queries of a slice that give nothing to any key may hold anything. */
template <typename S> __device__ void clear_f32_silent(const meeting &m, const f32_layout<S> &where)
{
    for (int i = threadIdx.x; i < m.count * S::depth; i += blockDim.x) {
        if (where.passing[i / S::depth].lse == infinity) {
            where.slice_left[i / S::depth * S::stride + i % S::depth] = 0.0f;
            where.slice_right[i / S::depth * S::stride + i % S::depth] = 0.0f;
        }
    }
}

template <int depth> __device__ __forceinline__ void backward_f32_keys(const sa_cuda_backward &b)
{
    using S = f32_shape<depth, true>;
    const sa_cuda_problem &p = b.forward;
    extern __shared__ __align__(128) char memory[];
    key_tile &t = *(key_tile *)memory;
    const f32_layout<S> where(memory);
    query_walk walk;
    if (!begin_keys(b, blockIdx.x, S::rows, t, walk)) {
        return;
    }
    load_f32<S>({t.keys.key + t.first * t.keys.key_stride, t.keys.key_stride}, t.count, S::rows, p.depth, where.left);
    load_f32<S>({t.keys.value + t.first * t.keys.value_stride, t.keys.value_stride}, t.count, S::rows, p.depth_v, where.right);
    const bool pinned = t.keys.kind == run_pinned;
    const sa_cuda_tensor source = pinned && has_second_query(p) ? second_query_tensor(p) : query_tensor(p);
    float bias[S::weighed] = {};
    f32_sums<S> total = {};
    meeting m;
    int head = -1;
    while (next_queries(b, S::slice, t, walk, m)) {
        if (head >= 0 && head != m.head && pinned && p.sink_bias.given) {
            store_f32_bias<S>(b, t, head, bias);
        }
        head = m.head;
        const int64_t token = t.at.query_begin + walk.token;
        load_f32<S>(rows_in(source, t.at.batch, head, token), m.count, S::slice, p.depth, where.slice_left);
        load_f32<S>(rows_in(b.output_gradient, t.at.batch, head, token), m.count, S::slice, p.depth_v, where.slice_right);
        if (threadIdx.x < S::slice) {
            where.passing[threadIdx.x] =
                threadIdx.x < m.count ? rows_of(b, t.at.batch, head, token)[threadIdx.x] : sa_cuda_row{infinity, 0.0f};
        }
        if (__syncthreads_or(threadIdx.x < m.count && where.passing[threadIdx.x].lse == infinity)) {
            clear_f32_silent<S>(m, where);
        }
        meet_f32<S>(p, t.at, t.keys, m, where, bias, total);
    }
    if (head >= 0 && pinned && p.sink_bias.given) {
        store_f32_bias<S>(b, t, head, bias);
    }
    const bool learned = t.keys.kind == run_learned;
    const int64_t first = key_row_of(p, t);
    store_f32<S>(learned ? b.sink_key_gradient : b.key_gradient, first, p.depth, t.count, t.count, p.scale, total.left);
    store_f32<S>(learned ? b.sink_value_gradient : b.value_gradient, first, p.depth_v, t.count, t.count, 1.0f, total.right);
}

/* Keys and values of a slice that this head gives no weight are cleared: they may hold anything. */
template <typename S>
__device__ void clear_f32_removed(const sa_cuda_problem &p, const run &r, const meeting &m, const f32_layout<S> &where)
{
    __syncthreads();
    for (int i = threadIdx.x; i < m.count * S::depth; i += blockDim.x) {
        if (is_removed(p, r, m.head, m.key + i / S::depth)) {
            where.slice_left[i / S::depth * S::stride + i % S::depth] = 0.0f;
        }
    }
}

template <int depth> __device__ __forceinline__ void backward_f32_queries(const sa_cuda_backward &b)
{
    using S = f32_shape<depth, false>;
    const sa_cuda_problem &p = b.forward;
    extern __shared__ __align__(128) char memory[];
    query_tile &t = *(query_tile *)memory;
    const f32_layout<S> where(memory);
    if (!begin_queries(b, blockIdx.x, S::rows, t)) {
        return;
    }
    const int64_t token = t.at.query_begin + t.first, first = query_row_of(p, t);
    for (int i = threadIdx.x; i < S::rows; i += blockDim.x) {
        where.passing[i] = i < t.count ? rows_of(b, t.at.batch, t.head, token)[i] : sa_cuda_row{infinity, 0.0f};
    }
    load_f32<S>(rows_in(b.output_gradient, t.at.batch, t.head, token), t.count, S::rows, p.depth_v, where.right);
#pragma unroll 1
    for (int second = has_second_query(p); second >= 0; second--) {
        const sa_cuda_tensor source = second ? second_query_tensor(p) : query_tensor(p);
        f32_sums<S> total = {};
        float bias[S::weighed] = {}; /* of no use here */
        meeting m;
        key_walk walk = {0, 0, -1};
        load_f32<S>(rows_in(source, t.at.batch, t.head, token), t.count, S::rows, p.depth, where.left);
        while (next_keys(b, S::slice, second, t, walk, m)) {
            const run &r = t.list.runs[walk.run];
            load_f32<S>({r.key + m.key * r.key_stride, r.key_stride}, m.count, S::slice, p.depth, where.slice_left);
            load_f32<S>({r.value + m.key * r.value_stride, r.value_stride}, m.count, S::slice, p.depth_v, where.slice_right);
            if (r.kind == run_pinned && p.sink_bias.given) {
                clear_f32_removed<S>(p, r, m, where);
            }
            meet_f32<S>(p, t.at, r, m, where, bias, total);
        }
        store_f32<S>(second ? b.sink_query_gradient : b.query_gradient, first, p.depth, t.rows, t.count, p.scale, total.left);
        __syncthreads();
    }
}

} // namespace sa

#define SA_BACKWARD_F32(depth)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * SA_BACKWARD_WARPS)                                                                   \
        backward_queries_f32_##depth(const __grid_constant__ sa_cuda_backward b)                                                           \
    {                                                                                                                                      \
        sa::backward_f32_queries<depth>(b);                                                                                                \
    }                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * SA_BACKWARD_WARPS)                                                                   \
        backward_keys_f32_##depth(const __grid_constant__ sa_cuda_backward b)                                                              \
    {                                                                                                                                      \
        sa::backward_f32_keys<depth>(b);                                                                                                   \
    }

SA_BACKWARD_F32(64)
SA_BACKWARD_F32(128)
SA_BACKWARD_F32(256)
