/* Rows of 16-bit elements into shared memory as the asynchronous products read them. */
#ifndef SA_CUDA_PANELS_CUH
#define SA_CUDA_PANELS_CUH

#include "wgmma_rows.cuh"

namespace sa
{

/* Panels of 64 columns, 128-byte swizzle, by all threads of a CTA: copies rows low .. high - 1 of `rows`; others are zero, and so is what is
 * beyond `width`. A thread's rows are a multiple of eight apart, so that the swizzle is the same for all of them. */
template <int depth, int rows, int threads>
__device__ __forceinline__ void load_panels(const char *source, int64_t stride, int low, int high, int width, uint32_t target)
{
    constexpr int pieces = depth / 8, step = threads / pieces;
    const int row = threadIdx.x / pieces, piece = threadIdx.x % pieces;
    const bool within = piece * 8 < width;
    const char *from = source + row * stride + piece * 16;
    const uint32_t to = target + piece / 8 * (rows * 128) + row * 128 + ((piece % 8 ^ row % 8) * 16);
#pragma unroll
    for (int i = 0; i < rows / step; i++) {
        const int at = row + i * step;
        copy_or_clear_16(to + i * step * 128, from + i * step * stride, within && at >= low && at < high);
    }
}

} // namespace sa

#endif
