#include "ledger.h"

#include <math.h>

enum { LOWEST_POWER = -48 };

int sa_ledger_bin(double mass)
{
    if (!(mass > 0.0)) {
        return 0;
    }
    int power;
    (void)frexp(mass, &power); /* mass = fraction * 2^power, fraction from 1/2 to 1 */
    const int bin = isinf(mass) ? SA_LEDGER_BINS - 1 : power - 1 - LOWEST_POWER;
    return bin < 0 ? 0 : bin >= SA_LEDGER_BINS ? SA_LEDGER_BINS - 1 : bin;
}

void sa_ledger_add(sa_ledger *ledger, sa_departure *log, int64_t size, sa_departure gone)
{
    ledger->evicted++;
    if (!isnan(gone.mass)) {
        ledger->mass += gone.mass;
        ledger->largest = gone.mass > ledger->largest ? gone.mass : ledger->largest;
        ledger->histogram[sa_ledger_bin(gone.mass)]++;
    }
    if (size > 0) {
        log[ledger->logged++ % size] = gone;
    }
}
