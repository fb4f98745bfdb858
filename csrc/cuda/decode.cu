/* Decode attention: a few query rows of a kv head against a long cache; with `append` a whole step of a streaming cache in one launch.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   s_j = log2(e) * scale * <q, k_j>
 *
 * One CTA per (16 rows, split of the keys); the rows of a tile are the queries of all heads of a group, so every K and V byte crosses the
 * bus once for the group:  bytes = 2 * keys * (depth + depth_v) * heads_kv * batch,  flops = 4 * keys * depth * heads_q * batch.
 * Warps share nothing while they run: each takes every n-th slice of 16 or 32 keys through a ring of its own, filled by cp.async ahead of
 * time, multiplies with mma.sync (rows padded to 16: the tensor cores have time to spare) and keeps its own (m, l, acc). They meet at the end:
 * warps in shared memory, splits in distributed shared memory of a cluster, or in scratch where the last CTA to arrive finishes the tile.
 * All sums have a fixed order. */
#include "multiply.cuh"

namespace sa {

template <int depth> struct shape {
    static constexpr int slice = SA_DECODE_SLICE(depth), pieces = depth / 8, row_bytes = depth * 2;
    static constexpr int half_stage = slice * row_bytes, stage = 2 * half_stage, ring = SA_DECODE_STAGES * stage;
};

struct decode_shared {
    tile<SA_DECODE_ROWS> t;
    float turn[2][2][128]; /* own and pinned position; cos and sin */
    alignas(16) uint16_t new_key[256];
    alignas(16) uint16_t new_value[256];
    float states[SA_DECODE_ROWS][2][SA_DECODE_WARPS]; /* maximum and sum of each warp */
};
static_assert(sizeof(decode_shared) <= SA_DECODE_ROWS_SHARED, "room for what is known of the rows");

/* --- queries, and the token of a step ---------------------------------------------------------------------------------------------- */

/* The piece of a row of queries, zero beyond depth. */
template <int depth> __device__ __forceinline__ uint4 load_piece(const sa_cuda_problem &p, const char *row, int piece)
{
    const uint16_t *from = (const uint16_t *)row + piece * 8;
    if (piece * 8 + 8 <= p.depth && ((uintptr_t)from & 15) == 0) {
        return *(const uint4 *)from;
    }
    uint32_t part[4] = {};
#pragma unroll 1
    for (int e = 0; e < 8 && piece * 8 + e < p.depth; e++) {
        const uint32_t bits = (uint32_t)from[e] << e % 2 * 16;
        part[0] |= e / 2 == 0 ? bits : 0;
        part[1] |= e / 2 == 1 ? bits : 0;
        part[2] |= e / 2 == 2 ? bits : 0;
        part[3] |= e / 2 == 3 ? bits : 0;
    }
    return make_uint4(part[0], part[1], part[2], part[3]);
}

/* Queries of a tile whose rows are known, by all threads. */
template <int depth> __device__ void load_queries(const sa_cuda_problem &p, const decode_shared &s, const sa_cuda_tensor &source, char *target)
{
    for (int i = threadIdx.x; i < SA_DECODE_ROWS * shape<depth>::pieces; i += blockDim.x) {
        const int row = i / shape<depth>::pieces, piece = i % shape<depth>::pieces;
        uint4 part = make_uint4(0, 0, 0, 0);
        if (row < s.t.real) {
            part = load_piece<depth>(p, element(source, s.t.at.batch, s.t.head[row], s.t.at.query_begin + s.t.token[row], 2), piece);
        }
        *(uint4 *)(target + piece_at<depth>(row, piece)) = part;
    }
}

/* The same where a row has one query, before anything else is known: threads first, first + step, .. */
template <int depth>
__device__ __forceinline__ void load_lean_queries(const sa_cuda_problem &p, const sa_cuda_tensor &source, int64_t batch, int first_head, int rows,
                                                  int first, int step, char *target)
{
    for (int i = first; i < SA_DECODE_ROWS * shape<depth>::pieces; i += step) {
        const int row = i / shape<depth>::pieces, piece = i % shape<depth>::pieces;
        uint4 part = make_uint4(0, 0, 0, 0);
        if (row < rows) {
            part = load_piece<depth>(p, element(source, batch, first_head + row, 0, 2), piece);
        }
        *(uint4 *)(target + piece_at<depth>(row, piece)) = part;
    }
}

/* The key and value that a step brings. */
__device__ __forceinline__ void load_token(const sa_cuda_problem &p, int64_t batch, int head, int first, int step, decode_shared &s)
{
    const uint16_t *key = (const uint16_t *)element(p.key, batch, head, 0, 2), *value = (const uint16_t *)element(p.value, batch, head, 0, 2);
#pragma unroll 1
    for (int d = first; d < 256; d += step) {
        s.new_key[d] = d < p.depth ? key[d] : 0;
        s.new_value[d] = d < p.depth_v ? value[d] : 0;
    }
}

/* The turns of a step: threads first, first + step, .. */
__device__ __forceinline__ void fill_turns(const sa_cuda_problem &p, int64_t row, int first, int step, decode_shared &s)
{
    const int pairs = (int)p.cache.pairs;
    const int64_t position = clamp(p.cache.lengths[row], 0, INT64_MAX / 2), pinned = pinned_turn(p, position);
    const float factor = p.cache.applied ? 1.0f : (float)p.cache.scaling;
#pragma unroll 1
    for (int i = first; i < 2 * pairs; i += step) {
        const int kind = i >= pairs, pair = i - kind * pairs;
        rotation(p.cache.inv_freq[pair], kind ? pinned : position, factor, s.turn[kind][0][pair], s.turn[kind][1][pair]);
    }
}

template <typename T> __device__ __forceinline__ void turn_pair(const float (&table)[2][128], int pair, uint16_t *first, uint16_t *second)
{
    const float x = T::wide(*first), y = T::wide(*second);
    *first = narrow<T>(x * table[0][pair] - y * table[1][pair]);
    *second = narrow<T>(y * table[0][pair] + x * table[1][pair]);
}

/* Rotates in place what arrived raw: both queries and the new key; of what arrived rotated, only the query for the pinned keys. */
template <typename T, int depth> __device__ void turn_all(const sa_cuda_problem &p, decode_shared &s, char *queries)
{
    const int pairs = (int)p.cache.pairs, rows = s.t.real;
    const auto at = [&](char *base, int row, int d) { return (uint16_t *)(base + piece_at<depth>(row, d / 8)) + d % 8; };
    for (int i = threadIdx.x; i < (2 * rows + 1) * pairs; i += blockDim.x) {
        const int row = i / pairs, pair = i % pairs;
        const int first = p.cache.interleaved ? 2 * pair : pair, second = p.cache.interleaved ? 2 * pair + 1 : pair + pairs;
        char *pinned = queries + SA_DECODE_ROWS * depth * 2;
        if (row < rows && has_second_query(p)) {
            turn_pair<T>(s.turn[1], pair, at(pinned, row, first), at(pinned, row, second));
        } else if (row >= rows && row < 2 * rows && !p.cache.applied) {
            turn_pair<T>(s.turn[0], pair, at(queries, row - rows, first), at(queries, row - rows, second));
        } else if (row == 2 * rows && !p.cache.applied) {
            turn_pair<T>(s.turn[0], pair, &s.new_key[first], &s.new_key[second]);
        }
    }
}

/* Writes the token of a step into its slot. No query of this call sees what stood there: it left the window. */
__device__ void append_token(const sa_cuda_problem &p, const decode_shared &s)
{
    const place &at = s.t.at;
    if (at.query_count == 0) {
        return;
    }
    const int64_t slot = at.length < p.pinned ? at.length : ring_slot(p, at.length);
    const int64_t row = (at.batch * p.heads_kv + s.t.kv_head) * (p.pinned + p.cache.capacity) + slot;
    for (int64_t d = threadIdx.x; d < p.depth; d += blockDim.x) {
        ((uint16_t *)p.cache.keys)[row * p.depth + d] = s.new_key[d];
    }
    for (int64_t d = threadIdx.x; d < p.depth_v; d += blockDim.x) {
        ((uint16_t *)p.cache.values)[row * p.depth_v + d] = s.new_value[d];
    }
}

/* --- keys and values --------------------------------------------------------------------------------------------------------------- */

/* A lane's walk over the slices that its warp loads: every `warps`-th. What a run has in common is read when the run is entered. */
template <int depth> struct loader {
    static constexpr int slice_keys = shape<depth>::slice, pieces = shape<depth>::pieces, step = 32 / pieces; /* rows of one instruction */
    const char *key, *value;                                                                                   /* the lane's piece of its first row */
    int64_t key_stride, value_stride, left; /* bytes of `step` rows; keys from here to the end of what is seen */
    int slice, run, run_end, raw;

    __device__ __forceinline__ void enter(const tile<SA_DECODE_ROWS> &t)
    {
        while (slice >= t.first_slice[run + 1]) {
            run++;
        }
        const int lane = threadIdx.x % 32;
        const sa::run &r = t.list.runs[run];
        const int64_t first = t.seen[run].low + (int64_t)(slice - t.first_slice[run]) * slice_keys;
        run_end = t.first_slice[run + 1];
        raw = r.raw;
        left = t.seen[run].high - first;
        key = r.key + (first + lane / pieces) * r.key_stride + lane % pieces * 16;
        value = r.value + (first + lane / pieces) * r.value_stride + lane % pieces * 16;
        key_stride = r.key_stride * step;
        value_stride = r.value_stride * step;
    }

    __device__ __forceinline__ void advance(const tile<SA_DECODE_ROWS> &t, int warps, int end)
    {
        slice += warps;
        if (slice < run_end) {
            key += key_stride * (warps * (slice_keys / step));
            value += value_stride * (warps * (slice_keys / step));
            left -= warps * slice_keys;
        } else if (slice < end) {
            enter(t);
        }
    }

    __device__ __forceinline__ void copy(const char *from, int64_t stride, int width, uint32_t target, uint64_t policy) const
    {
        const int lane = threadIdx.x % 32, row = lane / pieces, piece = lane % pieces;
        if (piece * 8 >= width) {
            return;
        }
        if (left >= slice_keys) {
#pragma unroll
            for (int i = 0; i < slice_keys; i += step) {
                copy_async_16(target + piece_at<depth>(row + i, piece), from, policy);
                from += stride;
            }
        } else {
            for (int i = row; i < left; i += step) {
                copy_async_16(target + piece_at<depth>(i, piece), from, policy);
                from += stride;
            }
        }
    }
};

/* Rows that cp.async cannot take: element by element. */
template <int depth> __device__ __noinline__ void load_elements(const char *source, int64_t stride, int rows, int width, char *target)
{
    for (int i = threadIdx.x % 32; i < rows * width; i += 32) {
        const int row = i / width, d = i % width;
        *(uint16_t *)(target + piece_at<depth>(row, d / 8) + d % 8 * 2) = ((const uint16_t *)(source + row * stride))[d];
    }
}

template <int depth>
__device__ __forceinline__ void load_slice(const sa_cuda_problem &p, const decode_shared &s, const loader<depth> &l, char *stage, uint64_t policy)
{
    char *values = stage + shape<depth>::half_stage;
    if (l.raw) {
        return; /* the token of a step is put there when its turn comes */
    }
    if (p.aligned) {
        l.copy(l.key, l.key_stride, (int)p.depth, shared_address(stage), policy);
        l.copy(l.value, l.value_stride, (int)p.depth_v, shared_address(values), policy);
    } else {
        const run &r = s.t.list.runs[l.run];
        const int64_t first = s.t.seen[l.run].high - l.left;
        const int rows = (int)least(shape<depth>::slice, l.left);
        load_elements<depth>(r.key + first * r.key_stride, r.key_stride, rows, (int)p.depth, stage);
        load_elements<depth>(r.value + first * r.value_stride, r.value_stride, rows, (int)p.depth_v, values);
    }
}

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
                float(&low)[4] = step % 2 ? odd.at[2 * pair] : scores.at[2 * pair];
                float(&high)[4] = step % 2 ? odd.at[2 * pair + 1] : scores.at[2 * pair + 1];
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

/* Joins a slice in shared memory to the warp's state. `first`: its first key in the run. */
template <typename T, int depth>
__device__ __forceinline__ void attend_slice(const sa_cuda_problem &p, const tile<SA_DECODE_ROWS> &t, const run &r, int64_t first, bool masked,
                                             const held_queries<depth> &queries, char *stage, warp_state<depth> &state)
{
    constexpr int slice = shape<depth>::slice;
    score_tile<slice> scores = {};
    score_slice<T>(queries, shared_address(stage), scores);
    scale_scores<slice>(p, t, r, 0, first, scores);
    if (masked) {
        mask_scores<slice>(p, t, r, 0, first, scores);
        clear_unseen<depth>(seen_keys(scores), stage + shape<depth>::half_stage);
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

/* The warps of a CTA become one: each leaves its state, and its values in its own ring; they are added up on the scale of the largest maximum in
 * the order of the warps, into the queries' place. The caller puts a barrier behind it. Little code: it runs once, and cold. */
template <int depth>
__device__ __forceinline__ partial merge_warps(decode_shared &s, warp_state<depth> &state, char *rings, float *merged)
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

/* The warp's slices of begin .. end - 1, through its ring. */
template <typename T, int depth>
__device__ __forceinline__ void attend_slices(const sa_cuda_problem &p, const decode_shared &s, loader<depth> &load, int begin, int end,
                                              uint32_t queries, char *ring, uint64_t policy, warp_state<depth> &state)
{
    constexpr int slice = shape<depth>::slice;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
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
        attend_slice<T, depth>(p, s.t, s.t.list.runs[w.run], first, w.slice < w.clean_begin || w.slice >= w.clean_end, held,
                               ring + stage * shape<depth>::stage, state);
        __syncwarp();
        stage = stage + 1 == SA_DECODE_STAGES ? 0 : stage + 1;
        filling = filling + 1 == SA_DECODE_STAGES ? 0 : filling + 1;
    }
    copy_async_wait<0>();
}

template <typename T, int depth> __device__ __forceinline__ void decode(const sa_cuda_problem &p)
{
    extern __shared__ __align__(128) char memory[];
    decode_shared &s = *(decode_shared *)memory;
    char *queries = memory + SA_DECODE_ROWS_SHARED, *rings = memory + SA_DECODE_SHARED(depth);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (warp > 0 && lane == 0) {
        uint32_t words = 0;
#pragma unroll 2
        for (int line = warp - 1; line < (int)sizeof p / 64; line += warps - 1) {
            words += touch_parameters(&p, line);
        }
        ((uint32_t *)s.states)[warp] = words; /* nobody reads it */
    }
    const uint32_t unit = p.splits == 1 ? blockIdx.x : p.clustered ? cluster_index() : blockIdx.x / (uint32_t)p.splits;
    const int split = (int)(blockIdx.x - unit * (uint32_t)p.splits);
    char *ring = rings + warp * shape<depth>::ring;
    if (p.depth < depth || p.depth_v < depth) { /* what no load fills must be zero */
#pragma unroll 1
        for (int i = lane; i < shape<depth>::ring / 16; i += 32) {
            ((uint4 *)ring)[i] = make_uint4(0, 0, 0, 0);
        }
    }
    const bool turns = rotates_inside(p);
    if (p.lean) {
        /* One warp finds the keys while the others fetch the queries. */
        const uint32_t tiles = (uint32_t)p.row_tiles, heads = (uint32_t)p.heads_kv, group = (uint32_t)p.group;
        const uint32_t index = tiles == 1 ? 0 : unit % tiles, above = tiles == 1 ? unit : unit / tiles;
        const uint32_t row = above < heads ? 0 : above / heads, head = above - row * heads;
        const int first_row = (int)index * SA_DECODE_ROWS, fetchers = warps > 1 ? 1 : 0;
        if (warp == 0) {
            fill_lean_tile(p, row, (int)head, first_row, shape<depth>::slice, s.t);
        }
        if (warp >= fetchers) {
            const int first = threadIdx.x - 32 * fetchers, step = blockDim.x - 32 * fetchers, first_head = (int)(head * group) + first_row;
            const int rows = (int)group - first_row < SA_DECODE_ROWS ? (int)group - first_row : SA_DECODE_ROWS;
            load_lean_queries<depth>(p, query_tensor(p), row, first_head, rows, first, step, queries);
            if (has_second_query(p)) {
                load_lean_queries<depth>(p, second_query_tensor(p), row, first_head, rows, first, step, queries + SA_DECODE_ROWS * depth * 2);
            }
            if (p.append) {
                load_token(p, row, (int)head, first, step, s);
            }
            if (turns) {
                fill_turns(p, row, first, step, s);
            }
            if (first < rows) {
                s.t.sink[first] = sink_of(p, first_head + first);
            }
        }
        __syncthreads();
    } else if (!begin_tile(p, unit, shape<depth>::slice, s.t)) {
        return;
    }
    int begin, end;
    share_slices(s.t.first_slice[s.t.list.count], split, p.splits, begin, end);
    const uint64_t policy = p.row_tiles > 1 ? policy_evict_normal() : policy_evict_first();
    loader<depth> load = {};
    load.slice = begin + warp;
    if (load.slice < end) {
        load.enter(s.t);
    }
#pragma unroll 1
    for (int i = 0; i < SA_DECODE_STAGES - 1; i++) {
        if (load.slice < end) {
            load_slice<depth>(p, s, load, ring + i * shape<depth>::stage, policy);
            load.advance(s.t, warps, end);
        }
        copy_async_commit();
    }
    const uint32_t readers = (uint32_t)(p.heads_kv * p.row_tiles * p.splits);
    uint32_t before = 0;
    if (p.append && threadIdx.x == blockDim.x - 1) {
        const int64_t units = p.splits > 1 && !p.clustered ? p.batch * p.heads_kv * p.row_tiles : 0;
        before = report_read(p, units + s.t.at.batch, readers);
    }
    if (!p.lean) {
        load_queries<depth>(p, s, query_tensor(p), queries);
        if (has_second_query(p)) {
            load_queries<depth>(p, s, second_query_tensor(p), queries + SA_DECODE_ROWS * depth * 2);
        }
        if (threadIdx.x < s.t.real) {
            s.t.sink[threadIdx.x] = sink_of(p, s.t.head[threadIdx.x]);
        }
        __syncthreads();
    }
    if (turns) {
        turn_all<T, depth>(p, s, queries);
        __syncthreads();
    }
    if (p.append && split == p.splits - 1 && unit % (uint32_t)p.row_tiles == 0) {
        append_token(p, s);
    }
    if (p.append && threadIdx.x == blockDim.x - 1) {
        advance(p, s.t.at, before, readers);
    }

    warp_state<depth> state;
    clear_state(state);
    attend_slices<T, depth>(p, s, load, begin, end, shared_address(queries), ring, policy, state);
    const partial part = merge_warps<depth>(s, state, rings, (float *)queries);
    if (split == 0 && s.t.real < s.t.rows) {
        pad_rows<T>(p, s.t);
    }
    if (p.clustered) {
        finish_cluster<T>(p, s.t, part, split);
        return;
    }
    __syncthreads();
    if (p.splits > 1) {
        finish_scratch<T>(p, s.t, part, unit, split, rings);
    } else {
        finish_alone<T>(p, s.t, part);
    }
}

} // namespace sa

#define SA_DECODE(name, type, depth)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * SA_DECODE_WARPS, 1) decode_##name##_##depth(const __grid_constant__ sa_cuda_problem p) \
    {                                                                                                                                       \
        sa::decode<sa::type, depth>(p);                                                                                                     \
    }

SA_DECODE(f16, f16, 64)
SA_DECODE(f16, f16, 128)
SA_DECODE(f16, f16, 256)
SA_DECODE(bf16, bf16, 64)
SA_DECODE(bf16, bf16, 128)
SA_DECODE(bf16, bf16, 256)
