/* The two warps of Hopper's prefill kernels that find tiles, and copy queries, keys and values. */
#ifndef SA_CUDA_HOPPER_COPY_CUH
#define SA_CUDA_HOPPER_COPY_CUH

#include "hopper.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Finds tile after tile, which takes longer than some slices. */
template <typename F> struct finder {
    const sa_cuda_problem &p;
    hopper_state<F> &s;

    static __device__ __forceinline__ int near(int64_t x)
    {
        return (int)clamp(x, -hopper_far, hopper_far);
    }

    /* How the slices of a tile are cut: they end where the keys end that its rows see. What whole ones leave and few pinned keys are one slice
     * where they find room in it and are scored with the same query; else the pinned ones have slices of their own. */
    __device__ __forceinline__ void cut(group_tile &t)
    {
        t.plain = t.pinned = -1;
        for (int i = 0; i < t.list.count; i++) {
            (t.list.runs[i].kind == run_pinned ? t.pinned : t.plain) = i;
        }
        const range none = {0, 0}, seen = t.plain >= 0 ? t.seen[t.plain] : none, pinned = t.pinned >= 0 ? t.seen[t.pinned] : none;
        const int64_t count = most(seen.high - seen.low, 0), held = most(pinned.high, 0);
        const int left = (int)(count % F::keys);
        const bool second = F::featured && has_second_query(p);
        t.few_pinned = held > 0 && held <= few;
        t.merged = t.few_pinned && left > 0 && left <= F::keys - few && !second;
        t.whole = (int)(count / F::keys) + (left > 0 && !t.merged);
        t.high = seen.high;
        t.pinned_whole = t.merged ? 0 : (int)((held + F::keys - 1) / F::keys);
        t.pinned = held > 0 ? t.pinned : -1;
        t.slices = (int)most(t.whole + t.pinned_whole + t.merged, 1);
        const int64_t reach = t.at.position + t.first_token + 1, place = t.plain >= 0 ? t.list.runs[t.plain].position : 0;
        t.edge = near(reach - place - t.high);
        t.start = near(-t.high);
        t.end = near((t.plain >= 0 ? t.list.runs[t.plain].count : 0) - t.high);
        t.pinned_edge = near(reach);
        t.pinned_end = t.pinned >= 0 ? near(t.list.runs[t.pinned].count) : 0;
    }

    /* Tokens that some query of the row sees: by a window, or as pinned ones. */
    __device__ __forceinline__ void find_seen(group_tile &t)
    {
        const int64_t window = t.widest, last = t.at.position + t.at.query_count - 1;
        const int64_t high = clamp(p.causal ? last + 1 : last + window, 0, t.at.key_count);
        t.seen_by_row = {t.at.key_begin + clamp(t.at.position - window + 1, 0, t.at.key_count), t.at.key_begin + high};
        t.pinned_by_row = {t.at.key_begin, t.at.key_begin + (p.apart ? least(p.pinned, p.causal ? high : t.at.key_count) : 0)};
    }

    __device__ __forceinline__ void publish(cursor &tiles)
    {
        barrier_arrive(&s.tile_full[tiles.stage]); /* every lane: one in the name of a warp is no order to racecheck */
        tiles.step<hopper_tiles>();
    }

    __device__ __forceinline__ void run_all()
    {
        const uint32_t units = units_of(p);
        cursor tiles;
        for (uint32_t round = 0;; round++) {
            bool any;
            const uint32_t unit = unit_of_round(p, units, round, any);
            group_tile &t = s.tiles[tiles.stage];
            barrier_wait(&s.tile_free[tiles.stage], tiles.parity ^ 1);
            if (!any) {
                t.slices = -1;
                publish(tiles);
                break;
            }
            if (find_group_tile(p, unit, F::rows / p.group, t)) {
                const int key = threadIdx.x % 32;
                const bool removed = F::featured && key < p.pinned && is_removed(p, t.kv_head, key);
                t.removed = F::featured ? __ballot_sync(~0u, removed) : 0;
                if (threadIdx.x % 32 == 0) {
                    cut(t);
                    find_seen(t);
                }
                publish(tiles);
            }
        }
    }
};

template <typename F> struct copier {
    const sa_cuda_prefill &call;
    hopper_state<F> &s;
    uint32_t memory;
    int lane;
    cursor at;
    range seen, pinned; /* tokens that some query of the row sees */
    uint32_t removed;   /* but for these of the pinned ones */

    __device__ __forceinline__ void panels(const sa_cuda_map &map, uint32_t target, uint64_t *barrier, int count, int a, int b, int c)
    {
        for (int i = 0; i < count; i++) {
            copy_box(map, target + i * (F::keys * 128), barrier, i * 64, a, b, c);
        }
    }

    /* Keys that no query of the row sees may hold anything, and 0 times anything is not 0: such values are cleared. */
    __device__ __forceinline__ bool is_seen(int64_t token) const
    {
        if (token >= pinned.low && token < pinned.high) {
            return removed == 0 || (removed >> (token - pinned.low) & 1) == 0;
        }
        return token >= seen.low && token < seen.high;
    }

    /* Are some of these tokens of the tensor such? May say so of others. */
    __device__ __forceinline__ bool holds_unseen(int64_t token, int count) const
    {
        const int64_t begin = most(token, 0), end = least(token + count, call.problem.kv_length);
        const bool joined = pinned.high >= seen.low && begin >= least(pinned.low, seen.low) && end <= most(seen.high, pinned.high);
        if (removed != 0 && begin < pinned.high && end > pinned.low) {
            return true;
        }
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
            const bool held = run_index == t.pinned, masked = first < all.low || first + F::keys > all.high || (F::featured && !t.filled);
            s.notes[at.stage] = {(int)(held ? first : first - t.high), held, !held, masked, F::featured && held && has_second_query(call.problem)};
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

    /* A slice by small boxes: few pinned keys, then zeros from beyond the tensor, then from row `used` on the keys from `token` on. */
    __device__ __forceinline__ void boxes(const sa_cuda_map &map, uint32_t target, uint64_t *barrier, int count, const group_tile &t, int used,
                                          int64_t token)
    {
        for (int row = 0; row < F::keys; row += few) {
            const int64_t from = row == 0 ? t.at.key_begin : row >= used ? token + row - used : call.problem.kv_length;
            for (int i = 0; i < count; i++) {
                copy_box(map, target + i * (F::keys * 128) + row * 128, barrier, i * 64, (int)from, t.kv_head, (int)t.at.batch);
            }
        }
    }

    /* Few pinned keys and, where there is room, the keys that whole slices leave. */
    __device__ __forceinline__ void mixed_slice(const group_tile &t)
    {
        const int64_t first = t.merged ? t.high - (int64_t)(t.whole + 1) * F::keys : 0; /* key of row 0, if it were a whole one */
        const int used = t.merged ? (int)(t.seen[t.plain].low - first) / few * few : F::keys;
        const int64_t token = t.merged ? t.at.key_begin + t.list.runs[t.plain].position + first + used : 0;
        barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            s.notes[at.stage] = {t.merged ? (int)(first - t.high) : 0, 1, (int16_t)t.merged, 1, F::featured && has_second_query(call.problem)};
            barrier_expect(&s.keys_full[at.stage], F::key_bytes);
            boxes(call.few_keys, memory + F::key_ring + at.stage * F::key_bytes, &s.keys_full[at.stage], F::key_panels, t, used, token);
        }
        const bool cleared = holds_unseen(t.at.key_begin, few) || holds_unseen(token, F::keys - used);
        uint64_t *barrier = cleared ? &s.dirty : &s.values_full[at.stage];
        barrier_wait(&s.values_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            barrier_expect(barrier, F::value_bytes);
            boxes(call.few_values, memory + F::value_ring + at.stage * F::value_bytes, barrier, F::value_panels, t, used, token);
        }
        if (cleared) {
            settle();
            clear(0, few, t.at.key_begin);
            clear(used, F::keys - used, token);
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

    __device__ __forceinline__ void run_all()
    {
        cursor tiles, loads;
        for (;;) {
            const group_tile &t = s.tiles[tiles.stage];
            barrier_wait(&s.tile_full[tiles.stage], tiles.parity);
            if (t.slices < 0) {
                break;
            }
            seen = t.seen_by_row;
            pinned = t.pinned_by_row;
            removed = t.removed;
            queries(t, loads);
            slices(t);
            barrier_arrive(&s.tile_free[tiles.stage]);
            tiles.step<hopper_tiles>();
        }
    }

    __device__ __forceinline__ void slices(const group_tile &t)
    {
        if (t.whole + t.pinned_whole + t.merged == 0) {
            empty_slice();
        }
        for (int i = 0; i < t.pinned_whole; i++) {
            if (t.few_pinned) {
                mixed_slice(t);
            } else {
                whole_slice(t, t.pinned, (int64_t)i * F::keys);
            }
        }
        for (int i = 0; i < t.whole; i++) {
            whole_slice(t, t.plain, t.high - (int64_t)(i + 1) * F::keys);
        }
        if (t.merged) {
            mixed_slice(t);
        }
    }

    /* Rows that see nothing have a slice of zeros all the same. */
    __device__ __forceinline__ void empty_slice()
    {
        const int beyond = (int)call.problem.kv_length;
        barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
        barrier_wait(&s.values_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            s.notes[at.stage] = {0, 0, 0, 1, 0};
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
