/* What the prefill kernels of Hopper share: their form, the tile of rows, and what lies in shared memory. */
#ifndef SA_CUDA_HOPPER_CUH
#define SA_CUDA_HOPPER_CUH

#include "finish.cuh"
#include "tma.cuh"

namespace sa
{

constexpr int few = SA_HOPPER_FEW, hopper_tiles = 3, hopper_far = 1 << 29;
constexpr float lazy_bits = 8.0f; /* log2 by which a row's maximum may be exceeded before what was summed is scaled */

/* log2 by which a first maximum may lie below zero and is taken for zero all the same: weights are that much smaller. */
template <typename T> constexpr float low_bits = 4.0f;
template <> constexpr float low_bits<bf16> = 48.0f;

/* Sizes of a kernel: rows of a tile, depth of queries and keys and of values, keys of a slice, slices and tiles of queries held; and whether
 * scores are more than scaled and hidden. */
template <int rows_, int depth_, int width_, int keys_, int stages_, int query_tiles_, bool featured_> struct form {
    static constexpr int rows = rows_, depth = depth_, width = width_, keys = keys_, stages = stages_, query_tiles = query_tiles_;
    static constexpr bool featured = featured_;
    static constexpr bool turns = !featured && (depth == 64 || depth == 128); /* where it was timed */
    static constexpr int groups = rows / 64, warps = 4 * groups, threads = SA_HOPPER_THREADS(rows);
    static constexpr int key_panels = (depth + 63) / 64, value_panels = (width + 63) / 64;
    static constexpr uint32_t query_bytes = key_panels * rows * 128, key_bytes = key_panels * keys * 128, value_bytes = value_panels * keys * 128;
    static constexpr int query_parts = featured ? 2 : 1; /* the second query, for pinned keys */
    static constexpr uint32_t key_ring = query_tiles * query_parts * query_bytes, value_ring = key_ring + stages * key_bytes;
};

/* The queries of some tokens, of all heads of a group: row i is token i / group, head i % group. */
struct group_tile {
    place at;
    run_list list;
    range seen[max_runs]; /* by any row */
    range all[max_runs];  /* by every real row */
    int window[SA_HOPPER_HEADS];
    float slope[SA_HOPPER_HEADS], sink[SA_HOPPER_HEADS]; /* log2 units */
    int first_token, kv_head, rows, real; /* rows: in the tile, padded queries with them; real: the others */

    /* what is done with it: runs of the pinned keys and of the others, -1 for none, and their whole slices */
    int pinned, plain, pinned_whole, whole;
    int filled;                       /* are all rows real? */
    int slices;                       /* of the consumers, at least one; -1 after the last tile */
    int few_pinned;                   /* are there so few that a small box holds them? */
    int merged;                       /* is there a last slice of few pinned keys and of what whole slices leave? */
    int64_t high;                     /* end of what the plain slices hold */
    int edge, start, end;             /* from `high` on: how far row 0 sees, and the run of plain keys */
    int pinned_edge, pinned_end;      /* the same of the pinned keys, from the first of them on */
    int64_t widest;                   /* window of the group's heads */
    range seen_by_row, pinned_by_row; /* tokens that some query of the row sees: by a window, or as pinned ones */
    uint32_t removed;                 /* pinned keys that a bias removes for the whole group, a bit for each */
};

/* What the consumers have to know of a slice. */
struct slice_note {
    int32_t first;         /* key: of the pinned ones, else before (< 0) the end of what the tile sees */
    int16_t pinned, plain; /* does it hold such keys? Both: the pinned ones come first, `few` of them */
    int16_t masked;        /* some row does not see all of it */
    int16_t second;        /* scored with the second query */
};

template <typename F> struct hopper_state {
    group_tile tiles[hopper_tiles];
    slice_note notes[F::stages];
    uint64_t keys_full[F::stages], keys_free[F::stages], values_full[F::stages], values_free[F::stages];
    uint64_t tile_full[hopper_tiles], tile_free[hopper_tiles], queries_full[F::query_tiles], queries_free[F::query_tiles], dirty;
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

/* Fills a tile of `tokens` tokens, the `index`th of its row and kv head. All lanes of a warp. */
__device__ __forceinline__ void fill_group_tile(const sa_cuda_problem &p, const place &at, int index, int tokens, int kv_head, group_tile &t)
{
    const int lane = threadIdx.x % 32, group = p.group;
    const int64_t first_token = (int64_t)index * tokens;
    const int all_tokens = (int)clamp(at.query_total - first_token, 0, tokens), real = (int)clamp(at.query_count - first_token, 0, all_tokens);
    int64_t narrow = no_window, wide = 0; /* wide negated */
    for (int i = lane; i < group; i += 32) {
        const int head = kv_head * group + i;
        const int64_t window = window_of(p, head);
        t.window[i] = (int)least(window, hopper_far);
        t.slope[i] = p.alibi_slopes.given ? number_at(p.alibi_slopes, at.batch, head) * log2e : 0.0f;
        t.sink[i] = sink_of(p, head);
        narrow = least(narrow, window);
        wide = least(wide, -window);
    }
    narrow = reduce_least(narrow);
    wide = -reduce_least(wide);
    const int64_t low = at.position + first_token, high = low + (real > 0 ? real : 1) - 1;
    const run own = run_of(p, at, kv_head, lane);
    const int place = fill_runs(own, t.list);
    if (place >= 0) {
        t.seen[place] = real > 0 ? visible(own, p.causal, wide, wide, low, high) : range{0, 0};
        t.all[place] = visible(own, p.causal, narrow, narrow, high, low);
    }
    if (lane == 0) {
        t.at = at;
        t.first_token = (int)first_token;
        t.kv_head = kv_head;
        t.rows = all_tokens * group;
        t.real = real * group;
        t.filled = real == tokens;
        t.widest = wide;
    }
    __syncwarp();
}

/* Fills the tile of a unit: (row, kv head, tile) or, packed, (tile, kv head). False where there is no such tile. All lanes of a warp. */
__device__ __forceinline__ bool find_group_tile(const sa_cuda_problem &p, uint32_t unit, int tokens, group_tile &t)
{
    const uint32_t heads = (uint32_t)p.heads_kv, tiles = (uint32_t)p.row_tiles;
    const uint32_t head = p.sequences > 0 ? unit % heads : unit / tiles % heads;
    int64_t index = p.sequences > 0 ? unit / heads : unit % tiles, row = unit / tiles / heads;
    if (p.sequences > 0 && !find_sequence(p, p.group, (int64_t)tokens * p.group, index, row)) {
        return false;
    }
    fill_group_tile(p, p.sequences > 0 ? packed_row(p, row) : batch_row(p, row), (int)index, tokens, (int)head, t);
    return true;
}

/* The unit that this CTA takes in round `round`; >= units: none. Long tiles come first, and every other round goes backwards. */
__device__ __forceinline__ uint32_t unit_of_round(const sa_cuda_problem &p, uint32_t units, uint32_t round, bool &any)
{
    const uint32_t place = round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    any = place < units;
    if (p.sequences > 0) {
        return place;
    }
    const uint32_t tiles = (uint32_t)p.row_tiles, bands = units / tiles;
    return place % bands * tiles + tiles - 1 - place / bands;
}

__device__ __forceinline__ uint32_t units_of(const sa_cuda_problem &p)
{
    return (uint32_t)(p.row_tiles * p.heads_kv * (p.sequences > 0 ? 1 : p.batch));
}

#endif

} // namespace sa

#endif
