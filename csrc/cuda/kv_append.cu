/* KVCache: the new tokens of a part into the slots behind those that are held, turned where the cache turns; csrc/core/policy.c has the
 * words.
 *
 * A warp for each new key with its value, and, where the cache turns, for each new query, which goes into scratch.
 * bytes: the part, read and written once. */
#include "kv_slots.cuh"

namespace sa
{

/* Copies a vector, turned to `position` where `pairs` > 0. By a warp. */
__device__ void take_vector(const sa_cuda_slots &c, const void *from, int64_t source, void *to, int64_t target, int64_t depth, int64_t pairs,
                            int64_t position)
{
    for (int64_t pair = threadIdx.x % 32; pair < pairs; pair += 32) {
        const int64_t first = c.interleaved ? 2 * pair : pair, second = c.interleaved ? 2 * pair + 1 : pair + pairs;
        float cosine, sine;
        rotation(c.inv_freq[pair], position, (float)c.scaling, cosine, sine);
        const float x = wide_number(c.dtype, from, source + first), y = wide_number(c.dtype, from, source + second);
        store_number(c.dtype, to, target + first, x * cosine - y * sine);
        store_number(c.dtype, to, target + second, y * cosine + x * sine);
    }
    for (int64_t d = 2 * pairs + threadIdx.x % 32; d < depth; d += 32) {
        copy_number(c.dtype, from, source + d, to, target + d);
    }
}

/* Key and value of a token, and what is known of it. By a warp. */
__device__ void append_token(const sa_cuda_slots &c, int64_t stream, int64_t held, int64_t token)
{
    const int64_t row = stream / c.heads_kv, head = stream % c.heads_kv, slot = stream * c.stride + held + token;
    const int64_t all = c.batch * c.heads_kv * c.stride, position = c.lengths[stream] + token;
    const int64_t key = row * c.key.batch + head * c.key.head + (c.first + token) * c.key.token;
    const int64_t value = row * c.value.batch + head * c.value.head + (c.first + token) * c.value.token;
    double own[2] = {};
    take_vector(c, c.key.data, key, c.keys, slot * c.depth, c.depth, c.turned != nullptr ? c.pairs : 0, position);
    take_vector(c, c.value.data, value, c.values, slot * c.depth_v, c.depth_v, 0, position);
    if (c.kind == k_norm || c.kind == key_diff || c.kind == cur) {
        own[0] = square_of(c, c.keys, slot * c.depth, c.depth);
    }
    if (c.kind == v_length_h2o || c.kind == cur) {
        own[1] = square_of(c, c.values, slot * c.depth_v, c.depth_v);
    }
    for (int64_t i = threadIdx.x % 32; i < c.ring_bytes / 4; i += 32) {
        ((uint32_t *)(c.rings + slot * c.ring_bytes))[i] = 0;
    }
    if (threadIdx.x % 32 == 0) {
        c.positions[slot] = position;
        c.mass[slot] = c.call[slot] = 0.0;
        c.own[slot] = c.kind == cur ? own[0] : sqrt(own[0]);
        c.own[all + slot] = c.kind == cur ? own[1] : sqrt(own[1]);
    }
}

__device__ void turn_query(const sa_cuda_slots &c, int64_t stream, int64_t token, int64_t of_group)
{
    const int64_t row = stream / c.heads_kv, head = stream % c.heads_kv * c.group + of_group;
    const int64_t from = row * c.query.batch + head * c.query.head + (c.first + token) * c.query.token;
    const int64_t to = ((row * c.heads_kv * c.group + head) * c.tokens + token) * c.depth;
    take_vector(c, c.query.data, from, c.turned, to, c.depth, c.pairs, c.lengths[stream] + token);
}

__device__ __forceinline__ void append(const sa_cuda_slots &c)
{
    const uint32_t streams = (uint32_t)(c.batch * c.heads_kv), parts = gridDim.x / streams, stream = blockIdx.x / parts;
    const uint32_t row = stream / (uint32_t)c.heads_kv, part = blockIdx.x - stream * parts, index = part * SA_KV_APPEND_WARPS + threadIdx.x / 32;
    const uint32_t vectors = c.turned != nullptr ? (uint32_t)c.group + 1 : 1, token = index / vectors, vector = index - token * vectors;
    const int64_t held = clamp(c.held[stream], 0, c.stride), fresh = least(new_tokens(c, row), c.stride - held);
    if (part == 0 && threadIdx.x == 0) {
        c.counts[stream] = held + fresh;
        if (stream == row * (uint32_t)c.heads_kv) {
            c.fresh[row] = fresh;
        }
    }
    if (vector > 0 && token < c.tokens) {
        turn_query(c, stream, token, vector - 1); /* of padded tokens too: they are loaded */
    } else if (vector == 0 && token < fresh) {
        append_token(c, stream, held, token);
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(32 * SA_KV_APPEND_WARPS) kv_append(const __grid_constant__ sa_cuda_slots c)
{
    sa::append(c);
}
