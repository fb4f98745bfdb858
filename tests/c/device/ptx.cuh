/* The names of csrc/cuda/ptx.cuh, in its order, on the host. A shared address is an offset into the block's memory; the rank of another
 * block of the cluster stands in its upper byte. */
#ifndef SA_CUDA_PTX_CUH
#define SA_CUDA_PTX_CUH

#include "device.h"

#define __align__(n)

namespace sa
{

inline char *shared_memory()
{
    return device::current->home->shared;
}

inline void must_be_aligned(uint64_t address, uint64_t bytes)
{
    if (address % bytes != 0) {
        fprintf(stderr, "an address that is no multiple of %d\n", (int)bytes);
        abort();
    }
}

struct f32 {
    static constexpr int size = 4;
    static void store(void *data, int64_t at, float x)
    {
        ((float *)data)[at] = x;
    }
};

/* mma.m16n8k16: row i, depth k of A is in lane 4 * (i % 8) + k % 8 / 2; depth k, column j of B in lane 4 * j + k % 8 / 2. */
template <typename T> void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    device::warp &w = device::own_warp();
    const int lane = device::lane();
    memcpy(w.fragments[lane], a, sizeof a);
    w.fragments[lane][4] = b0;
    w.fragments[lane][5] = b1;
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        const int i = lane / 4 + e / 2 * 8, j = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            const uint32_t left = w.fragments[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2], right = w.fragments[j * 4 + k % 8 / 2][4 + k / 8];
            d[e] += T::wide((uint16_t)(left >> k % 2 * 16)) * T::wide((uint16_t)(right >> k % 2 * 16));
        }
    }
    __syncwarp();
}

struct f16 {
    static constexpr int size = 2;
    static uint16_t bits(float x)
    {
        const _Float16 half = (_Float16)x;
        uint16_t result;
        memcpy(&result, &half, sizeof result);
        return result;
    }
    static void store(void *data, int64_t at, float x)
    {
        ((uint16_t *)data)[at] = bits(x);
    }
    static uint32_t pack(float low, float high)
    {
        return bits(low) | (uint32_t)bits(high) << 16;
    }
    static float wide(uint16_t bits)
    {
        _Float16 half;
        memcpy(&half, &bits, sizeof half);
        return (float)half;
    }
    static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        multiply_fragments<f16>(d, a, b0, b1);
    }
};

struct bf16 {
    static constexpr int size = 2;
    static uint16_t bits(float x)
    {
        uint32_t word;
        memcpy(&word, &x, sizeof word);
        return x != x ? 0x7fff : (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
    static void store(void *data, int64_t at, float x)
    {
        ((uint16_t *)data)[at] = bits(x);
    }
    static uint32_t pack(float low, float high)
    {
        return bits(low) | (uint32_t)bits(high) << 16;
    }
    static float wide(uint16_t bits)
    {
        return __uint_as_float((uint32_t)bits << 16);
    }
    static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        multiply_fragments<bf16>(d, a, b0, b1);
    }
};

template <typename T> uint16_t narrow(float x)
{
    return T::bits(x);
}

inline float exp2_fast(float x)
{
    return exp2f(x);
}

inline uint32_t touch_parameters(const void *parameters, int line)
{
    return ((const uint32_t *)parameters)[16 * line];
}

inline uint32_t shared_address(const void *pointer)
{
    return (uint32_t)((const char *)pointer - shared_memory());
}

/* Element (row, column) of tile i, whose row addresses the lanes 8 * i .. gave. */
inline uint32_t matrix_element(const device::warp &w, int i, int row, int column)
{
    uint16_t bits;
    memcpy(&bits, shared_memory() + w.addresses[8 * i + row] + 2 * column, sizeof bits);
    return bits;
}

inline void load_tiles(uint32_t (&tiles)[4], uint32_t address, bool transposed)
{
    device::warp &w = device::own_warp();
    const int lane = device::lane(), row = lane / 4, column = lane % 4 * 2;
    must_be_aligned(address, 16);
    w.addresses[lane] = address;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        tiles[i] = transposed ? matrix_element(w, i, column, row) | matrix_element(w, i, column + 1, row) << 16
                              : matrix_element(w, i, row, column) | matrix_element(w, i, row, column + 1) << 16;
    }
    __syncwarp();
}

inline void load_matrices(uint32_t (&tiles)[4], uint32_t address)
{
    load_tiles(tiles, address, false);
}

inline void load_matrices_transposed(uint32_t (&tiles)[4], uint32_t address)
{
    load_tiles(tiles, address, true);
}

inline uint64_t policy_evict_first()
{
    return 0;
}

inline uint64_t policy_evict_normal()
{
    return 0;
}

inline void copy_async_16(uint32_t target, const void *source, uint64_t = 0)
{
    must_be_aligned((uint64_t)(uintptr_t)source | target, 16);
    memcpy(shared_memory() + target, source, 16);
}

inline void copy_async_8(uint32_t target, const void *source)
{
    must_be_aligned((uint64_t)(uintptr_t)source | target, 8);
    memcpy(shared_memory() + target, source, 8);
}

inline void copy_async_commit()
{
}

template <int pending> void copy_async_wait()
{
}

inline void add_to(int64_t *number, int64_t added)
{
    *number += added;
}

inline uint32_t least_of_warp(uint32_t number)
{
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, number, step);
        number = other < number ? other : number;
    }
    return number;
}

inline double product(double a, double b)
{
    return a * b;
}

inline uint32_t count_up(uint32_t *counter, uint32_t count)
{
    const uint32_t before = *counter;
    *counter = before >= count - 1 ? 0 : before + 1;
    return before;
}

inline bool arrive(uint32_t *counter, uint32_t count)
{
    return count_up(counter, count) == count - 1;
}

inline void let_next_begin()
{
}

inline void wait_for_last()
{
}

inline void prefetch_bulk(const void *address, uint32_t bytes)
{
    must_be_aligned((uint64_t)(uintptr_t)address | bytes, 16);
    static volatile char sink;
    sink = ((const char *)address)[0] + ((const char *)address)[bytes - 1];
}

inline uint32_t cluster_index()
{
    return device::current_cluster->number;
}

inline void cluster_arrive()
{
    device::cluster &c = *device::current_cluster;
    device::current->cluster_generation = device::arrive_at(c.all, c.blocks.size() * device::block_size.x);
}

inline void cluster_arrive_relaxed()
{
    cluster_arrive();
}

inline void cluster_wait()
{
    device::wait_for(device::current_cluster->all, device::current->cluster_generation);
}

inline uint32_t cluster_address(uint32_t address, uint32_t rank)
{
    return address | rank << 24;
}

inline void cluster_store_pair(uint32_t address, uint64_t first, uint64_t second)
{
    const uint64_t pair[2] = {first, second};
    must_be_aligned(address, 16);
    memcpy(device::current_cluster->blocks[address >> 24].shared + (address & 0xffffff), pair, sizeof pair);
}

inline float2 cluster_load_pair(uint32_t address)
{
    float2 pair;
    must_be_aligned(address, 8);
    memcpy(&pair, device::current_cluster->blocks[address >> 24].shared + (address & 0xffffff), sizeof pair);
    return pair;
}

} // namespace sa

#endif
