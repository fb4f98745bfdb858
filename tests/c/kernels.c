/* Every kernel table against the reference table, over shapes, dtypes and features; the reference against a plain statement of the
 * formula. Results must not depend on the number of threads, bit for bit. */
#include "test.h"

enum feature {
    CAUSAL = 1,
    WINDOW = 2,
    WINDOWS = 4, /* one for each head, 0 for none */
    PIN = 8,
    LOGITS = 16,
    BIAS = 32,
    SECOND = 64, /* sink_query */
    LEARNED = 128,
    SOFTCAP = 256,
    ALIBI = 512,
    PADDED = 1024,
    PACKED = 2048,
    MASS_MAX = 4096,
};

enum { PINNED = 4, LOGIT_COUNT = 2, LEARNED_ROWS = 3, MOST_HEADS = 8, MOST_BATCH = 2 };

static const unsigned feature_sets[] = {
    CAUSAL,
    0,
    CAUSAL | WINDOW,
    WINDOW | PIN,
    CAUSAL | WINDOWS | PIN | MASS_MAX,
    CAUSAL | LOGITS,
    CAUSAL | WINDOW | PIN | BIAS | SECOND,
    CAUSAL | LEARNED | LOGITS,
    CAUSAL | SOFTCAP | ALIBI,
    CAUSAL | WINDOW | PIN | PADDED,
    CAUSAL | WINDOW | PIN | PACKED | LOGITS,
    CAUSAL | WINDOW | PIN | BIAS | SECOND | LOGITS | LEARNED | SOFTCAP | ALIBI | PADDED,
};

typedef struct shape {
    int64_t batch, heads_q, heads_kv, query_length, kv_length, depth, depth_v;
} shape;

static const shape shapes[] = {
    {2, 4, 2, 37, 61, 16, 16},   /* several spans, packed tiles */
    {1, 8, 2, 1, 300, 64, 64},   /* decode, read in place */
    {1, 4, 1, 3, 700, 32, 48},   /* few rows, split keys */
    {1, 2, 2, 140, 140, 40, 24}, /* whole and cut blocks */
    {2, 3, 3, 9, 130, 37, 20},   /* depths that no vector divides */
    {1, 2, 1, 5, 20, 256, 256},  /* the largest depth */
};

/* A call and the memory of its arguments. */
typedef struct call {
    sa_attend_params params;
    float logits[MOST_HEADS * LOGIT_COUNT], bias[MOST_HEADS * PINNED], slopes[MOST_HEADS];
    int64_t window[MOST_HEADS], starts[MOST_BATCH], lengths[MOST_BATCH], query_lengths[MOST_BATCH];
    int64_t cumulative_query[3], cumulative_key[3];
    int64_t outputs, rows, keys; /* elements of output, lse and mass */
} call;

static void set_windows(call *c, unsigned features, int64_t heads)
{
    for (int64_t h = 0; h < heads; h++) {
        c->window[h] = features & WINDOWS ? (h % 3) * 21 : 19;
    }
    if (features & (WINDOW | WINDOWS)) {
        c->params.window = (sa_ints){.data = c->window, .shape = {heads}, .rank = features & WINDOWS ? 1 : 0};
    }
}

static void set_lengths(call *c, unsigned features, const shape *s)
{
    for (int64_t b = 0; b < s->batch; b++) {
        c->starts[b] = 2 * b + 1;
        c->lengths[b] = s->kv_length - 3 * (b + 1);
        c->query_lengths[b] = max_i64(s->query_length - 2 * b - 1, 1);
    }
    if (features & PADDED) {
        c->params.starts = (sa_ints){.data = c->starts, .shape = {s->batch}, .rank = 1};
        c->params.lengths = (sa_ints){.data = c->lengths, .shape = {s->batch}, .rank = 1};
        c->params.query_lengths = (sa_ints){.data = c->query_lengths, .shape = {s->batch}, .rank = 1};
    }
    if (features & PACKED) {
        memcpy(c->cumulative_query, (int64_t[]){0, s->query_length / 3, s->query_length}, sizeof c->cumulative_query);
        memcpy(c->cumulative_key, (int64_t[]){0, s->kv_length / 2, s->kv_length}, sizeof c->cumulative_key);
        c->params.cumulative_query = (sa_ints){.data = c->cumulative_query, .shape = {3}, .rank = 1};
        c->params.cumulative_key = (sa_ints){.data = c->cumulative_key, .shape = {3}, .rank = 1};
    }
}

static void set_scores(call *c, unsigned features, const shape *s, uint64_t *random)
{
    sa_attend_params *p = &c->params;
    for (int64_t i = 0; i < MOST_HEADS * LOGIT_COUNT; i++) {
        c->logits[i] = normal(random);
    }
    for (int64_t i = 0; i < MOST_HEADS * PINNED; i++) {
        c->bias[i] = i % 7 == 3 ? -INFINITY : normal(random);
    }
    for (int64_t i = 0; i < MOST_HEADS; i++) {
        c->slopes[i] = 0.02f * (float)(i + 1);
    }
    p->pinned = features & PIN ? PINNED : 0;
    p->has_softcap = (features & SOFTCAP) != 0;
    p->softcap = 2.0;
    if (features & LOGITS) {
        p->sink_logits = (sa_floats){.data = c->logits, .shape = {s->heads_q, LOGIT_COUNT}, .rank = 2};
    }
    if (features & BIAS) {
        p->sink_bias = (sa_floats){.data = c->bias, .shape = {s->heads_q, PINNED}, .rank = 2};
    }
    if (features & ALIBI) {
        p->alibi_slopes = (sa_floats){.data = c->slopes, .shape = {s->heads_q}, .rank = 1};
    }
    if (features & SECOND) {
        p->sink_query = new_tensor(p->query.dtype, s->batch, s->heads_q, s->query_length, s->depth, 0, random);
    }
    if (features & LEARNED) {
        p->sink_key = new_tensor(p->query.dtype, s->heads_kv, LEARNED_ROWS, s->depth, 1, 0, random);
        p->sink_value = new_tensor(p->query.dtype, s->heads_kv, LEARNED_ROWS, s->depth_v, 1, 0, random);
        p->sink_key.rank = p->sink_value.rank = 3;
    }
}

static void new_call(call *c, const shape *s, sa_dtype dtype, unsigned features)
{
    uint64_t random = 88172645463325252u + features;
    *c = (call){.params = {.function = "attend", .causal = (features & CAUSAL) != 0, .mass_queries = -1}};
    sa_attend_params *p = &c->params;
    p->query = new_tensor(dtype, s->batch, s->heads_q, s->query_length, s->depth, 0, &random);
    p->key = new_tensor(dtype, s->batch, s->heads_kv, s->kv_length, s->depth, 5, &random);
    p->value = new_tensor(dtype, s->batch, s->heads_kv, s->kv_length, s->depth_v, 0, &random);
    p->output = new_tensor(dtype, s->batch, s->heads_q, s->query_length, s->depth_v, 0, &random);
    p->mass_reduce = features & MASS_MAX ? SA_MASS_MAX : SA_MASS_SUM;
    c->rows = s->batch * s->heads_q * s->query_length;
    c->outputs = c->rows * s->depth_v;
    c->keys = s->batch * s->heads_kv * s->kv_length;
    p->lse = allocate(c->rows * (int64_t)sizeof(float));
    p->mass = allocate(c->keys * (int64_t)sizeof(float));
    set_windows(c, features, s->heads_q);
    set_lengths(c, features, s);
    set_scores(c, features, s, &random);
}

static void end_call(call *c)
{
    sa_attend_params *p = &c->params;
    void *const all[] = {p->query.data, p->key.data, p->value.data, p->output.data, p->sink_query.data, p->sink_key.data, p->sink_value.data,
                         p->lse, p->mass};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

/* Runs with a table and some threads; output, lse and mass end to end in one block of memory. */
static char *run(call *c, const char *table, int64_t threads)
{
    const int64_t output_bytes = c->outputs * sa_dtype_size(c->params.query.dtype);
    char *results = allocate(output_bytes + (c->rows + c->keys) * (int64_t)sizeof(float));
    memset(c->params.mass, 0, (size_t)c->keys * sizeof(float));
    EXPECT(sa_table_use(table) == SA_OK, "%s", sa_message());
    sa_set_threads(threads);
    EXPECT(sa_attend_check(&c->params) == SA_OK && sa_attend(&c->params, no_poll) == SA_OK, "%s", sa_message());
    memcpy(results, c->params.output.data, (size_t)output_bytes);
    memcpy(results + output_bytes, c->params.lse, (size_t)c->rows * sizeof(float));
    memcpy(results + output_bytes + c->rows * (int64_t)sizeof(float), c->params.mass, (size_t)c->keys * sizeof(float));
    return results;
}

static void compare(const call *c, const char *got, const char *expected, const char *what)
{
    const sa_dtype dtype = c->params.query.dtype;
    const int64_t lse = c->outputs * sa_dtype_size(dtype), mass = lse + c->rows * (int64_t)sizeof(float);
    const double out_error = relative_error(dtype, got, expected, c->outputs);
    const double lse_error = relative_error(SA_F32, got + lse, expected + lse, c->rows);
    const double mass_error = relative_error(SA_F32, got + mass, expected + mass, c->keys);
    EXPECT(out_error <= bound_of(dtype), "%s: out is off by %g", what, out_error);
    EXPECT(lse_error <= (dtype == SA_F32 ? 1e-5 : 1e-4), "%s: lse is off by %g", what, lse_error);
    EXPECT(mass_error <= (dtype == SA_F32 ? 1e-5 : 1e-3), "%s: mass is off by %g", what, mass_error);
}

/* --- gradients ---------------------------------------------------------------------------------------------------------------------- */

enum { GRADIENTS = 8 };

typedef struct gradients {
    void *data[GRADIENTS]; /* query, key, value, sink_query, sink_key, sink_value, sink_logits, sink_bias */
    int64_t count[GRADIENTS];
    sa_dtype dtype[GRADIENTS];
} gradients;

static int64_t elements(const sa_tensor *tensor)
{
    int64_t count = tensor->rank > 0;
    for (int axis = 0; axis < tensor->rank; axis++) {
        count *= tensor->shape[axis];
    }
    return count;
}

/* Of the output and lse that the last run left; the output stands for its own gradient, lse for its. */
static gradients run_backward(const call *c, const char *table, int64_t threads)
{
    const sa_attend_params *p = &c->params;
    sa_tensor lse = {.data = p->lse, .shape = {p->query.shape[0], p->query.shape[1], p->query.shape[2]}, .rank = 3, .dtype = SA_F32};
    lse.stride[2] = 1;
    lse.stride[1] = lse.shape[2];
    lse.stride[0] = lse.shape[1] * lse.shape[2];
    sa_attend_backward_params b = {.attend = *p, .output_gradient = p->output, .output = p->output, .lse = lse, .lse_gradient = lse};
    b.attend.output = (sa_tensor){0};
    b.attend.lse = b.attend.mass = NULL;
    const sa_tensor *const tensors[] = {&p->query, &p->key, &p->value, &p->sink_query, &p->sink_key, &p->sink_value};
    void **const places[] = {&b.query_gradient,    &b.key_gradient,        &b.value_gradient,
                             &b.sink_query_gradient, &b.sink_key_gradient, &b.sink_value_gradient};
    gradients g = {0};
    for (int i = 0; i < 6; i++) {
        g.dtype[i] = p->query.dtype;
        g.count[i] = elements(tensors[i]);
        *places[i] = g.data[i] = g.count[i] > 0 ? allocate(g.count[i] * 4) : NULL;
    }
    g.count[6] = p->sink_logits.data != NULL ? p->query.shape[1] * LOGIT_COUNT : 0;
    g.count[7] = p->sink_bias.data != NULL ? p->query.shape[1] * PINNED : 0;
    b.sink_logits_gradient = g.data[6] = g.count[6] > 0 ? allocate(g.count[6] * 4) : NULL;
    b.sink_bias_gradient = g.data[7] = g.count[7] > 0 ? allocate(g.count[7] * 4) : NULL;
    EXPECT(sa_table_use(table) == SA_OK, "%s", sa_message());
    sa_set_threads(threads);
    EXPECT(sa_attend_backward_check(&b) == SA_OK && sa_attend_backward(&b, no_poll) == SA_OK, "%s", sa_message());
    return g;
}

static void free_gradients(gradients *g)
{
    for (int i = 0; i < GRADIENTS; i++) {
        free(g->data[i]);
    }
}

static void test_backward(const call *c, const char *table, const char *what)
{
    static const double bounds[] = {[SA_F32] = 5e-6, [SA_F16] = 3e-3, [SA_BF16] = 2.5e-2};
    gradients expected = run_backward(c, "reference", 2), one = run_backward(c, table, 1), three = run_backward(c, table, 3);
    for (int i = 0; i < GRADIENTS; i++) {
        const double error = relative_error(one.dtype[i], one.data[i], expected.data[i], one.count[i]);
        EXPECT(error <= bounds[c->params.query.dtype], "%s: gradient %d is off by %g", what, i, error);
        const size_t bytes = (size_t)(one.count[i] * sa_dtype_size(one.dtype[i]));
        EXPECT(bytes == 0 || memcmp(one.data[i], three.data[i], bytes) == 0, "%s: gradient %d: three threads differ from one", what, i);
    }
    free_gradients(&expected);
    free_gradients(&one);
    free_gradients(&three);
}

/* --- a plain statement of the formula: causality, windows, pinned keys, logits, softcap, ALiBi ------------------------------------- */

static bool sees(const call *c, int64_t head, int64_t position, int64_t key)
{
    const sa_attend_params *p = &c->params;
    const int64_t width = p->window.data == NULL ? 0 : c->window[p->window.rank == 0 ? 0 : head];
    const bool near = width == 0 || (p->causal ? position - key : llabs(position - key)) < width;
    return (!p->causal || key <= position) && (near || key < p->pinned);
}

static double score(const call *c, int64_t batch, int64_t head, int64_t query, int64_t key)
{
    const sa_attend_params *p = &c->params;
    const int64_t kv_head = head / (p->query.shape[1] / p->key.shape[1]), depth = p->query.shape[3];
    const int64_t q = batch * p->query.stride[0] + head * p->query.stride[1] + query * p->query.stride[2];
    const int64_t k = batch * p->key.stride[0] + kv_head * p->key.stride[1] + key * p->key.stride[2];
    double sum = 0.0;
    for (int64_t d = 0; d < depth; d++) {
        sum += element(p->query.dtype, p->query.data, q + d) * element(p->key.dtype, p->key.data, k + d);
    }
    sum /= sqrt((double)depth);
    sum = p->has_softcap ? p->softcap * tanh(sum / p->softcap) : sum;
    const int64_t position = p->key.shape[2] - p->query.shape[2] + query;
    return p->alibi_slopes.data == NULL ? sum : sum - (double)c->slopes[head] * (double)llabs(position - key);
}

/* Writes one row; returns its lse. */
static double state_row(const call *c, int64_t batch, int64_t head, int64_t query, float *row)
{
    const sa_attend_params *p = &c->params;
    const int64_t kv_head = head / (p->query.shape[1] / p->key.shape[1]), depth_v = p->value.shape[3];
    double values[256] = {0.0}, total = 0.0;
    for (int64_t i = 0; i < LOGIT_COUNT && p->sink_logits.data != NULL; i++) {
        total += exp((double)c->logits[head * LOGIT_COUNT + i]);
    }
    for (int64_t key = 0; key < p->key.shape[2]; key++) {
        if (sees(c, head, p->key.shape[2] - p->query.shape[2] + query, key)) {
            const double weight = exp(score(c, batch, head, query, key));
            total += weight;
            for (int64_t d = 0; d < depth_v; d++) {
                const int64_t v = batch * p->value.stride[0] + kv_head * p->value.stride[1] + key * p->value.stride[2];
                values[d] += weight * element(p->value.dtype, p->value.data, v + d);
            }
        }
    }
    for (int64_t d = 0; d < depth_v; d++) {
        row[d] = total > 0.0 ? (float)(values[d] / total) : 0.0f;
    }
    return log(total);
}

static void check_reference(call *c, const char *results, const char *what)
{
    const int64_t heads = c->params.query.shape[1], queries = c->params.query.shape[2], depth_v = c->params.value.shape[3];
    float *out = allocate(c->outputs * (int64_t)sizeof(float)), *lse = allocate(c->rows * (int64_t)sizeof(float));
    for (int64_t r = 0; r < c->rows; r++) {
        lse[r] = (float)state_row(c, r / queries / heads, r / queries % heads, r % queries, out + r * depth_v);
    }
    const double out_error = relative_error(SA_F32, results, out, c->outputs);
    const double lse_error = relative_error(SA_F32, results + c->outputs * (int64_t)sizeof(float), lse, c->rows);
    EXPECT(out_error <= 2e-7 && lse_error <= 2e-7, "%s: the reference is off by %g, lse by %g", what, out_error, lse_error);
    free(out);
    free(lse);
}

/* --- rounding to half types: two keys of equal weight, whose mean is exact in fp32 ------------------------------------------------- */

static int64_t test_rounding(sa_dtype dtype, int64_t queries)
{
    enum { DEPTH = 256 };
    uint64_t random = 77;
    sa_attend_params p = {.function = "attend",
                          .query = new_tensor(dtype, 1, 1, queries, DEPTH, 0, &random),
                          .key = new_tensor(dtype, 1, 1, 2, DEPTH, 0, &random),
                          .value = new_tensor(dtype, 1, 1, 2, DEPTH, 0, &random),
                          .output = new_tensor(dtype, 1, 1, queries, DEPTH, 0, &random),
                          .mass_queries = -1};
    memset(p.key.data, 0, (size_t)(2 * DEPTH * sa_dtype_size(dtype)));
    for (int64_t i = 0; i < 2 * DEPTH; i++) {
        const float value = normal(&random);
        set_element(dtype, p.value.data, i, value < 0.0f ? value - 1.0f : value + 1.0f);
    }
    EXPECT(sa_attend_check(&p) == SA_OK && sa_attend(&p, no_poll) == SA_OK, "%s", sa_message());
    for (int64_t i = 0; i < queries * DEPTH; i++) {
        const double mean = 0.5 * (element(dtype, p.value.data, i % DEPTH) + element(dtype, p.value.data, DEPTH + i % DEPTH));
        const uint16_t expected = dtype == SA_F16 ? sa_f32_to_f16((float)mean) : sa_f32_to_bf16((float)mean);
        const uint16_t got = ((const uint16_t *)p.output.data)[i];
        EXPECT(got == expected, "%s, %s: %a became %x, expected %x", sa_table_chosen(), sa_dtype_name(dtype), mean, got, expected);
    }
    free(p.query.data);
    free(p.key.data);
    free(p.value.data);
    free(p.output.data);
    return 1;
}

/* --- all of it -------------------------------------------------------------------------------------------------------------------- */

static void test_call(const shape *s, sa_dtype dtype, unsigned features, const char *table)
{
    char what[160];
    snprintf(what, sizeof what, "%s, %s, %lld x %lld queries, %lld keys, depth %lld, features %x", table, sa_dtype_name(dtype),
             (long long)s->batch, (long long)s->query_length, (long long)s->kv_length, (long long)s->depth, features);
    call c;
    new_call(&c, s, dtype, features);
    char *expected = run(&c, "reference", 2);
    if (strcmp(table, "reference") == 0) {
        if (dtype == SA_F32 && (features & (BIAS | SECOND | LEARNED | PADDED | PACKED)) == 0) {
            check_reference(&c, expected, what);
        }
    } else {
        test_backward(&c, table, what);
        char *one = run(&c, table, 1), *three = run(&c, table, 3);
        const int64_t bytes = c.outputs * sa_dtype_size(dtype) + (c.rows + c.keys) * (int64_t)sizeof(float);
        compare(&c, one, expected, what);
        EXPECT(memcmp(one, three, (size_t)bytes) == 0, "%s: three threads differ from one", what);
        free(one);
        free(three);
    }
    free(expected);
    end_call(&c);
}

int64_t test_kernels(void)
{
    static const sa_dtype dtypes[] = {SA_F32, SA_F16, SA_BF16};
    const char *table = sa_table_chosen();
    int64_t calls = test_rounding(SA_F16, 1) + test_rounding(SA_BF16, 1) + test_rounding(SA_F16, 40) + test_rounding(SA_BF16, 40);
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (size_t f = 0; f < sizeof feature_sets / sizeof feature_sets[0]; f++) {
            for (int d = 0; d < 3; d++) {
                if (!(feature_sets[f] & PACKED) || shapes[i].batch == 1) {
                    test_call(&shapes[i], dtypes[d], feature_sets[f], table);
                    calls++;
                }
            }
        }
    }
    return calls;
}
