/* The names of csrc/cuda/wgmma.cuh and wgmma_window.cuh that window_sm90.cu uses, on the host. */
#ifndef SA_CUDA_WGMMA_WINDOW_CUH
#define SA_CUDA_WGMMA_WINDOW_CUH

#include "wgmma_rows.cuh"

namespace sa
{

/* --- barriers: arrivals of a phase, those that have come, and the phases that are over ------------------------------------------------ */

struct phased {
    uint16_t expected, arrived;
    uint32_t over;
};

inline void barrier_init(uint64_t *barrier, uint32_t arrivals)
{
    const phased fresh = {(uint16_t)arrivals, 0, 0};
    memcpy(barrier, &fresh, sizeof fresh);
}

inline void barrier_arrive(uint64_t *barrier)
{
    phased state;
    memcpy(&state, barrier, sizeof state);
    if (state.arrived == state.expected) {
        fprintf(stderr, "a barrier that was never begun\n");
        abort();
    }
    if (++state.arrived == state.expected) {
        state.arrived = 0;
        state.over++;
    }
    memcpy(barrier, &state, sizeof state);
}

inline void barrier_arrive_copied(uint64_t *barrier)
{
    barrier_arrive(barrier);
}

inline void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    for (;;) {
        phased state;
        memcpy(&state, barrier, sizeof state);
        if ((state.over & 1) != parity) {
            return;
        }
        device::yield();
    }
}

template <int registers> void take_registers()
{
}

template <int registers> void leave_registers()
{
}

/* --- matrices ------------------------------------------------------------------------------------------------------------------------- */

inline void store_matrices(uint32_t address, const uint32_t (&tiles)[4])
{
    device::warp &w = device::own_warp();
    const int lane = device::lane();
    must_be_aligned(address, 16);
    w.addresses[lane] = address;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        memcpy(shared_memory() + w.addresses[8 * i + lane / 4] + lane % 4 * 4, &tiles[i], 4);
    }
    __syncwarp();
}

inline uint4 load_shared_16(uint32_t address)
{
    uint4 x;
    must_be_aligned(address, 16);
    memcpy(&x, shared_memory() + address, sizeof x);
    return x;
}

inline void store_streaming_16(void *target, uint4 x)
{
    must_be_aligned((uint64_t)(uintptr_t)target, 16);
    memcpy(target, &x, sizeof x);
}

template <typename T, int count> void register_product(float *d, const uint32_t *a, uint64_t b, int joined, bool along_rows)
{
    device::warp &w = device::own_warp();
    memcpy(w.fragments[device::lane()], a, 4 * sizeof *a);
    __syncwarp();
    for (int i = 0; i < count; i++) {
        const int row = product_row(i) % 16;
        d[i] = joined ? d[i] : 0.0f;
        for (int k = 0; k < 16; k++) {
            const uint32_t pair = w.fragments[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            d[i] += T::wide((uint16_t)(pair >> k % 2 * 16)) * swizzled<T>(b, along_rows, product_column(i), k);
        }
    }
    __syncwarp();
}

template <typename T, int count> void score_product(float *d, const uint32_t *a, uint64_t b, int joined)
{
    register_product<T, count>(d, a, b, joined, false);
}

template <typename T, int count> void value_product(float *d, const uint32_t *a, uint64_t b, int joined)
{
    register_product<T, count>(d, a, b, joined, true);
}

} // namespace sa

#endif
