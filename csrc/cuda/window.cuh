/* What a CTA of window_sm90.cu works on: stretches of tiles along a kv head, and where their keys lie in a ring of shared memory. */
#ifndef SA_CUDA_WINDOW_CUH
#define SA_CUDA_WINDOW_CUH

#include "finish.cuh"
#include "wgmma_window.cuh"

namespace sa
{

constexpr int window_groups = SA_WINDOW_GROUPS, window_warps = 4 * window_groups, copying_threads = 128, bundle = 16;
constexpr int tile_rows = 64, warp_rows = 16, group_limit = SA_WINDOW_HEADS;

/* Consecutive tiles of one kv head of one row. Keys are counted from `origin` on, in lines; a tile works on `keys` lines from its shift on,
 * which hold all that it sees. */
struct stretch {
    int64_t batch, query_begin, key_begin, key_count;
    int64_t position;  /* of the row's query 0 */
    int64_t origin;    /* index of line 0 among the row's keys; may be negative */
    char *query, *second, *output; /* of the row's query 0 and the group's first head */
    int head, tiles, first_row, first_token;
    int rows, real;    /* of the whole row and kv head: all, and those of real queries */
    int behind;        /* line of the position of first_token */
    int pinned;        /* keys */
    int sees;          /* so many pinned keys does query 0 see, and each query one more; may be negative */
    int apart;         /* line where the pinned keys end, clamped */
    uint32_t inverse;  /* x / group = x * inverse >> 16 for small x */
};

/* Everything in shared memory but the elements. */
struct window_state {
    uint64_t full[SA_WINDOW_BUNDLES(64)], free[SA_WINDOW_BUNDLES(64)];
    uint64_t stretch_full, stretch_free, pinned_full;
    stretch now;                                 /* no tiles: the end */
    float sink[group_limit], slope[group_limit]; /* log2 units */
    float bias[SA_WINDOW_BIASES];                /* [group, pinned], log2 units */
};
static_assert(sizeof(window_state) <= SA_WINDOW_STATE_SHARED, "room for what is known of the heads");

/* A tile: its first row, whose query and head in the group, and its first line. */
struct spot {
    int row, token, head, shift;
};

/* Groups of 2, 4, 8 .. heads: shifts instead of divisions, and every tile begins with the first head. */
__device__ __forceinline__ bool is_even_group(const sa_cuda_problem &p)
{
    return (p.group & (p.group - 1)) == 0;
}

__device__ __forceinline__ int token_of(const sa_cuda_problem &p, int row)
{
    return is_even_group(p) ? row >> (__ffs(p.group) - 1) : (int)((uint32_t)row / (uint32_t)p.group);
}

__device__ __forceinline__ spot spot_of(const sa_cuda_problem &p, const stretch &s, int tile)
{
    const int row = s.first_row + tile * tile_rows, token = token_of(p, row);
    return {row, token, row - token * p.group, (token - s.first_token) & ~7};
}

/* Query and head in the group of row `row` of a tile. */
struct owner {
    int token, head;
};

__device__ __forceinline__ owner owner_of(const sa_cuda_problem &p, const stretch &s, const spot &t, int row)
{
    const int skipped = (int)((uint32_t)(t.head + row) * s.inverse >> 16);
    return {t.token + skipped, t.head + row - skipped * p.group};
}

/* A product with values takes 16 keys: the last ones of a tile may be nobody's, with weight 0. */
template <int keys> constexpr int lines = (keys + 15) / 16 * 16;

/* Bundles of the stretch that a tile needs, with all before it. */
template <int keys> __device__ __forceinline__ int bundles_until(const spot &t)
{
    return (t.shift + lines<keys> + bundle - 1) / bundle;
}

template <int keys> __device__ __forceinline__ int bundles_of(const sa_cuda_problem &p, const stretch &s)
{
    return bundles_until<keys>(spot_of(p, s, s.tiles - 1));
}

/* --- who does what ----------------------------------------------------------------------------------------------------------------- */

/* What all CTAs share out, evenly, neighbours together: the tiles of a kv head after another. Beginning a stretch takes as long as a few
 * tiles, so that each head has so many more that are none: who begins a second one has less to do in it. */
struct share {
    uint32_t tiles, begin; /* of a kv head, and those that are none before them */
    uint32_t next, end;    /* of this CTA */
};

/* All lanes of a warp. */
__device__ __forceinline__ share share_of(const sa_cuda_problem &p)
{
    int64_t tiles = p.row_tiles, none;
    if (p.sequences > 0) {
        int64_t left = INT64_MAX;
        find_sequence(p, p.group, tile_rows, left, none);
        tiles = INT64_MAX - left;
    }
    const uint32_t begin = p.sequences == 0 && tiles >= 16 * 3 ? 3 : 0;
    const uint64_t units = (uint64_t)(tiles + begin) * p.heads_kv * (p.sequences > 0 ? 1 : p.batch);
    return {(uint32_t)tiles, begin, (uint32_t)(units * blockIdx.x / gridDim.x), (uint32_t)(units * (blockIdx.x + 1) / gridDim.x)};
}

/* The next stretch of this CTA; without tiles at the end. All lanes of a warp. */
template <int keys> __device__ __forceinline__ stretch next_stretch(const sa_cuda_problem &p, share &own)
{
    stretch s = {};
    const uint32_t period = own.tiles + own.begin, band = own.next / (period > 0 ? period : 1), heads = (uint32_t)p.heads_kv;
    const uint32_t in_band = own.next - band * period;
    own.next += in_band < own.begin ? own.begin - in_band : 0;
    if (own.next >= own.end) {
        return s;
    }
    int64_t tile = own.next - band * period - own.begin, sequence = 0, tiles = own.tiles;
    place at;
    if (p.sequences > 0) {
        find_sequence(p, p.group, tile_rows, tile, sequence);
        at = packed_row(p, sequence);
        tiles = (at.query_total * p.group + tile_rows - 1) / tile_rows;
    } else {
        at = batch_row(p, band / heads);
    }
    s.batch = at.batch;
    s.query_begin = at.query_begin;
    s.key_begin = at.key_begin;
    s.key_count = at.key_count;
    s.position = at.position;
    s.head = (int)(band % heads);
    s.tiles = (int)least(own.end - own.next, tiles - tile);
    own.next += s.tiles;
    s.first_row = (int)tile * tile_rows;
    s.first_token = token_of(p, s.first_row);
    s.rows = (int)(at.query_total * p.group);
    s.real = (int)(at.query_count * p.group);
    s.behind = keys - SA_WINDOW_SPAN(p.group);
    s.origin = at.position + s.first_token - s.behind;
    s.pinned = (int)least(p.pinned, at.key_count);
    s.sees = (int)clamp(at.position + 1, -(1 << 30), SA_WINDOW_PINNED);
    s.apart = (int)clamp(s.pinned - s.origin, -(1 << 30), keys);
    s.inverse = (65535 + (uint32_t)p.group) / (uint32_t)p.group;
    s.query = (char *)element(p.query, at.batch, s.head * p.group, at.query_begin, 2);
    s.second = (char *)element(p.sink_query, at.batch, s.head * p.group, at.query_begin, 2);
    s.output = (char *)element(p.output, at.batch, s.head * p.group, at.query_begin, 2);
    return s;
}

/* --- shared memory ----------------------------------------------------------------------------------------------------------------- */

/* Where things lie: addresses, and a ring of `bundles` bundles whose first ones are repeated behind its end, so that no product wraps. */
template <int depth> struct window_memory {
    static constexpr uint32_t row_bytes = depth * 2, panel = SA_WINDOW_BUNDLES(depth) * bundle * 128, ring_bytes = panel * (depth / 64);
    uint32_t keys, values, pinned_keys, pinned_values, queries;
    int bundles, repeated;
};

template <int depth> __device__ __forceinline__ window_memory<depth> window_memory_of(const sa_cuda_problem &p, char *memory)
{
    using layout = window_memory<depth>;
    layout m;
    m.keys = shared_address(memory) + SA_WINDOW_STATE_SHARED;
    m.values = m.keys + layout::ring_bytes;
    m.pinned_keys = m.values + layout::ring_bytes;
    m.pinned_values = m.pinned_keys + bundle * layout::row_bytes;
    m.queries = m.pinned_values + bundle * layout::row_bytes;
    m.repeated = 64 % (16 * p.group) == 0 ? 2 : 3; /* 48 keys from a multiple of 16, or of 8 */
    m.bundles = SA_WINDOW_BUNDLES(depth) - m.repeated;
    return m;
}

struct ring_cursor {
    int stage = 0;
    uint32_t parity = 0, count = 0;
    __device__ __forceinline__ void step(int stages)
    {
        count++;
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ void release(uint64_t *barrier)
{
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(barrier);
    }
}

/* What a warp has of the ring: it waits for all bundles and gives all of them back, in order. */
struct ring_hold {
    ring_cursor waited, released;
    uint32_t begin; /* bundles of the stretches before */
    int eighth;     /* of the ring, where the tile begins */
    __device__ __forceinline__ void wait(window_state &state, int bundles, uint32_t count)
    {
#pragma unroll 1
        while (waited.count < begin + count) {
            barrier_wait(&state.full[waited.stage], waited.parity);
            waited.step(bundles);
        }
    }
    /* The tile begins `eighths` later than the one before: not so much later that the ring came round twice. */
    __device__ __forceinline__ void go_on(int bundles, int eighths)
    {
        eighth += eighths;
        eighth -= eighth >= 2 * bundles ? 2 * bundles : 0;
    }
    __device__ __forceinline__ void give_back(window_state &state, int bundles, uint32_t count)
    {
        __syncwarp();
#pragma unroll 1
        while (released.count < begin + count) {
            wait(state, bundles, released.count + 1 - begin);
            release(&state.free[released.stage]);
            released.step(bundles);
        }
    }
};

/* The ring's groups of eight keys of a tile. A product finds what it needs in registers that a warp has in common, so that `eighth` is
 * handed around. */
struct ring_place {
    int eighth, eighths; /* first of the tile, and of the ring */
    __device__ __forceinline__ uint32_t behind(int steps) const
    {
        const int at = eighth + steps;
        return (uint32_t)((at >= eighths ? at - eighths : at) * (1024 / 16));
    }
};

__device__ __forceinline__ ring_place ring_place_of(const ring_hold &hold, int bundles)
{
    return {__shfl_sync(~0u, hold.eighth, 0), 2 * bundles};
}

/* A description `distance` 16-byte units further on. The upper half never changes. */
__device__ __forceinline__ uint64_t further(uint64_t description, uint32_t distance)
{
    return (description & 0xffffffff00000000u) | ((uint32_t)description + distance);
}

} // namespace sa

#endif
