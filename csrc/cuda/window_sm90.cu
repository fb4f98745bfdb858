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
 *   v3 160 registers for those who multiply                          0.135   0.311
 * prefill_sm80.cu took 0.76 and 1.03, flex compiled by torch 2.11 0.47 for the first in the run of v1. The floor of memory is 0.079 and 0.14.
 * Limited by the latency of instructions: a multiprocessor's four schedulers issue in half of the cycles, from three warps each. */
#include "window_copy.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Lines at either end of a tile that not every row sees, where the window fits the tile well. */
template <int keys> constexpr int edge = keys % 16 == 8 ? 8 : 16;

/* --- the warpgroups that multiply -------------------------------------------------------------------------------------------------- */

/* Are this thread's columns of 32 columns among `depth`? */
__device__ __forceinline__ bool in_row(int block, int64_t depth)
{
    return block * 32 + (int)threadIdx.x % 4 * 8 < (int)depth;
}

/* A thread's row of a tensor whose first row is at `base`, at the quarter of every 32 columns that is the thread's. */
__device__ __forceinline__ char *row_of(const sa_cuda_tensor &x, char *base, int token, int head)
{
    return at_step(at_step(base, token, (int)x.token * 2), head, (int)x.head * 2) + threadIdx.x % 4 * 16;
}

/* A thread has two rows of a tile, 8 apart, and of every 32 columns the quarter lane % 4, 16 bytes. What these are to a product, columns
 * 2 (lane % 4) and one more of each eight, is a matter of how keys and values lie in shared memory: woven. */
template <int depth>
__device__ __forceinline__ void fetch_queries(const sa_cuda_problem &p, const sa_cuda_tensor &x, char *base, const stretch &s, const spot &t,
                                              uint32_t (&raw)[depth / 4])
{
#pragma unroll
    for (int half = 0; half < 2; half++) { /* rows that are not there: anything that is */
        const bool there = t.row + own_row() + 8 * half < s.rows;
        const char *from = row_of(x, base, there ? t.token[half] : 0, there ? t.head[half] : 0);
#pragma unroll
        for (int block = 0; block < depth / 32; block++) {
            load_streaming_16(&raw[8 * block + 4 * half], from + (in_row(block, p.depth) ? block * 64 : 0));
        }
    }
}

/* In the order of products. Not done when they are fetched, which would wait for them. */
template <int depth>
__device__ __forceinline__ void take_queries(const sa_cuda_problem &p, const uint32_t (&raw)[depth / 4], uint32_t (&queries)[depth / 4])
{
#pragma unroll
    for (int i = 0; i < depth / 4; i++) {
        queries[i / 8 * 8 + i % 4 * 2 + i / 4 % 2] = in_row(i / 8, p.depth) ? raw[i] : 0;
    }
}

/* Brings them near: a thread the first or second line of half of its rows. */
template <int depth>
__device__ __forceinline__ void expect_queries(const sa_cuda_problem &p, const sa_cuda_tensor &x, char *base, const stretch &s, const spot &t)
{
    const int half = threadIdx.x % 2, line = threadIdx.x / 2 % 2 * 128;
    if (t.row + own_row() + 8 * half < s.rows && line < p.depth * 2) {
        expect(row_of(x, base, half ? t.token[1] : t.token[0], half ? t.head[1] : t.head[0]) + line);
    }
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

template <typename T, int depth, int keys, int groups>
__device__ __forceinline__ void issue_scores(const window_memory<depth> &m, uint32_t ring, const uint32_t (&queries)[depth / 4],
                                             float (&scores)[keys / 2])
{
    const uint64_t first = further(describe_panels(m.keys, 16, 1024), ring);
#pragma unroll
    for (int step = 0; step < depth / 16; step++) {
        const uint64_t at = further(first, step / 4 * (m.panel / 16) + step % 4 * 2);
        if constexpr (groups > SA_WINDOW_GROUPS) { /* all at once ask for more registers than a thread has before it takes some */
            score_product<T, 36>(scores, &queries[4 * step], at, step > 0);
            score_product<T, keys / 2 - 36>(scores + 36, &queries[4 * step], further(at, 9 * 1024 / 16), step > 0);
        } else {
            score_product<T, keys / 2>(scores, &queries[4 * step], at, step > 0);
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
__device__ __forceinline__ void issue_values(const window_memory<depth> &m, uint32_t ring, const uint32_t (&weights)[lines<keys> / 4],
                                             const uint32_t (&others)[4], float (&values)[depth / 2])
{
    const uint64_t held = further(describe_panels(m.values, m.panel, 1024), ring);
    if constexpr (pinned) {
        value_product<T, depth / 2>(values, others, describe_panels(m.pinned_values, bundle * 128, 1024), 0);
    }
#pragma unroll
    for (int step = 0; step < lines<keys> / 16; step++) {
        value_product<T, depth / 2>(values, &weights[4 * step], further(held, step * (2048 / 16)), pinned || step > 0);
    }
    products_commit();
}

/* Closes this thread's rows and writes them, 16 bytes at a time. */
template <typename T, int depth>
__device__ __forceinline__ void write_rows(const sa_cuda_problem &p, const stretch &s, const window_state &state, const spot &t,
                                           const float (&maximum)[2], const float (&sum)[2], float (&values)[depth / 2])
{
    const int quarter = threadIdx.x % 4, own = quarter % 2, row = t.row + own_row() + 8 * own;
    /* One thread closes one row, and two have it. */
    float total = own ? sum[1] : sum[0];
    total += __shfl_xor_sync(~0u, own ? sum[0] : sum[1], 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int head = own ? t.head[1] : t.head[0], token = own ? t.token[1] : t.token[0];
    softmax_end end = {0.0f, -infinity};
    if (row < s.real) {
        end = close(own ? maximum[1] : maximum[0], total, state.sink[head]);
    }
    float *lse = lse_of(p);
    if (lse != nullptr && quarter < 2 && row < s.rows) {
        lse[(s.batch * p.heads_q + s.head * p.group + head) * p.query_length + s.query_begin + token] = end.lse;
    }
    const float other = __shfl_xor_sync(~0u, end.factor, 1), factor[2] = {own ? other : end.factor, own ? end.factor : other};
    if (__any_sync(~0u, factor[0] == 0.0f || factor[1] == 0.0f)) { /* whatever was in values that nobody sees */
#pragma unroll
        for (int i = 0; i < depth / 2; i++) {
            values[i] = factor[i % 4 / 2] == 0.0f ? 0.0f : values[i];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        char *to = row_of(p.output, s.output, t.token[half], t.head[half]);
        const bool written = t.row + own_row() + 8 * half < s.rows;
#pragma unroll
        for (int block = 0; block < depth / 32; block++) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &values[16 * block + 4 * i + 2 * half];
                words[i] = T::pack(pair[0] * factor[half], pair[1] * factor[half]);
            }
            if (written && in_row(block, p.depth_v)) {
                store_streaming_16(to + block * 64, words);
            }
        }
    }
}

/* What the rows of this thread see, as lines of the tile and pinned keys; true where all but the edges is seen by all rows. */
template <int keys>
__device__ __forceinline__ bool look(const sa_cuda_problem &p, const stretch &s, const spot &t, int (&low)[2], int (&high)[2],
                                     int (&pinned)[2])
{
    const int shift = shift_of(s, t), apart = s.apart - shift, position = s.behind + 1 - s.first_token - shift,
              window = (int)p.common_window;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const bool real = t.row + own_row() + 8 * half < s.real;
        high[half] = real ? t.token[half] + position : 0;
        low[half] = high[half] - window > apart ? high[half] - window : apart;
        pinned[half] = !real ? 0 : s.sees + t.token[half] < s.pinned ? s.sees + t.token[half] : s.pinned;
    }
    const int nearest = t.first + position, farthest = t.last + position;
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
        const float slope = state.slope[t.head[half]];
#pragma unroll
        for (int i = 2 * half; i < keys / 2; i += i % 2 ? 3 : 1) {
            scores[i] = cap(p, scores[i]) - slope * (float)(high[half] - 1 - (i / 4 * 8 + i % 2 + column));
        }
#pragma unroll
        for (int i = 2 * half; i < 8; i += i % 2 ? 3 : 1) {
            const int at = i / 4 * 8 + i % 2 + column;
            const float distance = fabsf((float)(s.position + t.token[half] - at));
            more[i] = cap(p, more[i]) - slope * distance;
            if (p.sink_bias.given && at < p.pinned) {
                more[i] += state.bias[t.head[half] * (int)p.pinned + at];
            }
        }
    }
}

template <typename T, int depth, int keys, int groups, bool pinned, bool featured>
__device__ __forceinline__ void multiply_tile(const sa_cuda_problem &p, const stretch &s, const window_state &state,
                                              const window_memory<depth> &m, uint32_t ring, spot &t,
                                              uint32_t (&raw)[depth / 4])
{
    uint32_t queries[depth / 4];
    constexpr bool roomy = depth == 64 && groups == SA_WINDOW_GROUPS; /* the next queries may come early */
    float scores[keys / 2], more[8], values[depth / 2];
    uint32_t weights[lines<keys> / 4] = {}, others[4];
    int low[2], high[2], held[2];
    take_queries<depth>(p, raw, queries);
    pin(scores);
    pin(more);
    products_begin();
    issue_scores<T, depth, keys, groups>(m, ring, queries, scores);
    if (pinned && !featured) {
        issue_pinned<T, depth>(m, queries, more);
    }
    products_commit();
    products_wait<0>();
    pin(scores);
    pin(more);
    const bool edges = look<keys>(p, s, t, low, high, held);
    if constexpr (featured) {
        if (p.sink_query.data != nullptr) {
            fetch_queries<depth>(p, p.sink_query, s.second, s, t, raw);
            take_queries<depth>(p, raw, queries);
        }
        products_begin();
        issue_pinned<T, depth>(m, queries, more);
        products_commit();
        products_wait<0>();
        pin(more);
        decorate<keys>(p, s, state, t, high, scores, more);
    }
    spot next = t;
    go_on<groups>(p, s, next);
    if (roomy) {
        fetch_queries<depth>(p, p.query, s.query, s, next, raw);
    } else {
        expect_queries<depth>(p, p.query, s.query, s, next);
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
    for (int part = 0; part < keys / 2; part += 24) {
        if (keys / 2 - part >= 24) {
            weigh<T, 24>(scale, anchor, &scores[part], &weights[part / 2], sum);
        } else {
            weigh<T, keys / 2 % 24>(scale, anchor, &scores[part], &weights[part / 2], sum);
        }
    }
    float total[2] = {sum[0] + sum[1], sum[2] + sum[3]};
    pin(total);
    pin(values);
    products_begin();
    issue_values<T, depth, keys, pinned>(m, ring, weights, others, values);
    products_wait<0>();
    pin(values);
    if (!roomy) {
        fetch_queries<depth>(p, p.query, s.query, s, next, raw);
    }
    maximum[0] *= scale;
    maximum[1] *= scale;
    write_rows<T, depth>(p, s, state, t, maximum, total, values);
    t = next;
}

template <typename T, int depth, int keys, int groups>
__device__ __forceinline__ void multiply_stretch(const sa_cuda_problem &p, const stretch &s, window_state &state,
                                                 const window_memory<depth> &m, ring_hold &hold)
{
    const int group = threadIdx.x / 128 - 1;
    const bool featured = p.softcap > 0.0f || p.alibi_slopes.given || p.sink_bias.given || p.sink_query.data != nullptr;
    uint32_t raw[depth / 4];
    spot t = spot_of(p, s, group);
    hold.waited = hold.released = 0;
    if (group < s.tiles) {
        fetch_queries<depth>(p, p.query, s.query, s, t, raw);
    }
#pragma unroll 1
    for (int tile = group; tile < s.tiles; tile += groups) {
        const int shift = shift_of(s, t);
        hold.give_back(state, m.bundles, shift / bundle);
        hold.wait(state, m.bundles, bundles_until<keys>(shift));
        const uint32_t ring = ring_place_of(hold, shift);
        if constexpr (groups > SA_WINDOW_GROUPS) {
            multiply_tile<T, depth, keys, groups, false, false>(p, s, state, m, ring, t, raw);
        } else if (featured) {
            multiply_tile<T, depth, keys, groups, true, true>(p, s, state, m, ring, t, raw);
        } else if (p.pinned > 0 || (depth == 64 && keys == SA_WINDOW_FEWER_KEYS)) { /* a bare one has a kernel of its own */
            multiply_tile<T, depth, keys, groups, true, false>(p, s, state, m, ring, t, raw);
        } else {
            multiply_tile<T, depth, keys, groups, false, false>(p, s, state, m, ring, t, raw);
        }
    }
    hold.give_back(state, m.bundles, bundles_of<keys>(p, s));
}

template <typename T, int depth, int keys, int groups>
__device__ void multiply_stretches(const sa_cuda_problem &p, window_state &state, const window_memory<depth> &m)
{
    ring_hold hold = {};
    for (uint32_t parity = 0;; parity ^= 1) {
        barrier_wait(&state.stretch_full, parity);
        const stretch &s = state.now;
        if (s.tiles == 0) {
            break;
        }
        multiply_stretch<T, depth, keys, groups>(p, s, state, m, hold);
        barrier_arrive(&state.stretch_free);
    }
}

template <typename T, int depth, int keys, int groups> __device__ __forceinline__ void prefill_window(const sa_cuda_problem &p)
{
    extern __shared__ __align__(1024) char memory[];
    window_state &state = *(window_state *)memory;
    const window_memory<depth> m = window_memory_of<depth>(p, memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < m.bundles; i++) {
            barrier_init(&state.full[i], copying_threads / 32);
            barrier_init(&state.free[i], 4 * groups);
        }
        barrier_init(&state.stretch_full, copying_threads);
        barrier_init(&state.stretch_free, 128 * groups);
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x < copying_threads) {
        leave_registers<SA_WINDOW_COPYING_REGISTERS>();
        copy_stretches<depth, keys>(p, state, m);
    } else {
        take_registers<SA_WINDOW_REGISTERS(groups)>();
        multiply_stretches<T, depth, keys, groups>(p, state, m);
    }
}

#else

template <typename T, int depth, int keys, int groups> __device__ void prefill_window(const sa_cuda_problem &)
{
    __trap(); /* choose.c sends nothing here */
}

#endif

} // namespace sa

#define SA_WINDOW(form, name, depth, keys, groups)                                                                                         \
    extern "C" __global__ void __launch_bounds__(SA_WINDOW_THREADS(groups), 1)                                                             \
        prefill_##form##_##name##_##depth##_##keys(const __grid_constant__ sa_cuda_problem p)                                              \
    {                                                                                                                                      \
        sa::prefill_window<sa::name, depth, keys, groups>(p);                                                                              \
    }

SA_WINDOW(window, f16, 64, 136, SA_WINDOW_GROUPS)
SA_WINDOW(window, f16, 64, 144, SA_WINDOW_GROUPS)
SA_WINDOW(window, f16, 128, 136, SA_WINDOW_GROUPS)
SA_WINDOW(window, f16, 128, 144, SA_WINDOW_GROUPS)
SA_WINDOW(window, bf16, 64, 136, SA_WINDOW_GROUPS)
SA_WINDOW(window, bf16, 64, 144, SA_WINDOW_GROUPS)
SA_WINDOW(window, bf16, 128, 136, SA_WINDOW_GROUPS)
SA_WINDOW(window, bf16, 128, 144, SA_WINDOW_GROUPS)
SA_WINDOW(window_bare, f16, 64, 136, SA_WINDOW_MORE_GROUPS)
SA_WINDOW(window_bare, bf16, 64, 136, SA_WINDOW_MORE_GROUPS)
