/* What the kernel of narrow windows asks of Hopper beside wgmma.cuh: products whose first factor is in registers, and matrices out. */
#ifndef SA_CUDA_WGMMA_WINDOW_CUH
#define SA_CUDA_WGMMA_WINDOW_CUH

#include "wgmma.cuh"

namespace sa
{

/* Copies 4 bytes, or writes as many zeros. */
__device__ __forceinline__ void copy_or_clear_4(uint32_t target, const void *source, bool copied)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(copied ? 4 : 0) : "memory");
}

/* 16 bytes that are read once. */
__device__ __forceinline__ void load_streaming_16(uint32_t *x, const void *source)
{
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(source)
                 : "memory");
}

/* The compiler would multiply words of 64 bits. */
__device__ __forceinline__ char *at_step(char *base, int count, int step)
{
    char *place;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(place) : "r"(count), "r"(step), "l"(base));
    return place;
}

/* A line of memory that is read soon. */
__device__ __forceinline__ void expect(const void *source)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(source));
}

/* 16 bytes that nobody reads soon. */
__device__ __forceinline__ void store_streaming_16(void *target, const uint32_t (&x)[4])
{
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define SA_D36 SA_D32 ", %32, %33, %34, %35"
#define SA_D68 SA_D64 ", %64, %65, %66, %67"
#define SA_D72 SA_D68 ", %68, %69, %70, %71"
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
    } else if constexpr (count == 32) {
        SA_PRODUCTS_TURNED("64", SA_D32, "32", "33", "34", "35", "36", "37", "0", SA_R32(d, 0));
    } else if constexpr (count == 36) {
        SA_PRODUCTS_TURNED("72", SA_D36, "36", "37", "38", "39", "40", "41", "0", SA_R32(d, 0), SA_R4(d, 32));
    } else if constexpr (count == 68) {
        SA_PRODUCTS_TURNED("136", SA_D68, "68", "69", "70", "71", "72", "73", "0", SA_R64(d), SA_R4(d, 64));
    } else {
        static_assert(count == 72, "16, 64, 72, 136 or 144 keys");
        SA_PRODUCTS_TURNED("144", SA_D72, "72", "73", "74", "75", "76", "77", "0", SA_R64(d), SA_R8(d, 64));
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
