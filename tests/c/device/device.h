/* The CUDA vocabulary of csrc/cuda on the host: every thread is a fiber, threads of a cluster run in turn, in a shuffled order.
 *
 * What this shows: indices, masks, barriers that all reach, the algebra. What it cannot show: data races, speed, the machine's own
 * rounding. Shared memory begins as NaN bits, so that a value nobody wrote is seen. */
#ifndef SA_TEST_DEVICE_H
#define SA_TEST_DEVICE_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

using std::fma;
using std::rint;

struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return {x, y, z, w};
}

inline float2 make_float2(float x, float y)
{
    return {x, y};
}

inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

namespace device
{

struct index {
    unsigned x;
};

struct barrier {
    unsigned arrived, generation;
};

struct warp {
    barrier all;
    uint64_t exchanged[32];
    uint32_t fragments[32][6], addresses[32];
};

struct block {
    std::vector<char> memory;
    char *shared;
    unsigned number;
    barrier all;
    std::vector<warp> warps;
    bool any;
};

struct cluster {
    std::vector<block> blocks;
    unsigned number;
    barrier all;
};

struct fiber {
    void *stack_pointer;
    index thread;
    block *home;
    unsigned cluster_generation; /* of the cluster's barrier, when the fiber arrived */
    bool done;
};

extern fiber *current;
extern cluster *current_cluster;
extern index block_size, grid_size;

/* Lets another fiber run. Aborts if none gets anywhere. */
void yield();

/* Returns the generation in which the caller arrived. */
inline unsigned arrive_at(barrier &b, size_t expected)
{
    const unsigned generation = b.generation;
    if (++b.arrived == expected) {
        b.arrived = 0;
        b.generation++;
    }
    return generation;
}

inline void wait_for(const barrier &b, unsigned generation)
{
    while (b.generation == generation) {
        yield();
    }
}

inline warp &own_warp()
{
    return current->home->warps[current->thread.x / 32];
}

inline int lane()
{
    return (int)(current->thread.x % 32);
}

} // namespace device

#define threadIdx (device::current->thread)
#define blockIdx (device::index{device::current->home->number})
#define blockDim (device::block_size)
#define gridDim (device::grid_size)

inline void __syncthreads()
{
    device::barrier &all = device::current->home->all;
    device::wait_for(all, device::arrive_at(all, device::block_size.x));
}

inline void __syncwarp()
{
    device::barrier &all = device::own_warp().all;
    device::wait_for(all, device::arrive_at(all, 32));
}

inline int __syncthreads_or(int value)
{
    bool &any = device::current->home->any;
    __syncthreads();
    any = false;
    __syncthreads();
    any = any || value != 0;
    __syncthreads();
    return any;
}

template <typename T> T shuffle(T value, int from)
{
    device::warp &w = device::own_warp();
    memcpy(&w.exchanged[device::lane()], &value, sizeof value);
    __syncwarp();
    memcpy(&value, &w.exchanged[from], sizeof value);
    __syncwarp();
    return value;
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int step)
{
    return shuffle(value, device::lane() ^ step);
}

template <typename T> T __shfl_up_sync(unsigned, T value, int step)
{
    return shuffle(value, device::lane() >= step ? device::lane() - step : device::lane());
}

template <typename T> T __shfl_sync(unsigned, T value, int from)
{
    return shuffle(value, from % 32);
}

inline unsigned __ballot_sync(unsigned, bool vote)
{
    device::warp &w = device::own_warp();
    w.exchanged[device::lane()] = vote;
    __syncwarp();
    unsigned votes = 0;
    for (int i = 0; i < 32; i++) {
        votes |= (unsigned)w.exchanged[i] << i;
    }
    __syncwarp();
    return votes;
}

inline bool __any_sync(unsigned lanes, bool vote)
{
    return __ballot_sync(lanes, vote) != 0;
}

inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}

inline int __ffs(unsigned x)
{
    return __builtin_ffs((int)x);
}

inline long long __double_as_longlong(double x)
{
    long long bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline double __longlong_as_double(long long bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float __uint_as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <typename T> T __ldcg(const T *from)
{
    return *from;
}

inline float __fdividef(float a, float b)
{
    return a / b;
}

inline float __log2f(float x)
{
    return log2f(x);
}

#endif
