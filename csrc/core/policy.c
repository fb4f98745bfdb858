#include "policy.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "half.h"
#include "integers.h"
#include "problem.h"

/* own[0], own[1] of each policy:
 *   H2OEMA         decayed mass                   VLengthH2O  score, |v|
 *   KeyDiff, KNorm |k|                            CUR         |k|^2, |v|^2
 *   ExpectedAttention |v| */

enum { MAX_WINDOW = 4096 };

static const char *const names[] = {"SinkWindow", "H2O",    "H2ONorm", "H2OEMA", "VLengthH2O",        "Scissorhands", "TOVA",
                                    "SnapKV",     "KeyDiff", "KNorm",  "CUR",    "ExpectedAttention", "Random",       "Custom"};

sa_policy_kind sa_policy_named(const char *name)
{
    int kind = 0;
    while (kind < SA_POLICY_CUSTOM && strcmp(names[kind], name) != 0) {
        kind++;
    }
    return (sa_policy_kind)kind;
}

sa_status sa_policy_check(const sa_policy *policy, const char *function)
{
    const char *name = names[policy->kind];
    const bool future = policy->kind == SA_POLICY_EXPECTED_ATTENTION;
    if (future && (policy->window < 1 || policy->window > INT32_MAX)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): the n_future of %s is %" PRId64 ", expected 1 to %d", function, name, policy->window, INT32_MAX);
    }
    const bool window = policy->kind == SA_POLICY_SCISSORHANDS || policy->kind == SA_POLICY_SNAP_KV || policy->kind == SA_POLICY_CUR;
    if (window && (policy->window < 1 || policy->window > MAX_WINDOW)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): the window of %s is %" PRId64 ", expected 1 to %d", function, name, policy->window, MAX_WINDOW);
    }
    if (policy->kind == SA_POLICY_SNAP_KV && (policy->kernel < 1 || policy->kernel > MAX_WINDOW || policy->kernel % 2 == 0)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): the kernel of %s is %" PRId64 ", expected an odd number from 1 to %d", function, name,
                       policy->kernel, MAX_WINDOW);
    }
    if (policy->kind == SA_POLICY_H2O_EMA && !(policy->decay >= 0.0 && policy->decay <= 1.0)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): the lam of %s is %g, expected 0 to 1", function, name, policy->decay);
    }
    return SA_OK;
}

static int64_t bit_words(const sa_policy *policy)
{
    return ceil_div(policy->window, 64);
}

int64_t sa_policy_state_bytes(const sa_policy *policy)
{
    int64_t ring = 0;
    if (policy->kind == SA_POLICY_SNAP_KV) {
        ring = policy->window * (int64_t)sizeof(float);
    } else if (policy->kind == SA_POLICY_SCISSORHANDS) {
        ring = bit_words(policy) * (int64_t)sizeof(uint64_t);
    }
    return round_up((int64_t)sizeof(sa_token_state) + ring, 8);
}

int64_t sa_policy_statistics(const sa_policy *policy, int64_t depth)
{
    return policy->kind == SA_POLICY_EXPECTED_ATTENTION ? 1 + depth + depth * depth : 0; /* how many, their sum, their products' sum */
}

sa_mass_need sa_policy_need(const sa_policy *policy)
{
    switch (policy->kind) {
    case SA_POLICY_H2O:
    case SA_POLICY_H2O_NORM: return SA_MASS_TOTAL;
    case SA_POLICY_H2O_EMA:
    case SA_POLICY_V_LENGTH_H2O:
    case SA_POLICY_SCISSORHANDS:
    case SA_POLICY_TOVA:
    case SA_POLICY_SNAP_KV:
    case SA_POLICY_CUSTOM: return SA_MASS_EACH;
    default: return SA_MASS_NONE;
    }
}

int64_t sa_policy_protects(const sa_policy *policy)
{
    return policy->kind == SA_POLICY_SNAP_KV ? policy->window : 0;
}

/* --- keys and values --------------------------------------------------------------------------------------------------------------- */

static double number(sa_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case SA_F32: return (double)((const float *)data)[i];
    case SA_F16: return (double)sa_f16_to_f32(((const uint16_t *)data)[i]);
    default: return (double)sa_bf16_to_f32(((const uint16_t *)data)[i]);
    }
}

static const void *key_of(const sa_candidates *all, int64_t candidate)
{
    return candidate < all->held ? sa_at(all->held_keys, all->dtype, candidate * all->depth)
                                 : sa_at(all->fresh_keys, all->dtype, (candidate - all->held) * all->fresh_key_stride);
}

/* A vector as doubles. */
static const double *widened(sa_dtype dtype, const void *vector, int64_t depth, double *out)
{
    for (int64_t i = 0; i < depth && dtype == SA_F32; i++) {
        out[i] = (double)((const float *)vector)[i];
    }
    for (int64_t i = 0; i < depth && dtype != SA_F32; i++) {
        out[i] = number(dtype, vector, i);
    }
    return out;
}

static double product_of(const double *a, const double *b, int64_t depth)
{
    double sum[4] = {0.0};
    for (int64_t i = 0; i < depth / 4 * 4; i += 4) {
        for (int lane = 0; lane < 4; lane++) {
            sum[lane] += a[i + lane] * b[i + lane];
        }
    }
    for (int64_t i = depth / 4 * 4; i < depth; i++) {
        sum[0] += a[i] * b[i];
    }
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

static double square_of(sa_dtype dtype, const void *vector, int64_t depth)
{
    double sum = 0.0;
    for (int64_t i = 0; i < depth; i++) {
        const double x = number(dtype, vector, i);
        sum += x * x;
    }
    return sum;
}

static double key_square(const sa_candidates *all, int64_t fresh)
{
    return square_of(all->dtype, sa_at(all->fresh_keys, all->dtype, fresh * all->fresh_key_stride), all->depth);
}

static double value_square(const sa_candidates *all, int64_t fresh)
{
    return square_of(all->dtype, sa_at(all->fresh_values, all->dtype, fresh * all->fresh_value_stride), all->depth_v);
}

static void meet_token(const sa_policy *policy, const sa_candidates *all, int64_t fresh)
{
    sa_token_state *state = sa_state_of(policy, all, all->held + fresh);
    switch (policy->kind) {
    case SA_POLICY_V_LENGTH_H2O: state->own[1] = sqrt(value_square(all, fresh)); break;
    case SA_POLICY_EXPECTED_ATTENTION: state->own[0] = sqrt(value_square(all, fresh)); break;
    case SA_POLICY_KEY_DIFF:
    case SA_POLICY_K_NORM: state->own[0] = sqrt(key_square(all, fresh)); break;
    case SA_POLICY_CUR:
        state->own[0] = key_square(all, fresh);
        state->own[1] = value_square(all, fresh);
        break;
    default: break;
    }
}

/* --- what queries gave -------------------------------------------------------------------------------------------------------------- */

/* One query, or the sum over a part's: `mass` by candidate. */
static void add_mass(const sa_policy *policy, const sa_candidates *all, const float *mass)
{
    for (int64_t i = 0; i < all->held + all->fresh; i++) {
        sa_token_state *state = sa_state_of(policy, all, i);
        state->mass += (double)mass[i];
        state->call += (double)mass[i];
    }
}

static void add_by_value_length(const sa_policy *policy, const sa_candidates *all, const float *mass)
{
    const int64_t count = all->held + all->fresh;
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        sum += (double)mass[i] * sa_state_of(policy, all, i)->own[1];
    }
    for (int64_t i = 0; i < count && sum > 0.0; i++) {
        sa_token_state *state = sa_state_of(policy, all, i);
        state->own[0] += (double)mass[i] * state->own[1] / sum;
    }
}

/* Query `position` of the stream; it saw `visible` candidates. */
static void observe_query(const sa_policy *policy, const sa_candidates *all, const float *mass, int64_t position, int64_t visible)
{
    const int64_t count = all->held + all->fresh, place = policy->window > 0 ? position % policy->window : 0;
    if (policy->kind == SA_POLICY_V_LENGTH_H2O) {
        add_by_value_length(policy, all, mass);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        sa_token_state *state = sa_state_of(policy, all, i);
        if (policy->kind == SA_POLICY_H2O_EMA) {
            state->own[0] = policy->decay * state->own[0] + (double)mass[i];
        } else if (policy->kind == SA_POLICY_SNAP_KV) {
            ((float *)(void *)(state + 1))[place] = mass[i];
        } else if (policy->kind == SA_POLICY_SCISSORHANDS) {
            uint64_t *word = (uint64_t *)(void *)(state + 1) + place / 64;
            const uint64_t bit = (uint64_t)1 << place % 64;
            *word = (double)mass[i] * (double)visible >= 1.0 ? *word | bit : *word & ~bit;
        }
    }
}

/* A pair of columns as a complex number, times re + i im. */
static void turn_pair(const sa_rope *rope, double *vector, int64_t pair, double re, double im)
{
    const int64_t a = rope->interleaved ? 2 * pair : pair, b = rope->interleaved ? 2 * pair + 1 : pair + rope->pairs;
    const double x = vector[a], y = vector[b];
    vector[a] = x * re - y * im;
    vector[b] = y * re + x * im;
}

/* A query of the part, as if it stood at position 0, into the sums. */
static void take_query(const sa_candidates *all, int64_t fresh, int64_t head)
{
    const int64_t depth = all->depth, position = all->length - all->fresh + fresh;
    double query[256], *sum = all->statistics + 1, *products = sum + depth;
    const int64_t offset = head * all->query_head_stride + fresh * all->query_stride;
    (void)widened(all->dtype, sa_at(all->queries, all->dtype, offset), depth, query);
    for (int64_t pair = 0; pair < all->rope.pairs && all->turned; pair++) {
        const double angle = all->rope.inv_freq[pair] * (double)position;
        turn_pair(&all->rope, query, pair, cos(angle), -sin(angle));
    }
    all->statistics[0] += 1.0;
    for (int64_t i = 0; i < depth; i++) {
        sum[i] += query[i];
        for (int64_t j = 0; j < depth; j++) {
            products[i * depth + j] += query[i] * query[j];
        }
    }
}

void sa_policy_observe(const sa_policy *policy, const sa_candidates *all)
{
    for (int64_t i = 0; i < all->fresh; i++) {
        meet_token(policy, all, i);
        for (int64_t head = 0; head < all->group && policy->kind == SA_POLICY_EXPECTED_ATTENTION; head++) {
            if (all->positions[all->held + i] >= all->pinned) {
                take_query(all, i, head);
            }
        }
    }
    for (int64_t row = 0; row < all->mass_rows && all->tracked; row++) {
        const float *mass = all->mass + row * all->mass_stride;
        add_mass(policy, all, mass);
        if (sa_policy_need(policy) == SA_MASS_EACH) {
            observe_query(policy, all, mass, all->length - all->fresh + row, all->held + row + 1);
        }
    }
}

/* --- scores ------------------------------------------------------------------------------------------------------------------------- */

/* Mean over the window's queries, then over or the largest of the `kernel` neighbours in order of position. The last `window` tokens stay
 * whatever they score, and do not lend their weight to neighbours. */
static void score_snap(const sa_policy *policy, const sa_candidates *all, double *scores)
{
    const int64_t count = all->held + all->fresh;
    double *mean = all->scratch;
    int64_t judged = 0;
    for (int64_t rank = 0; rank < count && all->positions[all->order[rank]] < all->length - policy->window; rank++, judged++) {
        const float *ring = (const float *)(const void *)(sa_state_of(policy, all, all->order[rank]) + 1);
        double sum[4] = {0.0}; /* four at a time: an addition waits for the one before */
        for (int64_t i = 0; i < policy->window / 4 * 4; i += 4) {
            for (int lane = 0; lane < 4; lane++) {
                sum[lane] += (double)ring[i + lane];
            }
        }
        for (int64_t i = policy->window / 4 * 4; i < policy->window; i++) {
            sum[0] += (double)ring[i];
        }
        mean[rank] = (sum[0] + sum[1] + (sum[2] + sum[3])) / (double)policy->window;
    }
    for (int64_t rank = 0; rank < count; rank++) {
        double pooled = rank < judged ? 0.0 : INFINITY;
        const int64_t first = max_i64(rank - policy->kernel / 2, 0), last = min_i64(rank + policy->kernel / 2, judged - 1);
        for (int64_t i = first; i <= last && rank < judged; i++) {
            pooled = policy->maximum ? (mean[i] > pooled ? mean[i] : pooled) : pooled + mean[i] / (double)policy->kernel;
        }
        scores[all->order[rank]] = pooled;
    }
}

static void score_scissorhands(const sa_policy *policy, const sa_candidates *all, double *scores)
{
    for (int64_t i = 0; i < all->held + all->fresh; i++) {
        const uint64_t *words = (const uint64_t *)(const void *)(sa_state_of(policy, all, i) + 1);
        int64_t set = 0;
        for (int64_t word = 0; word < bit_words(policy); word++) {
            set += __builtin_popcountll(words[word]);
        }
        scores[i] = (double)set;
    }
}

/* The newest query's weight, mean over all heads: they hold the same tokens in the same slots. */
static void score_tova(const sa_candidates *all, double *scores)
{
    const float *newest = all->mass - all->head * all->head_stride + (all->mass_rows - 1) * all->mass_stride;
    for (int64_t i = 0; i < all->held + all->fresh; i++) {
        double sum = 0.0;
        for (int64_t head = 0; head < all->heads && all->mass_rows > 0; head++) {
            sum += (double)newest[head * all->head_stride + i];
        }
        scores[i] = sum / (double)all->heads;
    }
}

static void score_key_diff(const sa_policy *policy, const sa_candidates *all, double *scores)
{
    const int64_t count = all->held + all->fresh;
    double *mean = all->scratch, wide[256];
    memset(mean, 0, (size_t)all->depth * sizeof *mean);
    for (int64_t rank = 0; rank < count; rank++) {
        const int64_t i = all->order[rank];
        const double length = sa_state_of(policy, all, i)->own[0], part = length > 0.0 ? 1.0 / (length * (double)count) : 0.0;
        (void)widened(all->dtype, key_of(all, i), all->depth, wide);
        for (int64_t d = 0; d < all->depth; d++) {
            mean[d] += part * wide[d];
        }
    }
    const double whole = sqrt(product_of(mean, mean, all->depth));
    for (int64_t i = 0; i < count; i++) {
        const double length = sa_state_of(policy, all, i)->own[0] * whole;
        const double product = product_of(mean, widened(all->dtype, key_of(all, i), all->depth, wide), all->depth);
        scores[i] = length > 0.0 ? -product / length : 0.0;
    }
}

/* |k|^2 |v|^2, each as a share of its window: `window` neighbours in order of position. */
static void score_cur(const sa_policy *policy, const sa_candidates *all, double *scores)
{
    const int64_t count = all->held + all->fresh;
    for (int64_t first = 0; first < count; first += policy->window) {
        const int64_t last = min_i64(first + policy->window, count);
        double keys = 0.0, values = 0.0;
        for (int64_t rank = first; rank < last; rank++) {
            const sa_token_state *state = sa_state_of(policy, all, all->order[rank]);
            keys += state->own[0];
            values += state->own[1];
        }
        for (int64_t rank = first; rank < last; rank++) {
            const sa_token_state *state = sa_state_of(policy, all, all->order[rank]);
            const double key = keys > 0.0 ? state->own[0] / keys : 0.0, value = values > 0.0 ? state->own[1] / values : 0.0;
            scores[all->order[rank]] = key * value;
        }
    }
}

/* The mean turn over the next `window` positions, of each pair: re, im [pairs]. A geometric sum. */
static void mean_turn(const sa_policy *policy, const sa_candidates *all, double *re, double *im)
{
    const double count = (double)policy->window, scaling = all->turned ? 1.0 : all->rope.scaling;
    for (int64_t pair = 0; pair < all->rope.pairs; pair++) {
        const double half = all->rope.inv_freq[pair] / 2.0, below = sin(half);
        const double size = fabs(below) > 1e-12 ? sin(count * half) / (count * below) : 1.0;
        const double angle = all->rope.inv_freq[pair] * (double)all->length + (count - 1.0) * half;
        re[pair] = scaling * size * cos(angle);
        im[pair] = scaling * size * sin(angle);
    }
}

/* scale mu.k + scale^2 k'Sk / 2 with the mean mu and the covariance S of the queries, turned to the future: the key is turned back. */
static double expected_logit(const sa_candidates *all, int64_t candidate, const double *re, const double *im)
{
    const int64_t depth = all->depth;
    const double count = fmax(all->statistics[0], 1.0), *sum = all->statistics + 1, *products = sum + depth;
    double key[256], square = 0.0;
    (void)widened(all->dtype, key_of(all, candidate), depth, key);
    for (int64_t pair = 0; pair < all->rope.pairs; pair++) {
        turn_pair(&all->rope, key, pair, re[pair], -im[pair]);
    }
    const double mean = product_of(sum, key, depth) / count;
    for (int64_t i = 0; i < depth; i++) {
        square += key[i] * product_of(products + i * depth, key, depth);
    }
    return all->scale * mean + all->scale * all->scale * (square / count - mean * mean) / 2.0;
}

static void score_expected(const sa_policy *policy, const sa_candidates *all, double *scores)
{
    const int64_t count = all->held + all->fresh;
    double re[128], im[128], largest = -INFINITY, sum = 0.0;
    mean_turn(policy, all, re, im);
    for (int64_t i = 0; i < count; i++) {
        scores[i] = expected_logit(all, i, re, im);
        largest = scores[i] > largest ? scores[i] : largest;
    }
    for (int64_t i = 0; i < count; i++) {
        scores[i] = exp(scores[i] - largest);
        sum += scores[i];
    }
    for (int64_t i = 0; i < count; i++) {
        scores[i] *= sa_state_of(policy, all, i)->own[0] / sum;
    }
}

static uint64_t mixed(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* A number for each token that depends on nothing but seed, row, head and position: splitmix64. */
static double random_score(const sa_policy *policy, const sa_candidates *all, int64_t position)
{
    const uint64_t stream = mixed(mixed(policy->seed + (uint64_t)all->row) + (uint64_t)all->head);
    return (double)(mixed(stream + (uint64_t)position) >> 11) * 0x1p-53;
}

static double simple_score(const sa_policy *policy, const sa_candidates *all, int64_t i)
{
    const sa_token_state *state = sa_state_of(policy, all, i);
    switch (policy->kind) {
    case SA_POLICY_H2O: return state->mass;
    case SA_POLICY_H2O_NORM: return state->mass / (double)(all->length - all->positions[i]);
    case SA_POLICY_H2O_EMA:
    case SA_POLICY_V_LENGTH_H2O: return state->own[0];
    case SA_POLICY_K_NORM: return -state->own[0];
    case SA_POLICY_RANDOM: return random_score(policy, all, all->positions[i]);
    default: return 0.0; /* SinkWindow: ties go to the newer */
    }
}

void sa_policy_score(const sa_policy *policy, const sa_candidates *all, double *scores)
{
    switch (policy->kind) {
    case SA_POLICY_SNAP_KV: score_snap(policy, all, scores); return;
    case SA_POLICY_SCISSORHANDS: score_scissorhands(policy, all, scores); return;
    case SA_POLICY_TOVA: score_tova(all, scores); return;
    case SA_POLICY_KEY_DIFF: score_key_diff(policy, all, scores); return;
    case SA_POLICY_CUR: score_cur(policy, all, scores); return;
    case SA_POLICY_EXPECTED_ATTENTION: score_expected(policy, all, scores); return;
    default: break;
    }
    for (int64_t i = 0; i < all->held + all->fresh; i++) {
        scores[i] = simple_score(policy, all, i);
    }
}
