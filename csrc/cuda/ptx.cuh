/* Thin wrappers of the instructions that CUDA C++ has no words for, and the two half types. No CUTLASS, no CUDA headers. */
#ifndef SA_CUDA_PTX_CUH
#define SA_CUDA_PTX_CUH

#include <stdint.h>

namespace sa
{

/* Conversions between fp32 and the element types; `multiply` is D += A B with A [16, 16] by rows, B [16, 8] by columns, D fp32. */
struct f32 {
    static constexpr int size = 4;
    static __device__ __forceinline__ void store(void *data, int64_t at, float x)
    {
        ((float *)data)[at] = x;
    }
};

struct f16 {
    static constexpr int size = 2;
    static __device__ __forceinline__ void store(void *data, int64_t at, float x)
    {
        ((uint16_t *)data)[at] = (uint16_t)pack(x, 0.0f);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t both;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
    }
    static __device__ __forceinline__ float wide(uint16_t bits)
    {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct bf16 {
    static constexpr int size = 2;
    static __device__ __forceinline__ void store(void *data, int64_t at, float x)
    {
        ((uint16_t *)data)[at] = (uint16_t)pack(x, 0.0f);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t both;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
    }
    static __device__ __forceinline__ float wide(uint16_t bits)
    {
        return __uint_as_float((uint32_t)bits << 16);
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <typename T> __device__ __forceinline__ uint16_t narrow(float x)
{
    return (uint16_t)T::pack(x, 0.0f);
}

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* A word of line `line` of the parameters. They are cold when a kernel begins, and waiting for one line after the other would take longer
 * than all else: other warps than the one in a hurry ask for them. */
__device__ __forceinline__ uint32_t touch_parameters(const void *parameters, int line)
{
    uint32_t word;
    asm volatile("ld.param.u32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_grid_constant((const char *)parameters + 64 * line)));
    return word;
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* Four 8 x 8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8. */
__device__ __forceinline__ void load_matrices(uint32_t (&tiles)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&tiles)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

/* L2 policies: keys and values that are read once should not push out what is read again. */
__device__ __forceinline__ uint64_t policy_evict_first()
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t policy_evict_normal()
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_async_16(uint32_t target, const void *source, uint64_t policy)
{
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "l"(policy) : "memory");
}

__device__ __forceinline__ void copy_async_16(uint32_t target, const void *source)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_async_8(uint32_t target, const void *source)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int pending> __device__ __forceinline__ void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* Counts to `count` and then from 0 again, in no order with other accesses. Returns what was there before. */
__device__ __forceinline__ uint32_t count_up(uint32_t *counter, uint32_t count)
{
    uint32_t before;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count - 1) : "memory");
    return before;
}

/* Without waiting for what was there. */
__device__ __forceinline__ void add_to(int64_t *number, int64_t added)
{
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(number), "l"(added) : "memory");
}

/* Rounded by itself: scores are to be those of the host, ties included, whose compiler joins no product with a sum. */
__device__ __forceinline__ double product(double a, double b)
{
    return __dmul_rn(a, b);
}

/* The least number of a warp; every lane gets it. */
__device__ __forceinline__ uint32_t least_of_warp(uint32_t number)
{
    return __reduce_min_sync(~0u, number);
}

/* Counts an arrival, with all that the CTA wrote before its last barrier, at a counter that returns to 0. True for the last of `count`. */
__device__ __forceinline__ bool arrive(uint32_t *counter, uint32_t count)
{
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count - 1) : "memory");
    return before == count - 1;
}

#if __CUDA_ARCH__ >= 900
/* Asks for memory that is read later: from there to the L2. Multiples of 16 bytes. */
__device__ __forceinline__ void prefetch_bulk(const void *address, uint32_t bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}
#else
__device__ __forceinline__ void prefetch_bulk(const void *, uint32_t)
{
}
#endif

/* --- clusters (sm_90 and later) -------------------------------------------------------------------------------------------------- */

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t cluster_index()
{
    uint32_t index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}

/* The kernel behind this one may begin, and waits in wait_for_last for what this one writes. */
__device__ __forceinline__ void let_next_begin()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void wait_for_last()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

/* An arrival that publishes nothing: it need not wait for stores on their way. */
__device__ __forceinline__ void cluster_arrive_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The address in CTA `rank` of the cluster that stands where `address` stands here. */
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank)
{
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ __forceinline__ float2 cluster_load_pair(uint32_t address)
{
    float2 x;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ void cluster_store_pair(uint32_t address, uint64_t first, uint64_t second)
{
    asm volatile("st.shared::cluster.v2.b64 [%0], {%1, %2};" ::"r"(address), "l"(first), "l"(second) : "memory");
}
#else
__device__ __forceinline__ uint32_t cluster_index()
{
    return blockIdx.x;
}

__device__ __forceinline__ void let_next_begin()
{
}

__device__ __forceinline__ void wait_for_last()
{
}

__device__ __forceinline__ void cluster_arrive()
{
}

__device__ __forceinline__ void cluster_arrive_relaxed()
{
}

__device__ __forceinline__ void cluster_wait()
{
}

__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t)
{
    return address;
}

__device__ __forceinline__ void cluster_store_pair(uint32_t, uint64_t, uint64_t)
{
}

__device__ __forceinline__ float2 cluster_load_pair(uint32_t)
{
    return {0.0f, 0.0f};
}
#endif

} // namespace sa

#endif
