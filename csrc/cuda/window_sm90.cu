/* Attention of many query rows with a narrow window on Hopper: what a row sees fits into registers at once, so there is nothing to rescale.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   flops = 4 * depth * visible pairs * heads_q * batch
 *   bytes = 2 * (depth + depth_v) * (heads_q + heads_kv) * query_length * batch, which is what bounds it
 *
 * Rows are the queries of all heads of a group, 64 to a tile, so that a tile spans few positions and sees few more keys than the window. A CTA
 * walks along a stretch of tiles of one kv head; keys and values come once each, 16 at a time, into a ring from which its warpgroups take
 * tiles by turns: all products of a tile's scores, one softmax, all products with the values. Queries are each warp's own affair: it copies
 * its 16 rows one tile ahead, and its outputs leave through the same place in lines of 128 bytes. Pinned keys are a small block of their own.
 *
 * H200, bf16, ms in a loop over cold sets: D 128 32/8 N 16384 window 128 with 4 pinned; D 64 64/8 N 32768 window 128 with sink logits
 *   v1 addresses by 64-bit products                                  0.175   0.388    2026-11-25
 *   v2 half the instructions of a tile                               0.145   0.311
 *   v3 160 registers for those who multiply                          0.125   0.292    in four runs up to 0.135 and 0.309
 * Through attend the first takes 0.127, in a run in which flex compiled by torch 2.11 took 0.482; prefill_sm80.cu 0.688 on the same card, by
 * another job. There softcap took 0.258, ALiBi 0.205, a second query 0.216, bias of pinned keys 0.206, lengths 0.130, lse 0.131, 32 packed sequences
 * 0.149; the second line 0.291. The floor of memory is 0.079 and 0.14. What limits, by ncu: a scheduler issues 1440 and 1010 instructions a tile,
 * in 40 and 50 % of its cycles; a warp that multiplies takes 6 to 8 cycles for each, a quarter of it for results of fixed latency, and there are
 * three such warps.
 *
 * Tried and lost: queries from memory into registers and outputs from registers, 16 bytes a thread, with the columns of keys and values woven
 * so that they suit, a ring that repeats 9 bundles so that all keys are one product, and no staging: 730 instructions in the loop of depth 64
 * by count, but 0.168 and 0.322 ms, without the code that decorates scores 0.154 and 0.279. Words of 4 bytes cost the copies (nothing copied:
 * 0.141 and 0.272), queries of depth 128 find no registers before the last product. Exponentials left out, or sums, the latter took as long:
 * 0.153 and 0.273, 0.154 and 0.282; outputs left out 0.136 and 0.254. */
#include "window_copy.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Products with keys take 48 of them, and then what is left; a thread has half as many scores. */
template <int keys> constexpr int last_part = (keys % 48 == 0 ? 48 : keys % 48) / 2;

/* Lines at either end of a tile that not every row sees, where the window fits the tile well. */
template <int keys> constexpr int edge = keys % 16 == 8 ? 8 : 16;

/* --- the warpgroups that multiply -------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ int own_row()
{
    return threadIdx.x / 32 % 4 * warp_rows + threadIdx.x % 32 / 4;
}

/* A warp's 16 rows in shared memory: of 16-byte pieces, swizzled. A lane of matrices has row lane % 16 and the first or second of two
 * pieces; `pair` goes on from there. */
template <int depth> __device__ __forceinline__ uint32_t matrix_lane(uint32_t memory)
{
    const int lane = threadIdx.x % 32;
    return memory + lane % 16 * (depth * 2) + ((lane / 16 ^ lane % 8) * 16);
}

__device__ __forceinline__ uint32_t matrix_at(uint32_t lane, int pair)
{
    return lane ^ pair * 32;
}

/* The warp's rows of a tile by pieces of 16 bytes: body(row of the warp, piece, address in shared memory, address in a tensor whose first
 * row is at `base`). */
template <int depth, typename Body>
__device__ __forceinline__ void each_piece(const sa_cuda_problem &p, const sa_cuda_tensor &x, char *base, const stretch &s, const spot &t,
                                           uint32_t memory, Body body)
{
    constexpr int pieces = depth / 8, step = 32 / pieces;
    const int lane = threadIdx.x % 32, own = lane / pieces, piece = lane % pieces, first = threadIdx.x / 32 % 4 * warp_rows + own;
    const int a_token = (int)x.token * 2, a_head = (int)x.head * 2;
    const uint32_t start = memory + own * (depth * 2) + ((piece ^ own) * 16);
    if (is_even_group(p)) { /* the same steps for all lanes */
        const owner of = owner_of(p, s, t, first);
        const int further = p.group <= step ? token_of(p, step) * a_token : a_token - (p.group - step) * a_head;
        base += (int64_t)of.token * a_token + (int64_t)of.head * a_head + piece * 16;
#pragma unroll
        for (int i = 0; i < warp_rows; i += step) {
            body(i + own, piece, (start ^ (i & 7) * 16) + i * (depth * 2), base);
            base += ((i + step) & (p.group - 1)) == 0 ? further : step * a_head;
        }
    } else {
#pragma unroll
        for (int i = 0; i < warp_rows; i += step) {
            const owner of = owner_of(p, s, t, first + i);
            body(i + own, piece, (start ^ (i & 7) * 16) + i * (depth * 2),
                 base + (int64_t)of.token * a_token + (int64_t)of.head * a_head + piece * 16);
        }
    }
}

/* Real rows of this warp in a tile, and all of them. */
__device__ __forceinline__ int rows_left(const spot &t, int rows)
{
    return rows - t.row - (int)(threadIdx.x / 32 % 4) * warp_rows;
}

template <int depth>
__device__ __forceinline__ void fetch_queries(const sa_cuda_problem &p, const sa_cuda_tensor &queries, char *base, const stretch &s,
                                              const spot &t, uint32_t memory)
{
    const int left = rows_left(t, s.real);
    if (left >= warp_rows && p.depth == depth) {
        each_piece<depth>(p, queries, base, s, t, memory,
                          [&](int, int, uint32_t target, char *from) { copy_or_clear_16(target, from, true); });
    } else {
        each_piece<depth>(p, queries, base, s, t, memory, [&](int row, int piece, uint32_t target, char *from) {
            const bool copied = row < left && piece * 8 < p.depth;
            copy_or_clear_16(target, copied ? from : base, copied);
        });
    }
    copy_async_commit();
}

template <int depth> __device__ __forceinline__ void take_queries(uint32_t memory, uint32_t (&queries)[depth / 4])
{
    const uint32_t lane = matrix_lane<depth>(memory);
#pragma unroll
    for (int step = 0; step < depth / 16; step++) {
        load_matrices(*(uint32_t(*)[4]) & queries[4 * step], matrix_at(lane, step));
    }
    __syncwarp();
}

/* Hides what rows do not see: `low` is where a row begins, `high` where it ends. Within a long sequence, rows see all but what is near the
 * tile's first and last line. */
template <int keys>
__device__ __forceinline__ void hide(const int (&low)[2], const int (&high)[2], bool edges, float (&scores)[keys / 2])
{
    const int column = threadIdx.x % 4 * 2;
    if (edges) {
#pragma unroll
        for (int i = 0; i < keys / 2; i++) {
            const int at = i / 4 * 8 + i % 2 + column, half = i % 4 / 2;
            if (i / 4 * 8 < edge<keys>) {
                scores[i] = at >= low[half] ? scores[i] : -infinity;
            } else if (i / 4 * 8 + 8 > keys - edge<keys>) {
                scores[i] = at < high[half] ? scores[i] : -infinity;
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < keys / 2; i++) {
        const int at = i / 4 * 8 + i % 2 + column, half = i % 4 / 2;
        scores[i] = at >= low[half] && at < high[half] ? scores[i] : -infinity;
    }
}

/* The largest dot products of this thread's two rows. */
template <int count> __device__ __forceinline__ void raise(const float *scores, float (&maximum)[2])
{
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        maximum[0] = fmaxf(maximum[0], fmaxf(scores[i], scores[i + 1]));
        maximum[1] = fmaxf(maximum[1], fmaxf(scores[i + 2], scores[i + 3]));
    }
}

/* From dot products to weights, summed over this thread's columns. They are done with here, so that their registers are free. */
template <typename T, int count>
__device__ __forceinline__ void weigh(float scale, const float (&anchor)[2], const float *scores, uint32_t *weights, float (&sum)[4])
{
#pragma unroll
    for (int i = 0; i < count; i += 2) {
        const float x = exp2_fast(fmaf(scores[i], scale, -anchor[i / 2 % 2])), y = exp2_fast(fmaf(scores[i + 1], scale, -anchor[i / 2 % 2]));
        sum[i % 4] += x;
        sum[i % 4 + 1] += y;
        weights[i / 2] = T::pack(x, y);
    }
#pragma unroll
    for (int i = 0; i < count / 2; i++) {
        asm volatile("" : "+r"(weights[i]));
    }
}

template <typename T, int depth, int keys>
__device__ __forceinline__ void issue_scores(const window_memory<depth> &m, const ring_place &ring, const uint32_t (&queries)[depth / 4],
                                             float (&scores)[keys / 2])
{
    const uint64_t held = describe_panels(m.keys, 16, 1024);
#pragma unroll
    for (int part = 0; part < keys; part += 48) {
        const uint64_t from = further(held, ring.behind(part / 8));
#pragma unroll
        for (int step = 0; step < depth / 16; step++) {
            const uint64_t at = further(from, step / 4 * (m.panel / 16) + step % 4 * 2);
            if (keys - part >= 48) {
                score_product<T, 24>(&scores[part / 2], &queries[4 * step], at, step > 0);
            } else {
                score_product<T, last_part<keys>>(&scores[part / 2], &queries[4 * step], at, step > 0);
            }
        }
    }
}

template <typename T, int depth>
__device__ __forceinline__ void issue_pinned(const window_memory<depth> &m, const uint32_t (&queries)[depth / 4], float (&scores)[8])
{
    const uint64_t first = describe_panels(m.pinned_keys, 16, 1024);
#pragma unroll
    for (int step = 0; step < depth / 16; step++) {
        score_product<T, 8>(scores, &queries[4 * step], further(first, step / 4 * (bundle * 128 / 16) + step % 4 * 2), step > 0);
    }
}

template <typename T, int depth, int keys, bool pinned>
__device__ __forceinline__ void issue_values(const window_memory<depth> &m, const ring_place &ring, const uint32_t (&weights)[lines<keys> / 4],
                                             const uint32_t (&others)[4], float (&values)[depth / 2])
{
    const uint64_t held = describe_panels(m.values, m.panel, 1024), first = describe_panels(m.pinned_values, bundle * 128, 1024);
#pragma unroll
    for (int step = 0; step < lines<keys> / 16; step++) {
        value_product<T, depth / 2>(values, &weights[4 * step], further(held, ring.behind(2 * step)), step > 0);
    }
    if constexpr (pinned) {
        value_product<T, depth / 2>(values, others, first, 1);
    }
    products_commit();
}

/* Closes the warp's rows and writes them: through shared memory, so that whole lines leave. */
template <typename T, int depth>
__device__ __forceinline__ void write_rows(const sa_cuda_problem &p, const stretch &s, const window_state &state, const spot &t,
                                           uint32_t memory, const float (&maximum)[2], float (&sum)[2], float (&values)[depth / 2])
{
    const int lane = threadIdx.x % 32, left = rows_left(t, s.rows);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own_row() + 8 * half;
        const owner of = owner_of(p, s, t, row);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        softmax_end end = {0.0f, -infinity};
        if (t.row + row < s.real) {
            end = close(maximum[half], sum[half], state.sink[of.head]);
        }
        factor[half] = end.factor;
        float *lse = lse_of(p);
        if (lse != nullptr && lane % 4 == 0 && t.row + row < s.rows) {
            lse[(s.batch * p.heads_q + s.head * p.group + of.head) * p.query_length + s.query_begin + of.token] = end.lse;
        }
    }
    if (__any_sync(~0u, factor[0] == 0.0f || factor[1] == 0.0f)) { /* whatever was in values that nobody sees */
#pragma unroll
        for (int i = 0; i < depth / 2; i++) {
            values[i] = factor[i % 4 / 2] == 0.0f ? 0.0f : values[i];
        }
    }
    const uint32_t matrix = matrix_lane<depth>(memory);
#pragma unroll
    for (int n = 0; n < depth / 8; n += 2) {
        uint32_t tiles[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            tiles[i] = T::pack(values[4 * n + 2 * i] * factor[i % 2], values[4 * n + 2 * i + 1] * factor[i % 2]);
        }
        store_matrices(matrix_at(matrix, n / 2), tiles);
    }
    __syncwarp();
    if (left >= warp_rows && p.depth_v == depth) {
        each_piece<depth>(p, p.output, s.output, s, t, memory,
                          [&](int, int, uint32_t from, char *to) { store_streaming_16(to, load_shared_16(from)); });
    } else {
        each_piece<depth>(p, p.output, s.output, s, t, memory, [&](int row, int piece, uint32_t from, char *to) {
            if (row < left && piece * 8 < p.depth_v) {
                store_streaming_16(to, load_shared_16(from));
            }
        });
    }
    __syncwarp();
}

/* What the rows of this thread see, as lines of the tile and pinned keys; true where all but the edges is seen by all rows. */
template <int keys>
__device__ __forceinline__ bool look(const sa_cuda_problem &p, const stretch &s, const spot &t, int (&low)[2], int (&high)[2],
                                     int (&pinned)[2])
{
    const int apart = s.apart - t.shift, position = s.behind + 1 - s.first_token - t.shift, window = (int)p.common_window;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own_row() + 8 * half, token = owner_of(p, s, t, row).token;
        const bool real = t.row + row < s.real;
        high[half] = real ? token + position : 0;
        low[half] = high[half] - window > apart ? high[half] - window : apart;
        pinned[half] = !real ? 0 : s.sees + token < s.pinned ? s.sees + token : s.pinned;
    }
    const int nearest = t.token + position, farthest = owner_of(p, s, t, tile_rows - 1).token + position;
    return t.row + tile_rows <= s.real && nearest >= keys - edge<keys> && apart <= edge<keys> && farthest - window <= edge<keys>;
}

/* From a dot product to a score in log2 units. */
__device__ __forceinline__ float cap(const sa_cuda_problem &p, float dot)
{
    const float score = dot * p.scale;
    if (p.softcap > 0.0f) { /* tanh x = 1 - 2 / (e^2x + 1) */
        const float grown = exp2_fast(score * __fdividef(2.0f * log2e, p.softcap));
        return p.softcap * log2e * (1.0f - __fdividef(2.0f, grown + 1.0f));
    }
    return score * log2e;
}

/* All that happens to scores beside hiding. `high`: as look() has it. */
template <int keys>
__device__ __forceinline__ void decorate(const sa_cuda_problem &p, const stretch &s, const window_state &state, const spot &t,
                                         const int (&high)[2], float (&scores)[keys / 2], float (&more)[8])
{
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const owner of = owner_of(p, s, t, own_row() + 8 * half);
        const float slope = state.slope[of.head];
#pragma unroll
        for (int i = 2 * half; i < keys / 2; i += i % 2 ? 3 : 1) {
            scores[i] = cap(p, scores[i]) - slope * (float)(high[half] - 1 - (i / 4 * 8 + i % 2 + column));
        }
#pragma unroll
        for (int i = 2 * half; i < 8; i += i % 2 ? 3 : 1) {
            const int at = i / 4 * 8 + i % 2 + column;
            const float distance = fabsf((float)(s.position + of.token - at));
            more[i] = cap(p, more[i]) - slope * distance;
            if (p.sink_bias.given && at < p.pinned) {
                const float bias = state.bias[of.head * (int)p.pinned + at];
                more[i] = bias == -infinity ? -infinity : more[i] + bias;
            }
        }
    }
}

template <typename T, int depth, int keys, bool pinned, bool featured>
__device__ __forceinline__ void multiply_tile(const sa_cuda_problem &p, const stretch &s, const window_state &state,
                                              const window_memory<depth> &m, const ring_place &ring, const spot &t,
                                              uint32_t (&queries)[depth / 4], uint32_t memory)
{
    float scores[keys / 2], more[8], values[depth / 2];
    uint32_t weights[lines<keys> / 4] = {}, others[4];
    int low[2], high[2], held[2];
    pin(scores);
    pin(more);
    products_begin();
    issue_scores<T, depth, keys>(m, ring, queries, scores);
    if (pinned && !featured) {
        issue_pinned<T, depth>(m, queries, more);
    }
    products_commit();
    const bool edges = look<keys>(p, s, t, low, high, held);
    products_wait<0>();
    pin(scores);
    if constexpr (featured) {
        copy_async_wait<1>(); /* the second query, or the first once more */
        __syncwarp();
        take_queries<depth>(memory, queries);
        products_begin();
        issue_pinned<T, depth>(m, queries, more);
        products_commit();
        products_wait<0>();
        pin(more);
        decorate<keys>(p, s, state, t, high, scores, more);
    }
    pin(more);
    hide<keys>(low, high, edges, scores);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        more[i] = pinned && i / 4 * 8 + i % 2 + (int)threadIdx.x % 4 * 2 < held[i % 4 / 2] ? more[i] : -infinity;
    }
    const float scale = featured ? 1.0f : p.scale * log2e;
    float maximum[2] = {-infinity, -infinity}, sum[4] = {}, anchor[2];
    raise<keys / 2>(scores, maximum);
    raise<pinned ? 8 : 0>(more, maximum);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 1));
        maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 2));
        anchor[half] = anchor_of(maximum[half]) * scale;
    }
    weigh<T, pinned ? 8 : 0>(scale, anchor, more, others, sum);
#pragma unroll
    for (int part = 0; part < keys; part += 48) {
        if (keys - part >= 48) {
            weigh<T, 24>(scale, anchor, &scores[part / 2], &weights[part / 4], sum);
        } else {
            weigh<T, last_part<keys>>(scale, anchor, &scores[part / 2], &weights[part / 4], sum);
        }
    }
    pin(values);
    products_begin();
    issue_values<T, depth, keys, pinned>(m, ring, weights, others, values);
    products_wait<0>();
    pin(values);
    float total[2] = {sum[0] + sum[1], sum[2] + sum[3]};
    maximum[0] *= scale;
    maximum[1] *= scale;
    write_rows<T, depth>(p, s, state, t, memory, maximum, total, values);
}

template <typename T, int depth, int keys>
__device__ __forceinline__ void multiply_stretch(const sa_cuda_problem &p, const stretch &s, window_state &state,
                                                 const window_memory<depth> &m, ring_hold &hold)
{
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
    const bool featured = p.softcap > 0.0f || p.alibi_slopes.given || p.sink_bias.given || p.sink_query.data != nullptr;
    constexpr uint32_t own_bytes = warp_rows * depth * 2;
    uint32_t here = m.queries + warp * 2 * own_bytes, there = here + own_bytes;
    spot t = spot_of(p, s, group);
    hold.eighth = (int)((2 * hold.begin + t.shift / 8) % (2 * m.bundles));
    if (group < s.tiles) {
        fetch_queries<depth>(p, p.query, s.query, s, t, here);
        hold.give_back(state, m.bundles, t.shift / bundle);
    }
    for (int tile = group; tile < s.tiles; tile += window_groups) {
        uint32_t queries[depth / 4];
        copy_async_wait<0>();
        __syncwarp();
        take_queries<depth>(here, queries);
        if (featured && p.sink_query.data != nullptr) {
            fetch_queries<depth>(p, p.sink_query, s.second, s, t, here);
        }
        const spot next = spot_of(p, s, tile + window_groups);
        if (tile + window_groups < s.tiles) {
            fetch_queries<depth>(p, p.query, s.query, s, next, there);
        } else {
            copy_async_commit();
        }
        hold.wait(state, m.bundles, bundles_until<keys>(t));
        fence_async();
        const ring_place ring = ring_place_of(hold, m.bundles);
        if (featured) {
            multiply_tile<T, depth, keys, true, true>(p, s, state, m, ring, t, queries, here);
        } else if (p.pinned > 0) {
            multiply_tile<T, depth, keys, true, false>(p, s, state, m, ring, t, queries, here);
        } else {
            multiply_tile<T, depth, keys, false, false>(p, s, state, m, ring, t, queries, here);
        }
        if (tile + window_groups < s.tiles) {
            hold.give_back(state, m.bundles, next.shift / bundle);
        }
        hold.go_on(m.bundles, (next.shift - t.shift) / 8);
        t = next;
        const uint32_t other = here;
        here = there;
        there = other;
    }
    hold.give_back(state, m.bundles, bundles_of<keys>(p, s));
}

template <typename T, int depth, int keys>
__device__ void multiply_stretches(const sa_cuda_problem &p, window_state &state, const window_memory<depth> &m)
{
    ring_hold hold = {};
    for (uint32_t parity = 0;; parity ^= 1) {
        barrier_wait(&state.stretch_full, parity);
        barrier_wait(&state.pinned_full, parity);
        const stretch &s = state.now;
        if (s.tiles == 0) {
            break;
        }
        multiply_stretch<T, depth, keys>(p, s, state, m, hold);
        hold.begin += bundles_of<keys>(p, s);
        barrier_arrive(&state.stretch_free);
    }
}

template <typename T, int depth, int keys> __device__ __forceinline__ void prefill_window(const sa_cuda_problem &p)
{
    extern __shared__ __align__(1024) char memory[];
    window_state &state = *(window_state *)memory;
    const window_memory<depth> m = window_memory_of<depth>(p, memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < m.bundles; i++) {
            barrier_init(&state.full[i], copying_threads);
            barrier_init(&state.free[i], window_warps);
        }
        barrier_init(&state.stretch_full, copying_threads);
        barrier_init(&state.pinned_full, copying_threads);
        barrier_init(&state.stretch_free, 32 * window_warps);
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x < copying_threads) {
        leave_registers<SA_WINDOW_COPYING_REGISTERS>();
        copy_stretches<depth, keys>(p, state, m);
    } else {
        take_registers<SA_WINDOW_REGISTERS>();
        multiply_stretches<T, depth, keys>(p, state, m);
    }
}

#else

template <typename T, int depth, int keys> __device__ void prefill_window(const sa_cuda_problem &)
{
    __trap(); /* choose.c sends nothing here */
}

#endif

} // namespace sa

#define SA_WINDOW(name, depth, keys)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(SA_WINDOW_THREADS, 1)                                                                     \
        prefill_window_##name##_##depth##_##keys(const __grid_constant__ sa_cuda_problem p)                                                \
    {                                                                                                                                      \
        sa::prefill_window<sa::name, depth, keys>(p);                                                                                      \
    }

SA_WINDOW(f16, 64, 136)
SA_WINDOW(f16, 64, 144)
SA_WINDOW(f16, 128, 136)
SA_WINDOW(f16, 128, 144)
SA_WINDOW(bf16, 64, 136)
SA_WINDOW(bf16, 64, 144)
SA_WINDOW(bf16, 128, 136)
SA_WINDOW(bf16, 128, 144)
