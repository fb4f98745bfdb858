/* sa_mass: the mass alone, from the lse of the scalar reference, with and without weights of the queries; every table against it. */
#include "../../csrc/cpu/table.h"
#include "call.h"

static float *run(const sa_mass_params *given)
{
    sa_mass_params p = *given;
    const sa_tensor *key = &p.attend.key;
    float *mass = fuzz_memory(key->shape[0] * key->shape[1] * key->shape[2], sizeof *mass);
    p.attend.mass = mass;
    FUZZ_REQUIRE(sa_mass_check(&p) == SA_OK);
    FUZZ_REQUIRE(sa_mass(&p, (sa_poll){NULL, NULL}) == SA_OK);
    return mass;
}

/* What attend gives beside the output: lse, and the mass if it is asked for. */
static float *attend(const sa_attend_params *given, float *mass)
{
    sa_attend_params p = *given;
    const int64_t shape[4] = {p.query.shape[0], p.query.shape[1], p.query.shape[2], p.value.shape[3]};
    fuzz_input none = {NULL, 0};
    fuzz_tensor out = fuzz_make_tensor(&none, p.query.dtype, 4, shape, false);
    p.output = out.tensor;
    p.mass = mass;
    p.lse = fuzz_memory(shape[0] * shape[1] * shape[2], sizeof *p.lse);
    FUZZ_REQUIRE(sa_attend(&p, (sa_poll){NULL, NULL}) == SA_OK);
    free(out.memory);
    return p.lse;
}

static void compare(call *c, const char *table)
{
    sa_attend_params *attended = &c->params;
    const sa_tensor *query = &attended->query, *key = &attended->key;
    const int64_t count = key->shape[0] * key->shape[1] * key->shape[2];
    float *together = fuzz_memory(count, sizeof *together);
    sa_mass_params p = {.attend = *attended};
    p.lse = (sa_floats){.shape = {query->shape[0], query->shape[1], query->shape[2]}, .rank = 3};
    FUZZ_REQUIRE(sa_table_use("reference") == SA_OK);
    float *lse = attend(attended, together);
    p.lse.data = lse;
    float *alone = run(&p);
    if (c->wild == 0) { /* else an lse may have left the range of fp32 on its way */
        fuzz_require_floats(alone, together, count, 1e-5);
    }
    if (c->random & 1) {
        p.row_weights = p.lse;
        p.row_weights.data = take_floats(c, query->shape[0] * query->shape[1] * query->shape[2], 1.0f);
        for (int64_t i = 0; i < query->shape[0] * query->shape[1] * query->shape[2]; i++) {
            float *weight = (float *)(uintptr_t)p.row_weights.data + i;
            *weight = isinf(*weight) ? 0.0f : *weight;
        }
    }
    float *expected = run(&p);
    if (sa_table_use(table) == SA_OK) {
        float *got = run(&p);
        if (c->wild == 0) {
            fuzz_require_floats(got, expected, count, 2e-4);
        }
        free(got);
    }
    free(together);
    free(alone);
    free(expected);
    free(lse);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    call c = {.params = {.function = "mass"}};
    const uint8_t table = fuzz_byte(&in);
    sa_set_threads(table % 8 == 7 ? 3 : 1);
    take_call(&c, &in, 80000);
    if (sa_attend_check(&c.params) == SA_OK) {
        compare(&c, sa_table_name((int)(table / 3) % sa_table_count()));
    }
    drop_call(&c);
    return 0;
}
