/* What the kernels of the backward pass share: which keys meet which queries, from either side.
 *
 * A tile holds keys of one run and one kv head, or queries of one head; it stays while slices of the other side pass by. Everything in a
 * slice belongs to one head and one run, so that visibility is a band: key j meets query i where low <= i - j <= high. */
#ifndef SA_CUDA_BACKWARD_CUH
#define SA_CUDA_BACKWARD_CUH

#include "backward.h"
#include "tile.cuh"

namespace sa
{

constexpr int far = 1 << 20; /* beyond any tile */

/* A slice that passes a tile. Indices count from the first query and the first key of the two. */
struct meeting {
    int count;     /* rows of the slice */
    int low, high; /* the band */
    int head;      /* query head */
    int64_t query; /* position of query 0 */
    int64_t key;   /* index in its run of key 0 */
};

__device__ __forceinline__ place place_of(const sa_cuda_problem &p, int64_t row)
{
    return p.sequences > 0 ? packed_row(p, row) : batch_row(p, row);
}

__device__ __forceinline__ bool is_everywhere(const sa_cuda_problem &p, const run &r)
{
    return r.kind == run_learned || (r.kind == run_pinned && !p.causal);
}

__device__ __forceinline__ void set_band(const sa_cuda_problem &p, const run &r, meeting &m)
{
    m.low = -far;
    m.high = far;
    if (!is_everywhere(p, r)) {
        const int64_t window = window_of(p, m.head), base = m.query - r.position - m.key;
        m.low = (int)clamp((p.causal ? 0 : 1 - window) - base, -far, far);
        m.high = r.kind == run_pinned ? far : (int)clamp(window - 1 - base, -far, far);
    }
}

/* Queries of a row that see any of the keys first .. last of a run. */
__device__ __forceinline__ range queries_of(const sa_cuda_problem &p, const place &at, const run &r, int head, int64_t first, int64_t last)
{
    if (is_everywhere(p, r)) {
        return {0, at.query_count};
    }
    const int64_t window = window_of(p, head), offset = r.position - at.position;
    return {most(0, offset + first - (p.causal ? 0 : window - 1)),
            r.kind == run_pinned ? at.query_count : least(at.query_count, offset + last + window)};
}

__device__ __forceinline__ const sa_cuda_row *rows_of(const sa_cuda_backward &b, int64_t batch, int64_t head, int64_t token)
{
    return (const sa_cuda_row *)((const char *)b.forward.scratch + b.rows_offset) +
           (batch * b.forward.heads_q + head) * b.forward.query_length + token;
}

/* --- a tile of keys ----------------------------------------------------------------------------------------------------------------- */

struct key_tile {
    run_list list;
    place at; /* the row whose queries pass */
    run keys;
    int64_t first;        /* key of the run */
    int64_t row, end_row; /* rows whose queries pass: one, or all for learned keys */
    int count, kv_head;
};

/* The queries that pass a tile of keys: head after head of the group, row after row. */
struct query_walk {
    int64_t row, token, end;
    int head; /* in the group */
};

/* The tile of a unit: learned keys first, which meet most, then (row, kv head, tile). All lanes of a warp. */
__device__ inline bool find_key_tile(const sa_cuda_backward &b, int64_t unit, int width, key_tile &t)
{
    const sa_cuda_problem &p = b.forward;
    const int lane = threadIdx.x % 32;
    const int64_t rows = p.sequences > 0 ? p.sequences : p.batch, learned = b.learned_tiles * p.heads_kv;
    if (unit < learned) {
        const int head = (int)(unit % p.heads_kv);
        if (lane == 0) {
            t.at = place_of(p, 0);
            t.keys = run_of(p, t.at, head, 0);
            t.first = unit / p.heads_kv * width;
            t.row = 0;
            t.end_row = rows;
            t.kv_head = head;
        }
        return true;
    }
    unit -= learned;
    int64_t index = unit % b.key_tiles, row = p.sequences > 0 ? 0 : unit / b.key_tiles / p.heads_kv;
    const int64_t end = p.sequences > 0 ? rows : row + 1;
    const int head = (int)(unit / b.key_tiles % p.heads_kv);
    for (; row < end; row++) {
        const place at = place_of(p, row);
        __syncwarp();
        fill_runs(run_of(p, at, head, lane), t.list);
        __syncwarp();
        for (int i = 0; i < t.list.count; i++) {
            const run &r = t.list.runs[i];
            const int64_t tiles = r.kind == run_learned ? 0 : (r.count + width - 1) / width;
            if (index < tiles) {
                if (lane == 0) {
                    t.at = at;
                    t.keys = r;
                    t.first = index * width;
                    t.row = row;
                    t.end_row = row + 1;
                    t.kv_head = head;
                }
                return true;
            }
            index -= tiles;
        }
    }
    return false;
}

/* All threads of the CTA; ends with a barrier. False where there is no such tile. */
__device__ __forceinline__ bool begin_keys(const sa_cuda_backward &b, int64_t unit, int width, key_tile &t, query_walk &walk)
{
    if (!__syncthreads_or(threadIdx.x < 32 && find_key_tile(b, unit, width, t))) {
        return false;
    }
    if (threadIdx.x == 0) {
        t.count = (int)least(width, t.keys.count - t.first);
    }
    __syncthreads();
    walk = {t.row, 0, 0, -1};
    return true;
}

/* Goes to the next slice of queries; false behind the last. All threads, with barriers where the row changes. */
__device__ __forceinline__ bool next_queries(const sa_cuda_backward &b, int slice, key_tile &t, query_walk &walk, meeting &m)
{
    const sa_cuda_problem &p = b.forward;
    walk.token += slice;
    while (walk.token >= walk.end) {
        walk.head++;
        if (walk.head == p.group) {
            walk.head = 0;
            walk.row++;
            if (walk.row == t.end_row) {
                return false;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                t.at = place_of(p, walk.row);
            }
            __syncthreads();
        }
        const range seen = queries_of(p, t.at, t.keys, t.kv_head * p.group + walk.head, t.first, t.first + t.count - 1);
        walk.token = seen.low;
        walk.end = seen.high;
    }
    m.count = (int)least(slice, walk.end - walk.token);
    m.head = t.kv_head * p.group + walk.head;
    m.query = t.at.position + walk.token;
    m.key = t.first;
    set_band(p, t.keys, m);
    return true;
}

/* Where the gradient of the tile's first key lies: row of [batch, heads_kv, kv_length], or of [heads_kv, learned]. */
__device__ __forceinline__ int64_t key_row_of(const sa_cuda_problem &p, const key_tile &t)
{
    return t.keys.kind == run_learned
               ? t.kv_head * p.learned + t.first
               : (t.at.batch * p.heads_kv + t.kv_head) * p.kv_length + t.at.key_begin + t.keys.position + t.first;
}

/* --- a tile of queries -------------------------------------------------------------------------------------------------------------- */

struct query_tile {
    run_list list;
    range seen[max_runs];
    place at;
    int64_t first;   /* token */
    int rows, count; /* in the tile; of them real */
    int head;
};

/* The keys that pass a tile of queries: run after run. */
struct key_walk {
    int64_t key, end;
    int run;
};

/* All threads of the CTA; ends with a barrier. False where there is no such tile. */
__device__ __forceinline__ bool begin_queries(const sa_cuda_backward &b, int64_t unit, int width, query_tile &t)
{
    const sa_cuda_problem &p = b.forward;
    bool exists = false;
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x, head = (int)(unit / b.query_tiles % p.heads_q);
        int64_t index = b.query_tiles - 1 - unit % b.query_tiles, row = unit / b.query_tiles / p.heads_q; /* the last tile sees most */
        exists = p.sequences == 0 || find_sequence(p, 1, width, index, row);
        if (exists) {
            const place at = place_of(p, row);
            const int64_t first = index * width;
            const int count = (int)clamp(at.query_count - first, 0, width);
            const run own = run_of(p, at, head / p.group, lane);
            const int place = fill_runs(own, t.list);
            if (place >= 0) {
                const int64_t window = window_of(p, head), low = at.position + first;
                t.seen[place] = count > 0 ? visible(own, p.causal, window, window, low, low + count - 1) : range{0, 0};
            }
            if (lane == 0) {
                t.at = at;
                t.first = first;
                t.rows = (int)clamp(at.query_total - first, 0, width);
                t.count = count;
                t.head = head;
            }
        }
    }
    return __syncthreads_or(exists);
}

/* Goes to the next slice of keys of the runs that meet this query: the one for the pinned keys, or the other. */
__device__ __forceinline__ bool next_keys(const sa_cuda_backward &b, int slice, bool second, const query_tile &t, key_walk &walk,
                                          meeting &m)
{
    const sa_cuda_problem &p = b.forward;
    walk.key += slice;
    while (walk.key >= walk.end) {
        walk.run++;
        if (walk.run == t.list.count) {
            return false;
        }
        const bool pinned = t.list.runs[walk.run].kind == run_pinned && has_second_query(p);
        walk.key = pinned == second ? t.seen[walk.run].low : 0;
        walk.end = pinned == second ? t.seen[walk.run].high : 0;
    }
    m.count = (int)least(slice, walk.end - walk.key);
    m.head = t.head;
    m.query = t.at.position + t.first;
    m.key = walk.key;
    set_band(p, t.list.runs[walk.run], m);
    return true;
}

__device__ __forceinline__ int64_t query_row_of(const sa_cuda_problem &p, const query_tile &t)
{
    return (t.at.batch * p.heads_q + t.head) * p.query_length + t.at.query_begin + t.first;
}

/* Does this head give the pinned key no weight whatever the scores? */
__device__ __forceinline__ bool is_removed(const sa_cuda_problem &p, const run &r, int head, int64_t key)
{
    return r.kind == run_pinned && p.sink_bias.given && number_at(p.sink_bias, head, r.position + key) == -infinity;
}

} // namespace sa

#endif
