/* sa_attend, sa_mass: plan, then the chosen table. */
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

sa_status sa_mass(const sa_mass_params *params, sa_poll poll)
{
    sa_attend_params given = params->attend;
    given.lse = (float *)(uintptr_t)params->lse.data; /* read alone */
    sa_plan plan;
    SA_TRY(sa_plan_attend(&given, &plan));
    for (int64_t i = 0; i < plan.problem.row_count && params->row_weights.data != NULL; i++) {
        plan.problem.rows[i].weights = params->row_weights.data + (plan.problem.rows[i].lse - given.lse);
    }
    const sa_status status = sa_table()->mass(&plan.problem, poll);
    sa_plan_end(&plan);
    return status;
}
