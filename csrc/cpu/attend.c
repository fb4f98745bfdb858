/* sa_attend: plan, then the chosen table. */
#include "../core/plan.h"
#include "table.h"

sa_status sa_attend(const sa_attend_params *params, sa_poll poll)
{
    sa_plan plan;
    SA_TRY(sa_plan_attend(params, &plan));
    const sa_status status = sa_table()->attend(&plan.problem, poll);
    sa_plan_end(&plan);
    return status;
}
