/* Hopper's copies of tensor boxes to shared memory, and products of any width; beside wgmma.cuh. Only where sm_90a is compiled for. */
#ifndef SA_CUDA_TMA_CUH
#define SA_CUDA_TMA_CUH

#include "params.h"
#include "wgmma.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Arrives, and lets the phase end only when `bytes` more have been copied. */
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t bytes)
{
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

/* The box of `map` at these coordinates; what lies outside of the tensor arrives as zeros and counts all the same. One thread. */
__device__ __forceinline__ void copy_box(const sa_cuda_map &map, uint32_t target, uint64_t *barrier, int column, int a, int b, int c)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(target),
                 "l"(&map), "r"(column), "r"(a), "r"(b), "r"(c), "r"(shared_address(barrier))
                 : "memory");
}

/* --- products of any width -------------------------------------------------------------------------------------------------------------- */

#define SA_T0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SA_T1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define SA_T2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define SA_T3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define SA_T4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define SA_T5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define SA_T6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define SA_T7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define SA_T8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define SA_T9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define SA_TA "%80, %81, %82, %83, %84, %85, %86, %87"
#define SA_TB "%88, %89, %90, %91, %92, %93, %94, %95"
#define SA_TC "%96, %97, %98, %99, %100, %101, %102, %103"
#define SA_TD "%104, %105, %106, %107, %108, %109, %110, %111"
#define SA_TE "%112, %113, %114, %115, %116, %117, %118, %119"
#define SA_TF "%120, %121, %122, %123, %124, %125, %126, %127"

/* D (+)= A B of `n` columns. A: shared memory along k, or registers. B: shared memory, along k (keys) or along n (values). */
template <typename T, int n> struct wide_product;

#define SA_WIDE(n, list, out, both, i0, i1, i2, i3, i4)                                                                                    \
    template <> struct wide_product<bf16, n> {                                                                                             \
        SA_WIDE_OF(#n, "bf16", n, SA_EXPAND list, out, both, i0, i1, i2, i3, i4)                                                          \
    };                                                                                                                                     \
    template <> struct wide_product<f16, n> {                                                                                              \
        SA_WIDE_OF(#n, "f16", n, SA_EXPAND list, out, both, i0, i1, i2, i3, i4)                                                           \
    };
#define SA_EXPAND(...) __VA_ARGS__
#define SA_WGMMA(name, type, list) "wgmma.mma_async.sync.aligned.m64n" name "k16.f32." type "." type " {" list "}, "
#define SA_WIDE_OF(name, type, n, list, out, both, i0, i1, i2, i3, i4)                                                                     \
    static __device__ __forceinline__ void begin(float (&d)[n / 2], uint64_t a, uint64_t b)                                                \
    {                                                                                                                                      \
        asm volatile("{ .reg .pred never; setp.ne.b32 never, 0, 0;\n" SA_WGMMA(name, type, list) "%" i0 ", %" i1 ", never, 1, 1, 0, 0; }" \
                     : out(d)                                                                                                              \
                     : "l"(a), "l"(b));                                                                                                    \
    }                                                                                                                                      \
    static __device__ __forceinline__ void keys(float (&d)[n / 2], uint64_t a, uint64_t b)                                                 \
    {                                                                                                                                      \
        asm volatile(SA_WGMMA(name, type, list) "%" i0 ", %" i1 ", 1, 1, 1, 0, 0;" : both(d) : "l"(a), "l"(b));                           \
    }                                                                                                                                      \
    static __device__ __forceinline__ void values(float (&d)[n / 2], const uint32_t *a, uint64_t b)                                        \
    {                                                                                                                                      \
        asm volatile(SA_WGMMA(name, type, list) "{%" i0 ", %" i1 ", %" i2 ", %" i3 "}, %" i4 ", 1, 1, 1, 1;"                              \
                     : both(d)                                                                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                \
    }

#define SA_O8(d, i)                                                                                                                        \
    "=&f"(d[i]), "=&f"(d[i + 1]), "=&f"(d[i + 2]), "=&f"(d[i + 3]), "=&f"(d[i + 4]), "=&f"(d[i + 5]), "=&f"(d[i + 6]), "=&f"(d[i + 7])
#define SA_O32(d, i) SA_O8(d, i), SA_O8(d, i + 8), SA_O8(d, i + 16), SA_O8(d, i + 24)
#define SA_G8(d) SA_R8(d, 0)
#define SA_G24(d) SA_R8(d, 0), SA_R8(d, 8), SA_R8(d, 16)
#define SA_G32(d) SA_R32(d, 0)
#define SA_G40(d) SA_R32(d, 0), SA_R8(d, 32)
#define SA_G48(d) SA_R32(d, 0), SA_R8(d, 32), SA_R8(d, 40)
#define SA_G56(d) SA_G48(d), SA_R8(d, 48)
#define SA_G64(d) SA_R64(d)
#define SA_G72(d) SA_R64(d), SA_R8(d, 64)
#define SA_G80(d) SA_R64(d), SA_R8(d, 64), SA_R8(d, 72)
#define SA_G88(d) SA_G80(d), SA_R8(d, 80)
#define SA_G96(d) SA_R64(d), SA_R32(d, 64)
#define SA_G128(d) SA_R64(d), SA_R32(d, 64), SA_R32(d, 96)
#define SA_N8(d) SA_O8(d, 0)
#define SA_N24(d) SA_O8(d, 0), SA_O8(d, 8), SA_O8(d, 16)
#define SA_N32(d) SA_O32(d, 0)
#define SA_N40(d) SA_O32(d, 0), SA_O8(d, 32)
#define SA_N48(d) SA_O32(d, 0), SA_O8(d, 32), SA_O8(d, 40)
#define SA_N56(d) SA_N48(d), SA_O8(d, 48)
#define SA_N64(d) SA_O32(d, 0), SA_O32(d, 32)
#define SA_N72(d) SA_O32(d, 0), SA_O32(d, 32), SA_O8(d, 64)
#define SA_N80(d) SA_O32(d, 0), SA_O32(d, 32), SA_O8(d, 64), SA_O8(d, 72)
#define SA_N88(d) SA_N80(d), SA_O8(d, 80)
#define SA_N96(d) SA_O32(d, 0), SA_O32(d, 32), SA_O32(d, 64)
#define SA_N128(d) SA_O32(d, 0), SA_O32(d, 32), SA_O32(d, 64), SA_O32(d, 96)
#define SA_L4 SA_T0 ", " SA_T1 ", " SA_T2 ", " SA_T3
#define SA_L8 SA_L4 ", " SA_T4 ", " SA_T5 ", " SA_T6 ", " SA_T7

SA_WIDE(16, (SA_T0), SA_N8, SA_G8, "8", "9", "10", "11", "12")
SA_WIDE(48, (SA_T0 ", " SA_T1 ", " SA_T2), SA_N24, SA_G24, "24", "25", "26", "27", "28")
SA_WIDE(64, (SA_L4), SA_N32, SA_G32, "32", "33", "34", "35", "36")
SA_WIDE(80, (SA_L4 ", " SA_T4), SA_N40, SA_G40, "40", "41", "42", "43", "44")
SA_WIDE(96, (SA_L4 ", " SA_T4 ", " SA_T5), SA_N48, SA_G48, "48", "49", "50", "51", "52")
SA_WIDE(112, (SA_L4 ", " SA_T4 ", " SA_T5 ", " SA_T6), SA_N56, SA_G56, "56", "57", "58", "59", "60")
SA_WIDE(128, (SA_L8), SA_N64, SA_G64, "64", "65", "66", "67", "68")
SA_WIDE(144, (SA_L8 ", " SA_T8), SA_N72, SA_G72, "72", "73", "74", "75", "76")
SA_WIDE(160, (SA_L8 ", " SA_T8 ", " SA_T9), SA_N80, SA_G80, "80", "81", "82", "83", "84")
SA_WIDE(176, (SA_L8 ", " SA_T8 ", " SA_T9 ", " SA_TA), SA_N88, SA_G88, "88", "89", "90", "91", "92")
SA_WIDE(192, (SA_L8 ", " SA_T8 ", " SA_T9 ", " SA_TA ", " SA_TB), SA_N96, SA_G96, "96", "97", "98", "99", "100")
SA_WIDE(256, (SA_L8 ", " SA_T8 ", " SA_T9 ", " SA_TA ", " SA_TB ", " SA_TC ", " SA_TD ", " SA_TE ", " SA_TF), SA_N128, SA_G128, "128", "129", "130",
        "131", "132")

#endif

} // namespace sa

#endif
