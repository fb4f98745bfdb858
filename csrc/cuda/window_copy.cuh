/* The warpgroup of window_sm90.cu that copies: what belongs to a kv head once a stretch, its keys and values once each. */
#ifndef SA_CUDA_WINDOW_COPY_CUH
#define SA_CUDA_WINDOW_COPY_CUH

#include "window.cuh"

namespace sa
{

/* A thread's share of a bundle. `all`: every word of it is there. `again` 0: it lies in one place. */
template <int depth, bool all>
__device__ __forceinline__ void copy_words(const char *from, int64_t stride, int64_t line, int64_t low, int64_t high, bool within,
                                           uint32_t target, uint32_t again)
{
    constexpr int words = depth / 2, step = copying_threads / words;
#pragma unroll
    for (int i = 0; i < bundle / step; i++) {
        const bool copied = all || (within && line + i * step >= low && line + i * step < high);
        const uint32_t turned = (i * step % 8) * 16; /* the swizzle */
        copy_or_clear_4((target ^ turned) + i * step * 128, from, copied);
        if (again != 0) {
            copy_or_clear_4((again ^ turned) + i * step * 128, from, copied);
        }
        from += step * stride;
    }
}

template <int depth>
__device__ __forceinline__ void copy_bundle(const char *from, int64_t stride, int64_t line, int64_t low, int64_t high, int64_t width,
                                            uint32_t target, uint32_t again)
{
    const int row = threadIdx.x % copying_threads / (depth / 2), word = threadIdx.x % copying_threads % (depth / 2);
    if (width == depth && line - row >= low && line - row + bundle <= high) {
        copy_words<depth, true>(from, stride, line, low, high, true, target, again);
    } else {
        copy_words<depth, false>(from, stride, line, low, high, word * 2 < width, target, again);
    }
}

/* Where a thread's first word of a bundle lies: panels of 64 columns, 128-byte swizzle, and within 32 columns woven: word 4 a + b of them
 * lies where word 4 b + a would. */
template <int depth> __device__ __forceinline__ uint32_t bundle_offset(uint32_t panel)
{
    const int thread = threadIdx.x % copying_threads, row = thread / (depth / 2), word = thread % (depth / 2);
    const int piece = word % 32 / 16 * 4 + word % 4;
    return word / 32 * panel + row * 128 + ((piece ^ row % 8) * 16) + word % 16 / 4 * 4;
}

/* What belongs to the kv head: pinned keys, and numbers of the group's heads. */
template <int depth>
__device__ __forceinline__ void begin_stretch(const sa_cuda_problem &p, const stretch &s, window_state &state, const window_memory<depth> &m)
{
    const int thread = threadIdx.x % copying_threads, row = thread / (depth / 2), word = thread % (depth / 2);
    const uint32_t offset = bundle_offset<depth>(bundle * 128);
    copy_bundle<depth>(element(p.key, s.batch, s.head, s.key_begin + row, 2) + word * 4, p.key.token * 2, row, 0, s.pinned,
                       p.depth, m.pinned_keys + offset, 0);
    copy_bundle<depth>(element(p.value, s.batch, s.head, s.key_begin + row, 2) + word * 4, p.value.token * 2, row, 0, s.pinned,
                       p.depth_v, m.pinned_values + offset, 0);
    if (thread == 0) {
        state.now = s;
    }
    if (thread < p.group) {
        state.sink[thread] = sink_of(p, s.head * p.group + thread);
        state.slope[thread] = p.alibi_slopes.given ? number_at(p.alibi_slopes, s.batch, s.head * p.group + thread) * log2e : 0.0f;
    }
    for (int i = thread; p.sink_bias.given && i < p.group * (int)p.pinned; i += copying_threads) {
        state.bias[i] = number_at(p.sink_bias, s.head * p.group + i / p.pinned, i % p.pinned) * log2e;
    }
    barrier_arrive(&state.stretch_full); /* the copies are part of the first bundle */
}

/* Bundles on their way. The tensor cores may read a bundle when who wrote it saw it land and said so: some bundles later, so that copies
 * overlap, or at once where there is nothing to copy. */
struct landing {
    static constexpr int most = 4;
    ring_cursor first;
    int count = 0;
    __device__ __forceinline__ void announce(window_state &state, int bundles)
    {
        fence_async();
        __syncwarp();
        release(&state.full[first.stage]);
        first.step(bundles);
        count--;
    }
    __device__ __forceinline__ void add(window_state &state, int bundles)
    {
        copy_async_commit();
        if (++count > most) {
            copy_async_wait<most>();
            announce(state, bundles);
        }
    }
    __device__ __forceinline__ void finish(window_state &state, int bundles)
    {
        copy_async_wait<0>();
#pragma unroll 1
        while (count > 0) {
            announce(state, bundles);
        }
    }
};

template <int depth, int keys> __device__ void copy_stretches(const sa_cuda_problem &p, window_state &state, const window_memory<depth> &m)
{
    const int thread = threadIdx.x % copying_threads, row = thread / (depth / 2), word = thread % (depth / 2);
    const uint32_t offset = bundle_offset<depth>(m.panel);
    share own = share_of(p);
    ring_cursor at;
    landing landing;
    for (uint32_t parity = 1;; parity ^= 1) {
        const stretch s = next_stretch<keys>(p, own);
        barrier_wait(&state.stretch_free, parity);
        begin_stretch<depth>(p, s, state, m);
        if (s.tiles == 0) {
            break;
        }
        const int64_t low = most(0, s.position - p.common_window + 1);
        int64_t line = s.origin + row;
        const char *key = element(p.key, s.batch, s.head, s.key_begin + line, 2) + word * 4;
        const char *value = element(p.value, s.batch, s.head, s.key_begin + line, 2) + word * 4;
        const int count = bundles_of<keys>(p, s);
        for (int i = 0; i < count; i++) {
            const uint32_t place = offset + at.stage * (bundle * 128);
            const uint32_t again = at.stage < m.repeated ? place + m.bundles * (bundle * 128) : 0;
            if (!barrier_is_over(&state.free[at.stage], at.parity ^ 1)) {
                landing.finish(state, m.bundles);
                barrier_wait(&state.free[at.stage], at.parity ^ 1);
            }
            copy_bundle<depth>(key, p.key.token * 2, line, low, s.key_count, p.depth, m.keys + place,
                               again ? m.keys + again : 0);
            copy_bundle<depth>(value, p.value.token * 2, line, low, s.key_count, p.depth_v, m.values + place,
                               again ? m.values + again : 0);
            landing.add(state, m.bundles);
            at.step(m.bundles);
            line += bundle;
            key += bundle * p.key.token * 2;
            value += bundle * p.value.token * 2;
        }
        landing.finish(state, m.bundles);
    }
}

} // namespace sa

#endif
