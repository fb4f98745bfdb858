/* The names of csrc/cuda/wgmma.cuh and wgmma_rows.cuh that backward_sm90.cu uses, on the host: products are there at once. */
#ifndef SA_CUDA_WGMMA_ROWS_CUH
#define SA_CUDA_WGMMA_ROWS_CUH

#include "ptx.cuh"

#define __CUDA_ARCH_FEAT_SM90_ALL

namespace sa
{

inline void fence_async()
{
}

inline void products_begin()
{
}

inline void products_commit()
{
}

template <int pending> void products_wait()
{
}

template <int count> void pin(float (&)[count])
{
}

inline void copy_or_clear_16(uint32_t target, const void *source, bool copied)
{
    if (copied) {
        copy_async_16(target, source, 0);
    } else {
        must_be_aligned(target, 16);
        memset(shared_memory() + target, 0, 16);
    }
}

inline uint64_t describe_panels(uint32_t address, uint32_t panel, uint32_t rows)
{
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(rows >> 4) << 32 | (uint64_t)1 << 62;
}

/* Element of a factor in 128-byte swizzle: `i` its row or column of the product, k the depth. */
template <typename T> float swizzled(uint64_t factor, bool along_rows, int i, int k)
{
    const uint32_t start = (uint32_t)(factor & 0x3fff) << 4, panel = (uint32_t)(factor >> 16 & 0x3fff) << 4,
                   rows = (uint32_t)(factor >> 32 & 0x3fff) << 4;
    uint32_t at = along_rows ? start + i / 64 * panel + k / 8 * rows + k % 8 * 128 + i % 64 * 2 : start + i / 8 * rows + i % 8 * 128 + k * 2;
    uint16_t bits;
    at ^= (at >> 7 & 7) << 4;
    memcpy(&bits, shared_memory() + at, sizeof bits);
    return T::wide(bits);
}

/* Row and column of element i of a thread. */
inline int product_row(int i)
{
    return (int)threadIdx.x / 32 % 4 * 16 + device::lane() / 4 + i % 4 / 2 * 8;
}

inline int product_column(int i)
{
    return i / 4 * 8 + device::lane() % 4 * 2 + i % 2;
}

template <typename T, int count> void product_of(float (&d)[count], uint64_t a, uint64_t b, int joined, bool along_rows)
{
    for (int i = 0; i < count; i++) {
        d[i] = joined ? d[i] : 0.0f;
        for (int k = 0; k < 16; k++) {
            d[i] += swizzled<T>(a, along_rows, product_row(i), k) * swizzled<T>(b, along_rows, product_column(i), k);
        }
    }
}

template <typename T, int count> void product(float (&d)[count], uint64_t a, uint64_t b, int joined)
{
    product_of<T>(d, a, b, joined, false);
}

template <typename T, int count> void product_along_rows(float (&d)[count], uint64_t a, uint64_t b, int joined)
{
    product_of<T>(d, a, b, joined, true);
}

/* A from registers, as multiply_fragments has it. */
template <typename T, int count> void product(float (&d)[count], const uint32_t *a, uint64_t b)
{
    device::warp &w = device::own_warp();
    memcpy(w.fragments[device::lane()], a, 4 * sizeof *a);
    __syncwarp();
    for (int i = 0; i < count; i++) {
        const int row = product_row(i) % 16;
        for (int k = 0; k < 16; k++) {
            const uint32_t pair = w.fragments[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            d[i] += T::wide((uint16_t)(pair >> k % 2 * 16)) * swizzled<T>(b, true, product_column(i), k);
        }
    }
    __syncwarp();
}

inline void add_four(float *to, float a, float b, float c, float d)
{
    must_be_aligned((uint64_t)(uintptr_t)to, 16);
    to[0] += a;
    to[1] += b;
    to[2] += c;
    to[3] += d;
}

inline void store_shared(uint32_t address, uint32_t word)
{
    must_be_aligned(address, 4);
    memcpy(shared_memory() + address, &word, sizeof word);
}

} // namespace sa

#endif
