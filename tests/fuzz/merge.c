/* sa_merge against the sum written out in long double; parts with infinite and NaN lse among them. */
#include "fuzz.h"

enum { PARTS = 6 };

typedef struct parts {
    void *outs[PARTS];
    float *lses[PARTS];
    int64_t count, rows, depth;
    sa_dtype dtype;
} parts;

/* The lse of a row; NaN wins, then +inf. */
static long double joined(const parts *p, int64_t row)
{
    long double largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < p->count; i++) {
        if (isnan(p->lses[i][row])) {
            return NAN;
        }
        largest = fmaxl(largest, (long double)p->lses[i][row]);
    }
    for (int64_t i = 0; i < p->count && isfinite(largest); i++) {
        sum += expl((long double)p->lses[i][row] - largest);
    }
    return isfinite(largest) ? largest + logl(sum) : largest;
}

static long double expected_value(const parts *p, int64_t row, int64_t d, long double lse)
{
    long double value = 0;
    for (int64_t i = 0; i < p->count; i++) {
        const long double weight = expl((long double)p->lses[i][row] - lse);
        if (weight != 0) {
            value += weight * (long double)fuzz_load(p->dtype, p->outs[i], row * p->depth + d);
        }
    }
    return value;
}

static void check(const parts *p, const void *out, const float *lse)
{
    for (int64_t row = 0; row < p->rows; row++) {
        const long double want = joined(p, row);
        FUZZ_REQUIRE(fuzz_close((double)lse[row], (double)(float)want, 1e-6));
        for (int64_t d = 0; d < p->depth; d++) {
            const double got = fuzz_load(p->dtype, out, row * p->depth + d);
            if (isinf(want)) {
                FUZZ_REQUIRE(got == 0.0);
            } else if (!isnan(want)) {
                FUZZ_REQUIRE(fuzz_close(got, (double)expected_value(p, row, d, want), fuzz_bound(p->dtype)));
            }
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    parts p = {.count = fuzz_range(&in, 1, PARTS), .rows = fuzz_range(&in, 0, 12), .depth = fuzz_depth(&in)};
    p.dtype = (sa_dtype)fuzz_range(&in, 0, 2);
    uint64_t random = fuzz_word(&in);
    static const float lses[] = {0, 1, -1, 80, -80, 700, -700, 3e38f, -3e38f, INFINITY, -INFINITY, -INFINITY, NAN, 5.5f, -0.0f, 1e-30f};
    for (int64_t i = 0; i < p.count; i++) {
        p.outs[i] = fuzz_memory(p.rows * p.depth, (size_t)sa_dtype_size(p.dtype));
        p.lses[i] = fuzz_memory(p.rows, sizeof(float));
        for (int64_t k = 0; k < p.rows * p.depth; k++) {
            fuzz_store(p.dtype, p.outs[i], k, fuzz_uniform(&random));
        }
        for (int64_t k = 0; k < p.rows; k++) {
            const uint8_t kind = fuzz_byte(&in);
            p.lses[i][k] = kind < 128 ? 8 * fuzz_uniform(&random) : lses[kind % 16];
        }
    }
    void *out = fuzz_memory(p.rows * p.depth, (size_t)sa_dtype_size(p.dtype));
    float *lse = fuzz_memory(p.rows, sizeof *lse);
    sa_part given[PARTS];
    for (int64_t i = 0; i < p.count; i++) {
        given[i].out = (sa_tensor){.data = p.outs[i], .shape = {p.rows, p.depth}, .stride = {p.depth, 1}, .rank = 2, .dtype = p.dtype};
        given[i].lse = (sa_tensor){.data = p.lses[i], .shape = {p.rows}, .stride = {1}, .rank = 1, .dtype = SA_F32};
    }
    sa_merge(given, p.count, out, lse);
    check(&p, out, lse);
    for (int64_t i = 0; i < p.count; i++) {
        free(p.outs[i]);
        free(p.lses[i]);
    }
    free(out);
    free(lse);
    return 0;
}
