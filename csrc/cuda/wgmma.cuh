/* Instructions of Hopper: mbarriers, register shares of warpgroups, asynchronous matrix products. Only where sm_90a is compiled for. */
#ifndef SA_CUDA_WGMMA_CUH
#define SA_CUDA_WGMMA_CUH

#include "ptx.cuh"

namespace sa
{

/* --- barriers -------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void barrier_init(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier)
{
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}

/* Arrives when all cp.async that this thread issued before have landed. Counts as one of the barrier's arrivals. */
__device__ __forceinline__ void barrier_arrive_copied(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* Waits until the phase of this parity is over. A fresh barrier is in phase 0: parity 1 is over at once. */
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred over;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 "@over bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Named barriers 1 .. 15. */
__device__ __forceinline__ void meet(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void call(int barrier, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* What was written to shared memory by threads may from here on be read by the tensor cores. */
__device__ __forceinline__ void fence_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Copies 16 bytes, or writes as many zeros. */
__device__ __forceinline__ void copy_or_clear_16(uint32_t target, const void *source, bool copied)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(copied ? 16 : 0) : "memory");
}

/* --- matrix products --------------------------------------------------------------------------------------------------------------- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int registers> __device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers> __device__ __forceinline__ void leave_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending> __device__ __forceinline__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* Registers that a product wrote are not read before this place. */
template <int count> __device__ __forceinline__ void pin(float (&d)[count])
{
#pragma unroll
    for (int i = 0; i < count; i++) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

/* Panels of 128-byte rows in 128-byte swizzle. Rows along k (queries, keys): `rows` is the distance of groups of eight rows, panels are
 * stepped by hand. Rows along n (values): `panel` is the distance of panels of 64 columns, `rows` of eight keys. */
__device__ __forceinline__ uint64_t describe_panels(uint32_t address, uint32_t panel, uint32_t rows)
{
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(rows >> 4) << 32 | (uint64_t)1 << 62;
}

#define SA_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SA_D32                                                                                                                             \
    SA_D8 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SA_D64                                                                                                                             \
    SA_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
           "%56, %57, %58, %59, %60, %61, %62, %63"
#define SA_R8(d, i)                                                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SA_R32(d, i) SA_R8(d, i), SA_R8(d, i + 8), SA_R8(d, i + 16), SA_R8(d, i + 24)
#define SA_R64(d) SA_R32(d, 0), SA_R32(d, 32)

/* D (+)= A B, both from shared memory along k; `joined` 0 forgets what D held. */
#define SA_PRODUCT_SHARED(columns, type, list, registers, x, y, z)                                                                         \
    asm volatile("{ .reg .pred joined; setp.ne.b32 joined, %" z ", 0;\n"                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" list "}, %" x ", %" y ", joined, 1, 1, 0, 0; }" \
                 : registers                                                                                                               \
                 : "l"(a), "l"(b), "r"(joined))

/* D += A B, A from registers, B from shared memory along n. */
#define SA_PRODUCT_MIXED(columns, type, list, registers, p, q, r, s, x)                                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" list "}, {%" p ", %" q ", %" r ", %" s "}, %"  \
                 x ", 1, 1, 1, 1;"                                                                                                         \
                 : registers                                                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename T> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<bf16> = true;

template <typename T> __device__ __forceinline__ void product(float (&d)[8], uint64_t a, uint64_t b, int joined)
{
    if constexpr (is_bf16<T>) {
        SA_PRODUCT_SHARED("16", "bf16", SA_D8, SA_R8(d, 0), "8", "9", "10");
    } else {
        SA_PRODUCT_SHARED("16", "f16", SA_D8, SA_R8(d, 0), "8", "9", "10");
    }
}

template <typename T> __device__ __forceinline__ void product(float (&d)[32], uint64_t a, uint64_t b, int joined)
{
    if constexpr (is_bf16<T>) {
        SA_PRODUCT_SHARED("64", "bf16", SA_D32, SA_R32(d, 0), "32", "33", "34");
    } else {
        SA_PRODUCT_SHARED("64", "f16", SA_D32, SA_R32(d, 0), "32", "33", "34");
    }
}

template <typename T> __device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b, int joined)
{
    if constexpr (is_bf16<T>) {
        SA_PRODUCT_SHARED("128", "bf16", SA_D64, SA_R64(d), "64", "65", "66");
    } else {
        SA_PRODUCT_SHARED("128", "f16", SA_D64, SA_R64(d), "64", "65", "66");
    }
}

template <typename T> __device__ __forceinline__ void product(float (&d)[32], const uint32_t *a, uint64_t b)
{
    if constexpr (is_bf16<T>) {
        SA_PRODUCT_MIXED("64", "bf16", SA_D32, SA_R32(d, 0), "32", "33", "34", "35", "36");
    } else {
        SA_PRODUCT_MIXED("64", "f16", SA_D32, SA_R32(d, 0), "32", "33", "34", "35", "36");
    }
}

template <typename T> __device__ __forceinline__ void product(float (&d)[64], const uint32_t *a, uint64_t b)
{
    if constexpr (is_bf16<T>) {
        SA_PRODUCT_MIXED("128", "bf16", SA_D64, SA_R64(d), "64", "65", "66", "67", "68");
    } else {
        SA_PRODUCT_MIXED("128", "f16", SA_D64, SA_R64(d), "64", "65", "66", "67", "68");
    }
}

#endif

} // namespace sa

#endif
