/* The vocabulary for AMX: that of AVX-512 with BF16 dot products, and products of packed bf16 pairs by tiles of 16 x 16.
 *
 * A tile product takes 16 rows by 16 words (32 numbers) against 16 words by 16 columns. So words come in sixteens, with zeros behind the
 * last real one, and score columns in thirty-twos: what a tile reads beyond the data is zero on both sides, never left over. */
#ifndef SA_VEC_AMX_H
#define SA_VEC_AMX_H

#define VEC_AMX 1
#include <stdbool.h>

#include "vec_avx512.h"

enum { AMX_SIDE = 16, AMX_LINE = 64 }; /* rows or words of a tile; bytes of its row */

/* Tiles 0 to 3 sum 32 rows x 32 columns, 4 and 5 hold rows of a, 6 and 7 columns of the panel. Once a task, not once a thread: a task is ten
 * microseconds or more, and a thread that waits with its tiles in use has 8 KiB more to be saved at each switch. */
static void amx_begin(void)
{
    uint8_t palette[64] __attribute__((aligned(64))) = {1};
    for (int tile = 0; tile < 8; tile++) {
        palette[16 + 2 * tile] = AMX_LINE; /* bytes of a row, 16 bits each */
        palette[48 + tile] = AMX_SIDE;     /* rows */
    }
    _tile_loadconfig(palette);
}

static void amx_end(void)
{
    _tile_release();
}

/* c[32, 32] (+)= a[32, words] * panel[words, 32]; strides in words. */
static void amx_multiply_2(const float *a, int64_t a_stride, const float *panel, int64_t words, float *c, int64_t c_stride, bool add)
{
    const int64_t line = 4 * a_stride, row = 4 * c_stride, step = 4 * 2 * AMX_SIDE;
    float *below = c + AMX_SIDE * c_stride;
    if (add) {
        _tile_loadd(0, c, row);
        _tile_loadd(1, c + AMX_SIDE, row);
        _tile_loadd(2, below, row);
        _tile_loadd(3, below + AMX_SIDE, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t word = 0; word < words; word += AMX_SIDE) {
        const float *columns = panel + word * 2 * AMX_SIDE;
        _tile_loadd(6, columns, step);
        _tile_loadd(4, a + word, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + AMX_SIDE, step);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + AMX_SIDE * a_stride + word, line);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + AMX_SIDE, row);
    _tile_stored(2, below, row);
    _tile_stored(3, below + AMX_SIDE, row);
}

/* The same for 16 rows. */
static void amx_multiply_1(const float *a, int64_t a_stride, const float *panel, int64_t words, float *c, int64_t c_stride, bool add)
{
    const int64_t line = 4 * a_stride, row = 4 * c_stride, step = 4 * 2 * AMX_SIDE;
    if (add) {
        _tile_loadd(0, c, row);
        _tile_loadd(1, c + AMX_SIDE, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t word = 0; word < words; word += AMX_SIDE) {
        const float *columns = panel + word * 2 * AMX_SIDE;
        _tile_loadd(4, a + word, line);
        _tile_loadd(6, columns, step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + AMX_SIDE, step);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + AMX_SIDE, row);
}

#endif
