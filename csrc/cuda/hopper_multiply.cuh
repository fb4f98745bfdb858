/* The warpgroups of Hopper's prefill kernels that multiply. */
#ifndef SA_CUDA_HOPPER_MULTIPLY_CUH
#define SA_CUDA_HOPPER_MULTIPLY_CUH

#include "hopper.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* What a thread knows of its two rows: largest dot product (or one near it), and the sum over its own columns. */
struct rows_state {
    float maximum[2], sum[2];
};

/* No less than the largest score of each of a thread's two rows, and that one where it is not negative: numbers that are compared as
 * integers, three at a time, stand in the right order unless they are negative. */
template <int keys> __device__ __forceinline__ void bound_scores(const float (&scores)[keys / 2], float (&bound)[2])
{
    constexpr int chains = 4;
    int larger[2][chains] = {};
#pragma unroll
    for (int n = 0; n < keys / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int &own = larger[half][n % chains];
            own = __vimax3_s32(own, __float_as_int(scores[4 * n + 2 * half]), __float_as_int(scores[4 * n + 2 * half + 1]));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int most = max(__vimax3_s32(larger[half][0], larger[half][1], larger[half][2]), larger[half][3]);
        most = max(most, __shfl_xor_sync(~0u, most, 1));
        most = max(most, __shfl_xor_sync(~0u, most, 2));
        bound[half] = __int_as_float(most);
    }
}

template <int keys> __device__ __forceinline__ void largest_scores(const float (&scores)[keys / 2], float (&largest)[2])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most = fmaxf(scores[2 * half], scores[2 * half + 1]);
#pragma unroll
        for (int n = 1; n < keys / 8; n++) {
            most = fmaxf(most, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        largest[half] = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    }
}

/* From dot products to weights, and the factor for what was summed before; `grows` where it is not 1. A maximum is one near it: as long as
 * no score exceeds it by that many powers of two, nothing that was summed is scaled. */
template <typename T, int keys>
__device__ __forceinline__ void weigh(float scale, float (&scores)[keys / 2], rows_state &state, float (&factor)[2], bool &grows)
{
    float bound[2];
    bound_scores<keys>(scores, bound);
    grows = (bound[0] - state.maximum[0]) * scale > lazy_bits || (bound[1] - state.maximum[1]) * scale > lazy_bits;
    factor[0] = factor[1] = 1.0f;
    if (__any_sync(~0u, grows)) {
        float largest[2];
        largest_scores<keys>(scores, largest);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float old = state.maximum[half], most = largest[half];
            if ((most - old) * scale > lazy_bits) {
                const float next = most < 0.0f && most * scale > -low_bits<T> ? 0.0f : most;
                factor[half] = exp2_fast((old - next) * scale);
                state.maximum[half] = next;
                state.sum[half] *= factor[half];
            }
        }
        grows = factor[0] != 1.0f || factor[1] != 1.0f;
    }
    const float anchor[2] = {anchor_of(state.maximum[0]) * scale, anchor_of(state.maximum[1]) * scale};
    float odd[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < keys / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float &x = scores[4 * n + 2 * half], &y = scores[4 * n + 2 * half + 1];
            x = exp2_fast(fmaf(x, scale, -anchor[half]));
            y = exp2_fast(fmaf(y, scale, -anchor[half]));
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
    int group;
    uint32_t rows[2]; /* this thread's two: token << 16 | head, both of the tile; whether they are real depends on it */
    float scale; /* of dot products, to log2 units */
    float unit;  /* of scores as weigh() gets them */
    cursor at, loads;
    uint64_t queries, key_ring, value_ring;

    __device__ __forceinline__ void release(uint64_t *barrier)
    {
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(barrier);
        }
    }

    template <int keys> __device__ __forceinline__ void issue_keys(float (&scores)[keys / 2], uint64_t queries)
    {
        const uint64_t keys_at = key_ring + at.stage * (F::key_bytes / 16);
#pragma unroll
        for (int step = 0; step < F::depth / 16; step++) {
            const int panel = step / 4, within = step % 4 * 2;
            const uint64_t from = queries + panel * (F::rows * 8) + within;
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

    __device__ __forceinline__ int token_of(int half) const
    {
        return (int)(rows[half] >> 16);
    }

    __device__ __forceinline__ int head_of(int half) const
    {
        return (int)(rows[half] & 0xffff);
    }

    __device__ __forceinline__ int64_t query_of(const group_tile &t, int half) const
    {
        return t.at.query_begin + t.first_token + token_of(half);
    }

    __device__ __forceinline__ int row_of(int half) const
    {
        return token_of(half) * p.group + head_of(half);
    }

    /* Keys that this thread's row sees, from key `first` on as slices count: of those that a window decides, and of the pinned ones. */
    __device__ __forceinline__ void plain_range(const group_tile &t, int half, int first, int &low, int &high) const
    {
        const int edge = t.edge + token_of(half), window = t.window[head_of(half)];
        low = max(edge - window, t.start) - first;
        high = row_of(half) < t.real ? min(p.causal ? edge : edge + window - 1, t.end) - first : low;
    }

    __device__ __forceinline__ int pinned_end(const group_tile &t, int half) const
    {
        const int end = p.causal ? min(t.pinned_edge + token_of(half), t.pinned_end) : t.pinned_end;
        return row_of(half) < t.real ? end : 0;
    }

    /* The queries that a slice is scored with. */
    __device__ __forceinline__ uint64_t queries_for(const slice_note &note) const
    {
        return F::featured && note.second ? queries + F::query_bytes / 16 : queries;
    }

    /* From dot products to scores in log2 units: blocks begin .. end - 1 of eight keys each, the first of them key `first`
     * where row 0 sees as far as `edge`; `held`: of pinned keys, which may have a bias. */
    template <int keys, int begin, int end>
    __device__ __forceinline__ void shape(const group_tile &t, int edge, int first, bool held, float (&scores)[keys / 2]) const
    {
        if (p.softcap > 0.0f) {
            cap<keys, begin, end>(scores);
        } else {
#pragma unroll
            for (int i = 4 * begin; i < 4 * end; i++) {
                scores[i] *= scale;
            }
        }
        const int column = threadIdx.x % 4 * 2;
        if (p.alibi_slopes.given) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float slope = t.slope[head_of(half)];
                const float from = (float)(edge - 1 + token_of(half) - first - column);
#pragma unroll
                for (int n = begin; n < end; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        scores[4 * n + 2 * half + e] -= slope * fabsf(from - (float)((n - begin) * 8 + e));
                    }
                }
            }
        }
        if (end <= few / 8 && held && p.sink_bias.given) {
#pragma unroll
            for (int i = 4 * begin; i < 4 * end; i++) {
                const int key = first + (i / 4 - begin) * 8 + i % 2 + column;
                const float bias = key < p.pinned ? number_at(p.sink_bias, t.kv_head * p.group + head_of(i % 4 / 2), key) : 0.0f;
                scores[i] = bias == -infinity ? -infinity : fmaf(bias, log2e, scores[i]);
            }
        }
    }

    /* cap * tanh(dot * scale / cap): small arguments, which most are, without the slow instructions. */
    template <int keys, int begin, int end> __device__ __forceinline__ void cap(float (&scores)[keys / 2]) const
    {
        const float inner = p.scale / p.softcap, outer = p.softcap * log2e;
        float largest = 0.0f;
#pragma unroll
        for (int i = 4 * begin; i < 4 * end; i++) {
            largest = fmaxf(largest, fabsf(scores[i]));
        }
        if (__all_sync(~0u, largest * fabsf(inner) <= 0.6f)) {
#pragma unroll
            for (int i = 4 * begin; i < 4 * end; i++) {
                const float x = scores[i] * inner, square = x * x;
                const float series = fmaf(fmaf(square, -0.04137113f, 0.13085432f), square, -0.33318933f);
                scores[i] = fmaf(x * square, series, x) * outer;
            }
        } else {
#pragma unroll
            for (int i = 4 * begin; i < 4 * end; i++) {
                const float grown = exp2_fast(scores[i] * (2.0f * log2e * inner));
                scores[i] = outer - __fdividef(2.0f * outer, grown + 1.0f);
            }
        }
    }

    /* What a slice's dot products become: scores in the units of weigh(), hidden where nobody sees them. */
    __device__ __forceinline__ void score(const group_tile &t, const slice_note &note, float (&scores)[F::keys / 2])
    {
        if (F::featured) {
            if (note.masked && p.softcap > 0.0f) {
                hide(t, note, scores, 0.0f); /* which way cap() goes is not for what nobody sees */
            }
            const bool held = note.pinned, both = held && note.plain;
            shape<F::keys, 0, few / 8>(t, held ? t.pinned_edge : t.edge, both ? 0 : note.first, held, scores);
            shape<F::keys, few / 8, F::keys / 8>(t, note.plain ? t.edge : t.pinned_edge, note.first + few, false, scores);
        }
        if (note.masked) {
            hide(t, note, scores, -infinity);
        }
    }

    /* Hides what a row does not see of a slice. */
    __device__ __forceinline__ void hide(const group_tile &t, const slice_note &note, float (&scores)[F::keys / 2], float hidden)
    {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t seen = 0; /* bit 2 n + e: key 8 n + e from this thread's column on */
            if (note.plain) {
                int low, high;
                plain_range(t, half, note.first, low, high);
                seen = own_below(high - column) & ~own_below(low - column);
            }
            if (note.pinned) {
                const int end = pinned_end(t, half);
                seen |= own_below((note.plain ? min(end, few) : end - note.first) - column);
            }
#pragma unroll
            for (int i = 0; i < F::keys / 4; i++) {
                float &x = scores[i / 2 * 4 + 2 * half + i % 2];
                x = seen & 1u << i ? x : hidden;
            }
        }
    }

    /* A bit for each of this thread's keys, of its column and the next in every block of eight, that are less than `key` from the column on. */
    static __device__ __forceinline__ uint32_t own_below(int key)
    {
        static_assert(F::keys <= 128, "a bit for each of a thread's keys of a row");
        const int inside = min(max(key, 0), F::keys), count = inside / 8 * 2 + min(inside % 8, 2);
        return (uint32_t)((1ull << count) - 1);
    }

    /* Warpgroups issue products by turns, so that one multiplies while another weighs. */
    __device__ __forceinline__ void take_turn()
    {
        if (F::turns) {
            meet(2 + group, 256);
        }
    }

    __device__ __forceinline__ void give_turn()
    {
        if (F::turns) {
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
        pin(values);
        take_turn();
        products_begin();
        issue_keys<F::keys>(scores, queries_for(note));
        issue_values<F::keys>(weights, before.stage, values);
        give_turn();
        return note;
    }

    /* Waits for the values and scales them. ptxas moves a wait to the top of its block, above the softmax that it should follow, so that
     * nothing overlaps; it does not move it above a branch. */
    __device__ __forceinline__ void finish_values(float (&scores)[F::keys / 2], const float (&factor)[2], bool grows, float (&values)[F::width / 2])
    {
        pin(scores);
        if (__any_sync(~0u, grows)) {
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

    /* A tile's first slice is weighed while the last values of the tile before are summed; then that tile is written. */
    __device__ __forceinline__ void begin_tile(const group_tile &t, float (&scores)[F::keys / 2], uint32_t (&weights)[F::keys / 4], cursor before,
                                               int tile_before, rows_state &state, float (&values)[F::width / 2])
    {
        const slice_note note = issue(scores, weights, before, tile_before >= 0, values);
        float last[2] = {0.0f, 0.0f};
        if (tile_before >= 0) {
            end_rows(s.tiles[tile_before], state, last);
        }
        products_wait<1>();
        pin(scores);
        release(&s.keys_free[at.stage]);
        float factor[2];
        bool grows;
        state = {{-infinity, -infinity}, {0.0f, 0.0f}};
        score(t, note, scores);
        weigh<T, F::keys>(unit, scores, state, factor, grows);
        pin(scores);
        if (tile_before >= 0) {
            products_wait<0>();
            pin(values);
            release(&s.values_free[before.stage]);
            write_rows(s.tiles[tile_before], last, values);
            barrier_arrive(&s.tile_free[tile_before]);
        } else {
            products_wait<0>();
            pin(values);
        }
        pack_weights<T, F::keys>(scores, weights);
#pragma unroll
        for (int i = 0; i < F::width / 2; i++) {
            values[i] = 0.0f;
        }
    }

    __device__ __forceinline__ void run_all()
    {
        cursor tiles, before;
        int tile_before = -1;
        float scores[F::keys / 2], values[F::width / 2], factor[2];
        uint32_t weights[F::keys / 4];
        rows_state state = {};
        bool grows;
#pragma unroll
        for (int i = 0; i < F::keys / 4; i++) {
            weights[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < F::width / 2; i++) {
            values[i] = 0.0f;
        }
        if (group == F::groups - 1) {
            give_turn(); /* the first is the first group's */
        }
        key_ring = describe_panels(memory + F::key_ring, 16, 1024);
        value_ring = describe_panels(memory + F::value_ring, F::keys * 128, 1024);
        for (;;) {
            barrier_wait(&s.tile_full[tiles.stage], tiles.parity);
            const group_tile &t = s.tiles[tiles.stage];
            const int count = t.slices;
            if (count < 0) {
                break;
            }
            barrier_wait(&s.queries_full[loads.stage], loads.parity);
            queries = describe_panels(memory + loads.stage * F::query_parts * F::query_bytes + group * 64 * 128, 16, 1024);
            begin_tile(t, scores, weights, before, tile_before, state, values);
            before = at;
#pragma unroll 1
            for (int slice = 1; slice < count; slice++) {
                at.template step<F::stages>();
                const slice_note note = issue(scores, weights, before, true, values);
                products_wait<1>();
                pin(scores);
                release(&s.keys_free[at.stage]);
                score(t, note, scores);
                weigh<T, F::keys>(unit, scores, state, factor, grows);
                finish_values(scores, factor, grows, values);
                release(&s.values_free[before.stage]);
                pack_weights<T, F::keys>(scores, weights);
                before = at;
            }
            release(&s.queries_free[loads.stage]);
            loads.template step<F::query_tiles>();
            at.template step<F::stages>();
            tile_before = tiles.stage;
            tiles.step<hopper_tiles>();
        }
        if (tile_before >= 0) {
            barrier_wait(&s.values_full[before.stage], before.parity);
            pin(values);
            products_begin();
            issue_values<F::keys>(weights, before.stage, values);
            products_wait<0>();
            pin(values);
            end_rows(s.tiles[tile_before], state, factor);
            write_rows(s.tiles[tile_before], factor, values);
        }
    }


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
    __device__ __forceinline__ void write_row(const group_tile &t, bool written, const float (&values)[F::width / 2], int half, float factor)
    {
        const int lane = threadIdx.x % 4, width = (int)p.depth_v;
        uint16_t *to = nullptr;
        if (written) {
            to = (uint16_t *)element(p.output, t.at.batch, t.kv_head * p.group + head_of(half), query_of(t, half), 2);
        }
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
            if (written && d < width) {
                *(uint4 *)(to + d) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }

    /* Closes this thread's two rows: their factors, and their lse is written; rows of padding are 0 with lse -inf. */
    __device__ __forceinline__ void end_rows(const group_tile &t, const rows_state &state, float (&factor)[2])
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row_of(half);
            float sum = state.sum[half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            softmax_end end = {0.0f, -infinity};
            if (row < t.real) {
                end = close(state.maximum[half] * unit, sum, t.sink[head_of(half)]);
            }
            factor[half] = end.factor;
            float *lse = lse_of(p);
            if (lse != nullptr && row < t.rows && threadIdx.x % 4 == 0) {
                lse[(t.at.batch * p.heads_q + t.kv_head * p.group + head_of(half)) * p.query_length + query_of(t, half)] = end.lse;
            }
        }
    }

    __device__ __forceinline__ void write_rows(const group_tile &t, const float (&factor)[2], float (&values)[F::width / 2])
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row_of(half);
            if (row >= t.real) {
#pragma unroll
                for (int i = 0; i < F::width / 2; i++) {
                    values[i] = i % 4 / 2 == half ? 0.0f : values[i];
                }
            }
            write_row(t, row < t.rows, values, half, factor[half]);
        }
    }
};

#endif

} // namespace sa

#endif
