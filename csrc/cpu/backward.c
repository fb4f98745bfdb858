/* sa_attend_backward: plan, then the chosen table, then the sums over rows. */
#include "../core/plan.h"
#include "table.h"

sa_status sa_attend_backward(const sa_attend_backward_params *params, sa_poll poll)
{
    sa_backward_plan plan;
    SA_TRY(sa_plan_backward(params, &plan));
    const sa_status status = sa_table()->attend_backward(&plan.backward, poll);
    if (status == SA_OK) {
        sa_finish_backward(params, &plan);
    }
    sa_plan_backward_end(&plan);
    return status;
}
