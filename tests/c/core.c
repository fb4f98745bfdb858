/* The parts that know no kernel: half types, refusals, merging. */
#include "core/check.h"
#include "test.h"

static bool same_or_nan(float a, float b)
{
    return (isnan(a) && isnan(b)) || sa_bits_of_float(a) == sa_bits_of_float(b);
}

/* Every half survives the way to fp32 and back; NaN stays NaN. */
static int64_t test_halves(void)
{
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const float f16 = sa_f16_to_f32((uint16_t)bits), bf16 = sa_bf16_to_f32((uint16_t)bits);
        EXPECT(same_or_nan(f16, sa_f16_to_f32(sa_f32_to_f16(f16))), "fp16 bits %x", bits);
        EXPECT(same_or_nan(bf16, sa_bf16_to_f32(sa_f32_to_bf16(bf16))), "bf16 bits %x", bits);
    }
    return 2 * 65536;
}

/* Rounding goes to the nearer neighbour, to the even one from the middle: beside the middle of two neighbours, and on it. */
static int64_t test_rounding(void)
{
    int64_t count = 0;
    for (uint32_t bits = 1; bits < 0x7c00 - 1; bits += 7) {
        const float low = sa_f16_to_f32((uint16_t)bits), high = sa_f16_to_f32((uint16_t)(bits + 1));
        const float middle = 0.5f * (low + high); /* exact */
        const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
        EXPECT(sa_f32_to_f16(middle) == even, "fp16 middle above %x", bits);
        EXPECT(sa_f32_to_f16(nextafterf(middle, 0.0f)) == bits, "fp16 below the middle above %x", bits);
        EXPECT(sa_f32_to_f16(-nextafterf(middle, INFINITY)) == (0x8000 | (bits + 1)), "fp16 above the middle above %x", bits);
        count += 3;
    }
    EXPECT(sa_f32_to_f16(65519.0f) == 0x7bff && sa_f32_to_f16(65520.0f) == 0x7c00, "the end of fp16");
    EXPECT(sa_f32_to_bf16(sa_float_of_bits(0x3f808000)) == 0x3f80 && sa_f32_to_bf16(sa_float_of_bits(0x3f818000)) == 0x3f82,
           "bf16 ties to even");
    return count + 2;
}

static int64_t test_refusals(void)
{
    uint64_t random = 4;
    sa_attend_params params = {.function = "attend",
                               .query = new_tensor(SA_F32, 1, 4, 3, 8, 0, &random),
                               .key = new_tensor(SA_F32, 1, 3, 5, 8, 0, &random),
                               .value = new_tensor(SA_F32, 1, 3, 5, 8, 0, &random),
                               .mass_queries = -1};
    EXPECT(sa_attend_check(&params) == SA_VALUE_ERROR, "4 query heads over 3");
    EXPECT(strstr(sa_message(), "attend(): ") == sa_message(), "%s", sa_message());
    params.value.shape[1] = params.key.shape[1] = 2;
    EXPECT(sa_attend_check(&params) == SA_OK, "%s", sa_message());
    params.value.dtype = SA_F16;
    EXPECT(sa_attend_check(&params) == SA_TYPE_ERROR && strstr(sa_message(), " v ") != NULL, "%s", sa_message());
    params.value.dtype = SA_F32;
    params.pinned = -1;
    EXPECT(sa_attend_check(&params) == SA_VALUE_ERROR && strstr(sa_message(), "sinks") != NULL, "%s", sa_message());
    free(params.query.data);
    free(params.key.data);
    free(params.value.data);
    return 4;
}

/* Two parts of known sums: out = (1 * e^0 + 3 * e^(log 3)) / 4, lse = log 4; a part that saw nothing counts for nothing. */
static int64_t test_merge(void)
{
    const float one = 1.0f, three = 3.0f, nothing = 7.0f, lses[] = {0.0f, 1.0986123f, -INFINITY};
    const float *const outs[] = {&one, &three, &nothing};
    sa_part parts[3];
    float out, lse;
    for (int i = 0; i < 3; i++) {
        parts[i].out = (sa_tensor){.data = (void *)(uintptr_t)outs[i], .shape = {1}, .stride = {1}, .rank = 1, .dtype = SA_F32};
        parts[i].lse = (sa_tensor){.data = (void *)(uintptr_t)&lses[i], .dtype = SA_F32};
    }
    sa_merge(parts, 3, &out, &lse);
    EXPECT(fabsf(out - 2.5f) < 1e-6f && fabsf(lse - 1.3862944f) < 1e-6f, "out %g, lse %g", (double)out, (double)lse);
    return 1;
}

int64_t test_core(void)
{
    return test_halves() + test_rounding() + test_refusals() + test_merge();
}
