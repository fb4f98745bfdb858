/* What a CTA works on: a tile of query rows of one kv head, the runs that they see, and what happens to their scores. */
#ifndef SA_CUDA_TILE_CUH
#define SA_CUDA_TILE_CUH

#include "problem.cuh"

namespace sa
{

/* Row i of a tile is query (first_row + i) / group of head (first_row + i) % group of the kv head. */
template <int row_limit> struct tile {
    place at;
    run_list list;
    range seen[max_runs]; /* by any row */
    range all[max_runs];  /* by every real row */
    int first_slice[max_runs + 1];
    int64_t first_row;
    int64_t position[row_limit], window[row_limit];
    float slope[row_limit];  /* log2 units */
    float sink[row_limit];   /* log2 units; left to the kernel to fill */
    int head[row_limit];     /* of the query */
    int token[row_limit];    /* in the row */
    int kv_head, rows, real; /* rows: in the tile, padded queries with them; real: the others */
    int exists;
    int last; /* this CTA finishes the tile */
};

/* Slices begin .. end - 1 of `count` belong to a split. */
__device__ __forceinline__ void share_slices(uint32_t count, uint32_t split, uint32_t splits, int &begin, int &end)
{
    const uint32_t each = count / splits, longer = count % splits;
    begin = (int)(split * each + (split < longer ? split : longer));
    end = begin + (int)(each + (split < longer));
}

/* Finds the sequence that tile `index` of the packed ones belongs to: each has ceil(rows / tile) of them. All lanes of a warp. */
__device__ inline bool find_sequence(const sa_cuda_problem &p, int64_t group, int64_t tile_rows, int64_t &index, int64_t &sequence)
{
    const int lane = threadIdx.x % 32;
    for (int64_t first = 0; first < p.sequences; first += 32) {
        int64_t tiles = 0;
        if (first + lane < p.sequences) {
            tiles = (packed_row(p, first + lane).query_count * group + tile_rows - 1) / tile_rows;
        }
        int64_t sum = tiles;
        for (int step = 1; step < 32; step *= 2) {
            const int64_t before = __shfl_up_sync(~0u, sum, step);
            sum += lane >= step ? before : 0;
        }
        const unsigned reached = __ballot_sync(~0u, index < sum);
        if (reached != 0) {
            const int found = __ffs(reached) - 1;
            index -= __shfl_sync(~0u, sum - tiles, found);
            sequence = first + found;
            return true;
        }
        index -= __shfl_sync(~0u, sum, 31);
    }
    return false;
}

__device__ __forceinline__ int64_t reduce_least(int64_t value)
{
    for (int step = 16; step > 0; step /= 2) {
        value = least(value, __shfl_xor_sync(~0u, value, step));
    }
    return value;
}

/* Rows and runs of a tile whose place is known. All lanes of a warp. */
template <int row_limit>
__device__ __forceinline__ void fill_tile(const sa_cuda_problem &p, const place &at, int64_t first_row, int kv_head, int slice,
                                          tile<row_limit> &t)
{
    const int lane = threadIdx.x % 32;
    const uint32_t group = (uint32_t)p.heads_q / (uint32_t)p.heads_kv;
    const uint32_t first_token = first_row >> 32 == 0 ? (uint32_t)first_row / group : (uint32_t)((uint64_t)first_row / group),
                   first_head = (uint32_t)(first_row - (int64_t)first_token * group);
    const int rows = (int)clamp(at.query_total * group - first_row, 0, row_limit),
              real = (int)clamp(at.query_count * group - first_row, 0, rows);
    int64_t window_low = no_window, window_high = 0; /* high negated */
    for (int i = lane; i < rows; i += 32) {
        const uint32_t row = first_head + i;
        const int token = (int)(first_token + row / group), head = (int)(kv_head * group + row % group);
        const int64_t window = window_of(p, head);
        t.token[i] = token;
        t.head[i] = head;
        t.position[i] = at.position + token;
        t.window[i] = window;
        t.slope[i] = p.alibi_slopes.given ? number_at(p.alibi_slopes, at.batch, head) * log2e : 0.0f;
        if (i < real) {
            window_low = least(window_low, window);
            window_high = least(window_high, -window);
        }
    }
    if (p.common_window == 0) {
        window_low = reduce_least(window_low);
        window_high = reduce_least(window_high);
    } else {
        window_low = p.common_window;
        window_high = -window_low;
    }
    window_high = -window_high;
    const int64_t low = at.position + first_token, high = at.position + first_token + (first_head + (real > 0 ? real : 1) - 1) / group;
    const run own = run_of(p, at, kv_head, lane);
    const int place = fill_runs(own, t.list);
    int slices = 0;
    if (place >= 0) {
        const range seen = real > 0 ? visible(own, p.causal, window_high, window_high, low, high) : range{0, 0};
        t.seen[place] = seen;
        t.all[place] = visible(own, p.causal, window_low, window_low, high, low);
        slices = (int)((uint64_t)(most(seen.high - seen.low, 0) + slice - 1) / (unsigned)slice);
    }
    for (int step = 1; step < 8; step *= 2) {
        const int before = __shfl_up_sync(~0u, slices, step);
        slices += lane >= step ? before : 0;
    }
    if (place >= 0) {
        t.first_slice[place + 1] = slices;
    }
    if (lane == 0) {
        t.first_slice[0] = 0;
        t.at = at;
        t.first_row = first_row;
        t.kv_head = kv_head;
        t.rows = rows;
        t.real = real;
    }
}

/* Run `index` of a kv head where the row has one query: only the keys that it sees, so that nothing is left to compare. Every instruction
 * here runs cold, once, before the first key is asked for. */
__device__ __forceinline__ run lean_run(const sa_cuda_problem &p, const place &at, int64_t head, int index)
{
    int64_t first = 0, count, position;
    int64_t pinned = p.apart ? p.pinned : 0;
    sa_cuda_tensor key = p.held_key, value = p.held_value;
    int64_t batch = at.batch;
    int kind = index == 2 ? run_pinned : run_plain;
    bool raw = false;
    if (p.cache.keys != nullptr) {
        const int64_t oldest = most(at.low, at.length - p.common_window + 1), held = most(at.length - oldest, 0);
        const int64_t slot = ring_slot(p, most(oldest, p.pinned)), to_end = least(held, p.pinned + p.cache.capacity - slot);
        first = index == 2 ? 0 : index == 3 ? slot : p.pinned;
        count = index == 2 ? least(pinned, at.length) : index == 3 ? to_end : held - to_end;
        position = index == 2 ? 0 : index == 3 ? oldest : oldest + to_end;
        if (index == 1) { /* the token comes first: while its scores are masked, the others are still on their way */
            first = 0;
            count = at.query_count;
            position = at.length;
            kind = at.length < p.pinned ? run_pinned : run_plain;
            raw = p.append;
        }
        if (!p.append && index == 1) {
            key = key_tensor(p);
            value = p.value;
        }
    } else {
        pinned = least(pinned, at.key_count);
        position = index == 2 ? 0 : most(pinned, at.key_count - p.common_window);
        first = at.key_begin + position;
        count = index == 2 ? pinned : index == 3 ? at.key_count - position : 0;
        if (p.slots && index == 1) { /* as with a cache */
            first = 0;
            count = at.query_count;
            position = at.key_count;
            kind = p.apart && position < p.pinned ? run_pinned : run_plain;
            raw = true;
        }
    }
    if (p.learned > 0 && index == 0) {
        key = p.sink_key;
        value = p.sink_value;
        batch = first = position = 0;
        count = p.learned;
        kind = run_learned;
    }
    count = index > 4 || (index == 0 && p.learned == 0) ? 0 : count;
    return {element(key, batch, head, first, 2),
            element(value, batch, head, first, 2),
            key.token * 2,
            value.token * 2,
            count,
            position,
            kind,
            raw};
}

/* fill_tile where the row has one query. All lanes of a warp. */
template <int row_limit>
__device__ __forceinline__ void fill_lean_tile(const sa_cuda_problem &p, int64_t row, int head, int first_row, int slice,
                                               tile<row_limit> &t)
{
    const int lane = threadIdx.x % 32, group = p.group;
    const place at = batch_row(p, row, head);
    const int rows = group - first_row < row_limit ? group - first_row : row_limit, real = at.query_count > 0 ? rows : 0;
    const run own = lean_run(p, at, head, lane);
    const int place = fill_runs(own, t.list);
    int slices = real == 0 ? 0 : (int)((uint64_t)(own.count + slice - 1) / (unsigned)slice);
    for (int step = 1; step < 8; step *= 2) {
        const int before = __shfl_up_sync(~0u, slices, step);
        slices += lane >= step ? before : 0;
    }
    if (place >= 0) {
        t.seen[place] = t.all[place] = {0, own.count};
        t.first_slice[place + 1] = slices;
    }
    if (lane < rows) {
        t.token[lane] = 0;
        t.head[lane] = head * group + first_row + lane;
        t.position[lane] = at.position;
        t.window[lane] = p.common_window;
        if (p.alibi_slopes.given) {
            t.slope[lane] = number_at(p.alibi_slopes, row, t.head[lane]) * log2e;
        }
    }
    if (lane == 0) {
        t.first_slice[0] = 0;
        t.at = at;
        t.first_row = first_row;
        t.kv_head = head;
        t.rows = rows;
        t.real = real;
        t.exists = true;
    }
}

/* Fills the tile of a unit: (row, kv head, tile) or, packed, (tile, kv head). False where there is no such tile. All lanes of a warp.
 * `slice`: keys that the kernel takes at a time. */
template <int row_limit> __device__ __forceinline__ bool find_tile(const sa_cuda_problem &p, uint32_t unit, int slice, tile<row_limit> &t)
{
    const uint32_t heads = (uint32_t)p.heads_kv, tiles = (uint32_t)p.row_tiles; /* a grid is smaller than 2^31 */
    const uint32_t head = p.sequences > 0 ? unit % heads : unit / tiles % heads;
    int64_t index = p.sequences > 0 ? unit / heads : unit % tiles, row = unit / tiles / heads;
    const bool exists = p.sequences == 0 || find_sequence(p, (uint32_t)p.heads_q / heads, row_limit, index, row);
    if (exists) {
        const place at = p.sequences > 0 ? packed_row(p, row) : batch_row(p, row, head);
        fill_tile(p, at, index * row_limit, (int)head, slice, t);
    }
    return exists;
}

/* find_tile by all threads of the CTA; ends with a barrier. */
template <int row_limit> __device__ __forceinline__ bool begin_tile(const sa_cuda_problem &p, uint32_t unit, int slice, tile<row_limit> &t)
{
    if (threadIdx.x < 32) {
        const bool exists = find_tile(p, unit, slice, t);
        if (threadIdx.x == 0) {
            t.exists = exists;
        }
    }
    __syncthreads();
    return t.exists;
}

/* Keys of a run that one row sees, relative to the key `first` of the run. */
template <int row_limit>
__device__ __forceinline__ void row_range(const sa_cuda_problem &p, const tile<row_limit> &t, const run &r, int row, int64_t first,
                                          int &low, int &high)
{
    const range own = visible(r, p.causal, t.window[row], t.window[row], t.position[row], t.position[row]);
    low = (int)clamp(own.low - first, 0, 1 << 20);
    high = row < t.real ? (int)clamp(own.high - first, 0, 1 << 20) : 0;
}

} // namespace sa

#endif
