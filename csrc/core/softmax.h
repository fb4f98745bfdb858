/* The state of an online softmax and its algebra: the one place where it is written for C.
 *
 * A state stands for the sum  s * 2^m  of terms  2^x_j ; scores are kept in log2 units. Weighted values scale with s.
 * Empty: m = -inf, s = 0. Two states join by rescaling both to the larger m. A sink logit is one more term without a value. */
#ifndef SA_SOFTMAX_H
#define SA_SOFTMAX_H

#include <math.h>

#define SA_LOG2E 1.44269504088896340736
#define SA_LN2 0.69314718055994530942

/* 2^(m - anchor), 0 for an empty state whatever the anchor. */
static inline float sa_softmax_factor(float maximum, float anchor)
{
    return maximum == -INFINITY ? 0.0f : exp2f(maximum - anchor);
}

typedef struct sa_softmax_end {
    float factor; /* multiply the weighted values by it: 0 where nothing was seen */
    float lse;    /* natural log, the sink included */
} sa_softmax_end;

/* Closes a row: joins the sink logit (natural log units, -inf for none) and normalises. */
static inline sa_softmax_end sa_softmax_close(float maximum, float sum, double sink)
{
    if (sink == (double)INFINITY) {
        return (sa_softmax_end){0.0f, INFINITY};
    }
    const double natural = (double)maximum * SA_LN2;
    if (maximum == -INFINITY) {
        return (sa_softmax_end){0.0f, (float)sink};
    }
    const double anchor = fmax(natural, sink);
    const double keys = exp(natural - anchor);
    const double total = (double)sum * keys + exp(sink - anchor);
    return (sa_softmax_end){(float)(keys / total), (float)(anchor + log(total))};
}

#endif
