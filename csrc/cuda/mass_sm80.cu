/* Per-key mass of half precision on the tensor cores, summed over the queries; mass.cu has the words and serves all else.
 *
 *   mass_j = sum over i, h of  w_hi 2^(s_hij - L_hi) / group,   L = log2(e) * lse
 *
 * A sum has no need to keep heads and queries apart: the rows of a kv head pass by, 64 at a time, in two buffers filled by cp.async, while
 * every warp keeps its keys in registers as the left operand. Sums of a tile in fp32, of tiles in fp64, in a fixed order; one writer a key.
 * flops = 2 * depth * visible pairs * heads_q, and as many exponentials as pairs.
 * H200, 2026-11-25, 32/8 heads, N 8192, D 128, bf16, causal: this pass alone about 3.1 ms (mass_sm90.cu 0.81). */
#include "decode_load.cuh"
#include "mass.cuh"

namespace sa
{

constexpr int mass_tile = SA_MASS_HALF_ROWS;

/* What is known of the rows of a tile. low .. high - 1: keys of the CTA that a row sees. */
struct mass_rows_known {
    float sum[mass_tile], weight[mass_tile], slope[mass_tile]; /* sum: log2 units */
    int low[mass_tile], high[mass_tile], head[mass_tile];
    int64_t position[mass_tile];
};
static_assert(2 * sizeof(mass_rows_known) == SA_MASS_HALF_KNOWN, "room for what is known of two tiles");

/* One row, on its way from memory to the others. */
struct mass_row {
    float sum, weight, slope;
    int low, high, head;
    int64_t position;
};

__device__ __forceinline__ mass_row find_row(const sa_cuda_problem &p, const mass_shared &s, int64_t index, int64_t rows, int keys)
{
    const run &r = s.list.runs[s.run];
    if (index >= rows) {
        return {};
    }
    const int64_t query = s.first_query + index / p.group, head = s.kv_head * p.group + index % p.group, token = s.at.query_begin + query;
    const int64_t position = s.at.position + query, window = window_of(p, head);
    const range seen = visible(r, p.causal, window, window, position, position);
    const float lse = lse_of_row(p, s, head, token);
    mass_row row;
    row.sum = lse * log2e;
    row.weight = weight_of_row(p, s, head, token);
    row.slope = p.alibi_slopes.given ? number_at(p.alibi_slopes, s.at.batch, head) * log2e : 0.0f;
    row.low = (int)clamp(seen.low - s.first, 0, keys);
    row.high = fabsf(lse) == infinity ? 0 : (int)clamp(seen.high - s.first, 0, keys);
    row.head = (int)head;
    row.position = position;
    return row;
}

__device__ __forceinline__ void keep_row(mass_rows_known &known, int i, const mass_row &row)
{
    known.sum[i] = row.sum;
    known.weight[i] = row.weight;
    known.slope[i] = row.slope;
    known.low[i] = row.low;
    known.high[i] = row.high;
    known.head[i] = row.head;
    known.position[i] = row.position;
}

/* Rows first .. first + 63 of the CTA's queries, zero beyond the last. The caller waits for the copies. */
template <int depth>
__device__ __forceinline__ void load_rows(const sa_cuda_problem &p, const mass_shared &s, const sa_cuda_tensor &source, bool aligned,
                                          int64_t first, int64_t rows, char *target)
{
    const uint64_t policy = policy_evict_normal();
    for (int i = threadIdx.x; i < mass_tile * shape<depth>::pieces; i += blockDim.x) {
        const int row = i / shape<depth>::pieces, piece = i % shape<depth>::pieces;
        char *to = target + piece_at<depth>(row, piece);
        if (first + row >= rows) {
            *(uint4 *)to = make_uint4(0, 0, 0, 0);
            continue;
        }
        const int64_t index = first + row;
        const char *from = element(source, s.at.batch, s.kv_head * p.group + index % p.group,
                                   s.at.query_begin + s.first_query + index / p.group, 2);
        if (aligned && piece * 8 < p.depth) {
            copy_async_16(shared_address(to), from + piece * 16, policy);
        } else {
            *(uint4 *)to = load_piece<depth>(p, from, piece);
        }
    }
}

/* Weights of 16 keys and 8 rows, added to the sums of the lane's two keys. `key`: the warp's first; `column`: the tile's row of element 0. */
__device__ __forceinline__ void add_weights(const sa_cuda_problem &p, const run &r, int64_t first_key, const mass_rows_known &known, bool clean,
                                            int key, int column, const float (&scores)[4], float (&sums)[2])
{
    const int lane = threadIdx.x % 32;
    if (clean) {
        const float scale = p.scale * log2e;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            sums[e / 2] += known.weight[column + e % 2] * exp2_fast(scores[e] * scale - known.sum[column + e % 2]);
        }
        return;
    }
    for (int e = 0; e < 4; e++) {
        const int row = column + e % 2, own = key + lane / 4 + e / 2 * 8;
        if (own >= known.low[row] && own < known.high[row]) {
            const float score = featured_score(p, r, known.head[row], known.position[row], known.slope[row], first_key + own, scores[e]);
            sums[e / 2] += score == -infinity ? 0.0f : known.weight[row] * exp2_fast(score - known.sum[row]);
        }
    }
}

template <typename T, int depth> __device__ __forceinline__ void mass_half(const sa_cuda_problem &p)
{
    extern __shared__ __align__(128) char memory[];
    constexpr int keys = SA_MASS_HALF_KEYS(depth), blocks = keys / 16 / SA_MASS_HALF_WARPS, buffer = mass_tile * depth * 2;
    mass_shared &s = *(mass_shared *)memory;
    mass_rows_known *known = (mass_rows_known *)(memory + SA_ROWS_SHARED);
    char *buffers = memory + SA_ROWS_SHARED + SA_MASS_HALF_KNOWN;
    const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16 * blocks;
    if (!__syncthreads_or(threadIdx.x < 32 && begin_mass(p, s, keys))) {
        return;
    }
    const run &r = s.list.runs[s.run];
    const int count = (int)least(keys, r.count - s.first);
    for (int i = threadIdx.x; i < keys * shape<depth>::pieces; i += blockDim.x) {
        const int row = i / shape<depth>::pieces, piece = i % shape<depth>::pieces;
        *(uint4 *)(buffers + piece_at<depth>(row, piece)) =
            row < count ? load_piece<depth>(p, r.key + (s.first + row) * r.key_stride, piece) : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    uint32_t held[blocks][depth / 16][4];
#pragma unroll
    for (int b = 0; b < blocks; b++) {
#pragma unroll
        for (int step = 0; step < depth / 16; step++) {
            load_matrices(held[b][step],
                          shared_address(buffers) + piece_at<depth>(warp_key + 16 * b + lane % 16, 2 * step + lane / 16));
        }
    }
    __syncthreads();

    const sa_cuda_tensor source = queries_of(p, r);
    const bool aligned = (((uintptr_t)source.data | (uintptr_t)((source.batch | source.head | source.token | p.depth) * 2)) & 15) == 0;
    const int64_t rows = most(s.end_query - s.first_query, 0) * p.group;
    const bool featured = is_featured(p, r);
    double totals[blocks][2] = {};
    mass_row row = {};
    if (threadIdx.x < mass_tile) {
        row = find_row(p, s, threadIdx.x, rows, keys);
        keep_row(known[0], threadIdx.x, row);
    }
    load_rows<depth>(p, s, source, aligned, 0, rows, buffers);
    copy_async_commit();
    int now = 0;
    for (int64_t first = 0; first < rows; first += mass_tile, now ^= 1) {
        const bool partly = threadIdx.x < mass_tile && (row.low > 0 || row.high < count);
        copy_async_wait<0>();
        const bool clean = !__syncthreads_or(partly) && !featured;
        if (first + mass_tile < rows) {
            load_rows<depth>(p, s, source, aligned, first + mass_tile, rows, buffers + (now ^ 1) * buffer);
            if (threadIdx.x < mass_tile) {
                row = find_row(p, s, first + mass_tile + threadIdx.x, rows, keys);
            }
        }
        copy_async_commit();
        const uint32_t from = shared_address(buffers + now * buffer);
        float sums[blocks][2] = {};
#pragma unroll 1
        for (int part = 0; part < mass_tile / 16; part++) {
            float scores[blocks][2][4] = {};
#pragma unroll
            for (int step = 0; step < depth / 16; step++) {
                uint32_t b[4];
                load_matrices(b, from + piece_at<depth>(part * 16 + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
                for (int i = 0; i < blocks; i++) {
                    T::multiply(scores[i][0], held[i][step], b[0], b[1]);
                    T::multiply(scores[i][1], held[i][step], b[2], b[3]);
                }
            }
#pragma unroll
            for (int i = 0; i < blocks; i++) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    add_weights(p, r, s.first, known[now], clean, warp_key + 16 * i, part * 16 + n * 8 + lane % 4 * 2, scores[i][n], sums[i]);
                }
            }
        }
        for (int i = 0; i < blocks; i++) {
            totals[i][0] += (double)sums[i][0];
            totals[i][1] += (double)sums[i][1];
        }
        if (threadIdx.x < mass_tile) {
            keep_row(known[now ^ 1], threadIdx.x, row);
        }
    }
    copy_async_wait<0>();
    const mass_place to = place_mass(p, s.at, r);
#pragma unroll
    for (int i = 0; i < 2 * blocks; i++) {
        double total = totals[i / 2][i % 2];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (lane % 4 == 0) {
            write_mass(p, s, to, warp_key + i / 2 * 16 + i % 2 * 8 + lane / 4, count, (float)(total / p.group));
        }
    }
}

} // namespace sa

#define SA_MASS_HALF(name, depth)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * SA_MASS_HALF_WARPS, 2)                                                               \
        mass_##name##_##depth(const __grid_constant__ sa_cuda_problem p)                                                                   \
    {                                                                                                                                      \
        sa::mass_half<sa::name, depth>(p);                                                                                                 \
    }

SA_MASS_HALF(f16, 64)
SA_MASS_HALF(f16, 128)
SA_MASS_HALF(f16, 256)
SA_MASS_HALF(bf16, 64)
SA_MASS_HALF(bf16, 128)
SA_MASS_HALF(bf16, 256)
