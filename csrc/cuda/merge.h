/* merge on a device: partial results over disjoint keys, joined. Plain C, read by both sides. */
#ifndef SA_CUDA_MERGE_H
#define SA_CUDA_MERGE_H

#include <stddef.h>
#include <stdint.h>

enum { SA_MERGE_PARTS = 48, SA_MERGE_THREADS = 256, SA_MERGE_CTAS = 1 << 20 /* at most; threads go on where there are more rows */ };

/* Strides count elements; axes that a part does not have come first, with stride 0. */
typedef struct sa_merge_part {
    const void *out;
    const float *lse;
    int64_t out_stride[4], lse_stride[3];
} sa_merge_part;

/* The kernel's only parameter. */
typedef struct sa_merge_problem {
    const sa_merge_part *more; /* every part, on the device; NULL: they are in `parts` */
    void *out;                 /* [rows, depth] dense */
    float *lse;                /* [rows] dense */
    int64_t extent[3];         /* the axes that make up the rows */
    int64_t count, rows, depth;
    int32_t dtype;   /* SA_CUDA_* */
    int32_t aligned; /* every row of every part, and of out, is read and written in 16-byte pieces */
    sa_merge_part parts[SA_MERGE_PARTS];
} sa_merge_problem;

#endif
