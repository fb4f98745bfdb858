/* The warp of Hopper's prefill kernels that finds tiles and copies queries, keys and values. */
#ifndef SA_CUDA_HOPPER_COPY_CUH
#define SA_CUDA_HOPPER_COPY_CUH

#include "hopper.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* How the slices of a tile are cut: whole ones end where the keys end that its rows see, so that the last begins before the first of them,
 * or, if little is left of it, is a small one. */
struct cut {
    int64_t high;         /* end of the run of plain keys */
    int64_t few_low;      /* first key of a small slice */
    int plain, whole;     /* run of plain keys, its whole slices */
    int pinned, pinned_whole; /* run of pinned keys, -1 for none; its whole slices */
    bool small;
};

template <typename F> __device__ __forceinline__ cut cut_of(const group_tile &t)
{
    cut c = {0, 0, -1, 0, -1, 0, false};
    for (int i = 0; i < t.list.count; i++) {
        (t.list.runs[i].kind == run_pinned ? c.pinned : c.plain) = i;
    }
    const range none = {0, 0}, seen = c.plain >= 0 ? t.seen[c.plain] : none, pinned = c.pinned >= 0 ? t.seen[c.pinned] : none;
    const int64_t count = most(seen.high - seen.low, 0), held = most(pinned.high, 0);
    const bool held_small = held > 0 && held <= few, held_whole = held > 0 && !held_small;
    int left = (int)(count % F::keys);
    c.whole = (int)(count / F::keys);
    if (left > 2 * few || c.whole == 0 || held_whole) {
        c.whole += left > 0;
        left = 0;
    }
    c.high = seen.high;
    c.pinned_whole = held_small ? 0 : (int)((held + F::keys - 1) / F::keys);
    c.small = held_small || left > 0;
    c.few_low = left > 0 ? seen.high - (int64_t)c.whole * F::keys - 2 * few : INT64_MAX;
    c.pinned = held_small || c.pinned_whole > 0 ? c.pinned : -1;
    return c;
}

template <typename F> struct producer {
    const sa_cuda_prefill &call;
    hopper_state<F> &s;
    uint32_t memory;
    int lane;
    cursor at;
    range seen, pinned; /* tokens that some query of the row sees: by a window, or as pinned ones */

    __device__ __forceinline__ void panels(const sa_cuda_map &map, uint32_t target, uint64_t *barrier, int count, int a, int b, int c)
    {
        for (int i = 0; i < count; i++) {
            copy_box(map, target + i * (F::keys * 128), barrier, i * 64, a, b, c);
        }
    }

    /* Keys that no query of the row sees may hold anything, and 0 times anything is not 0: such values are cleared. */
    __device__ __forceinline__ bool is_seen(int64_t token) const
    {
        return (token >= seen.low && token < seen.high) || (token >= pinned.low && token < pinned.high);
    }

    /* Are some of these tokens of the tensor such? May say so of others. */
    __device__ __forceinline__ bool holds_unseen(int64_t token, int count) const
    {
        const int64_t begin = most(token, 0), end = least(token + count, call.problem.kv_length);
        const bool joined = pinned.high >= seen.low && begin >= least(pinned.low, seen.low) && end <= most(seen.high, pinned.high);
        return begin < end && !joined && !(begin >= seen.low && end <= seen.high) && !(begin >= pinned.low && end <= pinned.high);
    }

    /* `from`: row of the slice where the token is. */
    __device__ __forceinline__ void clear(int from, int count, int64_t token)
    {
        for (int i = 0; i < count; i++) {
            if (is_seen(token + i)) {
                continue;
            }
            for (int piece = lane; piece < F::value_panels * 8; piece += 32) {
                const uint32_t to =
                    memory + F::value_ring + at.stage * F::value_bytes + piece / 8 * (F::keys * 128) + (from + i) * 128 + piece % 8 * 16;
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
            }
        }
    }

    __device__ __forceinline__ void whole_slice(const group_tile &t, int run_index, int64_t first)
    {
        const int64_t token = t.at.key_begin + t.list.runs[run_index].position + first;
        const int head = t.kv_head, batch = (int)t.at.batch;
        barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            const range all = t.all[run_index];
            const bool pinned_run = t.list.runs[run_index].kind == run_pinned;
            s.notes[at.stage] = {first, (int16_t)run_index, (int16_t)(first < all.low || first + F::keys > all.high),
                                 F::featured && pinned_run && has_second_query(call.problem)};
            barrier_expect(&s.keys_full[at.stage], F::key_bytes);
            panels(call.key, memory + F::key_ring + at.stage * F::key_bytes, &s.keys_full[at.stage], F::key_panels, (int)token, head, batch);
        }
        const bool cleared = holds_unseen(token, F::keys);
        uint64_t *barrier = cleared ? &s.dirty : &s.values_full[at.stage];
        barrier_wait(&s.values_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            barrier_expect(barrier, F::value_bytes);
            panels(call.value, memory + F::value_ring + at.stage * F::value_bytes, barrier, F::value_panels, (int)token, head, batch);
        }
        if (cleared) {
            settle();
            clear(0, F::keys, token);
            publish();
        }
        at.template step<F::stages>();
    }

    uint32_t dirty_parity = 0;
    __device__ __forceinline__ void settle()
    {
        barrier_wait(&s.dirty, dirty_parity);
        dirty_parity ^= 1;
    }
    __device__ __forceinline__ void publish()
    {
        fence_async();
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&s.values_full[at.stage]);
        }
    }

    /* Rows 0 .. few - 1: pinned keys; then 2 * few keys before the whole slices. What there is not is copied from beyond the end: zeros. */
    __device__ __forceinline__ void small_slice(const group_tile &t, const cut &c)
    {
        const int head = t.kv_head, batch = (int)t.at.batch;
        const int64_t beyond = call.problem.kv_length, held = c.pinned >= 0 ? t.at.key_begin : beyond;
        const bool left = c.few_low != INT64_MAX;
        const int64_t token = left ? t.at.key_begin + t.list.runs[c.plain].position + c.few_low : beyond;
        barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            s.notes[at.stage] = {c.few_low, (int16_t)c.pinned, (int16_t)(left ? c.plain : -1), 0};
            const uint32_t target = memory + F::key_ring + at.stage * F::key_bytes;
            barrier_expect(&s.keys_full[at.stage], F::key_panels * small_keys * 128);
            panels(call.few_keys, target, &s.keys_full[at.stage], F::key_panels, (int)held, head, batch);
            panels(call.few_keys, target + few * 128, &s.keys_full[at.stage], F::key_panels, (int)token, head, batch);
            panels(call.few_keys, target + 2 * few * 128, &s.keys_full[at.stage], F::key_panels, (int)token + few, head, batch);
        }
        const bool cleared = holds_unseen(held, few) || holds_unseen(token, 2 * few);
        uint64_t *barrier = cleared ? &s.dirty : &s.values_full[at.stage];
        barrier_wait(&s.values_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            const uint32_t target = memory + F::value_ring + at.stage * F::value_bytes;
            barrier_expect(barrier, F::value_panels * small_keys * 128);
            panels(call.few_values, target, barrier, F::value_panels, (int)held, head, batch);
            panels(call.few_values, target + few * 128, barrier, F::value_panels, (int)token, head, batch);
            panels(call.few_values, target + 2 * few * 128, barrier, F::value_panels, (int)token + few, head, batch);
        }
        if (cleared) {
            settle();
            clear(0, few, held);
            clear(few, 2 * few, token);
            publish();
        }
        at.template step<F::stages>();
    }

    __device__ __forceinline__ void queries(const group_tile &t, cursor &loads)
    {
        barrier_wait(&s.queries_free[loads.stage], loads.parity ^ 1);
        if (lane == 0) {
            const int group = call.problem.group, tokens = F::rows / group, token = (int)t.at.query_begin + t.first_token;
            const bool second = F::featured && has_second_query(call.problem);
            barrier_expect(&s.queries_full[loads.stage], F::key_panels * tokens * group * 128 * (second ? 2 : 1));
            for (int i = 0; i < F::key_panels; i++) {
                const uint32_t target = memory + loads.stage * F::query_parts * F::query_bytes + i * (F::rows * 128);
                copy_box(call.query, target, &s.queries_full[loads.stage], i * 64, t.kv_head * group, token, (int)t.at.batch);
                if (second) {
                    copy_box(call.second_query, target + F::query_bytes, &s.queries_full[loads.stage], i * 64, t.kv_head * group, token,
                             (int)t.at.batch);
                }
            }
        }
        loads.template step<F::query_tiles>();
    }

    /* Tokens that some query of the row sees: by a window, or as pinned ones. */
    __device__ __forceinline__ void find_seen(const group_tile &t)
    {
        const sa_cuda_problem &p = call.problem;
        int64_t window = 0;
        for (int i = lane; i < p.group; i += 32) {
            window = most(window, t.window[i]);
        }
        window = -reduce_least(-window);
        const int64_t last = t.at.position + t.at.query_count - 1;
        const int64_t high = clamp(p.causal ? last + 1 : last + least(window, no_window), 0, t.at.key_count);
        seen = {t.at.key_begin + clamp(t.at.position - window + 1, 0, t.at.key_count), t.at.key_begin + high};
        pinned = {t.at.key_begin, t.at.key_begin + (p.apart ? least(p.pinned, p.causal ? high : t.at.key_count) : 0)};
    }

    __device__ __forceinline__ void run_all()
    {
        const sa_cuda_problem &p = call.problem;
        const uint32_t units = units_of(p);
        cursor tiles, loads;
        for (uint32_t round = 0;; round++) {
            bool any;
            const uint32_t unit = unit_of_round(p, units, round, any);
            if (!any) {
                break;
            }
            group_tile &t = s.tiles[tiles.stage];
            barrier_wait(&s.tile_free[tiles.stage], tiles.parity ^ 1);
            if (!find_group_tile(p, unit, F::rows / p.group, t)) {
                continue;
            }
            const cut c = cut_of<F>(t);
            const int slices = c.whole + c.pinned_whole;
            if (lane == 0) {
                s.slices[tiles.stage] = slices > 0 ? slices : 1;
                s.small[tiles.stage] = c.small;
            }
            publish_tile(tiles);
            find_seen(t);
            queries(t, loads);
            if (slices == 0) {
                empty_slice();
            }
            for (int i = 0; i < c.pinned_whole; i++) {
                whole_slice(t, c.pinned, (int64_t)i * F::keys);
            }
            for (int i = 0; i < c.whole || i == 0; i++) {
                if (i < c.whole) {
                    whole_slice(t, c.plain, c.high - (int64_t)(i + 1) * F::keys);
                }
                if (i == 0 && c.small) {
                    small_slice(t, c);
                }
            }
        }
        barrier_wait(&s.tile_free[tiles.stage], tiles.parity ^ 1);
        if (lane == 0) {
            s.slices[tiles.stage] = -1;
        }
        publish_tile(tiles);
    }

    __device__ __forceinline__ void publish_tile(cursor &tiles)
    {
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&s.tile_full[tiles.stage]);
        }
        tiles.step<2>();
    }

    /* Rows that see nothing have a slice of zeros all the same. */
    __device__ __forceinline__ void empty_slice()
    {
        const int beyond = (int)call.problem.kv_length;
        barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
        barrier_wait(&s.values_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            s.notes[at.stage] = {0, -1, 1, 0};
            barrier_expect(&s.keys_full[at.stage], F::key_bytes);
            panels(call.key, memory + F::key_ring + at.stage * F::key_bytes, &s.keys_full[at.stage], F::key_panels, beyond, 0, 0);
            barrier_expect(&s.values_full[at.stage], F::value_bytes);
            panels(call.value, memory + F::value_ring + at.stage * F::value_bytes, &s.values_full[at.stage], F::value_panels, beyond, 0, 0);
        }
        at.template step<F::stages>();
    }
};

#endif

} // namespace sa

#endif
