/* What a kv head has forgotten: totals for ever, a histogram of the mass at leaving, and the last few evictions one by one.
 *
 * Memory does not grow with the stream. Which positions are gone needs no record: they are the gaps between those that are held. */
#ifndef SA_LEDGER_H
#define SA_LEDGER_H

#include <stdint.h>

enum { SA_LEDGER_BINS = 64 };

/* One token that left. */
typedef struct sa_departure {
    int64_t position; /* of the token */
    int64_t length;   /* tokens seen when it left */
    double mass;      /* softmax weight that it had received until then; NaN: not tracked */
} sa_departure;

typedef struct sa_ledger {
    int64_t evicted;
    int64_t logged;  /* departures written so far; entry i lies in the log at i % its size */
    double mass;     /* of all that left, together */
    double largest;  /* of one that left */
    int64_t histogram[SA_LEDGER_BINS]; /* bin i: masses from 2^(i - 48) up to twice that; the ends take what lies beyond */
} sa_ledger;

int sa_ledger_bin(double mass);

/* log: [size], nullable with size 0. */
void sa_ledger_add(sa_ledger *ledger, sa_departure *log, int64_t size, sa_departure gone);

#endif
