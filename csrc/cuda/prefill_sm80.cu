/* Attention of many query rows: tiles of 64 rows against slices of 64 keys (32 for depths above 128), FlashAttention-2 fashion.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   flops = 4 * depth * visible pairs * heads_q * batch
 *
 * One CTA per (64 rows, kv head, batch row); rows are the queries of all heads of a group, so that a narrow window wastes little of a
 * tile. Only slices that some row sees are visited: learned rows, pinned keys, window. Slices that every row sees whole carry no mask.
 * Keys and values come by cp.async one slice ahead; each of four warps multiplies its 16 rows with mma.sync. For sm_80 and later.
 *
 * H200, bf16, causal, useful TFLOP/s: 64/8 heads, D 128, N 8192; D 64, N 16384; 16/16, D 256, N 8192; 64/8, D 128, N 32768, window 1024
 *   v1 scores in local memory       114    66   144   102    2026-11-24
 *   v2 scores by value              178   201   159   146    2026-11-24
 * Limited by: queries read from shared memory for every slice, one barrier a slice, 16 rows a warp. Right for every argument, made to be
 * overtaken. */
#include "multiply.cuh"

namespace sa
{

constexpr int prefill_rows = SA_PREFILL_ROWS;
static_assert(sizeof(tile<prefill_rows>) <= SA_ROWS_SHARED, "room for what is known of the rows");

/* Rows of 16-bit elements into swizzled shared rows, zero beyond width. All threads. */
template <int depth>
__device__ __forceinline__ void load_tile(const sa_cuda_problem &p, const char *source, int64_t stride, int rows, int width, char *target,
                                          uint64_t policy)
{
    constexpr int pieces = depth / 8;
    if (p.aligned) {
        for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
            const int row = i / pieces, piece = i % pieces;
            if (piece * 8 < width) {
                copy_async_16(shared_address(target) + piece_at<depth>(row, piece), source + row * stride + piece * 16, policy);
            }
        }
        return;
    }
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
        const int row = i / width, d = i % width;
        *(uint16_t *)(target + piece_at<depth>(row, d / 8) + d % 8 * 2) = ((const uint16_t *)(source + row * stride))[d];
    }
}

template <int depth>
__device__ void load_query_tile(const sa_cuda_problem &p, const tile<prefill_rows> &t, const sa_cuda_tensor &source, char *target)
{
    constexpr int pieces = depth / 8;
    for (int i = threadIdx.x; i < prefill_rows * pieces; i += blockDim.x) {
        const int row = i / pieces, piece = i % pieces;
        uint16_t part[8] = {};
        if (row < t.real) {
            const uint16_t *from =
                (const uint16_t *)element(source, t.at.batch, t.head[row], t.at.query_begin + t.token[row], 2) + piece * 8;
            if (piece * 8 + 8 <= p.depth && ((uintptr_t)from & 15) == 0) {
                *(uint4 *)part = *(const uint4 *)from;
            } else {
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    part[e] = piece * 8 + e < p.depth ? from[e] : 0;
                }
            }
        }
        *(uint4 *)(target + piece_at<depth>(row, piece)) = *(const uint4 *)part;
    }
}

/* A slice on its way: which run, which keys. */
struct slice_at {
    int run, count;
    int64_t first;
};

__device__ __forceinline__ slice_at find_slice(const tile<prefill_rows> &t, int slice, int keys, int run)
{
    while (slice >= t.first_slice[run + 1]) {
        run++;
    }
    const int64_t first = t.seen[run].low + (int64_t)(slice - t.first_slice[run]) * keys;
    return {run, (int)least(keys, t.seen[run].high - first), first};
}

template <int depth>
__device__ __forceinline__ void load_stage(const sa_cuda_problem &p, const tile<prefill_rows> &t, const slice_at &at, char *stage,
                                           uint64_t policy)
{
    constexpr int keys = SA_PREFILL_KEYS(depth), pieces = depth / 8;
    const run &r = t.list.runs[at.run];
    char *values = stage + keys * depth * 2;
    load_tile<depth>(p, r.key + at.first * r.key_stride, r.key_stride, at.count, (int)p.depth, stage, policy);
    load_tile<depth>(p, r.value + at.first * r.value_stride, r.value_stride, at.count, (int)p.depth_v, values, policy);
    for (int i = at.count * pieces + threadIdx.x; i < keys * pieces;
         i += blockDim.x) { /* behind the end: weights 0, so values must be finite */
        *(uint4 *)(values + piece_at<depth>(i / pieces, i % pieces)) = make_uint4(0, 0, 0, 0);
    }
}

/* Clears the values of pinned keys whose bias is -inf for every head of the group: nobody sees them. */
template <int depth>
__device__ void clear_removed(const sa_cuda_problem &p, const tile<prefill_rows> &t, const run &r, const slice_at &at, char *values)
{
    const int64_t group = p.heads_q / p.heads_kv;
    for (int key = threadIdx.x; key < at.count; key += blockDim.x) {
        bool alive = false;
        for (int64_t head = t.kv_head * group; head < (t.kv_head + 1) * group; head++) {
            alive = alive || number_at(p.sink_bias, head, r.position + at.first + key) != -infinity;
        }
        for (int piece = 0; piece < (alive ? 0 : depth / 8); piece++) {
            *(uint4 *)(values + piece_at<depth>(key, piece)) = make_uint4(0, 0, 0, 0);
        }
    }
    __syncthreads();
}

template <typename T, int depth>
__device__ __forceinline__ void write_rows(const sa_cuda_problem &p, const tile<prefill_rows> &t, warp_state<depth> &state)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
        float sum = state.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (row >= t.real) {
            continue;
        }
        const softmax_end end = close(state.maximum[half], sum, t.sink[row]);
        uint16_t *to = (uint16_t *)element(p.output, t.at.batch, t.head[row], t.at.query_begin + t.token[row], 2);
        const bool pairs = ((uintptr_t)to & 3) == 0;
#pragma unroll
        for (int n = 0; n < depth / 8; n++) {
            const int d = n * 8 + lane % 4 * 2;
            const uint32_t both = T::pack(state.values[n][2 * half] * end.factor, state.values[n][2 * half + 1] * end.factor);
            if (d + 1 < p.depth_v && pairs) {
                *(uint32_t *)(to + d) = both;
            } else {
                for (int e = 0; e < 2 && d + e < p.depth_v; e++) {
                    to[d + e] = (uint16_t)(both >> (16 * e));
                }
            }
        }
        if (lane % 4 == 0) {
            store_lse(p, t, row, end.lse);
        }
    }
}

template <typename T, int depth> __device__ __forceinline__ void prefill(const sa_cuda_problem &p)
{
    constexpr int keys = SA_PREFILL_KEYS(depth), stage_bytes = 2 * keys * depth * 2;
    extern __shared__ __align__(128) char memory[];
    tile<prefill_rows> &t = *(tile<prefill_rows> *)memory;
    char *queries = memory + SA_ROWS_SHARED, *stages = queries + prefill_rows * depth * 2;
    const int warp_row = threadIdx.x / 32 * 16;
    uint32_t unit = blockIdx.x;
    if (p.sequences == 0) { /* the last tile of a causal row sees most: it goes first */
        unit += (uint32_t)p.row_tiles - 1 - 2 * (unit % (uint32_t)p.row_tiles);
    }
    if (p.depth < depth || p.depth_v < depth) { /* what no load fills must be zero */
        for (int i = threadIdx.x; i < 2 * stage_bytes / 16; i += blockDim.x) {
            ((uint4 *)stages)[i] = make_uint4(0, 0, 0, 0);
        }
    }
    if (!begin_tile(p, unit, keys, t)) {
        return;
    }
    if (threadIdx.x < t.real) {
        t.sink[threadIdx.x] = sink_of(p, t.head[threadIdx.x]);
    }
    const uint64_t policy = policy_evict_normal();
    const int slices = t.first_slice[t.list.count];
    warp_state<depth> state;
    clear_state(state);
    slice_at next = {};
    if (slices > 0) {
        next = find_slice(t, 0, keys, 0);
        load_stage<depth>(p, t, next, stages, policy);
    }
    copy_async_commit();
    for (int slice = 0, loaded = -1; slice < slices; slice++) {
        const slice_at at = next;
        const run &r = t.list.runs[at.run];
        char *stage = stages + slice % 2 * stage_bytes, *values = stage + keys * depth * 2;
        copy_async_wait<0>();
        __syncthreads(); /* the slice is there, and all are done with the one before */
        if (slice + 1 < slices) {
            next = find_slice(t, slice + 1, keys, at.run);
            load_stage<depth>(p, t, next, stages + (slice + 1) % 2 * stage_bytes, policy);
        }
        copy_async_commit();
        const int second = r.kind == run_pinned && has_second_query(p);
        if (loaded != second) {
            load_query_tile<depth>(p, t, second ? second_query_tensor(p) : query_tensor(p), queries);
            loaded = second;
            __syncthreads();
        }
        if (r.kind == run_pinned && p.sink_bias.given) {
            clear_removed<depth>(p, t, r, at, values);
        }
        score_tile<keys> scores = {};
        multiply_keys<T, depth, keys>(shared_address(queries) + warp_row * depth * 2, shared_address(stage), scores);
        scale_scores<keys>(p, t, r, warp_row, at.first, scores);
        if (at.first < t.all[at.run].low || at.first + keys > t.all[at.run].high) {
            mask_scores<keys>(p, t, r, warp_row, at.first, scores);
        }
        join_scores(scores, state);
        multiply_values<T, depth, keys>(shared_address(values), scores, state.values);
    }
    __syncthreads();
    write_rows<T, depth>(p, t, state);
    pad_rows<T>(p, t);
}

} // namespace sa

#define SA_PREFILL(name, depth)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(32 * SA_PREFILL_WARPS)                                                                    \
        prefill_##name##_##depth(const __grid_constant__ sa_cuda_problem p)                                                                \
    {                                                                                                                                      \
        sa::prefill<sa::name, depth>(p);                                                                                                   \
    }

SA_PREFILL(f16, 64)
SA_PREFILL(f16, 128)
SA_PREFILL(f16, 256)
SA_PREFILL(bf16, 64)
SA_PREFILL(bf16, 128)
SA_PREFILL(bf16, 256)
