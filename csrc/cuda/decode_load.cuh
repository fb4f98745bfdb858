/* How the decode kernel gets its queries, the token of a step, and keys and values. */
#ifndef SA_CUDA_DECODE_LOAD_CUH
#define SA_CUDA_DECODE_LOAD_CUH

#include "multiply.cuh"

namespace sa
{

template <int depth> struct shape {
    static constexpr int slice = SA_DECODE_SLICE(depth), pieces = depth / 8, row_bytes = depth * 2;
    static constexpr int half_stage = slice * row_bytes, stage = 2 * half_stage, ring = SA_DECODE_STAGES * stage;
};

/* Of a step that lets a token leave: its stream, the ledger before, the new token. */
struct decode_step {
    int64_t now, budget, evicted, logged;
    double mass, largest, token_mass, token_own;
};

struct decode_shared {
    tile<SA_DECODE_ROWS> t;
    float turn[2][2][128]; /* own and pinned position; cos and sin */
    alignas(16) uint16_t new_key[256];
    alignas(16) uint16_t new_value[256];
    float states[SA_DECODE_ROWS][2][SA_DECODE_WARPS]; /* maximum and sum of each warp */
    decode_step step;
    alignas(16) float sums[SA_DECODE_WARPS][SA_DECODE_ROWS]; /* of whole rows in log2 units, a copy a warp, where keys are weighed */
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
template <int depth>
__device__ inline void load_queries(const sa_cuda_problem &p, const decode_shared &s, const sa_cuda_tensor &source, char *target)
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
__device__ __forceinline__ void load_lean_queries(const sa_cuda_problem &p, const sa_cuda_tensor &source, int64_t batch, int first_head,
                                                  int rows, int first, int step, char *target)
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
    const uint16_t *key = (const uint16_t *)element(p.key, batch, head, 0, 2),
                   *value = (const uint16_t *)element(p.value, batch, head, 0, 2);
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

/* The token of a step into a slot. */
__device__ inline void store_token(const sa_cuda_problem &p, const decode_shared &s, int64_t slot)
{
    const place &at = s.t.at;
    uint16_t *key = (uint16_t *)(uintptr_t)element(p.held_key, at.batch, s.t.kv_head, slot, 2),
             *value = (uint16_t *)(uintptr_t)element(p.held_value, at.batch, s.t.kv_head, slot, 2);
    for (int64_t d = threadIdx.x; d < p.depth; d += blockDim.x) {
        key[d] = s.new_key[d];
    }
    for (int64_t d = threadIdx.x; d < p.depth_v; d += blockDim.x) {
        value[d] = s.new_value[d];
    }
}

/* Writes the token of a step into its slot. No query of this call sees what stood there: it left the window. */
__device__ inline void append_token(const sa_cuda_problem &p, const decode_shared &s)
{
    const place &at = s.t.at;
    if (at.query_count == 0) {
        return;
    }
    store_token(p, s, p.slots ? at.key_count : at.length < p.pinned ? at.length : ring_slot(p, at.length));
}

/* --- keys and values --------------------------------------------------------------------------------------------------------------- */

/* A lane's walk over the slices that its warp loads: every `warps`-th. What a run has in common is read when the run is entered. */
template <int depth> struct loader {
    static constexpr int slice_keys = shape<depth>::slice, pieces = shape<depth>::pieces, step = 32 / pieces; /* rows of one instruction */
    const char *key, *value;                /* the lane's piece of its first row */
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
__device__ __forceinline__ void load_slice(const sa_cuda_problem &p, const decode_shared &s, const loader<depth> &l, char *stage,
                                           uint64_t policy)
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

} // namespace sa

#endif
