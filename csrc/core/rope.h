/* Rotary positions with angles reduced in fp64: position 10 000 000 is as exact as position 10. */
#ifndef SA_ROPE_H
#define SA_ROPE_H

#include <stdbool.h>
#include <stdint.h>

#include "../sinkattn.h"

typedef struct sa_rope {
    const double *inv_freq; /* [pairs] */
    int64_t pairs;          /* rotated depth / 2 */
    double scaling;         /* multiplies cos and sin */
    bool interleaved;       /* pairs (0, 1), (2, 3), ..; else (0, pairs), (1, pairs + 1), .. */
} sa_rope;

/* cos and sin of position * inv_freq, times scaling: table [2, pairs]. */
void sa_rope_angles(const sa_rope *rope, int64_t position, double scaling, float *table);

/* Rotates one vector of `depth` elements; what lies behind 2 * pairs is copied. source may be target. */
void sa_rope_rotate(const sa_rope *rope, const float *table, sa_dtype dtype, const void *source, void *target, int64_t depth);

#endif
