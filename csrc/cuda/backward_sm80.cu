/* Gradients of attention in half types, recomputed from lse. With p = 2^(s - lse) and delta_i = <do_i, o_i> - dlse_i:
 *
 *   dv_j = sum_i p_ij do_i     ds_ij = p_ij (<do_i, v_j> - delta_i)     dk_j = scale sum_i ds_ij q_i     dq_i = scale sum_j ds_ij k_j
 *
 * Two kernels, no atomics, every sum in a fixed order. backward_keys: a tile of keys stays, the queries of all heads of its group pass in
 * slices (scores, dp, dv, dk). backward_queries: a tile of queries of one head stays, the keys pass (scores, dp, dq). Scores are computed
 * with the tile as the left factor, so that weights come out of mma.sync as the left factor of the next product: nothing but tiles
 * and slices crosses shared memory. Only slices that meet the tile are visited, and only those at a band's edge are masked.
 *   flops = 14 * depth * visible pairs * heads_q * batch, of which 10 would do with atomics for dq
 * Slices come by cp.async one ahead. For depths above 128 a CTA of backward_keys computes dk or dv, as registers hold one of them.
 * Learned keys meet every query of every row, pinned keys every query of theirs: one CTA each, which begin first.
 *
 * Not timed yet. By count, shared memory is the limit: at depth 128 backward_keys reads 80 matrices of 512 bytes for 128 mma.sync, as a warp
 * holds 16 keys, and backward_queries 80 for 192. The calls for caps, biases and ALiBi make ptxas spill some thirty registers a slice in
 * backward_queries at depth 128 and backward_keys at 64, whether they are made or not: kernels without them would be the first thing to try. */
#include "backward.cuh"
#include "multiply.cuh"

namespace sa
{

static_assert(sizeof(key_tile) <= SA_BACKWARD_SHARED_FACTS && sizeof(query_tile) <= SA_BACKWARD_SHARED_FACTS, "room for facts");

enum { role_queries, role_keys, role_key_gradient, role_value_gradient }; /* the last two: half of role_keys each */

template <typename type, int columns, int role_> struct shape {
    using T = type;
    static constexpr int depth = columns, role = role_, slice = SA_BACKWARD_SLICE(columns);
    static constexpr bool keys_stay = role_ != role_queries, scores_alone = role_ == role_value_gradient;
    static constexpr bool left = role_ != role_value_gradient, right = role_ == role_keys || role_ == role_value_gradient;
    static constexpr int blocks = keys_stay ? SA_BACKWARD_KEY_BLOCKS(columns) : SA_BACKWARD_QUERY_BLOCKS(columns);
    static constexpr int rows = SA_BACKWARD_ROWS(blocks);
    static constexpr int slice_bytes = slice * columns * 2, stage_bytes = 2 * slice_bytes;
};

/* The parts of shared memory. `left` of a tile or slice: queries or keys, `right`: gradients of the output or values. */
template <typename S> struct layout {
    char *left, *right, *stages;
    sa_cuda_row *passing; /* [2, slice], where keys stay */
    __device__ layout(char *memory)
        : left(memory + SA_BACKWARD_SHARED_FACTS), right(left + S::rows * S::depth * 2), stages(right + S::rows * S::depth * 2),
          passing((sa_cuda_row *)(stages + 2 * S::stage_bytes))
    {
    }
};

template <typename S> struct sums {
    float left[S::left ? S::blocks : 1][S::depth / 8][4];
    float right[S::right ? S::blocks : 1][S::depth / 8][4];
    float bias[S::blocks][2];
};

/* The rows of a matrix, somewhere in a tensor. */
struct rows_at {
    const char *first;
    int64_t stride; /* bytes */
};

__device__ __forceinline__ rows_at rows_in(const sa_cuda_tensor &tensor, int64_t batch, int64_t head, int64_t token)
{
    return {element(tensor, batch, head, token, 2), tensor.token * 2};
}

template <int depth> __device__ __noinline__ void load_elements(const rows_at from, int count, int rows, int width, char *target)
{
    for (int i = threadIdx.x; i < rows * depth; i += blockDim.x) {
        const int row = i / depth, d = i % depth;
        if (row >= count || d < width) {
            *(uint16_t *)(target + piece_at<depth>(row, d / 8) + d % 8 * 2) =
                row < count ? ((const uint16_t *)(from.first + row * from.stride))[d] : (uint16_t)0;
        }
    }
}

/* Copies `count` rows and clears the others: their weights are 0, which no NaN may meet. A thread has a column of pieces. */
template <int depth, int rows>
__device__ __forceinline__ void load_all(const sa_cuda_backward &b, const rows_at &from, int count, int64_t width, char *target)
{
    constexpr int pieces = depth / 8, step = 32 * SA_BACKWARD_WARPS / pieces;
    if (!b.aligned) {
        load_elements<depth>(from, count, rows, (int)width, target);
        return;
    }
    const int piece = threadIdx.x % pieces, first = threadIdx.x / pieces;
    const uint64_t policy = policy_evict_normal();
    const char *source = from.first + first * from.stride + piece * 16;
#pragma unroll
    for (int row = first, i = 0; i < rows / step; i++, row += step, source += step * from.stride) {
        if (row >= count) {
            *(uint4 *)(target + piece_at<depth>(row, piece)) = make_uint4(0, 0, 0, 0);
        } else if (piece * 8 < width) {
            copy_async_16(shared_address(target) + piece_at<depth>(row, piece), source, policy);
        }
    }
}

template <typename S>
__device__ __forceinline__ void load_slice(const sa_cuda_backward &b, const rows_at &left, const rows_at &right, int count, char *stage)
{
    load_all<S::depth, S::slice>(b, left, count, b.forward.depth, stage);
    load_all<S::depth, S::slice>(b, right, count, b.forward.depth_v, stage + S::slice_bytes);
}

/* Columns that no load fills: the inner products run over them. */
template <typename S> __device__ __forceinline__ void clear_columns(const sa_cuda_backward &b, layout<S> &at)
{
    if (b.forward.depth < S::depth || b.forward.depth_v < S::depth) {
        for (int i = threadIdx.x; i < (4 * S::rows * S::depth + 2 * S::stage_bytes) / 16; i += blockDim.x) {
            ((uint4 *)at.left)[i] = make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
    }
}

/* --- products ----------------------------------------------------------------------------------------------------------------------- */

/* sums += weights * slice. */
template <typename S>
__device__ __forceinline__ void add_weighted(uint32_t slice, const score_tile<S::slice> (&weights)[S::blocks],
                                             float (&sums)[S::blocks][S::depth / 8][4])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < S::slice / 16; step++) {
        uint32_t a[S::blocks][4], b[4];
#pragma unroll
        for (int i = 0; i < S::blocks; i++) {
            const float (&low)[4] = weights[i].at[2 * step], (&high)[4] = weights[i].at[2 * step + 1];
            a[i][0] = S::T::pack(low[0], low[1]);
            a[i][1] = S::T::pack(low[2], low[3]);
            a[i][2] = S::T::pack(high[0], high[1]);
            a[i][3] = S::T::pack(high[2], high[3]);
        }
#pragma unroll
        for (int pair = 0; pair < S::depth / 16; pair++) {
            load_matrices_transposed(b, slice + piece_at<S::depth>(step * 16 + lane % 16, 2 * pair + lane / 16));
#pragma unroll
            for (int i = 0; i < S::blocks; i++) {
                S::T::multiply(sums[i][2 * pair], a[i], b[0], b[1]);
                S::T::multiply(sums[i][2 * pair + 1], a[i], b[2], b[3]);
            }
        }
    }
}

/* --- weights ------------------------------------------------------------------------------------------------------------------------ */

/* From dot products to scores in log2 units, where more than a factor is between them. */
template <typename S>
__device__ __noinline__ score_tile<S::slice> feature_block(const sa_cuda_problem &p, int64_t batch, const run &r, const meeting m,
                                                           int warp_row, score_tile<S::slice> scores)
{
    const int lane = threadIdx.x % 32;
    const float slope = p.alibi_slopes.given ? number_at(p.alibi_slopes, batch, m.head) * log2e : 0.0f;
#pragma unroll
    for (int n = 0; n < S::slice / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = warp_row + lane / 4 + e / 2 * 8, column = n * 8 + lane % 4 * 2 + e % 2;
            const int query = S::keys_stay ? column : row, key = S::keys_stay ? row : column;
            scores.at[n][e] =
                featured_score(p, r, m.head, m.query + query, slope, least(m.key + key, r.count - 1), scores.at[n][e]);
        }
    }
    return scores;
}

/* What the cap lets through: 1 - tanh^2. */
template <int slice> __device__ __noinline__ score_tile<slice> cap_slopes(const sa_cuda_problem &p, score_tile<slice> dots)
{
#pragma unroll
    for (int n = 0; n < slice / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float capped = tanhf(dots.at[n][e] * p.scale / p.softcap);
            dots.at[n][e] = 1.0f - capped * capped;
        }
    }
    return dots;
}

/* Turns scores, times `factor` in log2 units, into weights, and products of gradient and value into gradients of the scores. */
template <typename S, bool masked>
__device__ __forceinline__ void weigh(const meeting &m, float factor, const sa_cuda_row *passing, const sa_cuda_row (&own)[S::blocks][2],
                                      int warp_row, score_tile<S::slice> (&scores)[S::blocks], score_tile<S::slice> (&gradients)[S::blocks])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < S::slice / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = n * 8 + lane % 4 * 2 + e % 2;
            sa_cuda_row facts = {};
            if (S::keys_stay) {
                facts = passing[column];
            }
#pragma unroll
            for (int i = 0; i < S::blocks; i++) {
                if (!S::keys_stay) {
                    facts = own[i][e / 2];
                }
                float weight = exp2_fast(fmaf(scores[i].at[n][e], factor, -facts.lse));
                if (masked) {
                    const int row = warp_row + 16 * i + lane / 4 + e / 2 * 8, offset = S::keys_stay ? column - row : row - column;
                    weight = column < m.count && offset >= m.low && offset <= m.high ? weight : 0.0f;
                }
                float &gradient = gradients[i].at[n][e];
                scores[i].at[n][e] = weight;
                if (!S::scores_alone) {
                    gradient = weight * (gradient - facts.delta);
                    gradient = masked && weight == 0.0f ? 0.0f : gradient; /* unseen keys may hold anything */
                }
            }
        }
    }
}

/* A slice against the tile: everything that it adds. */
template <typename S>
__device__ __forceinline__ void meet(const sa_cuda_problem &p, int64_t batch, const run &r, const meeting &m, const layout<S> &where,
                                     const char *stage, const sa_cuda_row *passing, const sa_cuda_row (&own)[S::blocks][2], sums<S> &total)
{
    const int warp_row = threadIdx.x / 32 * 16 * S::blocks;
    const uint32_t left = shared_address(where.left) + warp_row * S::depth * 2, slice = shared_address(stage);
    const uint32_t right = shared_address(where.right) + warp_row * S::depth * 2, slice_right = slice + S::slice_bytes;
    const bool featured = is_featured(p, r);
    score_tile<S::slice> scores[S::blocks] = {}, gradients[S::blocks] = {};
    multiply_rows<typename S::T, S::depth>(left, slice, scores);
    if (!S::scores_alone) {
        multiply_rows<typename S::T, S::depth>(right, slice_right, gradients);
    }
    if (featured) {
#pragma unroll
        for (int i = 0; i < S::blocks; i++) {
            scores[i] = feature_block<S>(p, batch, r, m, warp_row + 16 * i, scores[i]);
        }
    }
    const int least_offset = S::keys_stay ? 1 - S::rows : 1 - S::slice, largest_offset = (S::keys_stay ? S::slice : S::rows) - 1;
    const float factor = featured ? 1.0f : p.scale * log2e;
    if (featured || m.count < S::slice || m.low > least_offset || m.high < largest_offset) {
        weigh<S, true>(m, factor, passing, own, warp_row, scores, gradients);
    } else {
        weigh<S, false>(m, factor, passing, own, warp_row, scores, gradients);
    }
    if constexpr (S::right) {
        add_weighted<S>(slice_right, scores, total.right);
    }
    if constexpr (S::left) {
        if (S::keys_stay && r.kind == run_pinned) {
#pragma unroll
            for (int i = 0; i < S::blocks; i++) {
#pragma unroll
                for (int n = 0; n < S::slice / 8; n++) {
                    total.bias[i][0] += gradients[i].at[n][0] + gradients[i].at[n][1];
                    total.bias[i][1] += gradients[i].at[n][2] + gradients[i].at[n][3];
                }
            }
        }
        if (p.softcap > 0.0f) { /* the dot products once more: registers have no room to keep them */
#pragma unroll
            for (int i = 0; i < S::blocks; i++) {
                scores[i] = {};
            }
            multiply_rows<typename S::T, S::depth>(left, slice, scores);
#pragma unroll
            for (int i = 0; i < S::blocks; i++) {
                scores[i] = cap_slopes<S::slice>(p, scores[i]);
#pragma unroll
                for (int n = 0; n < S::slice / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) { /* beyond the tile a slope may be NaN */
                        float &gradient = gradients[i].at[n][e];
                        gradient = gradient == 0.0f ? 0.0f : gradient * scores[i].at[n][e];
                    }
                }
            }
        }
        add_weighted<S>(slice, gradients, total.left);
    }
}

/* --- results ------------------------------------------------------------------------------------------------------------------------ */

/* Writes the tile's rows of a dense gradient; rows from `real` on are zero. `first`: its first row there. */
template <typename S>
__device__ __forceinline__ void store_sums(void *gradient, int64_t first, int64_t width, int rows, int real, float factor,
                                           const float (&sums)[S::blocks][S::depth / 8][4])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < S::blocks; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = threadIdx.x / 32 * 16 * S::blocks + 16 * i + lane / 4 + 8 * half;
            if (row >= rows) {
                continue;
            }
            uint16_t *to = (uint16_t *)gradient + (first + row) * width;
            const bool pairs = ((uintptr_t)to & 3) == 0;
#pragma unroll
            for (int n = 0; n < S::depth / 8; n++) {
                const int d = n * 8 + lane % 4 * 2;
                const uint32_t both = row < real ? S::T::pack(sums[i][n][2 * half] * factor, sums[i][n][2 * half + 1] * factor) : 0;
                if (d + 1 < width && pairs) {
                    *(uint32_t *)(to + d) = both;
                } else {
                    for (int e = 0; e < 2 && d + e < width; e++) {
                        to[d + e] = (uint16_t)(both >> (16 * e));
                    }
                }
            }
        }
    }
}

/* What a head of a row has given to the bias of the tile's keys, which begins again. */
template <typename S> __device__ __forceinline__ void store_bias(const sa_cuda_backward &b, const key_tile &t, int head, sums<S> &total)
{
    const int lane = threadIdx.x % 32;
    float *bias = (float *)((char *)b.forward.scratch + b.bias_offset) + (t.row * b.forward.heads_q + head) * b.forward.pinned;
#pragma unroll
    for (int i = 0; i < S::blocks; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total.bias[i][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            total.bias[i][half] = 0.0f;
            const int row = threadIdx.x / 32 * 16 * S::blocks + 16 * i + lane / 4 + 8 * half;
            if (lane % 4 == 0 && row < t.count) {
                bias[t.keys.position + t.first + row] = sum;
            }
        }
    }
}

/* --- the two kernels ---------------------------------------------------------------------------------------------------------------- */

template <typename S>
__device__ __forceinline__ void load_queries(const sa_cuda_backward &b, const key_tile &t, const query_walk &walk, const meeting &m,
                                             char *stage, sa_cuda_row *passing)
{
    const sa_cuda_problem &p = b.forward;
    const int64_t token = t.at.query_begin + walk.token;
    const bool second = t.keys.kind == run_pinned && has_second_query(p);
    load_slice<S>(b, rows_in(second ? second_query_tensor(p) : query_tensor(p), t.at.batch, m.head, token),
                  rows_in(b.output_gradient, t.at.batch, m.head, token), m.count, stage);
    if (threadIdx.x < m.count) {
        copy_async_8(shared_address(passing + threadIdx.x), rows_of(b, t.at.batch, m.head, token) + threadIdx.x);
    }
}

/* All threads, where the slice has arrived: queries that give nothing to any key may hold anything, and are cleared. Ends with a barrier. */
template <typename S> __device__ __forceinline__ void clear_silent(const meeting &m, const sa_cuda_row *passing, char *stage)
{
    if (!__syncthreads_or(threadIdx.x < m.count && passing[threadIdx.x].lse == infinity)) { /* every thread has copied its own */
        return;
    }
    for (int i = threadIdx.x; i < m.count * (S::depth / 8); i += blockDim.x) {
        const int row = i / (S::depth / 8), piece = i % (S::depth / 8);
        if (passing[row].lse == infinity) {
            *(uint4 *)(stage + piece_at<S::depth>(row, piece)) = make_uint4(0, 0, 0, 0);
            *(uint4 *)(stage + S::slice_bytes + piece_at<S::depth>(row, piece)) = make_uint4(0, 0, 0, 0);
        }
    }
    __syncthreads();
}

template <typename S> __device__ __forceinline__ void backward_keys(const sa_cuda_backward &b, int64_t unit)
{
    const sa_cuda_problem &p = b.forward;
    extern __shared__ __align__(128) char memory[];
    key_tile &t = *(key_tile *)memory;
    layout<S> where(memory);
    query_walk walk;
    if (!begin_keys(b, unit, S::rows, t, walk)) {
        return;
    }
    clear_columns<S>(b, where);
    load_all<S::depth, S::rows>(b, {t.keys.key + t.first * t.keys.key_stride, t.keys.key_stride}, t.count, p.depth, where.left);
    load_all<S::depth, S::rows>(b, {t.keys.value + t.first * t.keys.value_stride, t.keys.value_stride}, t.count, p.depth_v, where.right);
    const bool biased = t.keys.kind == run_pinned && p.sink_bias.given && S::left;
    const sa_cuda_row none[S::blocks][2] = {};
    sums<S> total = {};
    meeting next;
    bool more = next_queries(b, S::slice, t, walk, next);
    if (more) {
        load_queries<S>(b, t, walk, next, where.stages, where.passing);
    }
    copy_async_commit();
    for (int step = 0; more; step++) {
        const meeting m = next;
        copy_async_wait<0>();
        clear_silent<S>(m, where.passing + step % 2 * S::slice, where.stages + step % 2 * S::stage_bytes);
        const int64_t batch = t.at.batch; /* the slice is there, and all are done with the one before */
        more = next_queries(b, S::slice, t, walk, next);
        if (more) {
            load_queries<S>(b, t, walk, next, where.stages + (step + 1) % 2 * S::stage_bytes, where.passing + (step + 1) % 2 * S::slice);
        }
        copy_async_commit();
        meet<S>(p, batch, t.keys, m, where, where.stages + step % 2 * S::stage_bytes, where.passing + step % 2 * S::slice, none, total);
        if (biased && (!more || next.head != m.head)) {
            store_bias<S>(b, t, m.head, total);
        }
    }
    copy_async_wait<0>();
    const bool learned = t.keys.kind == run_learned;
    const int64_t first = key_row_of(p, t);
    if constexpr (S::left) {
        store_sums<S>(learned ? b.sink_key_gradient : b.key_gradient, first, p.depth, t.count, t.count, p.scale, total.left);
    }
    if constexpr (S::right) {
        store_sums<S>(learned ? b.sink_value_gradient : b.value_gradient, first, p.depth_v, t.count, t.count, 1.0f, total.right);
    }
}

/* Keys and values of a slice that this head gives no weight are cleared: they may hold anything. */
template <typename S>
__device__ void clear_removed(const sa_cuda_problem &p, const run &r, const meeting &m, char *stage)
{
    for (int key = threadIdx.x; key < m.count; key += blockDim.x) {
        for (int piece = 0; piece < (is_removed(p, r, m.head, m.key + key) ? S::depth / 8 : 0); piece++) {
            *(uint4 *)(stage + piece_at<S::depth>(key, piece)) = make_uint4(0, 0, 0, 0);
            *(uint4 *)(stage + S::slice_bytes + piece_at<S::depth>(key, piece)) = make_uint4(0, 0, 0, 0);
        }
    }
    __syncthreads();
}

template <typename S>
__device__ __forceinline__ void load_keys(const sa_cuda_backward &b, const query_tile &t, const key_walk &walk, const meeting &m, char *stage)
{
    const run &r = t.list.runs[walk.run];
    load_slice<S>(b, {r.key + m.key * r.key_stride, r.key_stride}, {r.value + m.key * r.value_stride, r.value_stride}, m.count, stage);
}

/* All keys that meet one of the tile's two queries. */
template <typename S>
__device__ __forceinline__ void pass_keys(const sa_cuda_backward &b, const query_tile &t, bool second, const layout<S> &where,
                                          const sa_cuda_row (&own)[S::blocks][2], sums<S> &total)
{
    const sa_cuda_problem &p = b.forward;
    key_walk walk = {0, 0, -1};
    meeting next;
    bool more = next_keys(b, S::slice, second, t, walk, next);
    if (more) {
        load_keys<S>(b, t, walk, next, where.stages);
    }
    copy_async_commit();
    for (int step = 0; more; step++) {
        const meeting m = next;
        const run &r = t.list.runs[walk.run];
        char *stage = where.stages + step % 2 * S::stage_bytes;
        copy_async_wait<0>();
        __syncthreads(); /* the slice is there, and all are done with the one before */
        more = next_keys(b, S::slice, second, t, walk, next);
        if (more) {
            load_keys<S>(b, t, walk, next, where.stages + (step + 1) % 2 * S::stage_bytes);
        }
        copy_async_commit();
        if (r.kind == run_pinned && p.sink_bias.given) {
            clear_removed<S>(p, r, m, stage);
        }
        meet<S>(p, t.at.batch, r, m, where, stage, nullptr, own, total);
    }
    copy_async_wait<0>();
    __syncthreads();
}

template <typename S> __device__ __forceinline__ void backward_queries(const sa_cuda_backward &b)
{
    const sa_cuda_problem &p = b.forward;
    extern __shared__ __align__(128) char memory[];
    query_tile &t = *(query_tile *)memory;
    layout<S> where(memory);
    if (!begin_queries(b, blockIdx.x, S::rows, t)) {
        return;
    }
    const int lane = threadIdx.x % 32;
    const int64_t token = t.at.query_begin + t.first, first = query_row_of(p, t);
    sa_cuda_row own[S::blocks][2];
#pragma unroll
    for (int i = 0; i < 2 * S::blocks; i++) {
        const int row = threadIdx.x / 32 * 16 * S::blocks + 8 * i + lane / 4;
        own[i / 2][i % 2] = row < t.count ? rows_of(b, t.at.batch, t.head, token)[row] : sa_cuda_row{infinity, 0.0f};
    }
    clear_columns<S>(b, where);
    load_all<S::depth, S::rows>(b, rows_in(b.output_gradient, t.at.batch, t.head, token), t.count, p.depth_v, where.right);
#pragma unroll 1
    for (int second = has_second_query(p); second >= 0; second--) {
        sums<S> total = {};
        load_all<S::depth, S::rows>(b, rows_in(second ? second_query_tensor(p) : query_tensor(p), t.at.batch, t.head, token), t.count, p.depth,
                                    where.left);
        pass_keys<S>(b, t, second != 0, where, own, total);
#pragma unroll
        for (int n = 0; n < S::depth / 8; n++) { /* rows that give nothing get nothing, whatever they hold */
#pragma unroll
            for (int i = 0; i < 4 * S::blocks; i++) {
                float &sum = total.left[i / 4][n][i % 4];
                sum = own[i / 4][i % 4 / 2].lse == infinity ? 0.0f : sum;
            }
        }
        store_sums<S>(second ? b.sink_query_gradient : b.query_gradient, first, p.depth, t.rows, t.count, p.scale, total.left);
    }
}

} // namespace sa

#define SA_BACKWARD(name, depth)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * SA_BACKWARD_WARPS)                                                                   \
        backward_queries_##name##_##depth(const __grid_constant__ sa_cuda_backward b)                                                      \
    {                                                                                                                                      \
        sa::backward_queries<sa::shape<sa::name, depth, sa::role_queries>>(b);                                                             \
    }                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * SA_BACKWARD_WARPS)                                                                   \
        backward_keys_##name##_##depth(const __grid_constant__ sa_cuda_backward b)                                                         \
    {                                                                                                                                      \
        if constexpr (depth <= 128) {                                                                                                      \
            sa::backward_keys<sa::shape<sa::name, depth, sa::role_keys>>(b, blockIdx.x);                                                   \
        } else if (blockIdx.x % 2 == 0) {                                                                                                  \
            sa::backward_keys<sa::shape<sa::name, depth, sa::role_key_gradient>>(b, blockIdx.x / 2);                                       \
        } else {                                                                                                                           \
            sa::backward_keys<sa::shape<sa::name, depth, sa::role_value_gradient>>(b, blockIdx.x / 2);                                     \
        }                                                                                                                                  \
    }

SA_BACKWARD(f16, 64)
SA_BACKWARD(f16, 128)
SA_BACKWARD(f16, 256)
SA_BACKWARD(bf16, 64)
SA_BACKWARD(bf16, 128)
SA_BACKWARD(bf16, 256)
