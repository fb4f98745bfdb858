/* Attention of many query rows on Hopper (draft) */
#include "finish.cuh"
#include "tma.cuh"

#ifndef SA_TURNS
#define SA_TURNS 1 /* warpgroups multiply by turns */
#endif
#ifndef SA_LAZY
#define SA_LAZY 8 /* log2 by which a maximum may be exceeded before what was summed is scaled */
#endif
#ifndef SA_QREG
#define SA_QREG 0 /* queries in registers */
#endif
#ifndef SA_POLY
#define SA_POLY 0 /* of 16 exponentials so many by polynomial */
#endif
#ifndef SA_PREGS
#define SA_PREGS 40
#endif
#ifndef SA_PREGS3
#define SA_PREGS3 32
#endif
#ifndef SA_SECTION
#define SA_SECTION 0 /* kv heads worked on at a time; 0: all */
#endif

namespace sa
{

constexpr int few = SA_HOPPER_FEW, small_keys = 3 * few;

/* Sizes of a kernel: rows of a tile, depth of keys and of values, keys of a slice, slices and tiles of queries held. */
template <int rows_, int depth_, int width_, int keys_, int stages_, int query_tiles_> struct form {
    static constexpr int rows = rows_, depth = depth_, width = width_, keys = keys_, stages = stages_, query_tiles = query_tiles_;
    static constexpr int groups = rows / 64, warps = 4 * groups, threads = 128 * (groups + 1);
    static constexpr int key_panels = (depth + 63) / 64, value_panels = (width + 63) / 64;
    static constexpr uint32_t query_bytes = key_panels * rows * 128, key_bytes = key_panels * keys * 128, value_bytes = value_panels * keys * 128;
    static constexpr uint32_t key_ring = query_tiles * query_bytes, value_ring = key_ring + stages * key_bytes;
    static constexpr uint32_t shared = value_ring + stages * value_bytes;
};

/* What the consumers have to know of a slice. */
struct slice_note {
    int64_t first;
    int32_t run, masked;
};

template <typename F> struct hopper_state {
    tile<F::rows> tiles[2];
    slice_note notes[F::stages];
    int slices[2], small[2]; /* of a tile: whole slices, and whether a small one comes first */
    uint64_t keys_full[F::stages], keys_free[F::stages], values_full[F::stages], values_free[F::stages];
    uint64_t tile_full[2], tile_free[2], queries_full[F::query_tiles], queries_free[F::query_tiles], dirty;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct cursor {
    int stage = 0;
    uint32_t parity = 0;
    template <int stages> __device__ __forceinline__ void step()
    {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* The unit that this CTA takes in round `round`; >= units: none. Long tiles come first, and every other round goes backwards. */
__device__ __forceinline__ uint32_t unit_of_round(const sa_cuda_problem &p, uint32_t units, uint32_t round, bool &any)
{
    const uint32_t place = round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    any = place < units;
    if (p.sequences > 0) {
        return place;
    }
    const uint32_t tiles = (uint32_t)p.row_tiles, bands = units / tiles;
    constexpr uint32_t side = SA_SECTION > 0 ? SA_SECTION : 1;
    if (SA_SECTION > 0 && bands % side == 0) {
        const uint32_t section = place / (tiles * side), within = place % (tiles * side);
        return (section * side + within % side) * tiles + tiles - 1 - within / side;
    }
    return place % bands * tiles + tiles - 1 - place / bands;
}

__device__ __forceinline__ uint32_t units_of(const sa_cuda_problem &p)
{
    return (uint32_t)(p.row_tiles * p.heads_kv * (p.sequences > 0 ? 1 : p.batch));
}

/* --- the warp that copies ------------------------------------------------------------------------------------------------------------ */

/* How the slices of a tile are cut: whole ones end where the keys end that its rows see, so that the last begins before the first of them,
 * or, if little is left of it, is a small one. */
struct cut {
    int64_t high;         /* end of the run of plain keys */
    int64_t few_low;      /* first key of a small slice */
    int plain, whole;     /* run of plain keys, its whole slices */
    int pinned, pinned_whole; /* run of pinned keys, -1 for none; its whole slices */
    bool small;
};

template <typename F> __device__ __forceinline__ cut cut_of(const tile<F::rows> &t)
{
    cut c = {0, 0, -1, 0, -1, 0, false};
    for (int i = 0; i < t.list.count; i++) {
        (t.list.runs[i].kind == run_pinned ? c.pinned : c.plain) = i;
    }
    const range none = {0, 0}, seen = c.plain >= 0 ? t.seen[c.plain] : none, pinned = c.pinned >= 0 ? t.seen[c.pinned] : none;
    const int64_t count = most(seen.high - seen.low, 0), held = most(pinned.high, 0);
    const bool held_small = held > 0 && held <= few && count > 0, held_whole = held > 0 && !held_small;
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

    __device__ __forceinline__ void whole_slice(const tile<F::rows> &t, int run_index, int64_t first)
    {
        const int64_t token = t.at.key_begin + t.list.runs[run_index].position + first;
        const int head = t.kv_head, batch = (int)t.at.batch;
        barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            const range all = t.all[run_index];
            s.notes[at.stage] = {first, run_index, first < all.low || first + F::keys > all.high};
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
    __device__ __forceinline__ void small_slice(const tile<F::rows> &t, const cut &c)
    {
        const int head = t.kv_head, batch = (int)t.at.batch;
        const int64_t beyond = call.problem.kv_length, held = c.pinned >= 0 ? t.at.key_begin : beyond;
        const bool left = c.few_low != INT64_MAX;
        const int64_t token = left ? t.at.key_begin + t.list.runs[c.plain].position + c.few_low : beyond;
        barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
        if (lane == 0) {
            s.notes[at.stage] = {c.few_low, c.pinned, left ? c.plain : -1};
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

    __device__ __forceinline__ void queries(const tile<F::rows> &t, cursor &loads)
    {
        barrier_wait(&s.queries_free[loads.stage], loads.parity ^ 1);
        if (lane == 0) {
            const int group = call.problem.group, tokens = F::rows / group;
            barrier_expect(&s.queries_full[loads.stage], F::key_panels * tokens * group * 128);
            for (int i = 0; i < F::key_panels; i++) {
                copy_box(call.query, memory + loads.stage * F::query_bytes + i * (F::rows * 128), &s.queries_full[loads.stage], i * 64,
                         t.kv_head * group, (int)(t.at.query_begin + (uint32_t)t.first_row / (uint32_t)group), (int)t.at.batch);
            }
        }
        loads.template step<F::query_tiles>();
    }

    /* Tokens that some query of the row sees: by a window, or as pinned ones. */
    __device__ __forceinline__ void find_seen(const tile<F::rows> &t)
    {
        const sa_cuda_problem &p = call.problem;
        int64_t window = 0;
        for (int i = lane; i < t.real; i += 32) {
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
        const int rows = F::rows / p.group * p.group;
        cursor tiles, loads;
        for (uint32_t round = 0;; round++) {
            bool any;
            const uint32_t unit = unit_of_round(p, units, round, any);
            if (!any) {
                break;
            }
            tile<F::rows> &t = s.tiles[tiles.stage];
            barrier_wait(&s.tile_free[tiles.stage], tiles.parity ^ 1);
            if (!find_tile(p, unit, F::keys, t, rows)) {
                continue;
            }
            __syncwarp();
            const cut c = cut_of<F>(t);
            for (int i = lane; i < t.real; i += 32) {
                t.sink[i] = sink_of(p, t.head[i]);
            }
            const int slices = c.whole + c.pinned_whole;
            if (lane == 0) {
                s.slices[tiles.stage] = slices > 0 ? slices : 1;
                s.small[tiles.stage] = c.small;
            }
            publish_tile(tiles);
            find_seen(t);
            queries(t, loads);
            for (int i = 0; i < c.pinned_whole; i++) {
                whole_slice(t, c.pinned, (int64_t)i * F::keys);
            }
            for (int i = 1; i <= c.whole; i++) {
                whole_slice(t, c.plain, c.high - (int64_t)i * F::keys);
                if (i == 1 && c.small && c.pinned_whole == 0) {
                    small_slice(t, c);
                }
            }
            if (slices == 0) {
                empty_slice();
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
            s.notes[at.stage] = {0, -1, 1};
            barrier_expect(&s.keys_full[at.stage], F::key_bytes);
            panels(call.key, memory + F::key_ring + at.stage * F::key_bytes, &s.keys_full[at.stage], F::key_panels, beyond, 0, 0);
            barrier_expect(&s.values_full[at.stage], F::value_bytes);
            panels(call.value, memory + F::value_ring + at.stage * F::value_bytes, &s.values_full[at.stage], F::value_panels, beyond, 0, 0);
        }
        at.template step<F::stages>();
    }
};

/* --- the warpgroups that multiply -------------------------------------------------------------------------------------------------- */

/* 2^x on the multiplication pipes, right to 1e-4: for x from -126 on, what is less is as little. */
__device__ __forceinline__ float exp2_polynomial(float x)
{
    x = fmaxf(x, -126.0f);
    const float shifted = x + 12582912.0f, rest = x - (shifted - 12582912.0f);
    float y = fmaf(rest, 0.0554906f, 0.2402265f);
    y = fmaf(rest, y, 0.6931472f);
    y = fmaf(rest, y, 1.0f);
    return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

/* What a thread knows of its two rows: largest dot product (or one near it), and the sum over its own columns. */
struct rows_state {
    float maximum[2], sum[2];
};

/* From dot products to weights, and the factor for what was summed before. */
template <int keys> __device__ __forceinline__ void weigh(float scale, float (&scores)[keys / 2], rows_state &state, float (&factor)[2])
{
    float larger[2] = {state.maximum[0], state.maximum[1]}, anchor[2];
#pragma unroll
    for (int n = 0; n < keys / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            larger[half] = fmaxf(larger[half], fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        larger[half] = fmaxf(larger[half], __shfl_xor_sync(~0u, larger[half], 1));
        larger[half] = fmaxf(larger[half], __shfl_xor_sync(~0u, larger[half], 2));
        const float old = state.maximum[half];
        const float next = (larger[half] - old) * scale > (float)SA_LAZY ? larger[half] : old;
        factor[half] = old == -infinity ? 0.0f : exp2_fast((old - next) * scale);
        state.maximum[half] = next;
        anchor[half] = anchor_of(next) * scale;
        state.sum[half] *= factor[half];
    }
    float odd[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < keys / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float &x = scores[4 * n + 2 * half], &y = scores[4 * n + 2 * half + 1];
            x = fmaf(x, scale, -anchor[half]);
            y = fmaf(y, scale, -anchor[half]);
            const int place = (n * 4 + 2 * half) % 16;
            x = place % 16 < SA_POLY && place % 2 == 0 ? exp2_polynomial(x) : exp2_fast(x);
            y = (place + 1) % 16 < SA_POLY ? exp2_polynomial(y) : exp2_fast(y);
            state.sum[half] += x;
            odd[half] += y;
        }
    }
    state.sum[0] += odd[0];
    state.sum[1] += odd[1];
}

template <typename T, int keys> __device__ __forceinline__ void pack_weights(const float (&scores)[keys / 2], uint32_t (&weights)[keys / 4])
{
#pragma unroll
    for (int i = 0; i < keys / 4; i++) {
        weights[i] = T::pack(scores[2 * i], scores[2 * i + 1]);
    }
}

template <typename T, typename F> struct consumer {
    const sa_cuda_problem &p;
    hopper_state<F> &s;
    uint32_t memory;
    int group, first_row;
    float scale;
    cursor at, loads;
    uint64_t queries, key_ring, value_ring;
#if SA_QREG
    uint32_t query_words[F::depth / 4];
#endif

    __device__ __forceinline__ void release(uint64_t *barrier)
    {
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(barrier);
        }
    }

    template <int keys> __device__ __forceinline__ void issue_keys(float (&scores)[keys / 2])
    {
        const uint64_t keys_at = key_ring + at.stage * (F::key_bytes / 16);
#pragma unroll
        for (int step = 0; step < F::depth / 16; step++) {
            const int panel = step / 4, within = step % 4 * 2;
#if SA_QREG
            const uint32_t *const from = &query_words[4 * step];
#else
            const uint64_t from = queries + panel * (F::rows * 8) + within;
#endif
            if (step == 0) {
                wide_product<T, keys>::begin(scores, from, keys_at);
            } else {
                wide_product<T, keys>::keys(scores, from, keys_at + panel * (F::keys * 8) + within);
            }
        }
        products_commit();
    }

    template <int keys>
    __device__ __forceinline__ void issue_values(const uint32_t (&weights)[keys / 4], int stage, float (&values)[F::width / 2])
    {
        const uint64_t values_at = value_ring + stage * (F::value_bytes / 16);
#pragma unroll
        for (int step = 0; step < keys / 16; step++) {
            wide_product<T, F::width>::values(values, &weights[4 * step], values_at + step * 128);
        }
        products_commit();
    }

    /* Hides what a row does not see of a slice. */
    __device__ __forceinline__ void hide(const tile<F::rows> &t, const slice_note &note, float (&scores)[F::keys / 2])
    {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int low = 0, high = 0;
            if (note.run >= 0) {
                row_range(p, t, t.list.runs[note.run], first_row + 8 * half, note.first, low, high);
            }
            low -= column;
            high -= column;
#pragma unroll
            for (int n = 0; n < F::keys / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = scores[4 * n + 2 * half + e];
                    x = n * 8 + e >= low && n * 8 + e < high ? x : -infinity;
                }
            }
        }
    }

    __device__ __forceinline__ void hide_small(const tile<F::rows> &t, const slice_note &note, float (&scores)[small_keys / 2])
    {
        const int column = threadIdx.x % 4 * 2, pinned = note.run, plain = note.masked;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int held_low = 0, held = 0, low = 0, high = 0;
            if (pinned >= 0) {
                row_range(p, t, t.list.runs[pinned], first_row + 8 * half, 0, held_low, held);
            }
            if (plain >= 0) {
                row_range(p, t, t.list.runs[plain], first_row + 8 * half, note.first, low, high);
            }
#pragma unroll
            for (int n = 0; n < small_keys / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int at_key = n * 8 + e + column - (n * 8 < few ? 0 : few);
                    float &x = scores[4 * n + 2 * half + e];
                    x = n * 8 < few ? (at_key < held ? x : -infinity) : at_key >= low && at_key < high ? x : -infinity;
                }
            }
        }
    }

    __device__ __forceinline__ void take_turn()
    {
        if (SA_TURNS) {
            meet(2 + group, 256);
        }
    }

    __device__ __forceinline__ void give_turn()
    {
        if (SA_TURNS) {
            call(2 + (group + 1) % F::groups, 256);
        }
    }

    /* The next slice's keys are issued before the values of the one before, whichever tile that belongs to; afterwards its scores are there. */
    __device__ __forceinline__ slice_note issue(float (&scores)[F::keys / 2], const uint32_t (&weights)[F::keys / 4], cursor before, bool waits,
                                                float (&values)[F::width / 2])
    {
        barrier_wait(&s.keys_full[at.stage], at.parity);
        const slice_note note = s.notes[at.stage];
        if (waits) {
            barrier_wait(&s.values_full[before.stage], before.parity);
        }
        take_turn();
        pin(values);
        products_begin();
        issue_keys<F::keys>(scores);
        issue_values<F::keys>(weights, before.stage, values);
        give_turn();
        return note;
    }

    /* Waits for the values and scales them. ptxas moves a wait to the top of its block, above the softmax that it should follow, so that
     * nothing overlaps; it does not move it above a branch. */
    __device__ __forceinline__ void finish_values(float (&scores)[F::keys / 2], const float (&factor)[2], float (&values)[F::width / 2])
    {
        pin(scores);
        if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
            products_wait<0>();
            pin(values);
#pragma unroll
            for (int i = 0; i < F::width / 2; i++) {
                values[i] *= factor[i % 4 / 2];
            }
        } else {
            products_wait<0>();
            pin(values);
        }
    }

    /* A tile begins while the one before ends. */
    __device__ __forceinline__ slice_note change_tile(float (&scores)[F::keys / 2], const uint32_t (&weights)[F::keys / 4], cursor before,
                                                      int tile_before, rows_state &state, float (&values)[F::width / 2])
    {
        const slice_note note = issue(scores, weights, before, tile_before >= 0, values);
        products_wait<0>();
        pin(scores);
        pin(values);
        release(&s.keys_free[at.stage]);
        if (tile_before >= 0) {
            release(&s.values_free[before.stage]);
            write_rows(s.tiles[tile_before], state, values);
            __syncwarp();
            release(&s.tile_free[tile_before]);
        }
        state = {{-infinity, -infinity}, {0.0f, 0.0f}};
        return note;
    }

    /* Scores of a small slice; the state learns their maximum. */
    __device__ __forceinline__ void score_few(const tile<F::rows> &t, float (&scores)[small_keys / 2], rows_state &state)
    {
        barrier_wait(&s.keys_full[at.stage], at.parity);
        const slice_note note = s.notes[at.stage];
        products_begin();
        issue_keys<small_keys>(scores);
        products_wait<0>();
        pin(scores);
        release(&s.keys_free[at.stage]);
        hide_small(t, note, scores);
#pragma unroll
        for (int i = 0; i < small_keys / 2; i++) {
            state.maximum[i % 4 / 2] = fmaxf(state.maximum[i % 4 / 2], scores[i]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            state.maximum[half] = fmaxf(state.maximum[half], __shfl_xor_sync(~0u, state.maximum[half], 1));
            state.maximum[half] = fmaxf(state.maximum[half], __shfl_xor_sync(~0u, state.maximum[half], 2));
        }
    }

    /* Their weights, and the values. */
    __device__ __forceinline__ void add_few(float (&scores)[small_keys / 2], rows_state &state, float (&values)[F::width / 2])
    {
        const float anchor[2] = {anchor_of(state.maximum[0]) * scale, anchor_of(state.maximum[1]) * scale};
        uint32_t weights[small_keys / 4];
#pragma unroll
        for (int i = 0; i < small_keys / 2; i++) {
            scores[i] = exp2_fast(fmaf(scores[i], scale, -anchor[i % 4 / 2]));
            state.sum[i % 4 / 2] += scores[i];
        }
        pack_weights<T, small_keys>(scores, weights);
        barrier_wait(&s.values_full[at.stage], at.parity);
        pin(values);
        products_begin();
        issue_values<small_keys>(weights, at.stage, values);
        products_wait<0>();
        pin(values);
        release(&s.values_free[at.stage]);
    }

    __device__ __forceinline__ void run_all()
    {
        cursor tiles, before;
        int tile_before = -1;
        float scores[F::keys / 2], values[F::width / 2], factor[2];
        uint32_t weights[F::keys / 4];
        rows_state state = {};
#pragma unroll
        for (int i = 0; i < F::keys / 4; i++) {
            weights[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < F::width / 2; i++) {
            values[i] = 0.0f;
        }
        key_ring = describe_panels(memory + F::key_ring, 16, 1024);
        value_ring = describe_panels(memory + F::value_ring, F::keys * 128, 1024);
        if (SA_TURNS && group == F::groups - 1) {
            call(2, 256);
        }
        for (;;) {
            barrier_wait(&s.tile_full[tiles.stage], tiles.parity);
            const tile<F::rows> &t = s.tiles[tiles.stage];
            const int count = s.slices[tiles.stage];
            if (count < 0) {
                break;
            }
            barrier_wait(&s.queries_full[loads.stage], loads.parity);
            queries = describe_panels(memory + loads.stage * F::query_bytes + group * 64 * 128, 16, 1024);
#if SA_QREG
            load_queries();
            release(&s.queries_free[loads.stage]);
#endif
            const bool small = s.small[tiles.stage];
            slice_note note = change_tile(scores, weights, before, tile_before, state, values);
            const cursor first = at;
            float few_scores[small_keys / 2];
            if (small) {
                at.template step<F::stages>();
                score_few(t, few_scores, state);
            }
            if (note.masked) {
                hide(t, note, scores);
            }
            weigh<F::keys>(scale, scores, state, factor);
            pack_weights<T, F::keys>(scores, weights);
#pragma unroll
            for (int i = 0; i < F::width / 2; i++) { /* not earlier: registers */
                values[i] = 0.0f;
            }
            if (small) {
                add_few(few_scores, state, values);
            }
            before = first;
#pragma unroll 1
            for (int slice = 1; slice < count; slice++) {
                at.template step<F::stages>();
                note = issue(scores, weights, before, true, values);
                products_wait<1>();
                pin(scores);
                release(&s.keys_free[at.stage]);
                if (note.masked) {
                    hide(t, note, scores);
                }
                weigh<F::keys>(scale, scores, state, factor);
                finish_values(scores, factor, values);
                release(&s.values_free[before.stage]);
                pack_weights<T, F::keys>(scores, weights);
                before = at;
            }
#if !SA_QREG
            release(&s.queries_free[loads.stage]);
#endif
            loads.template step<F::query_tiles>();
            at.template step<F::stages>();
            tile_before = tiles.stage;
            tiles.step<2>();
        }
        if (tile_before >= 0) {
            barrier_wait(&s.values_full[before.stage], before.parity);
            pin(values);
            products_begin();
            issue_values<F::keys>(weights, before.stage, values);
            products_wait<0>();
            pin(values);
            write_rows(s.tiles[tile_before], state, values);
        }
    }

#if SA_QREG
    __device__ __forceinline__ void load_queries()
    {
        const int lane = threadIdx.x % 32, row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
        const uint32_t from = memory + loads.stage * F::query_bytes + row * 128;
#pragma unroll
        for (int step = 0; step < F::depth / 16; step++) {
            const int piece = step % 4 * 2 + lane / 16;
            uint32_t four[4];
            load_matrices(four, from + step / 4 * (F::rows * 128) + (piece ^ row % 8) * 16);
            query_words[4 * step] = four[0];
            query_words[4 * step + 1] = four[1];
            query_words[4 * step + 2] = four[2];
            query_words[4 * step + 3] = four[3];
        }
    }
#endif

    /* Four words of each of four lanes, transposed: lane i gets word i of all. */
    __device__ __forceinline__ void transpose(uint32_t (&w)[4])
    {
        const int lane = threadIdx.x % 4;
        const bool odd = lane & 1, upper = lane & 2;
        const uint32_t a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
        const uint32_t x0 = odd ? a : w[0], x1 = odd ? w[1] : a, x2 = odd ? b : w[2], x3 = odd ? w[3] : b;
        const uint32_t c = __shfl_xor_sync(~0u, upper ? x0 : x2, 2), d = __shfl_xor_sync(~0u, upper ? x1 : x3, 2);
        w[0] = upper ? c : x0;
        w[1] = upper ? d : x1;
        w[2] = upper ? x2 : c;
        w[3] = upper ? x3 : d;
    }

    /* One of this thread's two rows; `written` by the whole quad or by none of it. */
    __device__ __forceinline__ void write_row(const tile<F::rows> &t, int row, bool written, const float (&values)[F::width / 2], int half,
                                              float factor)
    {
        const int lane = threadIdx.x % 4, width = (int)p.depth_v;
        uint16_t *to = nullptr;
        if (written) {
            to = (uint16_t *)element(p.output, t.at.batch, t.head[row], t.at.query_begin + t.token[row], 2);
        }
        const bool pieces = (((uintptr_t)to | (uintptr_t)(width * 2)) & 15) == 0;
#pragma unroll
        for (int block = 0; block < F::width / 32; block++) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = block * 4 + i;
                w[i] = T::pack(values[4 * n + 2 * half] * factor, values[4 * n + 2 * half + 1] * factor);
            }
            transpose(w);
            const int d = block * 32 + lane * 8;
            if (!written || d >= width) {
                continue;
            }
            if (pieces) {
                *(uint4 *)(to + d) = make_uint4(w[0], w[1], w[2], w[3]);
            } else {
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    if (d + e < width) {
                        to[d + e] = (uint16_t)(w[e / 2] >> (e % 2 * 16));
                    }
                }
            }
        }
    }

    /* Closes this thread's two rows and writes them; rows of padding are 0 with lse -inf. */
    __device__ __forceinline__ void write_rows(const tile<F::rows> &t, const rows_state &state, float (&values)[F::width / 2])
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 8 * half;
            float sum = state.sum[half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            softmax_end end = {0.0f, -infinity};
            if (row < t.real) {
                end = close(state.maximum[half] * scale, sum, t.sink[row]);
            } else {
#pragma unroll
                for (int i = 0; i < F::width / 2; i++) {
                    values[i] = i % 4 / 2 == half ? 0.0f : values[i];
                }
            }
            write_row(t, row, row < t.rows, values, half, end.factor);
            if (row < t.rows && threadIdx.x % 4 == 0) {
                store_lse(p, t, row, end.lse);
            }
        }
    }
};

template <typename F> __device__ __forceinline__ void begin_barriers(hopper_state<F> &s)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < F::stages; i++) {
            barrier_init(&s.keys_full[i], 1);
            barrier_init(&s.values_full[i], 1);
            barrier_init(&s.keys_free[i], F::warps);
            barrier_init(&s.values_free[i], F::warps);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&s.tile_full[i], 1);
            barrier_init(&s.tile_free[i], F::warps);
        }
        for (int i = 0; i < F::query_tiles; i++) {
            barrier_init(&s.queries_full[i], 1);
            barrier_init(&s.queries_free[i], F::warps);
        }
        barrier_init(&s.dirty, 1);
        fence_async();
    }
    __syncthreads();
}

template <typename T, typename F> __device__ __forceinline__ void prefill_hopper(const sa_cuda_prefill &call)
{
    extern __shared__ __align__(1024) char memory[];
    hopper_state<F> &s = *(hopper_state<F> *)memory;
    const uint32_t elements = shared_address(memory) + SA_HOPPER_ROWS_SHARED(F::rows);
    static_assert(sizeof(hopper_state<F>) <= SA_HOPPER_ROWS_SHARED(F::rows), "room for what is known of the rows");
    begin_barriers<F>(s);
    if (threadIdx.x < 128) {
        leave_registers<F::groups == 2 ? SA_PREGS : SA_PREGS3>();
        if (threadIdx.x < 32) {
            producer<F> one = {call, s, elements, (int)threadIdx.x % 32, {}};
            one.run_all();
        }
    } else {
        take_registers<F::groups == 2 ? 256 - SA_PREGS / 2 - (SA_PREGS / 8 % 2 ? 4 : 0): 160>();
        const int group = threadIdx.x / 128 - 1;
        consumer<T, F> one = {call.problem, s, elements, group, group * 64 + (int)threadIdx.x / 32 % 4 * 16 + (int)threadIdx.x % 32 / 4,
                              call.problem.scale * log2e, {}, {}};
        one.run_all();
    }
}

#else

template <typename T, typename F> __device__ __forceinline__ void prefill_hopper(const sa_cuda_prefill &)
{
    __trap(); /* choose.c sends nothing here */
}

#endif

} // namespace sa

#ifdef SA_ROWS
#define SA_FORM_128 SA_ROWS, SA_KEYS, SA_STAGES, SA_QTILES
#define SA_FORM_64 SA_ROWS, SA_KEYS, SA_STAGES, SA_QTILES
#else
#define SA_FORM_128 128, 128, 2, 2
#define SA_FORM_64 192, 128, 3, 2
#endif
#define SA_PREFILL(name, depth, width, rows, keys, stages, query_tiles)                                                                   \
    extern "C" __global__ void __launch_bounds__(SA_HOPPER_THREADS(rows), 1)                                                               \
        prefill_hopper_##name##_##depth(const __grid_constant__ sa_cuda_prefill call)                                                      \
    {                                                                                                                                      \
        sa::prefill_hopper<sa::name, sa::form<rows, depth, width, keys, stages, query_tiles>>(call);                                       \
    }
#define SA_PREFILL_(...) SA_PREFILL(__VA_ARGS__)
#if defined(SA_ONLY_64)
SA_PREFILL_(bf16, 64, 64, SA_FORM_64)
#elif defined(SA_ONLY_128)
SA_PREFILL_(bf16, 128, 128, SA_FORM_128)
#else
#define SA_BF16(...) SA_PREFILL(bf16, __VA_ARGS__)
#define SA_F16(...) SA_PREFILL(f16, __VA_ARGS__)
SA_HOPPER_FORMS(SA_BF16)
SA_HOPPER_FORMS(SA_F16)
#endif
