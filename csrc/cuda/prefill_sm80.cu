/* Attention of many query rows on mma.sync: tiles of 128 rows (64 for depths above 128) against slices of 64 keys, FlashAttention-2
 * fashion.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   flops = 4 * depth * visible pairs * heads_q * batch
 *
 * One CTA per (tile, kv head, batch row); rows are the queries of all heads of a group, so that a narrow window wastes little of a tile.
 * Only slices that some row sees are visited: learned rows, pinned keys, window. Slices that every row sees whole carry no mask.
 * Each of four warps multiplies 32 rows, so that every fragment of K and V that it reads from shared memory serves two products. Keys and
 * values come by cp.async into one buffer each: values while the scores are computed, the next keys while these become weights. Sums are
 * kept relative to a maximum that may be 8 too small: then a slice seldom rescales what is there.
 *
 * H200, bf16, causal, 64/8 heads, useful TFLOP/s: D 128, N 8192; D 64, N 16384; 16/16 heads, D 256, N 8192; D 128, N 16384, window 1024 + 4
 *   v2 64 rows, 16 a warp               178   201   157   141    2026-11-25, a harness of its own
 *   v3 128 rows, 32 a warp (D 256: 64)  316   290   250   226    2026-11-25, the same run
 *   v4 maxima that may be too small     324   299   256   232    2026-11-25, another run (v2 again 178, 201, 156, 141)
 *   v5 addresses by slice, not carried  330   304   265   237    that run
 * torch's flash attention an hour before the first run, same machine: 335, 310, 286 (H 16/16, D 256). Tried and lost at D 128: 8 warps of 16
 * rows (213), 2 stages of keys and values (314; at D 64 they win 2 % and would leave an A100 one CTA), 256 rows (246), slices of 32 keys
 * (237), features of scores in the same kernel (284, it spills). */
#include "multiply.cuh"

namespace sa
{

/* blocks: of 16 rows, that a warp multiplies; plain: nothing happens to a score but that it is scaled, by a positive number, and hidden. */
template <int depth_, int rows_, bool plain_, int keys_ = SA_PREFILL_KEYS, int warps = SA_PREFILL_WARPS>
struct prefill_shape {
    static constexpr bool plain = plain_;
    static constexpr int depth = depth_, rows = rows_, keys = keys_, threads = 32 * warps, blocks = rows / (16 * warps);
    static constexpr int fixed = SA_PREFILL_ROWS_SHARED(rows), query_bytes = rows * depth * 2, half_bytes = keys * depth * 2;
    static_assert(sizeof(tile<rows>) <= fixed, "room for what is known of the rows");
};

/* Rows of 16-bit elements of any alignment into swizzled shared rows. All threads. */
template <typename S>
__device__ __noinline__ void load_elements(const char *source, int64_t stride, int count, int width, char *target)
{
    for (int i = threadIdx.x; i < count * width; i += S::threads) {
        const int row = i / width, d = i % width;
        *(uint16_t *)(target + piece_at<S::depth>(row, d / 8) + d % 8 * 2) = ((const uint16_t *)(source + row * stride))[d];
    }
}

template <typename S>
__device__ __noinline__ void load_query_tile(const sa_cuda_problem &p, const tile<S::rows> &t, const sa_cuda_tensor &source, char *target)
{
    constexpr int pieces = S::depth / 8;
    for (int i = threadIdx.x; i < S::rows * pieces; i += S::threads) {
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
        *(uint4 *)(target + piece_at<S::depth>(row, piece)) = *(const uint4 *)part;
    }
}

/* The slice of keys, or of values, that is read next, and its run. */
struct cursor {
    int slice, run;
};

template <typename S> __device__ __forceinline__ int64_t first_key(const tile<S::rows> &t, int slice, int run)
{
    return t.seen[run].low + (int64_t)(slice - t.first_slice[run]) * S::keys;
}

/* Goes to the run of the cursor's slice; others may have no slices. */
template <typename S> __device__ __forceinline__ void enter_run(const tile<S::rows> &t, cursor &c)
{
    while (c.slice >= t.first_slice[c.run + 1]) {
        c.run++;
    }
}

/* Asks for the cursor's slice and moves on. All threads; the caller says that there is one. */
template <typename S>
__device__ __forceinline__ void load_slice(const sa_cuda_problem &p, const tile<S::rows> &t, bool values, cursor &c, char *target)
{
    constexpr int pieces = S::depth / 8, step = S::threads / pieces;
    const run &r = t.list.runs[c.run];
    const int64_t stride = values ? r.value_stride : r.key_stride;
    const int64_t first = first_key<S>(t, c.slice, c.run);
    const char *source = (values ? r.value : r.key) + first * stride; /* kept from slice to slice it would cost registers */
    const bool last = c.slice + 1 == t.first_slice[c.run + 1];
    const int count = last ? (int)(t.seen[c.run].high - first) : S::keys;
    if (p.aligned) {
        const uint32_t to = shared_address(target);
        const int piece = threadIdx.x % pieces, row = threadIdx.x / pieces;
        const int limit = piece * 8 < (values ? p.depth_v : p.depth) ? count : 0;
        source += row * stride + piece * 16;
#pragma unroll
        for (int i = 0; i < S::keys / step; i++) {
            if (row + i * step < limit) {
                copy_async_16(to + piece_at<S::depth>(row + i * step, piece), source);
            }
            source += stride * step;
        }
    } else {
        load_elements<S>(source, stride, count, (int)(values ? p.depth_v : p.depth), target);
    }
    copy_async_commit();
    if (values && last) { /* behind the end: weights 0, so values must be finite */
        for (int i = count * pieces + threadIdx.x; i < S::keys * pieces; i += S::threads) {
            *(uint4 *)(target + piece_at<S::depth>(i / pieces, i % pieces)) = make_uint4(0, 0, 0, 0);
        }
    }
    c.slice++;
    if (last && c.run + 1 < t.list.count && c.slice < t.first_slice[t.list.count]) {
        enter_run<S>(t, c);
    }
}

/* Clears the values of pinned keys whose bias is -inf for every head of the group: nobody sees them. */
template <typename S>
__device__ __noinline__ void clear_removed(const sa_cuda_problem &p, const tile<S::rows> &t, int slice, int run, char *values)
{
    const int64_t first = first_key<S>(t, slice, run);
    const int count = (int)least(S::keys, t.seen[run].high - first);
    for (int key = threadIdx.x; key < count; key += S::threads) {
        const bool removed = is_removed(p, t.kv_head, t.list.runs[run].position + first + key);
        for (int piece = 0; piece < (removed ? S::depth / 8 : 0); piece++) {
            *(uint4 *)(values + piece_at<S::depth>(key, piece)) = make_uint4(0, 0, 0, 0);
        }
    }
    __syncthreads();
}

/* Weights of 16 rows as the second product takes them. */
template <int keys> struct weight_tile {
    uint32_t at[keys / 16][4];
};

template <typename T, typename S>
__device__ __forceinline__ void multiply_weights(uint32_t values, const weight_tile<S::keys> (&weights)[S::blocks],
                                                 warp_state<S::depth> (&state)[S::blocks])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < S::keys / 16; step++) {
#pragma unroll
        for (int pair = 0; pair < S::depth / 16; pair++) {
            uint32_t b[4];
            load_matrices_transposed(b, values + piece_at<S::depth>(step * 16 + lane % 16, 2 * pair + lane / 16));
#pragma unroll
            for (int block = 0; block < S::blocks; block++) {
                T::multiply(state[block].values[2 * pair], weights[block].at[step], b[0], b[1]);
                T::multiply(state[block].values[2 * pair + 1], weights[block].at[step], b[2], b[3]);
            }
        }
    }
}

/* join_scores of scores that are not scaled yet: `scale`, positive, brings them to log2 units. Weights may reach 2^slack. */
template <typename T, int depth, int keys>
__device__ __forceinline__ void join_scaled(const score_tile<keys> &scores, float scale, warp_state<depth> &state, weight_tile<keys> &weights)
{
    float larger[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float maximum = -infinity;
#pragma unroll
        for (int n = 0; n < keys / 8; n++) {
            maximum = fmaxf(maximum, fmaxf(scores.at[n][2 * half], scores.at[n][2 * half + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
        larger[half] = fmaxf(state.maximum[half], maximum * scale);
    }
    constexpr float slack = 8.0f;
    if (__any_sync(~0u, larger[0] - state.maximum[0] > slack || larger[1] - state.maximum[1] > slack)) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float factor = exp2_fast(state.maximum[half] - anchor_of(larger[half]));
            state.maximum[half] = larger[half];
            state.sum[half] *= factor;
#pragma unroll
            for (int n = 0; n < depth / 8; n++) {
                state.values[n][2 * half] *= factor;
                state.values[n][2 * half + 1] *= factor;
            }
        }
    }
    const float anchor[2] = {anchor_of(state.maximum[0]), anchor_of(state.maximum[1])};
#pragma unroll
    for (int n = 0; n < keys / 8; n++) {
        float weight[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            weight[e] = exp2_fast(fmaf(scores.at[n][e], scale, -anchor[e / 2]));
        }
        state.sum[0] += weight[0] + weight[1];
        state.sum[1] += weight[2] + weight[3];
        weights.at[n / 2][n % 2 * 2] = T::pack(weight[0], weight[1]);
        weights.at[n / 2][n % 2 * 2 + 1] = T::pack(weight[2], weight[3]);
    }
}

template <typename T, typename S>
__device__ __forceinline__ void write_rows(const sa_cuda_problem &p, const tile<S::rows> &t, int first, warp_state<S::depth> &state)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + lane / 4 + 8 * half;
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
        for (int n = 0; n < S::depth / 8; n++) {
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

/* Scores of a slice become weights. */
template <typename T, typename S>
__device__ __forceinline__ void weigh(const sa_cuda_problem &p, const tile<S::rows> &t, int slice, int run, int warp_row,
                                      score_tile<S::keys> (&scores)[S::blocks], warp_state<S::depth> (&state)[S::blocks],
                                      weight_tile<S::keys> (&weights)[S::blocks])
{
    const sa::run &r = t.list.runs[run];
    const int64_t first = first_key<S>(t, slice, run);
    const bool plain = S::plain || (p.scale > 0.0f && !is_featured(p, r));
    if (!plain) {
#pragma unroll
        for (int block = 0; block < S::blocks; block++) {
            scale_scores<S::keys>(p, t, r, warp_row + 16 * block, first, scores[block]);
        }
    }
    if (first < t.all[run].low || first + S::keys > t.all[run].high) {
#pragma unroll
        for (int block = 0; block < S::blocks; block++) {
            mask_scores<S::keys>(p, t, r, warp_row + 16 * block, first, scores[block]);
        }
    }
#pragma unroll
    for (int block = 0; block < S::blocks; block++) {
        join_scaled<T>(scores[block], plain ? p.scale * log2e : 1.0f, state[block], weights[block]);
    }
}

template <typename T, typename S> __device__ __forceinline__ void prefill(const sa_cuda_problem &p)
{
    extern __shared__ __align__(128) char memory[];
    tile<S::rows> &t = *(tile<S::rows> *)memory;
    char *queries = memory + S::fixed, *keys = queries + S::query_bytes, *values = keys + S::half_bytes;
    const int warp_row = threadIdx.x / 32 * 16 * S::blocks;
    uint32_t unit = blockIdx.x;
    if (p.sequences == 0) { /* the last tile of a causal row sees most: it goes first */
        unit += (uint32_t)p.row_tiles - 1 - 2 * (unit % (uint32_t)p.row_tiles);
    }
    if (p.depth < S::depth || p.depth_v < S::depth) { /* what no load fills must be zero */
        for (int i = threadIdx.x; i < 2 * S::half_bytes / 16; i += S::threads) {
            ((uint4 *)keys)[i] = make_uint4(0, 0, 0, 0);
        }
    }
    if (!begin_tile(p, unit, S::keys, t)) {
        return;
    }
    for (int row = threadIdx.x; row < t.real; row += S::threads) {
        t.sink[row] = sink_of(p, t.head[row]);
    }
    const int slices = t.first_slice[t.list.count];
    warp_state<S::depth> state[S::blocks];
#pragma unroll
    for (int block = 0; block < S::blocks; block++) {
        clear_state(state[block]);
    }
    cursor key_at = {}, value_at = {};
    if (slices > 0) {
        enter_run<S>(t, key_at);
        enter_run<S>(t, value_at);
        load_slice<S>(p, t, false, key_at, keys);
    }
    for (int slice = 0, run = 0, loaded = -1; slice < slices; slice++) {
        while (slice >= t.first_slice[run + 1]) {
            run++;
        }
        copy_async_wait<0>();
        __syncthreads(); /* the keys are there, and all are done with the values before */
        load_slice<S>(p, t, true, value_at, values);
        const int second = t.list.runs[run].kind == run_pinned && has_second_query(p);
        if (loaded != second) {
            load_query_tile<S>(p, t, second ? second_query_tensor(p) : query_tensor(p), queries);
            loaded = second;
            __syncthreads();
        }
        score_tile<S::keys> scores[S::blocks] = {};
        multiply_rows<T, S::depth>(shared_address(queries) + warp_row * S::depth * 2, shared_address(keys), scores);
        copy_async_wait<0>();
        __syncthreads(); /* the values are there, and all are done with the keys */
        if (slice + 1 < slices) {
            load_slice<S>(p, t, false, key_at, keys);
        }
        if (!S::plain && p.sink_bias.given && t.list.runs[run].kind == run_pinned) {
            clear_removed<S>(p, t, slice, run, values);
        }
        weight_tile<S::keys> weights[S::blocks];
        weigh<T, S>(p, t, slice, run, warp_row, scores, state, weights);
        multiply_weights<T, S>(shared_address(values), weights, state);
    }
    __syncthreads();
#pragma unroll
    for (int block = 0; block < S::blocks; block++) {
        write_rows<T, S>(p, t, warp_row + 16 * block, state[block]);
    }
    pad_rows<T>(p, t);
}

} // namespace sa

#define SA_PREFILL(kernel, name, depth, rows, keys, plain, ctas)                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * SA_PREFILL_WARPS, ctas)                                                              \
        kernel##_##name##_##depth(const __grid_constant__ sa_cuda_problem p)                                                               \
    {                                                                                                                                      \
        sa::prefill<sa::name, sa::prefill_shape<depth, rows, plain, keys>>(p);                                                               \
    }

SA_PREFILL(prefill, f16, 64, SA_PREFILL_ROWS, SA_PREFILL_KEYS, false, 4)
SA_PREFILL(prefill, f16, 128, SA_PREFILL_ROWS, SA_PREFILL_KEYS, false, 3)
SA_PREFILL(prefill, f16, 256, SA_PREFILL_ROWS, SA_PREFILL_KEYS, false, 2)
SA_PREFILL(prefill, bf16, 64, SA_PREFILL_ROWS, SA_PREFILL_KEYS, false, 4)
SA_PREFILL(prefill, bf16, 128, SA_PREFILL_ROWS, SA_PREFILL_KEYS, false, 3)
SA_PREFILL(prefill, bf16, 256, SA_PREFILL_ROWS, SA_PREFILL_KEYS, false, 2)
SA_PREFILL(prefill_wide, f16, 64, SA_PREFILL_WIDE_ROWS, SA_PREFILL_WIDE_KEYS(64), true, 2)
SA_PREFILL(prefill_wide, f16, 128, SA_PREFILL_WIDE_ROWS, SA_PREFILL_WIDE_KEYS(128), true, 2)
SA_PREFILL(prefill_wide, bf16, 64, SA_PREFILL_WIDE_ROWS, SA_PREFILL_WIDE_KEYS(64), true, 2)
SA_PREFILL(prefill_wide, bf16, 128, SA_PREFILL_WIDE_ROWS, SA_PREFILL_WIDE_KEYS(128), true, 2)
