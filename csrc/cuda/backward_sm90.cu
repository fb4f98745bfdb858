/* Gradients of attention in half types on Hopper, in one pass of five products by wgmma. The formulas are in backward_sm80.cu.
 *
 * A CTA of two warpgroups holds 128 keys and their values; the queries of all heads of the group pass in slices of 64, read once for
 * everything. Scores and products of gradient and value have keys as rows (S^T = K Q^T), so that weights leave the tensor cores as the
 * register factor of dV += P^T dO and dK += dS^T Q. dS crosses shared memory for dQ = dS K, half of whose columns each warpgroup computes and
 * adds to fp32 sums in global memory (red.v4, in the order in which CTAs come: the same bits only up to rounding), beside the product for dK.
 * backward_finish turns the sums into the gradient.
 *   flops = 10 * depth * visible pairs * heads_q * batch
 * Shared memory at depth 128: keys and values 64 KB, two slices 64 KB, dS 16 KB. Of a thread's 255 registers 128 hold dK and dV; a dQ that
 * is still in them when the next scores begin does not fit.
 *
 * Not for: softcap, ALiBi, bias of pinned keys, a second query, rows that are not read in pieces of 16 bytes, or where the same bits are
 * asked for in every run (choose.c sends those to backward_sm80.cu).
 *
 * H200, 2026-11-25, bf16, medians of eight calls, torch's flash and cuDNN of the same run (the flops are those of five products):
 *   dense causal, N 8192   16/16 D 128   1.88 ms (366 TFLOP/s)   two kernels 5.27, flash 2.72, cuDNN 1.67
 *                          32/8 D 128    3.58 ms (384)           two kernels 10.55, flash 5.23, cuDNN 2.82
 *                          16/16 D 64    1.32 ms (261)           two kernels 2.84, flash 1.64, cuDNN 1.04
 *   4 sinks, window 1024   64/8 D 128    4.75 ms (136)           two kernels 9.79: the CTAs of the pinned keys meet every query and end last
 * Tried and no faster: scores of the next slice beside dQ and dK, with three slices in shared memory. */
#include "backward.cuh"
#include "panels.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int one_pass_keys = SA_ONE_PASS_KEYS, one_pass_slice = SA_ONE_PASS_SLICE, one_pass_threads = SA_ONE_PASS_THREADS;

/* --- shared memory ----------------------------------------------------------------------------------------------------------------- */

/* Where the gradient of a slice's queries is summed up. */
struct sums_at {
    float *first;
    int count;
};

/* Panels of 64 columns: 128-byte rows in 128-byte swizzle. */
template <int depth> struct one_pass_layout {
    static constexpr uint32_t tile_bytes = one_pass_keys * depth * 2, slice_bytes = one_pass_slice * depth * 2;
    static constexpr uint32_t stage_bytes = 2 * slice_bytes, gradient_bytes = one_pass_keys * one_pass_slice * 2;
    uint32_t keys, values, stages, gradients;
    sa_cuda_row *passing; /* [2, slice] */
    sums_at *sums; /* [2] */
    char *stage_memory;
    __device__ one_pass_layout(char *memory)
    {
        keys = shared_address(memory) + SA_BACKWARD_SHARED_FACTS;
        values = keys + tile_bytes;
        stages = values + tile_bytes;
        gradients = stages + 2 * stage_bytes;
        stage_memory = memory + SA_BACKWARD_SHARED_FACTS + 2 * tile_bytes;
        passing = (sa_cuda_row *)(memory + SA_BACKWARD_SHARED_FACTS + 2 * tile_bytes + 2 * stage_bytes + gradient_bytes);
        sums = (sums_at *)(passing + 2 * one_pass_slice);
    }
};

/* Keys of the tile that any query of the row sees: others may hold anything, and dQ would meet them. */
__device__ __forceinline__ range seen_of(const sa_cuda_problem &p, const key_tile &t)
{
    if (t.keys.kind == run_learned) {
        return {0, t.count};
    }
    range all = {t.count, 0};
    for (int head = 0; head < (p.common_window > 0 ? 1 : p.group); head++) {
        const int64_t window = window_of(p, t.kv_head * p.group + head);
        const range own = visible(t.keys, p.causal, window, window, t.at.position, t.at.position + t.at.query_count - 1);
        all = {least(all.low, own.low - t.first), most(all.high, own.high - t.first)};
    }
    return {most(all.low, 0), least(all.high, t.count)};
}

/* --- a slice ----------------------------------------------------------------------------------------------------------------------- */

template <int depth>
__device__ __forceinline__ void load_queries(const sa_cuda_backward &b, const key_tile &t, const query_walk &walk, const meeting &m,
                                                const one_pass_layout<depth> &where, int stage)
{
    const sa_cuda_problem &p = b.forward;
    const int64_t token = t.at.query_begin + walk.token, batch = t.at.batch;
    const uint32_t target = where.stages + stage * where.stage_bytes;
    load_panels<depth, one_pass_slice, one_pass_threads>(element(p.query, batch, m.head, token, 2), p.query.token * 2, 0, m.count, (int)p.depth,
                                                         target);
    load_panels<depth, one_pass_slice, one_pass_threads>(element(b.output_gradient, batch, m.head, token, 2), b.output_gradient.token * 2, 0,
                                                         m.count, (int)p.depth_v, target + where.slice_bytes);
    if (threadIdx.x < m.count) {
        copy_async_8(shared_address(where.passing + stage * one_pass_slice + threadIdx.x), rows_of(b, batch, m.head, token) + threadIdx.x);
    }
    if (threadIdx.x == 0) {
        const int64_t row = (batch * p.heads_q + m.head) * p.query_length + token;
        where.sums[stage] = {(float *)((char *)p.scratch + b.sums_offset) + row * depth, m.count};
    }
}

/* The slice has arrived: queries that give nothing to any key may hold anything, and are cleared. Ends with a barrier, behind which the
 * tensor cores may read. */
template <int depth> __device__ __forceinline__ void open_slice(const one_pass_layout<depth> &where, int stage, int count)
{
    const sa_cuda_row *passing = where.passing + stage * one_pass_slice;
    fence_async();
    if (__syncthreads_or(threadIdx.x < count && passing[threadIdx.x].lse == infinity)) { /* every thread has copied its own */
        for (int i = threadIdx.x; i < 2 * count * (depth / 8); i += one_pass_threads) {
            const int row = i / 2 / (depth / 8), piece = i / 2 % (depth / 8);
            if (passing[row].lse == infinity) { /* a cleared row: the order of its pieces does not matter */
                char *panel = where.stage_memory + stage * where.stage_bytes + i % 2 * where.slice_bytes + piece / 8 * (one_pass_slice * 128);
                *(uint4 *)(panel + row * 128 + piece % 8 * 16) = make_uint4(0, 0, 0, 0);
            }
        }
        fence_async();
        __syncthreads();
    }
}

/* Weights of the thread's keys, from scores in any unit. Rows: keys first_row and eight further; columns: queries. */
template <bool masked>
__device__ __forceinline__ void weigh_scores(const meeting &m, int keys, float factor, int first_row, const sa_cuda_row *passing, float (&scores)[32])
{
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < one_pass_slice / 8; n++) {
        const float4 facts = *(const float4 *)(passing + n * 8 + column);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float weight = exp2_fast(fmaf(scores[4 * n + e], factor, e % 2 == 0 ? -facts.x : -facts.z));
            const int query = n * 8 + column + e % 2, key = first_row + e / 2 * 8, offset = query - key;
            const bool seen = !masked || (query < m.count && key < keys && offset >= m.low && offset <= m.high);
            scores[4 * n + e] = seen ? weight : 0.0f;
        }
    }
}

template <bool masked>
__device__ __forceinline__ void weigh_gradients(const sa_cuda_row *passing, const float (&weights)[32], float (&gradients)[32])
{
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < one_pass_slice / 8; n++) {
        const float4 facts = *(const float4 *)(passing + n * 8 + column);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float weight = weights[4 * n + e], gradient = weight * (gradients[4 * n + e] - (e % 2 == 0 ? facts.y : facts.w));
            gradients[4 * n + e] = masked && weight == 0.0f ? 0.0f : gradient; /* unseen keys may hold anything */
        }
    }
}

template <typename T> __device__ __forceinline__ void pack_all(const float (&wide)[32], uint32_t (&packed)[16])
{
#pragma unroll
    for (int i = 0; i < 16; i++) {
        packed[i] = T::pack(wide[2 * i], wide[2 * i + 1]);
    }
}

/* dS^T into shared memory, [key, query]. */
__device__ __forceinline__ void store_gradients(uint32_t target, int first_row, const uint32_t (&packed)[16])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int row = first_row + i % 2 * 8;
        const uint32_t to = target + row * 128 + ((i / 2 ^ row % 8) * 16) + lane % 4 * 4;
        store_shared(to, packed[i]);
    }
}

/* Adds the warpgroup's columns. Four neighbours of memory are two and two columns, eight apart (backward_finish undoes it). */
template <int depth> __device__ __forceinline__ void add_queries(const sums_at &to, const float (&sums)[depth / 4])
{
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * half;
        if (row < to.count) {
            float *first = to.first + row * depth + group * (depth / 2) + lane % 4 * 4;
#pragma unroll
            for (int n = 0; n < depth / 32; n++) {
                const int at = 8 * n + 2 * half;
                add_four(first + n * 16, sums[at], sums[at + 1], sums[at + 4], sums[at + 5]);
            }
        }
    }
}

/* --- products: each a group of its own -------------------------------------------------------------------------------------------- */

/* The warpgroup's keys (or values) against a slice of queries (or gradients of the output). */
template <typename T, int depth> __device__ __forceinline__ void issue_products(float (&products)[32], uint64_t tile, uint32_t slice)
{
    const uint64_t other = describe_panels(slice, 16, 1024);
#pragma unroll
    for (int k = 0; k < depth / 16; k++) {
        const int panel = k / 4, within = k % 4 * 2;
        product<T>(products, tile + panel * (one_pass_keys * 8) + within, other + panel * (one_pass_slice * 8) + within, k > 0);
    }
    products_commit();
}

/* sums += weights * slice. */
template <typename T, int depth>
__device__ __forceinline__ void issue_sums(float (&sums)[depth / 2], const uint32_t (&weights)[16], uint32_t slice)
{
    const uint64_t other = describe_panels(slice, one_pass_slice * 128, 1024);
#pragma unroll
    for (int k = 0; k < one_pass_slice / 16; k++) {
        product<T>(sums, &weights[4 * k], other + k * 128);
    }
    products_commit();
}

/* dS K, the warpgroup's columns. */
template <typename T, int depth> __device__ __forceinline__ void issue_queries(float (&sums)[depth / 4], uint32_t gradients, uint64_t keys)
{
    const uint64_t left = describe_panels(gradients, 16, 1024);
#pragma unroll
    for (int k = 0; k < one_pass_keys / 16; k++) {
        product_along_rows<T>(sums, left + k * 128, keys + k * 128, k > 0);
    }
    products_commit();
}

/* --- the kernel -------------------------------------------------------------------------------------------------------------------- */

template <typename T, int depth>
__device__ __forceinline__ void store_keys(void *gradient, int64_t first, int64_t width, int count, float factor, const float (&sums)[depth / 2])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
        if (row >= count) {
            continue;
        }
        uint16_t *to = (uint16_t *)gradient + (first + row) * width;
#pragma unroll
        for (int n = 0; n < depth / 8; n++) {
            const int d = n * 8 + lane % 4 * 2;
            if (d < width) { /* a multiple of eight, and rows begin at 16 bytes */
                *(uint32_t *)(to + d) = T::pack(sums[4 * n + 2 * half] * factor, sums[4 * n + 2 * half + 1] * factor);
            }
        }
    }
}

/* Tiles of four kv heads at a time, the longest first: what they read stays in L2. */
__device__ __forceinline__ int64_t unit_of(const sa_cuda_backward &b)
{
    const sa_cuda_problem &p = b.forward;
    const int64_t learned = b.learned_tiles * p.heads_kv, place = blockIdx.x - learned;
    if (place < 0 || p.sequences > 0) {
        return blockIdx.x;
    }
    const int64_t bands = p.heads_kv * p.batch, section = place / (4 * b.key_tiles) * 4, together = least(4, bands - section);
    const int64_t within = place - section * b.key_tiles;
    return learned + (section + within % together) * b.key_tiles + within / together;
}

template <typename T, int depth> __device__ __forceinline__ void one_pass(const sa_cuda_backward &b)
{
    using L = one_pass_layout<depth>;
    const sa_cuda_problem &p = b.forward;
    extern __shared__ __align__(1024) char memory[];
    key_tile &t = *(key_tile *)memory;
    const L where(memory);
    query_walk walk;
    if (!begin_keys(b, unit_of(b), one_pass_keys, t, walk)) {
        return;
    }
    const range held = seen_of(p, t);
    const int group = threadIdx.x / 128, first_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const float factor = p.scale * log2e;
    load_panels<depth, one_pass_keys, one_pass_threads>(t.keys.key + t.first * t.keys.key_stride, t.keys.key_stride, (int)held.low,
                                                        (int)held.high, (int)p.depth, where.keys);
    load_panels<depth, one_pass_keys, one_pass_threads>(t.keys.value + t.first * t.keys.value_stride, t.keys.value_stride, (int)held.low,
                                                        (int)held.high, (int)p.depth_v, where.values);
    /* along k: 64 rows of this warpgroup; along n: all keys, half of the columns */
    const uint64_t keys_k = describe_panels(where.keys + group * 8192, 16, 1024), values_k = describe_panels(where.values + group * 8192, 16, 1024);
    const uint64_t keys_n = describe_panels(where.keys + (depth == 128 ? group * (one_pass_keys * 128) : group * 64), one_pass_keys * 128, 1024);
    float key_sums[depth / 2], value_sums[depth / 2];
#pragma unroll
    for (int i = 0; i < depth / 2; i++) {
        key_sums[i] = value_sums[i] = 0.0f;
    }
    meeting next;
    bool more = next_queries(b, one_pass_slice, t, walk, next);
    if (more) {
        load_queries<depth>(b, t, walk, next, where, 0);
    }
    copy_async_commit();
    for (int stage = 0; more;) {
        const meeting m = next;
        const sa_cuda_row *passing = where.passing + stage * one_pass_slice;
        const uint32_t queries = where.stages + stage * L::stage_bytes;
        copy_async_wait<0>();
        open_slice<depth>(where, stage, m.count);
        float scores[32], gradients[32];
        pin(scores);
        pin(gradients);
        products_begin();
        issue_products<T, depth>(scores, keys_k, queries);
        issue_products<T, depth>(gradients, values_k, queries + L::slice_bytes);
        const int now = stage;
        stage ^= 1;
        more = next_queries(b, one_pass_slice, t, walk, next);
        if (more) {
            load_queries<depth>(b, t, walk, next, where, stage);
        }
        copy_async_commit();
        const bool masked = m.count < one_pass_slice || t.count < one_pass_keys || m.low > 1 - one_pass_keys || m.high < one_pass_slice - 1;
        products_wait<1>();
        pin(scores);
        if (masked) {
            weigh_scores<true>(m, t.count, factor, first_row, passing, scores);
        } else {
            weigh_scores<false>(m, t.count, factor, first_row, passing, scores);
        }
        uint32_t weights[16], slopes[16];
        pack_all<T>(scores, weights);
        pin(value_sums);
        products_begin();
        issue_sums<T, depth>(value_sums, weights, queries + L::slice_bytes);
        products_wait<1>();
        pin(gradients);
        if (masked) {
            weigh_gradients<true>(passing, scores, gradients);
        } else {
            weigh_gradients<false>(passing, scores, gradients);
        }
        pack_all<T>(gradients, slopes);
        store_gradients(where.gradients, first_row, slopes);
        fence_async();
        __syncthreads();
        float query_sums[depth / 4];
        pin(query_sums);
        pin(key_sums);
        products_begin();
        issue_queries<T, depth>(query_sums, where.gradients, keys_n);
        issue_sums<T, depth>(key_sums, slopes, queries);
        products_wait<1>();
        pin(query_sums);
        pin(value_sums);
        add_queries<depth>(where.sums[now], query_sums);
        products_wait<0>();
        pin(key_sums);
    }
    copy_async_wait<0>();
    const bool learned = t.keys.kind == run_learned;
    const int64_t first = key_row_of(p, t);
    store_keys<T, depth>(learned ? b.sink_key_gradient : b.key_gradient, first, p.depth, t.count, p.scale, key_sums);
    store_keys<T, depth>(learned ? b.sink_value_gradient : b.value_gradient, first, p.depth_v, t.count, 1.0f, value_sums);
}

#else

template <typename T, int depth> __device__ __forceinline__ void one_pass(const sa_cuda_backward &)
{
    __trap(); /* choose.c sends nothing here */
}

#endif

/* From the sums to the gradient of the queries: a thread for eight columns of a row. */
template <typename T> __device__ __forceinline__ void finish_queries(const sa_cuda_backward &b)
{
    const sa_cuda_problem &p = b.forward;
    const int64_t pieces = p.depth / 8, unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = unit / pieces, piece = unit % pieces;
    if (row >= p.batch * p.heads_q * p.query_length) {
        return;
    }
    const float *from = (const float *)((const char *)p.scratch + b.sums_offset) + row * b.sums_width + piece / 2 * 16 + piece % 2 * 2;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = *(const float2 *)(from + 4 * i);
        words[i] = T::pack(pair.x * p.scale, pair.y * p.scale);
    }
    *(uint4 *)((uint16_t *)b.query_gradient + row * p.depth + piece * 8) = make_uint4(words[0], words[1], words[2], words[3]);
}

} // namespace sa

#define SA_ONE_PASS(name, depth)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(SA_ONE_PASS_THREADS, 1)                                                                   \
        backward_hopper_##name##_##depth(const __grid_constant__ sa_cuda_backward b)                                                       \
    {                                                                                                                                      \
        sa::one_pass<sa::name, depth>(b);                                                                                                  \
    }

SA_ONE_PASS(f16, 64)
SA_ONE_PASS(f16, 128)
SA_ONE_PASS(bf16, 64)
SA_ONE_PASS(bf16, 128)

extern "C" __global__ void __launch_bounds__(SA_BACKWARD_NUMBER_THREADS) backward_finish_f16(const __grid_constant__ sa_cuda_backward b)
{
    sa::finish_queries<sa::f16>(b);
}

extern "C" __global__ void __launch_bounds__(SA_BACKWARD_NUMBER_THREADS) backward_finish_bf16(const __grid_constant__ sa_cuda_backward b)
{
    sa::finish_queries<sa::bf16>(b);
}
