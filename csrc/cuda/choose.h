/* Which kernels serve a problem, and how: pure functions of the shape and the device, tested without a GPU.
 *
 * Kernels, by file; <t> is f16 or bf16, <d> the smallest of 64, 128, 256 that holds depth and depth_v. Every one takes one
 * sa_cuda_problem (of the backward pass: one sa_cuda_backward) by value and has only dynamic shared memory, whose size, like grid, block and cluster, is in its sa_cuda_launch.
 *
 *   decode.cu        decode_<t>_<d>    few query rows: keys split over CTAs; with `append` the whole streaming step
 *                    decode_mass_<t>_<d>   the same and the mass of the keys, where their scores find room in shared memory
 *   decode_evict.cu  decode_evict_<t>_<d>  a step of a KVCache: that, and a token leaves; it takes one sa_cuda_eviction
 *   prefill_sm80.cu  prefill_<t>_<d>   many query rows
 *   prefill_sm90.cu  prefill_hopper_<t>_<form>  the same on Hopper, in the forms of params.h; it takes one sa_cuda_prefill
 *   window_sm90.cu   prefill_window_<t>_<d>  windows so narrow that all that a tile of rows sees fits into registers
 *   attend_f32.cu    attend_f32_<d>    fp32, both
 *   cache.cu         cache_rotate      rotates a chunk into scratch
 *                    cache_commit      writes a chunk into the slots and advances lengths and lows
 *   mass.cu          mass              per-key mass from lse
 *   mass_sm80.cu     mass_<t>_<d>      the same in half precision, summed over the queries
 *   mass_sm90.cu     mass_hopper_<t>_<d>  the same on Hopper, up to depth 128 and without what changes a score
 *   backward_rows.cu  backward_rows, backward_numbers       what query rows bring along; gradients of small arrays
 *   backward_sm80.cu  backward_keys_<t>_<d>, backward_queries_<t>_<d>
 *   backward_sm90.cu  backward_hopper_<t>_<d>, backward_finish_<t>  both in one pass on Hopper, up to depth 128
 *   backward_f32.cu   the same of fp32
 *
 * For every kernel the host sets MAX_DYNAMIC_SHARED_SIZE_BYTES to the device's opt-in limit, and for decode on sm_90
 * NON_PORTABLE_CLUSTER_SIZE_ALLOWED to 1. */
#ifndef SA_CUDA_CHOOSE_H
#define SA_CUDA_CHOOSE_H

#include "backward.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sa_cuda_device {
    int32_t capability; /* 90 for sm_90 */
    int32_t multiprocessors;
    int32_t shared_limit;  /* opt-in bytes of shared memory a block */
    int32_t cluster_limit; /* largest cluster of decode kernels with all of an SM's shared memory that the device runs: 0, 8 or 16. 0 as
                            * well where the decode kernels that were loaded were not compiled for sm_90 (CU_FUNC_ATTRIBUTE_PTX_VERSION) */
    int32_t wgmma;         /* the device runs code for sm_90a and the build has some */
} sa_cuda_device;

typedef struct sa_cuda_launch {
    int32_t kernel; /* index of sa_cuda_kernel */
    uint32_t grid;  /* CTAs, one axis */
    uint32_t block;
    uint32_t cluster; /* CTAs; 1: none */
    uint32_t shared;  /* dynamic bytes */
    uint32_t early;   /* may begin before the kernel in front has ended: it waits itself; only what was compiled for sm_90 */
} sa_cuda_launch;

enum { SA_CUDA_MAX_LAUNCHES = 4 };

/* Launches in order; none of them where there is nothing to do (no output element and no token to append). */
typedef struct sa_cuda_plan {
    sa_cuda_launch launches[SA_CUDA_MAX_LAUNCHES];
    int launch_count;
    int64_t scratch_bytes;
    int64_t counter_count;
    const char *path; /* name of the attention kernel, for counters of paths and benchmarks */
    int form;         /* of sa_cuda_forms where the kernel takes a sa_cuda_prefill, else -1 */
} sa_cuda_plan;

/* A form of the prefill kernel of Hopper (params.h). */
typedef struct sa_cuda_form {
    int32_t depth, width, rows, keys, featured, shared;
} sa_cuda_form;

extern const sa_cuda_form sa_cuda_forms[];

typedef struct sa_cuda_kernel {
    const char *name;  /* symbol */
    const char *image; /* stem of the .cu file */
} sa_cuda_kernel;

extern const sa_cuda_kernel sa_cuda_kernels[];
extern const int sa_cuda_kernel_count;

/* Fills the last block of the problem and the plan. Returns 0, or -1 where a grid would be larger than 2^31 - 1 CTAs. */
int sa_cuda_choose(sa_cuda_problem *problem, const sa_cuda_device *device, sa_cuda_plan *plan);

/* The same for mass alone, from row_lse. */
int sa_cuda_choose_mass(sa_cuda_problem *problem, const sa_cuda_device *device, sa_cuda_plan *plan);

/* The same for the gradients of a call. No launches where there are no queries: every gradient is zero. */
int sa_cuda_choose_backward(sa_cuda_backward *backward, sa_cuda_plan *plan);

#ifdef __cplusplus
}
#endif

#endif
