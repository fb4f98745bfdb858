/* What the kernels of a KVCache share: how many tokens are new, what a policy makes of a token, and an order of scores. */
#ifndef SA_CUDA_KV_SLOTS_CUH
#define SA_CUDA_KV_SLOTS_CUH

#include "kv_slots.h"
#include "problem.cuh"

namespace sa
{

/* In the order of sa_policy_kind. */
enum policy_kind { sink_window, h2o, h2o_norm, h2o_ema, v_length_h2o, scissorhands, tova, snap_kv, key_diff, k_norm, cur, expected, drawn };

__device__ __forceinline__ int64_t new_tokens(const sa_cuda_slots &c, int64_t row)
{
    return c.new_lengths.given ? clamp(integer_at(c.new_lengths, row) - c.first, 0, c.tokens) : c.tokens;
}

/* Every lane gets it. */
template <typename T> __device__ __forceinline__ T sum_of_warp(T value)
{
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(~0u, value, step);
    }
    return value;
}

/* Squared length of a stored vector; every lane gets it. */
__device__ inline double square_of(const sa_cuda_slots &c, const void *data, int64_t at, int64_t depth)
{
    double sum = 0.0;
    __syncwarp(); /* other lanes wrote it */
    for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
        const double x = (double)wide_number(c.dtype, data, at + d);
        sum += product(x, x);
    }
    return sum_of_warp(sum);
}

__device__ __forceinline__ uint64_t mixed(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* A number for each token that depends on nothing but seed, row, head and position. */
__device__ __forceinline__ double drawn_score(const sa_cuda_slots &c, int64_t row, int64_t head, int64_t position)
{
    return (double)(mixed(mixed(mixed(c.seed + (uint64_t)row) + (uint64_t)head) + (uint64_t)position) >> 11) * 0x1p-53;
}

/* How many of the last queries a token was above its share for. */
__device__ __forceinline__ double bits_set(const sa_cuda_slots &c, int64_t slot)
{
    int set = 0;
    for (int64_t word = 0; word < c.ring_bytes / 8; word++) {
        const uint64_t bits = ((const uint64_t *)(c.rings + slot * c.ring_bytes))[word];
        set += __popc((uint32_t)bits) + __popc((uint32_t)(bits >> 32));
    }
    return (double)set;
}

__device__ __forceinline__ void put_bit(const sa_cuda_slots &c, int64_t slot, int64_t place, bool set)
{
    uint64_t *word = (uint64_t *)(c.rings + slot * c.ring_bytes) + place / 64;
    const uint64_t bit = (uint64_t)1 << place % 64;
    *word = set ? *word | bit : *word & ~bit;
}

/* The newest query's weight, mean over all heads: they hold the same tokens in the same slots. */
__device__ __forceinline__ double shared_weight(const sa_cuda_slots &c, int64_t row, int64_t last, int64_t i)
{
    double sum = 0.0;
    for (int64_t head = 0; head < c.heads_kv; head++) {
        sum += (double)c.weights[((row * c.heads_kv + head) * c.weight_rows + last) * c.stride + i];
    }
    return sum / (double)c.heads_kv;
}

/* As whole numbers in the same order: NaN lowest, both zeros alike. */
__device__ __forceinline__ uint64_t ordered(double score)
{
    if (score != score) {
        return 0;
    }
    union {
        double number;
        uint64_t bits;
    } as = {score + 0.0};
    return as.bits >> 63 ? ~as.bits : as.bits | (uint64_t)1 << 63;
}

/* A token, by what decides who leaves. */
struct lowest {
    uint64_t score;
    int64_t position, slot;
};

__device__ __forceinline__ void take_lower(lowest &own, const lowest &other)
{
    if (other.score < own.score || (other.score == own.score && other.position < own.position)) {
        own = other;
    }
}

__device__ __forceinline__ void take_lowest_of_warp(lowest &own)
{
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
        take_lower(own, {__shfl_xor_sync(~0u, own.score, step), __shfl_xor_sync(~0u, own.position, step),
                         __shfl_xor_sync(~0u, own.slot, step)});
    }
}

/* --- the ledger -------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ int ledger_bin(double mass)
{
    if (!(mass > 0.0)) {
        return 0;
    }
    union {
        double number;
        uint64_t bits;
    } as = {mass};
    const int bin = (int)(as.bits >> 52 & 2047) - 1023 + 48; /* denormals lie far below the first bin */
    return bin < 0 ? 0 : bin >= SA_LEDGER_BINS ? SA_LEDGER_BINS - 1 : bin;
}

} // namespace sa

#endif
