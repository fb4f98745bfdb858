/* What the backward pass asks of Hopper beside wgmma.cuh. */
#ifndef SA_CUDA_WGMMA_ROWS_CUH
#define SA_CUDA_WGMMA_ROWS_CUH

#include "wgmma.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* D (+)= A B, A and B from shared memory, both along their rows: A [k, m], B [k, n]. */
template <typename T> __device__ __forceinline__ void product_along_rows(float (&d)[32], uint64_t a, uint64_t b, int joined)
{
    if constexpr (is_bf16<T>) {
        asm volatile("{ .reg .pred joined; setp.ne.b32 joined, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SA_D32 "}, %32, %33, joined, 1, 1, 1, 1; }"
                     : SA_R32(d, 0)
                     : "l"(a), "l"(b), "r"(joined));
    } else {
        asm volatile("{ .reg .pred joined; setp.ne.b32 joined, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" SA_D32 "}, %32, %33, joined, 1, 1, 1, 1; }"
                     : SA_R32(d, 0)
                     : "l"(a), "l"(b), "r"(joined));
    }
}

#define SA_D16 SA_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"

template <typename T> __device__ __forceinline__ void product_along_rows(float (&d)[16], uint64_t a, uint64_t b, int joined)
{
    if constexpr (is_bf16<T>) {
        asm volatile("{ .reg .pred joined; setp.ne.b32 joined, %18, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" SA_D16 "}, %16, %17, joined, 1, 1, 1, 1; }"
                     : SA_R8(d, 0), SA_R8(d, 8)
                     : "l"(a), "l"(b), "r"(joined));
    } else {
        asm volatile("{ .reg .pred joined; setp.ne.b32 joined, %18, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" SA_D16 "}, %16, %17, joined, 1, 1, 1, 1; }"
                     : SA_R8(d, 0), SA_R8(d, 8)
                     : "l"(a), "l"(b), "r"(joined));
    }
}

__device__ __forceinline__ void add_four(float *to, float a, float b, float c, float d)
{
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t word)
{
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

#endif

} // namespace sa

#endif
