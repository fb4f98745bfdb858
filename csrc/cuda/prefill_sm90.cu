/* Attention of many query rows on Hopper: tiles of 128 rows against slices of 128 keys, by asynchronous matrix products (wgmma).
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   flops = 4 * depth * visible pairs * heads_q * batch
 *
 * Rows are the queries of all heads of a group (tile.cuh), so that a narrow window reads a key once for the group. A CTA stays on its
 * multiprocessor and takes tile after tile, the longest first and to and fro, so that all end together. One warpgroup finds tiles and
 * copies queries, keys and values by cp.async, which takes any stride, ring buffers and ends of rows, a ring of slices ahead and beyond
 * the end of a tile; two warpgroups of 64 rows each multiply. Scores of the next slice are computed while the weights of this one meet
 * the values, and while the other warpgroup has its softmax. Slices that every row sees whole carry no mask.
 *
 * Not for: softcap, ALiBi, bias of pinned keys, a second query (choose.c sends those, and what was not measured, to prefill_sm80.cu).
 *
 * H200, bf16, causal, useful TFLOP/s: 64/8 heads, D 128, N 8192; D 64, N 16384; D 128, N 32768, window 1024 with 4 pinned; cuDNN beside
 *   v1 two warpgroups by turns      559   404   348       600   469   -    2026-11-25
 *   v1 not by turns                 552   398   348                        2026-11-25
 * Limited by: not known yet; the tensor cores are busy for about 60 % of the time. */
#include "finish.cuh"
#include "wgmma.cuh"

#ifndef SA_HOPPER_TURNS
#define SA_HOPPER_TURNS 1
#endif

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int hopper_rows = SA_HOPPER_ROWS, hopper_stages = SA_HOPPER_STAGES, group_threads = 128;
constexpr int consumer_groups = hopper_rows / 64, consumer_warps = 4 * consumer_groups;

using hopper_tile = tile<hopper_rows>;

/* What the consumers have to know of a slice. */
struct slice_note {
    int64_t first;
    int32_t run, masked;
};

/* Everything in shared memory but the elements. */
struct hopper_state {
    hopper_tile tiles[2];
    slice_note notes[hopper_stages];
    uint64_t keys_full[hopper_stages], keys_free[hopper_stages], values_full[hopper_stages], values_free[hopper_stages];
    uint64_t tile_full[2], tile_free[2], queries_full, queries_free;
};
static_assert(sizeof(hopper_state) <= SA_HOPPER_ROWS_SHARED, "room for what is known of the rows");

struct cursor {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void step(int stages)
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
    return place % bands * tiles + tiles - 1 - place / bands;
}

__device__ __forceinline__ uint32_t units_of(const sa_cuda_problem &p)
{
    return (uint32_t)(p.row_tiles * p.heads_kv * (p.sequences > 0 ? 1 : p.batch));
}

/* --- the warpgroup that copies ----------------------------------------------------------------------------------------------------- */

/* `rows` rows of 16-bit elements into panels of 64 columns, 128-byte swizzle; zero behind `count` and beyond `width`. A thread keeps its
 * piece of the row, and its rows are a multiple of eight apart, so that the swizzle is the same for all of them. */
template <int depth, int rows>
__device__ __forceinline__ void copy_rows(const char *source, int64_t stride, int count, int width, uint32_t target)
{
    constexpr int pieces = depth / 8, step = group_threads / pieces;
    const int thread = threadIdx.x % group_threads, row = thread / pieces, piece = thread % pieces;
    const bool within = piece * 8 < width;
    const char *from = source + row * stride + piece * 16;
    uint32_t to = target + piece / 8 * (rows * 128) + row * 128 + ((piece % 8 ^ row % 8) * 16);
    if (count >= rows && within) {
#pragma unroll
        for (int i = 0; i < rows / step; i++) {
            copy_or_clear_16(to, from, true);
            from += step * stride;
            to += step * 128;
        }
        return;
    }
#pragma unroll 1
    for (int i = row; i < rows; i += step) {
        const bool copied = i < count && within;
        copy_or_clear_16(to, copied ? from : source, copied);
        from += step * stride;
        to += step * 128;
    }
}

template <int depth> __device__ __forceinline__ void copy_queries(const sa_cuda_problem &p, const hopper_tile &t, uint32_t target)
{
    constexpr int pieces = depth / 8, step = group_threads / pieces;
    const int thread = threadIdx.x % group_threads, piece = thread % pieces;
    const sa_cuda_tensor queries = query_tensor(p);
#pragma unroll 4
    for (int row = thread / pieces; row < hopper_rows; row += step) {
        const bool copied = row < t.real && piece * 8 < p.depth;
        const char *from = (const char *)queries.data;
        if (copied) {
            from = element(queries, t.at.batch, t.head[row], t.at.query_begin + t.token[row], 2) + piece * 16;
        }
        copy_or_clear_16(target + piece / 8 * (hopper_rows * 128) + row * 128 + ((piece % 8 ^ row % 8) * 16), from, copied);
    }
}

template <int depth, int keys> __device__ void produce(const sa_cuda_problem &p, hopper_state &s, uint32_t memory)
{
    constexpr uint32_t query_bytes = hopper_rows * depth * 2, stage_bytes = keys * depth * 2;
    const uint32_t queries = memory, key_ring = queries + query_bytes, value_ring = key_ring + hopper_stages * stage_bytes;
    const int thread = threadIdx.x % group_threads;
    const uint32_t units = units_of(p);
    cursor tiles, at, loads;
    for (uint32_t round = 0;; round++) {
        bool any;
        const uint32_t unit = unit_of_round(p, units, round, any);
        if (!any) {
            break;
        }
        hopper_tile &t = s.tiles[tiles.stage];
        barrier_wait(&s.tile_free[tiles.stage], tiles.parity ^ 1);
        if (thread < 32) {
            const bool exists = find_tile(p, unit, keys, t);
            if (thread == 0) {
                t.exists = exists;
            }
            __syncwarp();
            for (int i = thread; exists && i < t.real; i += 32) {
                t.sink[i] = sink_of(p, t.head[i]);
            }
        }
        meet(1, group_threads);
        if (thread == 0) {
            barrier_arrive(&s.tile_full[tiles.stage]);
        }
        tiles.step(2);
        const int slices = t.exists ? t.first_slice[t.list.count] : 0;
        for (int slice = 0, run_index = 0; slice < slices; slice++) {
            while (slice >= t.first_slice[run_index + 1]) {
                run_index++;
            }
            const run &r = t.list.runs[run_index];
            const range seen = t.seen[run_index];
            const int64_t first = seen.low + (int64_t)(slice - t.first_slice[run_index]) * keys;
            const int count = (int)least(keys, seen.high - first);
            barrier_wait(&s.keys_free[at.stage], at.parity ^ 1);
            if (thread == 0) {
                const range all = t.all[run_index];
                s.notes[at.stage] = {first, run_index, first < all.low || first + keys > all.high};
                barrier_arrive(&s.keys_full[at.stage]);
            }
            copy_rows<depth, keys>(r.key + first * r.key_stride, r.key_stride, count, (int)p.depth, key_ring + at.stage * stage_bytes);
            barrier_arrive_copied(&s.keys_full[at.stage]);
            if (slice == 0) {
                barrier_wait(&s.queries_free, loads.parity ^ 1);
                copy_queries<depth>(p, t, queries);
                barrier_arrive_copied(&s.queries_full);
                loads.step(1);
            }
            barrier_wait(&s.values_free[at.stage], at.parity ^ 1);
            copy_rows<depth, keys>(r.value + first * r.value_stride, r.value_stride, count, (int)p.depth_v,
                                   value_ring + at.stage * stage_bytes);
            barrier_arrive_copied(&s.values_full[at.stage]);
            at.step(hopper_stages);
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* --- the warpgroups that multiply -------------------------------------------------------------------------------------------------- */

/* Hides what a row does not see. `row`: the first of this thread's two, eight apart. */
template <int keys>
__device__ __forceinline__ void hide(const sa_cuda_problem &p, const hopper_tile &t, const slice_note &note, int row, float (&scores)[keys / 2])
{
    int low[2], high[2];
    const run &r = t.list.runs[note.run];
    const int column = threadIdx.x % 4 * 2;
    row_range(p, t, r, row, note.first, low[0], high[0]);
    row_range(p, t, r, row + 8, note.first, low[1], high[1]);
#pragma unroll
    for (int i = 0; i < keys / 2; i++) {
        const int at = i / 4 * 8 + i % 2 + column, half = i % 4 / 2;
        scores[i] = at >= low[half] && at < high[half] ? scores[i] : -infinity;
    }
}

/* What a thread knows of its two rows: largest dot product, and the sum over its own columns. */
struct rows_state {
    float maximum[2], sum[2];
};

/* From dot products to weights, and the factor for what was summed before. */
template <int keys> __device__ __forceinline__ void weigh(float scale, float (&scores)[keys / 2], rows_state &state, float (&factor)[2])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float maximum = state.maximum[half];
#pragma unroll
        for (int n = 0; n < keys / 8; n++) {
            maximum = fmaxf(maximum, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
        factor[half] = state.maximum[half] == -infinity ? 0.0f : exp2_fast((state.maximum[half] - maximum) * scale);
        state.maximum[half] = maximum;
        const float anchor = anchor_of(maximum) * scale;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int n = 0; n < keys / 8; n++) {
            float &x = scores[4 * n + 2 * half], &y = scores[4 * n + 2 * half + 1];
            x = exp2_fast(fmaf(x, scale, -anchor));
            y = exp2_fast(fmaf(y, scale, -anchor));
            even += x;
            odd += y;
        }
        state.sum[half] = fmaf(state.sum[half], factor[half], even + odd);
    }
}

template <int depth> __device__ __forceinline__ void rescale(float (&values)[depth / 2], const float (&factor)[2])
{
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < depth / 2; i++) {
            values[i] *= factor[i % 4 / 2];
        }
    }
}

template <typename T, int depth, int keys>
__device__ __forceinline__ void issue_keys(uint64_t queries, uint64_t keys_at, float (&scores)[keys / 2])
{
#pragma unroll
    for (int step = 0; step < depth / 16; step++) {
        const int panel = step / 4, within = step % 4 * 2;
        product<T>(scores, queries + panel * (hopper_rows * 8) + within, keys_at + panel * (keys * 8) + within, step > 0);
    }
    products_commit();
}

template <typename T, int depth, int keys>
__device__ __forceinline__ void issue_values(const uint32_t (&weights)[keys / 4], uint64_t values_at, float (&values)[depth / 2])
{
#pragma unroll
    for (int step = 0; step < keys / 16; step++) {
        product<T>(values, &weights[4 * step], values_at + step * 128);
    }
    products_commit();
}

template <typename T, int keys> __device__ __forceinline__ void pack_weights(const float (&scores)[keys / 2], uint32_t (&weights)[keys / 4])
{
#pragma unroll
    for (int i = 0; i < keys / 4; i++) {
        weights[i] = T::pack(scores[2 * i], scores[2 * i + 1]);
    }
}

__device__ __forceinline__ void release(uint64_t *barrier)
{
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(barrier);
    }
}

template <typename T, int depth>
__device__ __forceinline__ void write_row(const sa_cuda_problem &p, const hopper_tile &t, int row, const float (&values)[depth / 2], int half,
                                          float factor)
{
    const int lane = threadIdx.x % 32;
    uint16_t *to = (uint16_t *)element(p.output, t.at.batch, t.head[row], t.at.query_begin + t.token[row], 2);
    const bool pairs = ((uintptr_t)to & 3) == 0;
#pragma unroll
    for (int n = 0; n < depth / 8; n++) {
        const int d = n * 8 + lane % 4 * 2;
        const uint32_t both = T::pack(values[4 * n + 2 * half] * factor, values[4 * n + 2 * half + 1] * factor);
        if (d + 1 < p.depth_v && pairs) {
            *(uint32_t *)(to + d) = both;
        } else {
            for (int e = 0; e < 2 && d + e < p.depth_v; e++) {
                to[d + e] = (uint16_t)(both >> (16 * e));
            }
        }
    }
}

/* Closes this thread's two rows and writes them; rows of padding are 0 with lse -inf. */
template <typename T, int depth>
__device__ __forceinline__ void write_rows(const sa_cuda_problem &p, const hopper_tile &t, int first_row, const rows_state &state,
                                           float (&values)[depth / 2])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half;
        float sum = state.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (row >= t.rows) {
            continue;
        }
        softmax_end end = {0.0f, -infinity};
        if (row < t.real) {
            end = close(state.maximum[half] * (p.scale * log2e), sum, t.sink[row]);
        } else {
#pragma unroll
            for (int i = 0; i < depth / 2; i++) {
                values[i] = i % 4 / 2 == half ? 0.0f : values[i];
            }
        }
        write_row<T, depth>(p, t, row, values, half, end.factor);
        if (threadIdx.x % 4 == 0) {
            store_lse(p, t, row, end.lse);
        }
    }
}

/* The slices of one tile. */
template <typename T, int depth, int keys>
__device__ __forceinline__ void consume_tile(const sa_cuda_problem &p, hopper_state &s, const hopper_tile &t, uint32_t memory, cursor &at,
                                             cursor &loads, rows_state &state, float (&values)[depth / 2])
{
    constexpr uint32_t query_bytes = hopper_rows * depth * 2, stage_bytes = keys * depth * 2;
    const int group = threadIdx.x / group_threads - 1, first_row = group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const uint64_t queries = describe_panels(memory + group * 64 * 128, 16, 1024);
    const uint64_t key_ring = describe_panels(memory + query_bytes, 16, 1024);
    const uint64_t value_ring = describe_panels(memory + query_bytes + hopper_stages * stage_bytes, keys * 128, 1024);
    const float scale = p.scale * log2e;
    const int slices = t.first_slice[t.list.count];
    float scores[keys / 2], factor[2];
    uint32_t weights[keys / 4];
    barrier_wait(&s.queries_full, loads.parity);
    loads.step(1);
    barrier_wait(&s.keys_full[at.stage], at.parity);
    fence_async();
    slice_note note = s.notes[at.stage];
    pin(scores);
    products_begin();
    issue_keys<T, depth, keys>(queries, key_ring + at.stage * (stage_bytes / 16), scores);
    products_wait<0>();
    pin(scores);
    release(&s.keys_free[at.stage]);
    if (note.masked) {
        hide<keys>(p, t, note, first_row, scores);
    }
    weigh<keys>(scale, scores, state, factor);
    pack_weights<T, keys>(scores, weights);
    for (int slice = 1; slice < slices; slice++) {
        cursor before = at;
        at.step(hopper_stages);
        barrier_wait(&s.keys_full[at.stage], at.parity);
        note = s.notes[at.stage];
        if (SA_HOPPER_TURNS) {
            meet(2 + group, 256);
        }
        barrier_wait(&s.values_full[before.stage], before.parity);
        fence_async();
        pin(scores);
        pin(values);
        products_begin();
        issue_keys<T, depth, keys>(queries, key_ring + at.stage * (stage_bytes / 16), scores);
        issue_values<T, depth, keys>(weights, value_ring + before.stage * (stage_bytes / 16), values);
        if (SA_HOPPER_TURNS) {
            call(3 - group, 256);
        }
        products_wait<1>();
        pin(scores);
        release(&s.keys_free[at.stage]);
        if (note.masked) {
            hide<keys>(p, t, note, first_row, scores);
        }
        weigh<keys>(scale, scores, state, factor);
        products_wait<0>();
        pin(values);
        release(&s.values_free[before.stage]);
        rescale<depth>(values, factor);
        pack_weights<T, keys>(scores, weights);
    }
    release(&s.queries_free);
    barrier_wait(&s.values_full[at.stage], at.parity);
    fence_async();
    pin(values);
    products_begin();
    issue_values<T, depth, keys>(weights, value_ring + at.stage * (stage_bytes / 16), values);
    products_wait<0>();
    pin(values);
    release(&s.values_free[at.stage]);
    at.step(hopper_stages);
}

template <typename T, int depth, int keys> __device__ void consume(const sa_cuda_problem &p, hopper_state &s, uint32_t memory)
{
    const int group = threadIdx.x / group_threads - 1, first_row = group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const uint32_t units = units_of(p);
    cursor tiles, at, loads;
    if (SA_HOPPER_TURNS && group == 1) {
        call(2, 256);
    }
    for (uint32_t round = 0;; round++) {
        bool any;
        unit_of_round(p, units, round, any);
        if (!any) {
            break;
        }
        barrier_wait(&s.tile_full[tiles.stage], tiles.parity);
        const hopper_tile &t = s.tiles[tiles.stage];
        if (t.exists) {
            rows_state state = {{-infinity, -infinity}, {0.0f, 0.0f}};
            float values[depth / 2] = {};
            if (t.first_slice[t.list.count] > 0) {
                consume_tile<T, depth, keys>(p, s, t, memory, at, loads, state, values);
            }
            write_rows<T, depth>(p, t, first_row, state, values);
        }
        __syncwarp();
        release(&s.tile_free[tiles.stage]);
        tiles.step(2);
    }
}

__device__ __forceinline__ void begin_barriers(hopper_state &s)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < hopper_stages; i++) {
            barrier_init(&s.keys_full[i], group_threads + 1);
            barrier_init(&s.values_full[i], group_threads);
            barrier_init(&s.keys_free[i], consumer_warps);
            barrier_init(&s.values_free[i], consumer_warps);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&s.tile_full[i], 1);
            barrier_init(&s.tile_free[i], consumer_warps);
        }
        barrier_init(&s.queries_full, group_threads);
        barrier_init(&s.queries_free, consumer_warps);
        fence_async();
    }
    __syncthreads();
}

template <typename T, int depth, int keys> __device__ __forceinline__ void prefill_hopper(const sa_cuda_problem &p)
{
    extern __shared__ __align__(1024) char memory[];
    hopper_state &s = *(hopper_state *)memory;
    const uint32_t elements = shared_address(memory) + SA_HOPPER_ROWS_SHARED;
    begin_barriers(s);
    if (threadIdx.x < group_threads) {
        leave_registers<56>();
        produce<depth, keys>(p, s, elements);
    } else {
        take_registers<224>();
        consume<T, depth, keys>(p, s, elements);
    }
}

#else

template <typename T, int depth, int keys> __device__ void prefill_hopper(const sa_cuda_problem &)
{
    __trap(); /* choose.c sends nothing here */
}

#endif

} // namespace sa

#define SA_PREFILL(name, depth)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(SA_HOPPER_THREADS, 1)                                                                     \
        prefill_hopper_##name##_##depth(const __grid_constant__ sa_cuda_problem p)                                                         \
    {                                                                                                                                      \
        sa::prefill_hopper<sa::name, depth, SA_HOPPER_KEYS>(p);                                                                            \
    }

SA_PREFILL(f16, 64)
SA_PREFILL(f16, 128)
SA_PREFILL(bf16, 64)
SA_PREFILL(bf16, 128)
