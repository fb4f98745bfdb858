/* sa_attend: every table against the scalar reference, on any call that the check lets pass. Outputs lie in memory of their exact size,
 * with gaps that must stay as they were. */
#include "../../csrc/cpu/table.h"
#include "call.h"

typedef struct result {
    fuzz_tensor out;
    float *lse, *mass;
    int64_t lse_count, mass_count;
} result;

static result run(const call *c, fuzz_input layout, bool lse, bool mass)
{
    sa_attend_params p = c->params;
    result r = {.lse_count = p.query.shape[0] * p.query.shape[1] * p.query.shape[2],
                .mass_count = p.key.shape[0] * p.key.shape[1] * p.key.shape[2]};
    const int64_t shape[4] = {p.query.shape[0], p.query.shape[1], p.query.shape[2], p.value.shape[3]};
    r.out = fuzz_make_tensor(&layout, p.query.dtype, 4, shape, false);
    p.output = r.out.tensor;
    p.lse = r.lse = lse ? fuzz_memory(r.lse_count, sizeof(float)) : NULL;
    p.mass = r.mass = mass ? fuzz_memory(r.mass_count, sizeof(float)) : NULL;
    FUZZ_REQUIRE(sa_attend_check(&p) == SA_OK);
    FUZZ_REQUIRE(sa_attend(&p, (sa_poll){NULL, NULL}) == SA_OK);
    fuzz_require_gaps(&r.out);
    return r;
}

static void drop(result *r)
{
    free(r->out.memory);
    free(r->lse);
    free(r->mass);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    call c = {.params = {.function = "attend"}};
    const uint8_t table = fuzz_byte(&in), wanted = fuzz_byte(&in);
    sa_set_threads(table % 8 == 7 ? 3 : 1);
    take_call(&c, &in, 80000);
    const fuzz_input layout = in;
    if (sa_attend_check(&c.params) == SA_OK) {
        FUZZ_REQUIRE(sa_table_use("reference") == SA_OK);
        result expected = run(&c, layout, true, true);
        const int index = (int)(table / 3) % sa_table_count();
        if (sa_table_use(sa_table_name(index)) == SA_OK) {
            result got = run(&c, layout, wanted & 1, wanted & 2);
            const double bound = fuzz_bound(c.params.query.dtype);
            if (c.wild == 0) {
                fuzz_require_close(&got.out, &expected.out, bound);
                fuzz_require_floats(got.lse, expected.lse, got.lse ? got.lse_count : 0, fmin(bound, 2e-4));
                fuzz_require_floats(got.mass, expected.mass, got.mass ? got.mass_count : 0, fmin(bound, 2e-4));
            }
            drop(&got);
        }
        drop(&expected);
    }
    drop_call(&c);
    return 0;
}
