/* The parts of a cache call that the attention kernel does not do itself: chunks of more than one token are rotated before and written
 * after. csrc/cpu/cache.c has the words. bytes: the chunk, read and written once. */
#include "problem.cuh"

namespace sa
{

/* Every head of one token of a tensor, turned by a table of cos and sin, into its part of the scratch. */
__device__ void rotate_heads(const sa_cuda_problem &p, const sa_cuda_tensor &source, const sa_cuda_tensor &target, int64_t heads,
                             int64_t batch, int64_t token, const float (&table)[2][128])
{
    const int size = element_size(p), pairs = (int)p.cache.pairs, width = (int)p.depth - pairs; /* a thread turns a pair or copies one */
    for (int64_t i = threadIdx.x; i < heads * width; i += blockDim.x) {
        const int64_t head = i / width;
        const int at = (int)(i % width);
        const char *from = element(source, batch, head, token, size);
        char *to = (char *)element(target, batch, head, token, size);
        if (at >= pairs) {
            copy_number(p.dtype, from, at + pairs, to, at + pairs);
            continue;
        }
        const int first = p.cache.interleaved ? 2 * at : at, second = p.cache.interleaved ? 2 * at + 1 : at + pairs;
        const float x = wide_number(p.dtype, from, first), y = wide_number(p.dtype, from, second);
        store_number(p.dtype, to, first, x * table[0][at] - y * table[1][at]);
        store_number(p.dtype, to, second, y * table[0][at] + x * table[1][at]);
    }
}

/* A CTA for each token: its own turn and that of the query for the pinned keys. */
__device__ __forceinline__ void rotate(const sa_cuda_problem &p)
{
    extern __shared__ __align__(16) char memory[];
    float (&table)[2][2][128] = *(float (*)[2][2][128])memory;
    const int64_t batch = blockIdx.x / p.query_length, token = blockIdx.x % p.query_length;
    const place at = batch_row(p, batch);
    const int64_t position = at.length + token; /* padded tokens too: decode loads the queries of a row without new ones */
    for (int i = threadIdx.x; i < 2 * p.cache.pairs; i += blockDim.x) {
        const int kind = i >= p.cache.pairs, pair = i - kind * (int)p.cache.pairs;
        rotation(p.cache.inv_freq[pair], kind ? pinned_turn(p, position) : position, p.cache.applied ? 1.0f : (float)p.cache.scaling,
                 table[kind][0][pair], table[kind][1][pair]);
    }
    __syncthreads();
    if (!p.cache.applied) {
        rotate_heads(p, p.query, rotated(p, 0), p.heads_q, batch, token, table[0]);
        rotate_heads(p, p.key, rotated(p, 2), p.heads_kv, batch, token, table[0]);
    }
    if (has_second_query(p)) {
        rotate_heads(p, p.query, rotated(p, 1), p.heads_q, batch, token, table[1]);
    }
}

__device__ void write_slot(const sa_cuda_problem &p, const place &at, int64_t head, int64_t token)
{
    const int size = element_size(p);
    const int64_t position = at.length + token;
    const int64_t slot = position < p.pinned ? position : ring_slot(p, position);
    const int64_t row = (at.batch * p.heads_kv + head) * (p.pinned + p.cache.capacity) + slot;
    const char *key = element(key_tensor(p), at.batch, head, token, size), *value = element(p.value, at.batch, head, token, size);
    for (int d = threadIdx.x % 32; d < p.depth; d += 32) {
        copy_number(p.dtype, key, d, p.cache.keys, row * p.depth + d);
    }
    for (int d = threadIdx.x % 32; d < p.depth_v; d += 32) {
        copy_number(p.dtype, value, d, p.cache.values, row * p.depth_v + d);
    }
}

/* Writes what is to stay of a chunk: its pinned tokens and the last of the others; a warp for each token. */
__device__ __forceinline__ void commit(const sa_cuda_problem &p)
{
    const int64_t parts = gridDim.x / (p.batch * p.heads_kv), part = blockIdx.x % parts;
    const int64_t head = blockIdx.x / parts % p.heads_kv, batch = blockIdx.x / parts / p.heads_kv;
    const place at = batch_row(p, batch);
    const int64_t length = at.length + at.query_count, pinned = clamp(p.pinned - at.length, 0, at.query_count);
    const int64_t first =
        most(most(at.length, p.pinned), length - p.cache.capacity) - at.length; /* token of the chunk that the ring keeps */
    const int64_t written = pinned + most(at.query_count - first, 0);
    for (int64_t i = written * part / parts + threadIdx.x / 32; i < written * (part + 1) / parts; i += blockDim.x / 32) {
        write_slot(p, at, head, i < pinned ? i : first + i - pinned);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        /* counters of the attention kernel, if it has any, come first */
        const int64_t units = p.splits > 1 && !p.clustered ? p.batch * p.heads_kv * p.row_tiles : 0;
        const uint32_t readers = (uint32_t)(p.heads_kv * parts);
        advance(p, at, report_read(p, units + batch, readers), readers);
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(32 * SA_CACHE_WARPS) cache_rotate(const __grid_constant__ sa_cuda_problem p)
{
    sa::rotate(p);
}

extern "C" __global__ void __launch_bounds__(32 * SA_CACHE_WARPS) cache_commit(const __grid_constant__ sa_cuda_problem p)
{
    sa::commit(p);
}
