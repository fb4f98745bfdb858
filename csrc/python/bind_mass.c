/* mass: the per-key mass for attention that was computed elsewhere. */
#include <string.h>

#include "array.h"
#include "bind_params.h"

enum { LSE = SA_ATTEND_ARGUMENTS, ROW_WEIGHTS, REDUCE, QUERIES, ARGUMENTS };

static int parse_reduce(sa_call *call, PyObject *const *arguments, sa_attend_params *params)
{
    bool given;
    if (sa_parse_int(call, "queries", arguments[QUERIES], &params->mass_queries, &given) < 0) {
        return -1;
    }
    if (given && params->mass_queries < 0) {
        PyErr_Format(PyExc_ValueError, "mass(): queries is %lld, expected at least 0", (long long)params->mass_queries);
        return -1;
    }
    const char *reduce = PyUnicode_Check(arguments[REDUCE]) ? PyUnicode_AsUTF8(arguments[REDUCE]) : NULL;
    if (reduce == NULL || (strcmp(reduce, "sum") != 0 && strcmp(reduce, "max") != 0)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "mass(): reduce is %R, expected 'sum' or 'max'", arguments[REDUCE]);
        return -1;
    }
    params->mass_reduce = reduce[0] == 's' ? SA_MASS_SUM : SA_MASS_MAX;
    return 0;
}

static int parse(sa_call *call, PyObject *const *arguments, sa_mass_params *params, sa_like *like)
{
    if (sa_parse_attend(call, arguments, Py_None, &params->attend, like) < 0) {
        return -1;
    }
    if (arguments[LSE] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "mass(): lse is None, expected an array [batch, heads_q, query_length]");
        return -1;
    }
    return sa_cast_floats(call, "lse", arguments[LSE], &params->lse) < 0 ||
                   sa_cast_floats(call, "row_weights", arguments[ROW_WEIGHTS], &params->row_weights) < 0
               ? -1
               : parse_reduce(call, arguments, &params->attend);
}

static int run(sa_call *call, const sa_mass_params *params, const sa_like *like)
{
    if (params->attend.on_cuda) {
        return sa_run_mass_on_cuda(call, params, like);
    }
    sa_released released;
    sa_release(&released);
    const sa_status status = sa_mass(params, released.poll);
    sa_reacquire(&released);
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

static PyObject *mass(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    sa_call call = {.module = sa_module_of(module), .function = "mass"};
    sa_mass_params params = {.attend = {.function = "mass", .mass_queries = -1}};
    sa_like like = {0};
    PyObject *answer = NULL;
    if (count != ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "_core.mass takes %d arguments, got %zd", ARGUMENTS, count);
        return NULL;
    }
    if (parse(&call, arguments, &params, &like) < 0) {
        goto end;
    }
    const sa_status status = sa_mass_check(&params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    void *data;
    answer = sa_new_result(&call, &like, SA_F32, 3, params.attend.key.shape, &data);
    params.attend.mass = data;
    if (answer == NULL || run(&call, &params, &like) < 0) {
        Py_CLEAR(answer);
    } else {
        answer = sa_finish_result(&call, &like, answer);
    }
end:
    sa_call_end(&call);
    return answer;
}

PyMethodDef sa_mass_methods[] = {
    {"mass", (PyCFunction)(void (*)(void))mass, METH_FASTCALL, "sinkattn.mass: k twice; lse, row_weights, reduce and queries come last."},
    {0},
};
