/* Who leaves: the lowest scores, against a selection that sorts; budgets; the ledger's bins. */
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../csrc/core/ledger.h"
#include "../../csrc/core/select.h"

#define EXPECT(condition)                                             \
    do {                                                              \
        if (!(condition)) {                                           \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            exit(1);                                                  \
        }                                                             \
    } while (0)

enum { MOST = 60 };

static uint64_t seed = 1;

static int64_t below(int64_t limit)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)(seed >> 33) % limit;
}

/* One after the other: the lowest score that may go, the oldest of equals. */
static void plainly(const double *scores, const int64_t *positions, int64_t count, sa_guard guard, int64_t leaving, bool *gone)
{
    for (int64_t i = 0; i < count; i++) {
        gone[i] = false;
    }
    for (int64_t n = 0; n < leaving; n++) {
        int64_t worst = -1;
        for (int64_t i = 0; i < count; i++) {
            const bool held = gone[i] || positions[i] < guard.pinned || positions[i] >= guard.recent_from;
            const double score = isnan(scores[i]) ? -INFINITY : scores[i];
            const double low = worst < 0 || isnan(scores[worst]) ? -INFINITY : scores[worst];
            if (!held && (worst < 0 || score < low || (score == low && positions[i] < positions[worst]))) {
                worst = i;
            }
        }
        gone[worst] = true;
    }
}

static void test_selection(void)
{
    double scores[MOST];
    int64_t positions[MOST];
    int32_t order[MOST], work[MOST];
    bool gone[MOST], expected[MOST];
    const int64_t count = 1 + below(MOST);
    for (int64_t i = 0; i < count; i++) { /* slots in a random order of positions */
        order[i] = (int32_t)i;
        scores[i] = below(20) == 0 ? (double)NAN : below(20) == 0 ? (double)INFINITY : (double)below(6);
    }
    for (int64_t i = count - 1; i > 0; i--) {
        const int64_t other = below(i + 1);
        const int32_t slot = order[i];
        order[i] = order[other];
        order[other] = slot;
    }
    for (int64_t rank = 0, position = 0; rank < count; rank++) {
        position += 1 + below(3);
        positions[order[rank]] = position;
    }
    const sa_guard guard = {below(10), 3 * count - below(20)};
    int64_t free_tokens = 0;
    for (int64_t i = 0; i < count; i++) {
        free_tokens += positions[i] >= guard.pinned && positions[i] < guard.recent_from;
    }
    const int64_t leaving = below(free_tokens + 1);
    sa_select(scores, positions, order, count, guard, leaving, work, gone);
    plainly(scores, positions, count, guard, leaving, expected);
    for (int64_t i = 0; i < count; i++) {
        EXPECT(gone[i] == expected[i]);
    }
}

static void test_budget(void)
{
    const sa_budget fixed = {10, 0.0, 4}, share = {3, 0.5, 1};
    EXPECT(sa_held_at(&fixed, 0) == 0 && sa_held_at(&fixed, 7) == 7 && sa_held_at(&fixed, 12) == 10);
    EXPECT(sa_held_at(&fixed, 15) == 13 && sa_held_at(&fixed, 16) == 10 && sa_slots_until(&fixed, INT64_MAX) == 13);
    EXPECT(sa_held_at(&share, 2) == 2 && sa_held_at(&share, 5) == 3 && sa_held_at(&share, 7) == 4 && sa_slots_until(&share, 100) == 50);
    int64_t before = 0;
    for (int64_t length = 0; length < 200; length++) { /* never more than one comes, never more than there is room for */
        EXPECT(sa_held_at(&fixed, length) <= before + 1 && sa_held_at(&fixed, length) <= sa_slots_until(&fixed, length));
        before = sa_held_at(&fixed, length);
    }
}

static void test_ledger(void)
{
    sa_ledger ledger = {0};
    sa_departure log[3];
    for (int64_t i = 0; i < 5; i++) {
        sa_ledger_add(&ledger, log, 3, (sa_departure){i, 10 + i, i == 4 ? (double)NAN : ldexp(1.0, (int)i)});
    }
    EXPECT(ledger.evicted == 5 && ledger.logged == 5 && ledger.mass == 15.0 && ledger.largest == 8.0);
    EXPECT(log[0].position == 3 && log[1].position == 4 && log[2].position == 2);
    EXPECT(sa_ledger_bin(1.0) == 48 && sa_ledger_bin(1.99) == 48 && sa_ledger_bin(0.0) == 0 && sa_ledger_bin(-1.0) == 0);
    EXPECT(sa_ledger_bin(1e300) == SA_LEDGER_BINS - 1 && sa_ledger_bin((double)INFINITY) == SA_LEDGER_BINS - 1 && sa_ledger_bin(1e-300) == 0);
    sa_ledger_add(&ledger, NULL, 0, (sa_departure){9, 20, 1.0});
    EXPECT(ledger.evicted == 6 && ledger.logged == 5 && ledger.histogram[48] == 2);
}

int main(void)
{
    for (int i = 0; i < 20000; i++) {
        test_selection();
    }
    test_budget();
    test_ledger();
    return 0;
}
