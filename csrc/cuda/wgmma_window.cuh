/* What the kernel of narrow windows asks of Hopper beside wgmma.cuh: products whose first factor is in registers, and matrices out. */
#ifndef SA_CUDA_WGMMA_WINDOW_CUH
#define SA_CUDA_WGMMA_WINDOW_CUH

#include "wgmma.cuh"

namespace sa
{

/* The opposite of load_matrices. */
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&tiles)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(tiles[0]), "r"(tiles[1]),
                 "r"(tiles[2]), "r"(tiles[3])
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address)
{
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}

/* 16 bytes that nobody reads soon. */
__device__ __forceinline__ void store_streaming_16(void *target, uint4 x)
{
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define SA_D24                                                                                                                             \
    SA_D8 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"

#define SA_D20 SA_D8 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define SA_R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])

/* D (+)= A B, A from registers; B from shared memory along k (turned 0) or along n (1). `joined` 0 forgets what D held. */
#define SA_PRODUCT_TURNED(columns, type, list, p, q, r, s, x, z, turned, ...)                                                              \
    asm volatile("{ .reg .pred joined; setp.ne.b32 joined, %" z ", 0;\n"                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" list "}, {%" p ", %" q ", %" r ", %" s "}, %"  \
                 x ", joined, 1, 1, " turned "; }"                                                                                         \
                 : __VA_ARGS__                                                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(joined))

#define SA_PRODUCTS_TURNED(columns, list, p, q, r, s, x, z, turned, ...)                                                                   \
    if constexpr (is_bf16<T>) {                                                                                                            \
        SA_PRODUCT_TURNED(columns, "bf16", list, p, q, r, s, x, z, turned, __VA_ARGS__);                                                   \
    } else {                                                                                                                               \
        SA_PRODUCT_TURNED(columns, "f16", list, p, q, r, s, x, z, turned, __VA_ARGS__);                                                    \
    }

/* Scores against 2 * count keys. */
template <typename T, int count> __device__ __forceinline__ void score_product(float *d, const uint32_t *a, uint64_t b, int joined)
{
    if constexpr (count == 8) {
        SA_PRODUCTS_TURNED("16", SA_D8, "8", "9", "10", "11", "12", "13", "0", SA_R8(d, 0));
    } else if constexpr (count == 20) {
        SA_PRODUCTS_TURNED("40", SA_D20, "20", "21", "22", "23", "24", "25", "0", SA_R8(d, 0), SA_R8(d, 8), SA_R4(d, 16));
    } else {
        static_assert(count == 24, "16, 40 or 48 keys");
        SA_PRODUCTS_TURNED("48", SA_D24, "24", "25", "26", "27", "28", "29", "0", SA_R8(d, 0), SA_R8(d, 8), SA_R8(d, 16));
    }
}

/* Weights times values of 16 keys. */
template <typename T, int count> __device__ __forceinline__ void value_product(float *d, const uint32_t *a, uint64_t b, int joined)
{
    if constexpr (count == 32) {
        SA_PRODUCTS_TURNED("64", SA_D32, "32", "33", "34", "35", "36", "37", "1", SA_R32(d, 0));
    } else {
        static_assert(count == 64, "depth 64 or 128");
        SA_PRODUCTS_TURNED("128", SA_D64, "64", "65", "66", "67", "68", "69", "1", SA_R64(d));
    }
}

#endif

} // namespace sa

#endif
