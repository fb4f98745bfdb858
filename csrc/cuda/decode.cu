/* Decode attention: a few query rows of a kv head against a long cache; with `append` a whole step of a streaming cache in one launch.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   s_j = log2(e) * scale * <q, k_j>
 *
 * One CTA per (16 rows, split of the keys); the rows of a tile are the queries of all heads of a group, so every K and V byte crosses the
 * bus once for the group:  bytes = 2 * keys * (depth + depth_v) * heads_kv * batch,  flops = 4 * keys * depth * heads_q * batch.
 * Warps share nothing while they run: each takes every n-th slice of 16 or 32 keys through a ring of its own, filled by cp.async ahead of
 * time, multiplies with mma.sync (rows padded to 16: the tensor cores have time to spare) and keeps its own (m, l, acc). They meet at the end:
 * warps in shared memory, splits in distributed shared memory of a cluster, or in scratch where the last CTA to arrive finishes the tile.
 * All sums have a fixed order. */
#include "multiply.cuh"

namespace sa {

template <int depth> struct shape {
    static constexpr int slice = SA_DECODE_SLICE(depth), pieces = depth / 8, row_bytes = depth * 2;
    static constexpr int half_stage = slice * row_bytes, stage = 2 * half_stage, ring = SA_DECODE_STAGES * stage;
};

struct decode_shared {
    tile<SA_DECODE_ROWS> t;
    float turn[2][2][128]; /* own and pinned position; cos and sin */
};
static_assert(sizeof(decode_shared) <= SA_ROWS_SHARED, "room for what is known of the rows");

/* --- loading ---------------------------------------------------------------------------------------------------------------------- */

/* Element d of a vector turned by a table of cos and sin. */
template <typename T>
__device__ __forceinline__ float turned(const sa_cuda_cache &cache, const float (&table)[2][128], const uint16_t *source, int d)
{
    const int pairs = (int)cache.pairs;
    const float own = T::wide(source[d]);
    if (d >= 2 * pairs) {
        return own;
    }
    const int pair = cache.interleaved ? d / 2 : d < pairs ? d : d - pairs;
    const bool second = cache.interleaved ? d % 2 : d >= pairs;
    const int step = cache.interleaved ? 1 : pairs;
    const float other = T::wide(source[second ? d - step : d + step]);
    return second ? own * table[0][pair] + other * table[1][pair] : own * table[0][pair] - other * table[1][pair];
}

/* The rows of queries, zero beyond depth and beyond the real rows. */
template <typename T, int depth>
__device__ void load_queries(const sa_cuda_problem &p, const decode_shared &s, const sa_cuda_tensor &source, bool turn, int kind, char *target)
{
    for (int i = threadIdx.x; i < SA_DECODE_ROWS * shape<depth>::pieces; i += blockDim.x) {
        const int row = i / shape<depth>::pieces, piece = i % shape<depth>::pieces;
        uint16_t part[8] = {};
        if (row < s.t.real) {
            const uint16_t *from = (const uint16_t *)element(source, s.t.at.batch, s.t.head[row], s.t.at.query_begin + s.t.token[row], 2);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int d = piece * 8 + e;
                if (d < p.depth) {
                    part[e] = turn ? narrow<T>(turned<T>(p.cache, s.turn[kind], from, d)) : from[d];
                }
            }
        }
        *(uint4 *)(target + piece_at<depth>(row, piece)) = *(const uint4 *)part;
    }
}

/* Rows that cp.async cannot take: element by element, turned if they still have to be. */
template <typename T, int depth>
__device__ __noinline__ void load_elements(const sa_cuda_cache &cache, const float (&table)[2][128], bool turn, const char *source, int64_t stride,
                                           int rows, int width, char *target)
{
    for (int i = threadIdx.x % 32; i < rows * width; i += 32) {
        const int row = i / width, d = i % width;
        const uint16_t *from = (const uint16_t *)(source + row * stride);
        *(uint16_t *)(target + piece_at<depth>(row, d / 8) + d % 8 * 2) = turn ? narrow<T>(turned<T>(cache, table, from, d)) : from[d];
    }
}

template <int depth>
__device__ __forceinline__ void load_pieces(const char *source, int64_t stride, int rows, int width, uint32_t target, uint64_t policy)
{
    constexpr int pieces = shape<depth>::pieces, step = 32 / pieces;
    const int lane = threadIdx.x % 32, row = lane / pieces, piece = lane % pieces;
    if (piece * 8 >= width) {
        return;
    }
    const char *from = source + row * stride + piece * 16;
#pragma unroll
    for (int i = 0; i < shape<depth>::slice; i += step) {
        if (row + i < rows) {
            copy_async_16(target + piece_at<depth>(row + i, piece), from, policy);
        }
        from += step * stride;
    }
}

/* A warp's walk over the slices of its split. */
struct cursor {
    int slice, run;
};

template <int row_limit> __device__ __forceinline__ void settle(const tile<row_limit> &t, cursor &c)
{
    while (c.slice >= t.first_slice[c.run + 1]) {
        c.run++;
    }
}

template <typename T, int depth>
__device__ __forceinline__ void load_slice(const sa_cuda_problem &p, const decode_shared &s, const cursor &c, char *stage, uint64_t policy)
{
    const run &r = s.t.list.runs[c.run];
    const int64_t first = s.t.seen[c.run].low + (int64_t)(c.slice - s.t.first_slice[c.run]) * shape<depth>::slice;
    const int rows = (int)least(shape<depth>::slice, s.t.seen[c.run].high - first);
    const char *key = r.key + first * r.key_stride, *value = r.value + first * r.value_stride;
    char *values = stage + shape<depth>::half_stage;
    if (p.aligned && !r.raw) {
        load_pieces<depth>(key, r.key_stride, rows, (int)p.depth, shared_address(stage), policy);
        load_pieces<depth>(value, r.value_stride, rows, (int)p.depth_v, shared_address(values), policy);
    } else {
        load_elements<T, depth>(p.cache, s.turn[0], r.raw, key, r.key_stride, rows, (int)p.depth, stage);
        load_elements<T, depth>(p.cache, s.turn[0], false, value, r.value_stride, rows, (int)p.depth_v, values);
    }
}

/* --- one slice -------------------------------------------------------------------------------------------------------------------- */

/* Clears the values of keys that none of the warp's rows sees: they may hold anything. */
template <int depth> __device__ __noinline__ void clear_unseen(const float (&scores)[shape<depth>::slice / 8][4], char *values)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < shape<depth>::slice / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const unsigned alive = __ballot_sync(~0u, scores[n][e] != -infinity || scores[n][e + 2] != -infinity);
            for (int quarter = 0; quarter < 4; quarter++) {
                if ((alive & (0x11111111u << quarter)) == 0 && lane < shape<depth>::pieces) {
                    *(uint4 *)(values + piece_at<depth>(n * 8 + quarter * 2 + e, lane)) = make_uint4(0, 0, 0, 0);
                }
            }
        }
    }
    __syncwarp();
}

template <typename T, int depth>
__device__ __forceinline__ void attend_slice(const sa_cuda_problem &p, const decode_shared &s, const cursor &c, uint32_t queries, char *stage,
                                             warp_state<depth> &state)
{
    constexpr int slice = shape<depth>::slice;
    const run &r = s.t.list.runs[c.run];
    const int64_t first = s.t.seen[c.run].low + (int64_t)(c.slice - s.t.first_slice[c.run]) * slice;
    float scores[slice / 8][4] = {};
    const bool second = r.kind == run_pinned && has_second_query(p);
    multiply_keys<T, depth, slice>(second ? queries + SA_DECODE_ROWS * depth * 2 : queries, shared_address(stage), scores);
    scale_scores<slice>(p, s.t, r, 0, first, scores);
    if (first < s.t.all[c.run].low || first + slice > s.t.all[c.run].high || (r.kind == run_pinned && p.sink_bias.given)) {
        mask_scores<slice>(p, s.t, r, 0, first, scores);
        clear_unseen<depth>(scores, stage + shape<depth>::half_stage);
    }
    join_scores(scores, state);
    multiply_values<T, depth, slice>(shared_address(stage) + shape<depth>::half_stage, scores, state.values);
}

/* --- the end ---------------------------------------------------------------------------------------------------------------------- */

/* Each warp leaves its state; then all warps' states become one. Ends with a barrier. */
template <int depth> __device__ partial merge_warps(const sa_cuda_problem &p, const tile<SA_DECODE_ROWS> &t, warp_state<depth> &state, char *memory)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float *values = (float *)memory, *states = values + warps * SA_DECODE_ROWS * depth;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp * SA_DECODE_ROWS + lane / 4 + 8 * half;
        float sum = state.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0) {
            states[2 * row] = state.maximum[half];
            states[2 * row + 1] = sum;
        }
        if (lane / 4 + 8 * half < t.real) {
#pragma unroll
            for (int n = 0; n < depth / 8; n++) {
                *(float2 *)(values + row * depth + n * 8 + lane % 4 * 2) = make_float2(state.values[n][2 * half], state.values[n][2 * half + 1]);
            }
        }
    }
    __syncthreads();
    float *merged = states + 2 * warps * SA_DECODE_ROWS, *merged_states = merged + SA_DECODE_ROWS * depth;
    for (int i = threadIdx.x; i < t.real * (depth / 4); i += blockDim.x) {
        const int row = i / (depth / 4), d = i % (depth / 4) * 4;
        float maximum = -infinity, sum = 0.0f;
        for (int w = 0; w < warps; w++) {
            maximum = fmaxf(maximum, states[2 * (w * SA_DECODE_ROWS + row)]);
        }
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int w = 0; w < warps; w++) {
            const int at = w * SA_DECODE_ROWS + row;
            const float factor = factor_to(states[2 * at], maximum);
            const float4 own = *(const float4 *)(values + at * depth + d);
            sum += factor * states[2 * at + 1];
            total.x += factor * own.x;
            total.y += factor * own.y;
            total.z += factor * own.z;
            total.w += factor * own.w;
        }
        *(float4 *)(merged + row * depth + d) = total;
        if (d == 0) {
            merged_states[2 * row] = maximum;
            merged_states[2 * row + 1] = sum;
        }
    }
    __syncthreads();
    return {merged, merged_states, depth};
}

/* --- appending -------------------------------------------------------------------------------------------------------------------- */

/* Writes the new token of a kv head into its slot. No query of this call sees what stood there: it left the window. */
template <typename T> __device__ void append_token(const sa_cuda_problem &p, const decode_shared &s)
{
    const place &at = s.t.at;
    if (at.query_count == 0) {
        return;
    }
    const int64_t slot = at.length < p.pinned ? at.length : p.pinned + (at.length - p.pinned) % p.cache.capacity;
    const int64_t row = (at.batch * p.heads_kv + s.t.kv_head) * (p.pinned + p.cache.capacity) + slot;
    const uint16_t *key = (const uint16_t *)element(p.key, at.batch, s.t.kv_head, 0, 2);
    const uint16_t *value = (const uint16_t *)element(p.value, at.batch, s.t.kv_head, 0, 2);
    const bool turn = p.cache.pairs > 0 && !p.cache.applied;
    for (int64_t d = threadIdx.x; d < p.depth; d += blockDim.x) {
        ((uint16_t *)p.cache.keys)[row * p.depth + d] = turn ? narrow<T>(turned<T>(p.cache, s.turn[0], key, (int)d)) : key[d];
    }
    for (int64_t d = threadIdx.x; d < p.depth_v; d += blockDim.x) {
        ((uint16_t *)p.cache.values)[row * p.depth_v + d] = value[d];
    }
}

/* --- the kernel ------------------------------------------------------------------------------------------------------------------- */

template <typename T, int depth> __device__ __forceinline__ void decode(const sa_cuda_problem &p)
{
    extern __shared__ __align__(128) char memory[];
    decode_shared &s = *(decode_shared *)memory;
    char *queries = memory + SA_ROWS_SHARED, *rings = memory + SA_DECODE_SHARED(depth);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t unit = blockIdx.x / p.splits;
    const int split = blockIdx.x % p.splits;
    char *ring = rings + warp * shape<depth>::ring;
    if (p.depth < depth || p.depth_v < depth) { /* what no load fills must be zero */
        for (int i = lane; i < shape<depth>::ring / 16; i += 32) {
            ((uint4 *)ring)[i] = make_uint4(0, 0, 0, 0);
        }
    }
    if (!begin_tile(p, unit, shape<depth>::slice, s.t)) {
        return;
    }
    if (rotates_inside(p)) {
        for (int i = threadIdx.x; i < 2 * p.cache.pairs; i += blockDim.x) {
            const int kind = i >= p.cache.pairs, pair = i - kind * (int)p.cache.pairs;
            const int64_t position = kind ? pinned_turn(p, s.t.at.position) : s.t.at.position;
            rotation(p.cache, position, pair, !p.cache.applied, s.turn[kind][0][pair], s.turn[kind][1][pair]);
        }
        __syncthreads();
    }

    const int64_t slices = s.t.first_slice[s.t.list.count];
    const int begin = (int)(slices * split / p.splits), end = (int)(slices * (split + 1) / p.splits);
    const uint64_t policy = p.row_tiles > 1 ? policy_evict_normal() : policy_evict_first();
    cursor loading = {begin + warp, 0};
    for (int i = 0; i < SA_DECODE_STAGES - 1; i++, loading.slice += warps) {
        if (loading.slice < end) {
            settle(s.t, loading);
            load_slice<T, depth>(p, s, loading, ring + i * shape<depth>::stage, policy);
        }
        copy_async_commit();
    }

    load_queries<T, depth>(p, s, query_tensor(p), rotates_inside(p) && !p.cache.applied, 0, queries);
    if (has_second_query(p)) {
        load_queries<T, depth>(p, s, second_query_tensor(p), rotates_inside(p), 1, queries + SA_DECODE_ROWS * depth * 2);
    }
    if (threadIdx.x < s.t.real) {
        s.t.sink[threadIdx.x] = sink_of(p, s.t.head[threadIdx.x]);
    }
    if (p.append && split == 0 && unit % p.row_tiles == 0) {
        append_token<T>(p, s);
    }
    if (p.append && threadIdx.x == blockDim.x - 1) {
        const int64_t units = p.batch * p.heads_kv * p.row_tiles;
        advance(p, s.t.at, (p.splits > 1 && !p.clustered ? units : 0) + s.t.at.batch, p.heads_kv * p.row_tiles * p.splits);
    }
    __syncthreads();

    warp_state<depth> state;
    clear_state(state);
    int stage = 0, filling = SA_DECODE_STAGES - 1;
    for (cursor c = {begin + warp, 0}; c.slice < end; c.slice += warps, loading.slice += warps) {
        if (loading.slice < end) {
            settle(s.t, loading);
            load_slice<T, depth>(p, s, loading, ring + filling * shape<depth>::stage, policy);
        }
        copy_async_commit();
        copy_async_wait<SA_DECODE_STAGES - 1>();
        __syncwarp();
        settle(s.t, c);
        attend_slice<T, depth>(p, s, c, shared_address(queries), ring + stage * shape<depth>::stage, state);
        __syncwarp();
        stage = stage + 1 == SA_DECODE_STAGES ? 0 : stage + 1;
        filling = filling + 1 == SA_DECODE_STAGES ? 0 : filling + 1;
    }
    copy_async_wait<0>();
    __syncthreads(); /* the rings become the place where states meet */

    const partial part = merge_warps<depth>(p, s.t, state, rings);
    if (split == 0) {
        pad_rows<T>(p, s.t);
    }
    if (p.clustered) {
        finish_cluster<T>(p, s.t, part, split);
    } else if (p.splits > 1) {
        finish_scratch<T>(p, s.t, part, unit, split, rings);
    } else {
        finish_alone<T>(p, s.t, part);
    }
}

} // namespace sa

#define SA_DECODE(name, type, depth)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * SA_DECODE_WARPS, 1) decode_##name##_##depth(const __grid_constant__ sa_cuda_problem p) \
    {                                                                                                                                       \
        sa::decode<sa::type, depth>(p);                                                                                                     \
    }

SA_DECODE(f16, f16, 64)
SA_DECODE(f16, f16, 128)
SA_DECODE(f16, f16, 256)
SA_DECODE(bf16, bf16, 64)
SA_DECODE(bf16, bf16, 128)
SA_DECODE(bf16, bf16, 256)
