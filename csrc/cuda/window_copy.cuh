/* The warpgroup of window_sm90.cu that copies: what belongs to a kv head once a stretch, its keys and values once each. */
#ifndef SA_CUDA_WINDOW_COPY_CUH
#define SA_CUDA_WINDOW_COPY_CUH

#include "window.cuh"

namespace sa
{

/* A thread's share of a bundle. `again` 0: it lies in one place. */
template <int depth>
__device__ __forceinline__ void copy_bundle(const char *from, int64_t stride, int64_t line, int64_t low, int64_t high, bool within,
                                            uint32_t target, uint32_t again)
{
    constexpr int pieces = depth / 8, step = copying_threads / pieces;
#pragma unroll
    for (int i = 0; i < bundle / step; i++) {
        const bool copied = within && line + i * step >= low && line + i * step < high;
        const char *source = from + i * step * stride;
        copy_or_clear_16(target + i * step * 128, source, copied);
        if (again != 0) {
            copy_or_clear_16(again + i * step * 128, source, copied);
        }
    }
}

/* Where a thread's first piece of a bundle lies: panels of 64 columns, 128-byte swizzle. */
template <int depth> __device__ __forceinline__ uint32_t bundle_offset(uint32_t panel)
{
    const int thread = threadIdx.x % copying_threads, row = thread / (depth / 8), piece = thread % (depth / 8);
    return piece / 8 * panel + row * 128 + ((piece % 8 ^ row % 8) * 16);
}

/* What belongs to the kv head: pinned keys, and numbers of the group's heads. */
template <int depth>
__device__ __forceinline__ void begin_stretch(const sa_cuda_problem &p, const stretch &s, window_state &state, const window_memory<depth> &m)
{
    const int thread = threadIdx.x % copying_threads, row = thread / (depth / 8), piece = thread % (depth / 8);
    const uint32_t offset = bundle_offset<depth>(bundle * 128);
    copy_bundle<depth>(element(p.key, s.batch, s.head, s.key_begin + row, 2) + piece * 16, p.key.token * 2, row, 0, s.pinned,
                       piece * 8 < p.depth, m.pinned_keys + offset, 0);
    for (int i = 0; i < bundle; i += copying_threads / (depth / 8)) {
        const bool copied = row + i < s.pinned && piece * 8 < p.depth_v && !is_removed(p, s.head, row + i);
        copy_or_clear_16(m.pinned_values + offset + i * 128, element(p.value, s.batch, s.head, s.key_begin + row + i, 2) + piece * 16, copied);
    }
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
    barrier_arrive(&state.stretch_full);
    barrier_arrive_copied(&state.pinned_full);
}

template <int depth, int keys> __device__ void copy_stretches(const sa_cuda_problem &p, window_state &state, const window_memory<depth> &m)
{
    const int thread = threadIdx.x % copying_threads, row = thread / (depth / 8), piece = thread % (depth / 8);
    const uint32_t offset = bundle_offset<depth>(m.panel);
    share own = share_of(p);
    ring_cursor at;
    for (uint32_t parity = 1;; parity ^= 1) {
        const stretch s = next_stretch<keys>(p, own);
        barrier_wait(&state.stretch_free, parity);
        begin_stretch<depth>(p, s, state, m);
        if (s.tiles == 0) {
            break;
        }
        const int64_t low = most(s.pinned, s.position - p.common_window + 1); /* pinned keys are not seen from here */
        int64_t line = s.origin + row;
        const char *key = element(p.key, s.batch, s.head, s.key_begin + line, 2) + piece * 16;
        const char *value = element(p.value, s.batch, s.head, s.key_begin + line, 2) + piece * 16;
        const int count = bundles_of<keys>(p, s);
        for (int i = 0; i < count; i++) {
            const uint32_t place = offset + at.stage * (bundle * 128);
            const uint32_t again = at.stage < m.repeated ? place + m.bundles * (bundle * 128) : 0;
            barrier_wait(&state.free[at.stage], at.parity ^ 1);
            copy_bundle<depth>(key, p.key.token * 2, line, low, s.key_count, piece * 8 < p.depth, m.keys + place,
                               again ? m.keys + again : 0);
            copy_bundle<depth>(value, p.value.token * 2, line, low, s.key_count, piece * 8 < p.depth_v, m.values + place,
                               again ? m.values + again : 0);
            barrier_arrive_copied(&state.full[at.stage]);
            at.step(m.bundles);
            line += bundle;
            key += bundle * p.key.token * 2;
            value += bundle * p.value.token * 2;
        }
    }
    copy_async_commit();
    copy_async_wait<0>();
}

} // namespace sa

#endif
