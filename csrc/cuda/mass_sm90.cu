/* Per-key mass of half precision on Hopper, summed over the queries; mass.cu has the words, mass_sm80.cu serves what this does not.
 *
 *   mass_j = sum over i, h of  w_hi 2^(s_hij - L_hi) / group,   L = log2(e) * lse
 *
 * A CTA of two warpgroups holds 256 keys, half of them each; the queries of the group's heads pass in slices of 128, three in shared memory.
 * Products have keys as rows (S^T = K Q^T) and come in two halves of 64 keys: while one is multiplied the other is weighed, so that the
 * tensor cores and the units for exponentials, which need the same time for this, work side by side. One writer a key; sums of 32 queries
 * in fp32, of slices in fp64, in a fixed order.
 *   flops = 2 * depth * visible pairs * heads_q, and as many exponentials as pairs
 * H200, 2026-11-25, bf16, causal, attend alone / with mass, ms: 32/8 heads, N 8192, D 128; D 64; N 2048, B 4, D 128
 *   v1 slices found by division   0.96 / 1.79   0.73 / 1.33   0.35 / 0.69
 *   v2 slices found by steps      0.97 / 1.73   0.74 / 1.34   0.35 / 0.68
 * The pass alone: 0.75 ms at D 128, about 2.3 times what its exponentials take. Suspected: two warps a scheduler that copy as well do not
 * hide their own latency. At N 2048 and B 1 (0.09 / 0.29) most multiprocessors have no keys.
 * Not for: softcap, ALiBi, bias of pinned keys, maxima, rows that are not read in pieces of 16 bytes (choose.c sends those elsewhere). */
#include "finish.cuh"
#include "mass.cuh"
#include "panels.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int hopper_keys = SA_MASS_HOPPER_KEYS, hopper_slice = SA_MASS_HOPPER_ROWS, hopper_threads = SA_MASS_HOPPER_THREADS,
              hopper_stages = SA_MASS_HOPPER_STAGES;

/* What is known of the queries of a slice: sums in log2 units, +inf where a query gives nothing, and what weights are multiplied with. */
struct slice_facts {
    float sum[hopper_slice], weight[hopper_slice];
};
static_assert(hopper_stages * sizeof(slice_facts) <= SA_MASS_HOPPER_FACTS, "room");

/* A slice of queries of one head. Query i of it sees key j of the CTA where low <= i - j <= high. */
struct passing {
    int count, head, low, high;
    int64_t token; /* on the length axis */
    const char *rows;
};

/* The slices in their order: head after head of the group. Nothing here is divided, as every thread does it for every slice. */
struct slice_walk {
    const char *rows;
    int64_t token, left, base; /* left: queries from here on; base: position of the first beyond that of the CTA's first key */
    int head;

    __device__ __forceinline__ void enter(const sa_cuda_problem &p, const mass_shared &s, const sa_cuda_tensor &source, int next_head)
    {
        head = next_head;
        token = s.at.query_begin + s.first_query;
        left = s.end_query - s.first_query;
        base = s.at.position + s.first_query - s.list.runs[s.run].position - s.first;
        rows = element(source, s.at.batch, head, token, 2);
    }

    __device__ __forceinline__ void advance(const sa_cuda_problem &p, const mass_shared &s, const sa_cuda_tensor &source)
    {
        if (left <= hopper_slice) {
            enter(p, s, source, head + 1);
            return;
        }
        token += hopper_slice;
        left -= hopper_slice;
        base += hopper_slice;
        rows += hopper_slice * 2 * source.token;
    }

    __device__ __forceinline__ passing slice(const sa_cuda_problem &p, const run &r) const
    {
        constexpr int far = 1 << 20;
        passing own = {(int)least(hopper_slice, left), head, -far, far, token, rows};
        if (p.causal || r.kind == run_plain) {
            const int64_t window = window_of(p, head);
            own.low = (int)clamp((p.causal ? 0 : 1 - window) - base, -far, far);
            own.high = r.kind == run_pinned ? far : (int)clamp(window - 1 - base, -far, far);
        }
        return own;
    }
};

template <int depth>
__device__ __forceinline__ void copy_slice(const sa_cuda_problem &p, const sa_cuda_tensor &source, const passing &slice, uint32_t target)
{
    load_panels<depth, hopper_slice, hopper_threads>(slice.rows, source.token * 2, 0, slice.count, (int)p.depth, target);
    copy_async_commit();
}

/* What the thread's query of a slice brings. */
struct row_facts {
    float sum, weight;
};

__device__ __forceinline__ row_facts find_facts(const sa_cuda_problem &p, const mass_shared &s, const passing &slice)
{
    const int row = threadIdx.x;
    if (row >= slice.count) {
        return {0.0f, 0.0f};
    }
    const int64_t token = slice.token + row;
    const float lse = lse_of_row(p, s, slice.head, token);
    return {fabsf(lse) == infinity ? infinity : lse * log2e, weight_of_row(p, s, slice.head, token)};
}

/* Keeps the facts of the thread's query. Ends with a barrier; true where a mask is needed because some query gives nothing. */
__device__ __forceinline__ bool keep_facts(slice_facts &known, const row_facts &own)
{
    if (threadIdx.x < hopper_slice) {
        known.sum[threadIdx.x] = own.sum;
        known.weight[threadIdx.x] = own.weight;
    }
    fence_async(); /* what this thread copied */
    return __syncthreads_or(threadIdx.x < hopper_slice && own.sum == infinity);
}

/* Adds the weights of a product to the sums of the thread's two keys, first_key and eight further. */
template <bool masked, bool weighted>
__device__ __forceinline__ void add_weights(const passing &slice, int keys, float factor, int first_key, const slice_facts &known,
                                            const float (&scores)[64], double (&totals)[2])
{
    const int column = threadIdx.x % 4 * 2;
    float sums[4] = {};
#pragma unroll
    for (int n = 0; n < hopper_slice / 8; n++) {
        const float2 sum = *(const float2 *)(known.sum + n * 8 + column);
        const float2 weight = weighted ? *(const float2 *)(known.weight + n * 8 + column) : make_float2(1.0f, 1.0f);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float own = exp2_fast(fmaf(scores[4 * n + e], factor, e % 2 == 0 ? -sum.x : -sum.y));
            if (weighted) {
                own *= e % 2 == 0 ? weight.x : weight.y;
            }
            if (masked) {
                const int query = n * 8 + column + e % 2, key = first_key + e / 2 * 8, offset = query - key;
                const bool seen = query < slice.count && key < keys && offset >= slice.low && offset <= slice.high &&
                                  (e % 2 == 0 ? sum.x : sum.y) != infinity;
                own = seen ? own : 0.0f;
            }
            sums[e] += own;
        }
    }
    totals[0] += (double)(sums[0] + sums[1]);
    totals[1] += (double)(sums[2] + sums[3]);
}

__device__ __forceinline__ void weigh(const sa_cuda_problem &p, const passing &slice, bool masked, int keys, float factor, int first_key,
                                      const slice_facts &known, const float (&scores)[64], double (&totals)[2])
{
    if (masked) {
        add_weights<true, true>(slice, keys, factor, first_key, known, scores, totals);
    } else if (p.row_weights.data != nullptr) {
        add_weights<false, true>(slice, keys, factor, first_key, known, scores, totals);
    } else {
        add_weights<false, false>(slice, keys, factor, first_key, known, scores, totals);
    }
}

/* 64 keys against a slice of queries: a group of its own. */
template <typename T, int depth> __device__ __forceinline__ void issue(float (&scores)[64], uint64_t keys, uint32_t slice)
{
    const uint64_t queries = describe_panels(slice, 16, 1024);
#pragma unroll
    for (int k = 0; k < depth / 16; k++) {
        const int panel = k / 4, within = k % 4 * 2;
        product<T>(scores, keys + panel * (hopper_keys * 8) + within, queries + panel * (hopper_slice * 8) + within, k > 0);
    }
    products_commit();
}

__device__ __forceinline__ bool needs_mask(const passing &slice, int keys, bool some)
{
    return some || slice.count < hopper_slice || keys < hopper_keys || slice.low > 1 - hopper_keys || slice.high < hopper_slice - 1;
}

template <typename T, int depth> __device__ __forceinline__ void mass_hopper(const sa_cuda_problem &p)
{
    extern __shared__ __align__(1024) char memory[];
    constexpr uint32_t slice_bytes = hopper_slice * depth * 2;
    mass_shared &s = *(mass_shared *)memory;
    slice_facts *known = (slice_facts *)(memory + SA_ROWS_SHARED);
    const uint32_t keys_at = shared_address(memory) + SA_ROWS_SHARED + SA_MASS_HOPPER_FACTS, stages = keys_at + hopper_keys * depth * 2;
    if (!__syncthreads_or(threadIdx.x < 32 && begin_mass(p, s, hopper_keys))) {
        return;
    }
    const run &r = s.list.runs[s.run];
    const sa_cuda_tensor source = queries_of(p, r);
    const int count = (int)least(hopper_keys, r.count - s.first);
    const int group = threadIdx.x / 128, first_key = group * 128 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const int64_t each = (most(s.end_query - s.first_query, 0) + hopper_slice - 1) / hopper_slice, slices = each * p.group;
    const uint64_t low_keys = describe_panels(keys_at + group * 128 * 128, 16, 1024), high_keys = low_keys + 64 * 8;
    const float factor = p.scale * log2e;
    double low_totals[2] = {}, high_totals[2] = {};
    if (slices > 0) {
        load_panels<depth, hopper_keys, hopper_threads>(r.key + s.first * r.key_stride, r.key_stride, 0, count, (int)p.depth, keys_at);
        slice_walk walk;
        walk.enter(p, s, source, s.kv_head * p.group);
        passing now = walk.slice(p, r), next = now;
        copy_slice<depth>(p, source, now, stages);
        row_facts own = find_facts(p, s, now);
        copy_async_wait<0>();
        bool masked = needs_mask(now, count, keep_facts(known[0], own));
        float low[64], high[64];
        pin(low);
        products_begin();
        issue<T, depth>(low, low_keys, stages);
        products_wait<0>();
        pin(low);
        if (slices > 1) {
            walk.advance(p, s, source);
            next = walk.slice(p, r);
            copy_slice<depth>(p, source, next, stages + slice_bytes);
            own = find_facts(p, s, next);
        }
        int stage = 0;
#pragma unroll 1
        for (int64_t i = 0; i < slices; i++) {
            const int following = stage + 1 == hopper_stages ? 0 : stage + 1;
            pin(high);
            products_begin();
            issue<T, depth>(high, high_keys, stages + stage * slice_bytes);
            weigh(p, now, masked, count, factor, first_key, known[stage], low, low_totals);
            copy_async_wait<0>();
            const bool next_masked = needs_mask(next, count, keep_facts(known[following], own));
            pin(low);
            products_begin();
            issue<T, depth>(low, low_keys, stages + following * slice_bytes); /* behind the last slice: nobody asks for it */
            const passing current = now;
            now = next;
            if (i + 2 < slices) {
                walk.advance(p, s, source);
                next = walk.slice(p, r);
                copy_slice<depth>(p, source, next, stages + (following + 1 == hopper_stages ? 0 : following + 1) * slice_bytes);
                own = find_facts(p, s, next);
            }
            products_wait<1>();
            pin(high);
            weigh(p, current, masked, count, factor, first_key + 64, known[stage], high, high_totals);
            masked = next_masked;
            stage = following;
            products_wait<0>();
            pin(low);
        }
    }
    const mass_place to = place_mass(p, s.at, r);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        double total = i / 2 ? high_totals[i % 2] : low_totals[i % 2];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (threadIdx.x % 4 == 0) {
            write_mass(p, s, to, first_key + i / 2 * 64 + i % 2 * 8, count, (float)(total / p.group));
        }
    }
}

#else

template <typename T, int depth> __device__ __forceinline__ void mass_hopper(const sa_cuda_problem &)
{
    __trap(); /* choose.c sends nothing here */
}

#endif

} // namespace sa

#define SA_MASS_HOPPER(name, depth)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(SA_MASS_HOPPER_THREADS, 1)                                                                \
        mass_hopper_##name##_##depth(const __grid_constant__ sa_cuda_problem p)                                                            \
    {                                                                                                                                      \
        sa::mass_hopper<sa::name, depth>(p);                                                                                               \
    }

SA_MASS_HOPPER(f16, 64)
SA_MASS_HOPPER(f16, 128)
SA_MASS_HOPPER(bf16, 64)
SA_MASS_HOPPER(bf16, 128)
