/* sa_attend_backward: every table against the scalar reference, on any call that the check lets pass, by relative L2 of each gradient. Results
 * lie in memory of their exact size; queries that count for nothing have no gradient, whatever they hold. */
#include "../../csrc/cpu/table.h"
#include "call.h"

enum { GRADIENTS = 8 };

typedef struct result {
    void *data[GRADIENTS]; /* query, key, value, sink_query, sink_key, sink_value, sink_logits, sink_bias; NULL: not given */
    int64_t count[GRADIENTS];
    sa_dtype dtype[GRADIENTS];
} result;

static int64_t elements(const sa_tensor *tensor)
{
    int64_t count = tensor->rank > 0;
    for (int axis = 0; axis < tensor->rank; axis++) {
        count *= tensor->shape[axis];
    }
    return count;
}

static result run(const sa_attend_backward_params *given)
{
    sa_attend_backward_params p = *given;
    const sa_attend_params *a = &p.attend;
    const sa_tensor *tensors[6] = {&a->query, &a->key, &a->value, &a->sink_query, &a->sink_key, &a->sink_value};
    const int64_t heads = a->query.shape[1];
    result r = {0};
    for (int i = 0; i < GRADIENTS; i++) {
        const bool given_here = i < 6 ? tensors[i]->rank > 0 : i == 6 ? a->sink_logits.data != NULL : a->sink_bias.data != NULL;
        const int64_t logits = a->sink_logits.rank == 0 ? 1 : heads * (a->sink_logits.rank == 2 ? a->sink_logits.shape[1] : 1);
        r.dtype[i] = i < 6 ? a->query.dtype : SA_F32;
        r.count[i] = !given_here ? 0 : i < 6 ? elements(tensors[i]) : i == 6 ? logits : heads * a->pinned;
        r.data[i] = given_here ? fuzz_memory(r.count[i], (size_t)sa_dtype_size(r.dtype[i])) : NULL;
        if (given_here) {
            memset(r.data[i], FUZZ_FILLER, (size_t)(r.count[i] * sa_dtype_size(r.dtype[i])));
        }
    }
    p.query_gradient = r.data[0];
    p.key_gradient = r.data[1];
    p.value_gradient = r.data[2];
    p.sink_query_gradient = r.data[3];
    p.sink_key_gradient = r.data[4];
    p.sink_value_gradient = r.data[5];
    p.sink_logits_gradient = r.data[6];
    p.sink_bias_gradient = r.data[7];
    FUZZ_REQUIRE(sa_attend_backward(&p, (sa_poll){NULL, NULL}) == SA_OK);
    return r;
}

static void drop(result *r)
{
    for (int i = 0; i < GRADIENTS; i++) {
        free(r->data[i]);
    }
}

static double norm(const result *a, const result *b, int i)
{
    double sum = 0.0;
    for (int64_t e = 0; e < a->count[i]; e++) {
        const double other = b != NULL ? fuzz_load(b->dtype[i], b->data[i], e) : 0.0, away = fuzz_load(a->dtype[i], a->data[i], e) - other;
        sum += away * away;
    }
    return sqrt(sum);
}

/* `uncancelled`: gradients of the size of what is subtracted from each other on the way; NULL: not known. */
static bool is_close(const result *got, const result *expected, const result *uncancelled, int i, double bound)
{
    const double away = norm(got, expected, i), size = norm(expected, NULL, i);
    const double least = (got->dtype[i] == SA_F32 ? 1e-6 : 1e-5) * sqrt((double)got->count[i]);
    const bool close = away <= bound * (uncancelled != NULL ? fmax(size, norm(uncancelled, NULL, i)) : size) + least;
    if (!close && uncancelled != NULL) {
        fprintf(stderr, "gradient %d: %g away, %g long, %g uncancelled\n", i, away, size, norm(uncancelled, NULL, i));
    }
    return close;
}

static double nothing(double x)
{
    return 0.0 * x;
}

static fuzz_tensor dense_copy(const sa_tensor *from, double (*change)(double))
{
    fuzz_tensor out = fuzz_make_tensor(&(fuzz_input){NULL, 0}, from->dtype, from->rank, from->shape, false);
    int64_t index[4] = {0};
    if (!fuzz_is_empty(from)) {
        do {
            const double value = fuzz_load(from->dtype, from->data, fuzz_element(from, index));
            fuzz_store(from->dtype, out.tensor.data, fuzz_element(&out.tensor, index), (float)change(value));
        } while (fuzz_next(from, index));
    }
    return out;
}

/* Where rounding is larger than the gradient by chance, what counts is its size with delta taken for 0, and d(out) and
 * the values for their absolute values. */
static void require_close(const sa_attend_backward_params *given, const result *got, const result *expected, double blur)
{
    const sa_dtype dtype = given->attend.query.dtype;
    const double bound = (dtype == SA_F32 ? 5e-6 : dtype == SA_F16 ? 3e-3 : 2.5e-2) + blur;
    bool close = true;
    for (int i = 0; i < GRADIENTS; i++) {
        close = close && is_close(got, expected, NULL, i, bound);
    }
    if (close) {
        return;
    }
    sa_attend_backward_params alike = *given;
    fuzz_tensor zero = dense_copy(&given->output, nothing), positive = dense_copy(&given->output_gradient, fabs);
    fuzz_tensor values = dense_copy(&given->attend.value, fabs);
    alike.output = zero.tensor;
    alike.output_gradient = positive.tensor;
    alike.attend.value = values.tensor;
    alike.lse_gradient.rank = 0;
    FUZZ_REQUIRE(sa_table_use("reference") == SA_OK);
    result uncancelled = run(&alike);
    for (int i = 0; i < GRADIENTS; i++) {
        FUZZ_REQUIRE(is_close(got, expected, &uncancelled, i, bound));
    }
    drop(&uncancelled);
    free(zero.memory);
    free(positive.memory);
    free(values.memory);
}

/* Queries with an infinite lse: their gradients are 0. */
static void require_idle(const sa_attend_backward_params *p, const result *r)
{
    const int64_t heads = p->attend.query.shape[1], queries = p->attend.query.shape[2], depth = p->attend.query.shape[3];
    for (int64_t i = 0; i < elements(&p->lse); i++) {
        const int64_t index[4] = {i / queries / heads, i / queries % heads, i % queries};
        const bool idle = isinf(((const float *)p->lse.data)[fuzz_element(&p->lse, index)]);
        for (int64_t d = 0; d < depth && idle; d++) {
            FUZZ_REQUIRE(fuzz_load(r->dtype[0], r->data[0], i * depth + d) == 0.0);
            FUZZ_REQUIRE(r->data[3] == NULL || fuzz_load(r->dtype[3], r->data[3], i * depth + d) == 0.0);
        }
    }
}

static sa_tensor take_rows(call *c, fuzz_input *in, const float *values)
{
    fuzz_tensor *t = &c->tensors[c->tensor_count++];
    *t = fuzz_make_tensor(in, SA_F32, 3, c->params.query.shape, values == NULL);
    fuzz_fill(t, &c->random, c->wild);
    int64_t index[4] = {0}, i = 0;
    if (values != NULL && !fuzz_is_empty(&t->tensor)) {
        do {
            ((float *)t->tensor.data)[fuzz_element(&t->tensor, index)] = values[i++];
        } while (fuzz_next(&t->tensor, index));
    }
    return t->tensor;
}

/* Output and lse of the reference in layouts of their own, d(output), and d(lse) or none. */
static sa_attend_backward_params take_gradients(call *c, fuzz_input *in)
{
    sa_attend_params p = c->params;
    const int64_t shape[4] = {p.query.shape[0], p.query.shape[1], p.query.shape[2], p.value.shape[3]};
    sa_attend_backward_params b = {.attend = p};
    fuzz_tensor *out = &c->tensors[c->tensor_count++];
    *out = fuzz_make_tensor(in, p.query.dtype, 4, shape, false);
    b.output = p.output = out->tensor;
    c->memory[c->memory_count++] = p.lse = fuzz_memory(shape[0] * shape[1] * shape[2], sizeof(float));
    FUZZ_REQUIRE(sa_table_use("reference") == SA_OK && sa_attend(&p, (sa_poll){NULL, NULL}) == SA_OK);
    b.lse = take_rows(c, in, p.lse);
    b.output_gradient = take_tensor(c, in, p.query.dtype, 4, shape);
    if (fuzz_byte(in) & 1) {
        b.lse_gradient = take_rows(c, in, NULL);
    }
    return b;
}

/* What fp32 cannot tell apart in the largest ALiBi term, in the exponent; and what a sum of many equal numbers, one after the other, may lose:
 * a quarter of the worst case. */
static double blur_of(const sa_attend_params *p)
{
    const double rows = (double)(p->query.shape[0] * p->query.shape[1] * p->query.shape[2]);
    return 0x1p-26 * rows + (p->alibi_slopes.data == NULL ? 0.0 : 0x1p-23 * (double)(p->query.shape[2] + p->key.shape[2]));
}

static void compare(call *c, fuzz_input *in, const char *table, bool threads)
{
    const sa_attend_backward_params p = take_gradients(c, in);
    FUZZ_REQUIRE(sa_attend_backward_check(&p) == SA_OK);
    result expected = run(&p);
    require_idle(&p, &expected);
    if (sa_table_use(table) == SA_OK) {
        sa_set_threads(threads ? 3 : 1);
        result got = run(&p), again = {0};
        require_idle(&p, &got);
        sa_set_threads(1);
        again = threads ? run(&p) : again;
        for (int i = 0; i < GRADIENTS && threads; i++) {
            FUZZ_REQUIRE(got.data[i] == NULL || memcmp(got.data[i], again.data[i], (size_t)(got.count[i] * sa_dtype_size(got.dtype[i]))) == 0);
        }
        if (c->wild == 0) {
            require_close(&p, &got, &expected, blur_of(&p.attend));
        }
        drop(&got);
        drop(&again);
    }
    drop(&expected);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    call c = {.params = {.function = "attend_backward"}};
    const uint8_t table = fuzz_byte(&in);
    sa_set_threads(1);
    take_call(&c, &in, 30000);
    if (sa_attend_check(&c.params) == SA_OK) {
        compare(&c, &in, sa_table_name((int)(table / 3) % sa_table_count()), table % 8 == 7);
    }
    drop_call(&c);
    return 0;
}
