/* The decode kernel: decode.cu says how it works and what it takes; decode_evict.cu has the steps that also let a token leave. */
#ifndef SA_CUDA_DECODE_CUH
#define SA_CUDA_DECODE_CUH

#include "decode_evict.cuh"

namespace sa
{

/* --- one slice -------------------------------------------------------------------------------------------------------------------- */

/* Which keys of a slice some row of the warp sees, a bit each. */
template <int slice> __device__ __forceinline__ uint32_t seen_keys(const score_tile<slice> &scores)
{
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < slice / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t rows = __ballot_sync(~0u, scores.at[n][e] != -infinity || scores.at[n][e + 2] != -infinity);
            rows |= rows >> 16;
            rows |= rows >> 8;
            rows |= rows >> 4; /* bit i: column 2 i + e of the tile */
            seen |= ((rows & 1) | (rows & 2) << 1 | (rows & 4) << 2 | (rows & 8) << 3) << (n * 8 + e);
        }
    }
    return seen;
}

/* Clears the values of keys that none of the warp's rows sees: they may hold anything. */
template <int depth> __device__ __forceinline__ void clear_unseen(uint32_t seen, char *values)
{
    const int lane = threadIdx.x % 32;
    for (int key = 0; key < shape<depth>::slice; key++) {
        if ((seen >> key & 1) == 0 && lane < shape<depth>::pieces) {
            *(uint4 *)(values + piece_at<depth>(key, lane)) = make_uint4(0, 0, 0, 0);
        }
    }
    __syncwarp();
}

/* What a warp knows of the run that it is in: read when the run is entered. */
struct walker {
    int slice, run, run_end;
    int clean_begin, clean_end; /* slices that every row sees whole */
    bool second;                /* the second query is in use */
    int raw;                    /* the token of a step */

    template <int slice_keys> __device__ __forceinline__ void enter(const sa_cuda_problem &p, const tile<SA_DECODE_ROWS> &t)
    {
        while (slice >= t.first_slice[run + 1]) {
            run++;
        }
        const sa::run &r = t.list.runs[run];
        const int64_t low = t.seen[run].low;
        run_end = t.first_slice[run + 1];
        second = r.kind == run_pinned && has_second_query(p);
        raw = r.raw;
        clean_begin = t.first_slice[run] + (int)((uint64_t)(t.all[run].low - low + slice_keys - 1) / slice_keys);
        clean_end = t.first_slice[run] + (int)((uint64_t)most(t.all[run].high - low, 0) / slice_keys);
        if (r.kind == run_pinned && p.sink_bias.given) {
            clean_end = 0; /* a bias of -inf removes a column */
        }
    }
};

/* The queries of a tile as multiply_keys takes them: in registers where there is room, else in shared memory. */
template <int depth> struct held_queries {
    static constexpr bool held = depth <= 128;
    uint32_t part[held ? depth / 16 : 1][4];
    uint32_t address;

    __device__ __forceinline__ void load(uint32_t from)
    {
        const int lane = threadIdx.x % 32;
        address = from;
        if constexpr (held) {
#pragma unroll
            for (int step = 0; step < depth / 16; step++) {
                load_matrices(part[step], from + piece_at<depth>(lane % 16, 2 * step + lane / 16));
            }
        }
    }
};

template <typename T, int depth>
__device__ __forceinline__ void score_slice(const held_queries<depth> &queries, uint32_t keys, score_tile<shape<depth>::slice> &scores)
{
    if constexpr (!held_queries<depth>::held) {
        multiply_keys<T, depth, shape<depth>::slice>(queries.address, keys, scores);
    } else {
        const int lane = threadIdx.x % 32, key = lane % 8 + lane / 16 * 8, side = lane / 8 % 2;
        score_tile<shape<depth>::slice> odd = {}; /* two chains are done sooner than one */
#pragma unroll
        for (int step = 0; step < depth / 16; step++) {
#pragma unroll
            for (int pair = 0; pair < shape<depth>::slice / 16; pair++) {
                uint32_t b[4];
                load_matrices(b, keys + piece_at<depth>(pair * 16 + key, 2 * step + side));
                float (&low)[4] = step % 2 ? odd.at[2 * pair] : scores.at[2 * pair];
                float (&high)[4] = step % 2 ? odd.at[2 * pair + 1] : scores.at[2 * pair + 1];
                T::multiply(low, queries.part[step], b[0], b[1]);
                T::multiply(high, queries.part[step], b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < shape<depth>::slice / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                scores.at[n][e] += odd.at[n][e];
            }
        }
    }
}

/* Joins a slice in shared memory to the warp's state. `first`: its first key in the run; kept: where its scores are kept, if they are. */
template <typename T, int depth, bool weighs>
__device__ __forceinline__ void attend_slice(const sa_cuda_problem &p, const tile<SA_DECODE_ROWS> &t, const run &r, int64_t first,
                                             bool masked, const held_queries<depth> &queries, char *stage, int stride, float *kept,
                                             warp_state<depth> &state)
{
    constexpr int slice = shape<depth>::slice;
    score_tile<slice> scores = {};
    score_slice<T>(queries, shared_address(stage), scores);
    scale_scores<slice>(p, t, r, 0, first, scores);
    if (masked) {
        mask_scores<slice>(p, t, r, 0, first, scores);
        clear_unseen<depth>(seen_keys(scores), stage + shape<depth>::half_stage);
    }
    if constexpr (weighs) {
        keep_scores<slice>(t, stride, kept, scores);
    }
    join_scores(scores, state);
    multiply_values<T, depth, slice>(shared_address(stage) + shape<depth>::half_stage, scores, state.values);
}

/* The token of a step becomes the first key of a stage. One warp. */
template <int depth> __device__ __forceinline__ void place_token(const decode_shared &s, char *stage)
{
    const int lane = threadIdx.x % 32;
    if (lane < shape<depth>::pieces) {
        *(uint4 *)(stage + piece_at<depth>(0, lane)) = ((const uint4 *)s.new_key)[lane];
        *(uint4 *)(stage + shape<depth>::half_stage + piece_at<depth>(0, lane)) = ((const uint4 *)s.new_value)[lane];
    }
    __syncwarp();
}

/* --- the end ---------------------------------------------------------------------------------------------------------------------- */

/* The warps of a CTA become one: each leaves its state, and its values in its own ring; they are added up on the scale of the largest
 * maximum in the order of the warps, into the queries' place. The caller puts a barrier behind it. Little code: it runs once, and cold. */
template <int depth> __device__ __forceinline__ partial merge_warps(decode_shared &s, warp_state<depth> &state, char *rings, float *merged)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, real = s.t.real;
    float *merged_states = &s.turn[0][0][0]; /* no longer needed */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + 8 * half;
        float sum = state.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (half == 1 && real <= 8) {
            break;
        }
        if (lane % 4 == 0) {
            s.states[row][0][warp] = state.maximum[half];
            s.states[row][1][warp] = sum;
        }
        float *own = (float *)(rings + warp * shape<depth>::ring) + row * depth + lane % 4 * 2;
        if (row < real) {
#pragma unroll
            for (int n = 0; n < depth / 8; n++) {
                *(float2 *)(own + n * 8) = make_float2(state.values[n][2 * half], state.values[n][2 * half + 1]);
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < real * (depth / 4); i += blockDim.x) {
        const int row = i / (depth / 4);
        float maximum = -infinity, sum = 0.0f;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int w = 0; w < warps; w++) {
            maximum = fmaxf(maximum, s.states[row][0][w]);
        }
#pragma unroll 2
        for (int w = 0; w < warps; w++) {
            const float4 own = ((const float4 *)(rings + w * shape<depth>::ring))[i];
            const float factor = factor_to(s.states[row][0][w], maximum);
            sum += factor * s.states[row][1][w];
            total = make_float4(total.x + factor * own.x, total.y + factor * own.y, total.z + factor * own.z, total.w + factor * own.w);
        }
        ((float4 *)merged)[i] = total;
        if (i % (depth / 4) == 0) {
            merged_states[2 * row] = maximum;
            merged_states[2 * row + 1] = sum;
        }
    }
    return {merged, merged_states, depth};
}

/* --- the kernel ------------------------------------------------------------------------------------------------------------------- */

/* The warp's slices of begin .. end - 1, through its ring. `kept`: where the scores of the split are kept, if they are. */
template <typename T, int depth, bool weighs>
__device__ __forceinline__ void attend_slices(const sa_cuda_problem &p, const decode_shared &s, loader<depth> &load, int begin, int end,
                                              uint32_t queries, char *ring, uint64_t policy, float *kept, warp_state<depth> &state)
{
    constexpr int slice = shape<depth>::slice;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int stride = weighs ? SA_DECODE_SCORE_STRIDE((int)p.query_length * p.group) : 0;
    held_queries<depth> held;
    held.load(queries);
    int stage = 0, filling = SA_DECODE_STAGES - 1;
    bool second = false;
    walker w = {begin + warp, 0, 0};
    for (; w.slice < end; w.slice += warps) {
        if (load.slice < end) {
            load_slice<depth>(p, s, load, ring + filling * shape<depth>::stage, policy);
            load.advance(s.t, warps, end);
        }
        copy_async_commit();
        copy_async_wait<SA_DECODE_STAGES - 1>();
        __syncwarp();
        if (w.slice >= w.run_end) {
            w.enter<slice>(p, s.t);
            if (w.second != second) {
                held.load(w.second ? queries + SA_DECODE_ROWS * depth * 2 : queries);
                second = w.second;
            }
        }
        if (w.raw) {
            place_token<depth>(s, ring + stage * shape<depth>::stage);
        }
        const int64_t first = s.t.seen[w.run].low + (int64_t)(w.slice - s.t.first_slice[w.run]) * slice;
        attend_slice<T, depth, weighs>(p, s.t, s.t.list.runs[w.run], first, w.slice < w.clean_begin || w.slice >= w.clean_end, held,
                                       ring + stage * shape<depth>::stage, stride, kept + (w.slice - begin) * (slice * stride), state);
        __syncwarp();
        stage = stage + 1 == SA_DECODE_STAGES ? 0 : stage + 1;
        filling = filling + 1 == SA_DECODE_STAGES ? 0 : filling + 1;
    }
    copy_async_wait<0>();
}

/* Parts of the shared memory of a CTA. */
struct decode_memory {
    decode_shared &s;
    char *queries; /* [2, rows, depth]: own and for the pinned keys; at the end the merged values */
    char *rings;   /* one a warp */
    float *scores; /* of the split, where keys are weighed */
};

/* The memory works while the CTA finds out what it has to read: the first keys and values of its share, as they lie. One thread. */
__device__ __forceinline__ void prefetch_share(const sa_cuda_problem &p, uint32_t unit, int split)
{
    const uint32_t heads = (uint32_t)p.heads_kv, row = unit < heads ? 0 : unit / heads, head = unit - row * heads;
    const uint32_t tokens = (uint32_t)(p.cache.keys != nullptr ? p.pinned + p.cache.capacity : p.kv_length), splits = (uint32_t)p.splits;
    const uint32_t each = splits == 1 ? tokens : tokens / splits, first = each * split, limit = (uint32_t)p.prefetch / (uint32_t)(p.depth * 2),
                   count = each < limit ? each : limit;
    if (count > 0) {
        prefetch_bulk(element(p.held_key, row, head, first, 2), count * (uint32_t)p.depth * 2);
        prefetch_bulk(element(p.held_value, row, head, first, 2), count * (uint32_t)p.depth_v * 2);
    }
}

/* Before anything is known: parameters are asked for, and what no load fills is cleared. */
template <int depth> __device__ __forceinline__ void warm_up(const sa_cuda_problem &p, const sa_cuda_eviction *e, const decode_memory &m)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (warp > 0 && lane == 0) {
        uint32_t words = 0;
#pragma unroll 2
        for (int line = warp - 1; line < (int)(e != nullptr ? sizeof *e : sizeof p) / 64; line += warps - 1) {
            words += touch_parameters(e != nullptr ? (const void *)e : &p, line);
        }
        ((uint32_t *)m.s.states)[warp] = words; /* nobody reads it */
    }
    if (p.depth < depth || p.depth_v < depth) {
#pragma unroll 1
        for (int i = lane; i < shape<depth>::ring / 16; i += 32) {
            ((uint4 *)(m.rings + warp * shape<depth>::ring))[i] = make_uint4(0, 0, 0, 0);
        }
    }
}

/* The tile where a row has one query: one warp finds the keys while the others fetch all else. Ends with a barrier. */
template <int depth> __device__ __forceinline__ void begin_lean(const sa_cuda_problem &p, const decode_memory &m, uint32_t unit)
{
    const uint32_t tiles = (uint32_t)p.row_tiles, heads = (uint32_t)p.heads_kv;
    const uint32_t index = tiles == 1 ? 0 : unit % tiles, above = tiles == 1 ? unit : unit / tiles;
    const uint32_t row = above < heads ? 0 : above / heads, head = above - row * heads;
    const int first_row = (int)index * SA_DECODE_ROWS, fetchers = blockDim.x > 32 ? 32 : 0; /* first thread that fetches */
    if (threadIdx.x < 32) {
        fill_lean_tile(p, row, (int)head, first_row, shape<depth>::slice, m.s.t);
    }
    if (threadIdx.x >= fetchers) {
        const int first = threadIdx.x - fetchers, step = blockDim.x - fetchers, first_head = (int)head * p.group + first_row;
        const int rows = p.group - first_row < SA_DECODE_ROWS ? p.group - first_row : SA_DECODE_ROWS;
        load_lean_queries<depth>(p, query_tensor(p), row, first_head, rows, first, step, m.queries);
        if (has_second_query(p)) {
            load_lean_queries<depth>(p, second_query_tensor(p), row, first_head, rows, first, step, m.queries + SA_DECODE_ROWS * depth * 2);
        }
        if (p.append) {
            load_token(p, row, (int)head, first, step, m.s);
        }
        if (rotates_inside(p)) {
            fill_turns(p, row, first, step, m.s);
        }
        if (first < rows) {
            m.s.t.sink[first] = sink_of(p, first_head + first);
        }
    }
    __syncthreads();
}

/* The queries of a tile that begin_tile filled. Ends with a barrier. */
template <int depth> __device__ __forceinline__ void fetch_queries(const sa_cuda_problem &p, const decode_memory &m)
{
    load_queries<depth>(p, m.s, query_tensor(p), m.queries);
    if (has_second_query(p)) {
        load_queries<depth>(p, m.s, second_query_tensor(p), m.queries + SA_DECODE_ROWS * depth * 2);
    }
    if (threadIdx.x < m.s.t.real) {
        m.s.t.sink[threadIdx.x] = sink_of(p, m.s.t.head[threadIdx.x]);
    }
    __syncthreads();
}

/* What a step does beside attending: the token into its slot, and the state forward when every CTA of the row has read it; that of a
 * KVCache goes forward in the kernel behind this one. */
__device__ __forceinline__ void append_step(const sa_cuda_problem &p, const decode_shared &s, uint32_t unit, int split, uint32_t before,
                                            uint32_t readers)
{
    if (split == p.splits - 1 && unit % (uint32_t)p.row_tiles == 0) {
        append_token(p, s);
    }
    if (threadIdx.x == blockDim.x - 1 && !p.slots) {
        advance(p, s.t.at, before, readers);
    }
}

/* The end of a step that lets a token leave: instead of the mass, what a policy makes of it. In a cluster the output is written while the
 * lowest scores are on their way. */
template <typename T, int depth>
__device__ __forceinline__ void finish_step(const sa_cuda_eviction &e, const decode_memory &m, const partial &part, int split, int begin, int end)
{
    const sa_cuda_problem &p = e.problem;
    float *sums = m.s.sums[threadIdx.x / 32];
    departing *found = (departing *)m.rings; /* nobody reads them any more */
    if (p.clustered) {
        cluster_arrive();
        cluster_wait();
        sums_of_cluster(p, m.s.t, part, sums);
    } else {
        __syncthreads();
        sums_alone(m.s.t, part, sums);
    }
    send_lowest(p, split, settle_slots(e, m.s, shape<depth>::slice, begin, end, m.scores, sums), found);
    if (p.clustered) {
        cluster_arrive();
        finish_cluster<T, true>(p, m.s.t, part, split);
        cluster_wait();
        cluster_arrive_relaxed(); /* nobody leaves while others read */
    } else {
        finish_alone<T>(p, m.s.t, part);
        __syncthreads();
    }
    if (split == 0 && m.s.t.at.query_count > 0) {
        evict_lowest(e, m.s, found);
    }
    if (p.clustered) {
        cluster_wait();
    }
}

/* States of warps, then of splits, become the result; then the keys of the split are weighed. */
template <typename T, int depth, bool weighs>
__device__ __forceinline__ void finish(const sa_cuda_problem &p, const sa_cuda_eviction *e, const decode_memory &m, uint32_t unit, int split,
                                       int begin, int end, warp_state<depth> &state)
{
    float *sums = m.s.sums[threadIdx.x / 32];
    const partial part = merge_warps<depth>(m.s, state, m.rings, (float *)m.queries);
    if (split == 0 && m.s.t.real < m.s.t.rows) {
        pad_rows<T>(p, m.s.t);
    }
    if (e != nullptr) {
        finish_step<T, depth>(*e, m, part, split, begin, end);
        return;
    }
    if (p.clustered) {
        finish_cluster<T>(p, m.s.t, part, split);
        if constexpr (weighs) {
            sums_of_cluster(p, m.s.t, part, sums);
        }
        cluster_arrive_relaxed(); /* nobody leaves while others read */
        if constexpr (weighs) {
            weigh_slices(p, m.s.t, shape<depth>::slice, begin, end, m.scores, sums);
        }
        cluster_wait();
        return;
    }
    __syncthreads();
    if constexpr (weighs) {
        finish_alone<T>(p, m.s.t, part);
        sums_alone(m.s.t, part, sums);
        weigh_slices(p, m.s.t, shape<depth>::slice, begin, end, m.scores, sums);
    } else if (p.splits > 1) {
        finish_scratch<T>(p, m.s.t, part, unit, split, m.rings);
    } else {
        finish_alone<T>(p, m.s.t, part);
    }
}

template <typename T, int depth, bool weighs> __device__ __forceinline__ void decode(const sa_cuda_problem &p, const sa_cuda_eviction *e = nullptr)
{
    extern __shared__ __align__(128) char memory[];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    char *rings = memory + SA_DECODE_SHARED(depth);
    const decode_memory m = {*(decode_shared *)memory, memory + SA_DECODE_ROWS_SHARED, rings, (float *)(rings + warps * shape<depth>::ring)};
    if (p.slots && e == nullptr) {
        let_next_begin();
    }
    const uint32_t unit = p.splits == 1 ? blockIdx.x : p.clustered ? cluster_index() : blockIdx.x / (uint32_t)p.splits;
    const int split = (int)(blockIdx.x - unit * (uint32_t)p.splits);
    if (p.prefetch > 0 && threadIdx.x == 0) {
        prefetch_share(p, unit, split);
    }
    warm_up<depth>(p, e, m);
    if (p.lean || e != nullptr) {
        begin_lean<depth>(p, m, unit);
    } else if (!begin_tile(p, unit, shape<depth>::slice, m.s.t)) {
        return;
    }

    int begin, end;
    share_slices(m.s.t.first_slice[m.s.t.list.count], split, p.splits, begin, end);
    const uint64_t policy = p.row_tiles > 1 ? policy_evict_normal() : policy_evict_first();
    char *ring = m.rings + warp * shape<depth>::ring;
    loader<depth> load = {};
    load.slice = begin + warp;
    if (load.slice < end) {
        load.enter(m.s.t);
    }
#pragma unroll 1
    for (int i = 0; i < SA_DECODE_STAGES - 1; i++) {
        if (load.slice < end) {
            load_slice<depth>(p, m.s, load, ring + i * shape<depth>::stage, policy);
            load.advance(m.s.t, warps, end);
        }
        copy_async_commit();
    }

    /* While the first keys are on their way. */
    const uint32_t readers = (uint32_t)(p.heads_kv * p.row_tiles * p.splits);
    uint32_t before = 0;
    if (p.append && threadIdx.x == blockDim.x - 1 && !p.slots) {
        const int64_t units = p.splits > 1 && !p.clustered ? p.batch * p.heads_kv * p.row_tiles : 0; /* their counters come first */
        before = report_read(p, units + m.s.t.at.batch, readers);
    }
    if (e != nullptr && threadIdx.x == blockDim.x - 1) {
        const int first = (begin > 0 ? begin - 1 : 0) * shape<depth>::slice; /* the token stands before the slots, in a slice of its own */
        ask_for_state(*e, split, first, (int)least((end - begin) * shape<depth>::slice, e->stride - first), m.s);
    }
    if (!p.lean && e == nullptr) {
        fetch_queries<depth>(p, m);
    }
    if (rotates_inside(p)) {
        turn_all<T, depth>(p, m.s, m.queries);
        __syncthreads();
    }
    if (p.append && e == nullptr) {
        append_step(p, m.s, unit, split, before, readers);
    }
    if (weighs && e == nullptr && p.weighs == SA_WEIGHS_SOME) {
        clear_mass(p, m.s.t, split);
    }

    warp_state<depth> state;
    clear_state(state);
    attend_slices<T, depth, weighs>(p, m.s, load, begin, end, shared_address(m.queries), ring, policy, m.scores, state);
    finish<T, depth, weighs>(p, e, m, unit, split, begin, end, state);
}

} // namespace sa

#endif
