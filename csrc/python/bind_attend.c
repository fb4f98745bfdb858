/* attend: parse -> view -> check -> allocate -> release the GIL -> run -> convert. */
#include <string.h>

#include "array.h"
#include "bind_params.h"

/* clang-format off */
enum {
    Q, K, V, CAUSAL, WINDOW, SINKS, SINK_LOGITS, SINK_BIAS, SINK_Q, SINK_KV, SCALE, SOFTCAP, ALIBI_SLOPES, STARTS, LENGTHS, Q_LENGTHS,
    CU_SEQLENS_Q, CU_SEQLENS_K, OUT, RETURN_LSE, RETURN_MASS, MASS_REDUCE, MASS_QUERIES, ARGUMENTS
};
/* clang-format on */
_Static_assert((int)OUT == (int)SA_ATTEND_ARGUMENTS, "sa_parse_attend reads what comes before");

static int parse_mass(sa_call *call, PyObject *const *arguments, sa_attend_params *params)
{
    bool given;
    params->mass_queries = -1;
    if (sa_parse_int(call, "mass_queries", arguments[MASS_QUERIES], &params->mass_queries, &given) < 0) {
        return -1;
    }
    if (given && params->mass_queries < 0) {
        PyErr_Format(PyExc_ValueError, "attend(): mass_queries is %lld, expected at least 0", (long long)params->mass_queries);
        return -1;
    }
    const char *reduce = PyUnicode_Check(arguments[MASS_REDUCE]) ? PyUnicode_AsUTF8(arguments[MASS_REDUCE]) : NULL;
    if (reduce == NULL || (strcmp(reduce, "sum") != 0 && strcmp(reduce, "max") != 0)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "attend(): mass_reduce is %R, expected 'sum' or 'max'", arguments[MASS_REDUCE]);
        return -1;
    }
    params->mass_reduce = reduce[0] == 's' ? SA_MASS_SUM : SA_MASS_MAX;
    return 0;
}

static int parse_numbers(sa_call *call, PyObject *const *arguments, sa_attend_params *params)
{
    bool given;
    if (arguments[WINDOW] != Py_None && PyBool_Check(arguments[WINDOW])) {
        PyErr_Format(PyExc_TypeError, "%s(): window is bool, expected an int, an int array [heads_q] or None", call->function);
        return -1;
    }
    if (sa_parse_bool(call, "causal", arguments[CAUSAL], &params->causal) < 0 ||
        sa_parse_int(call, "sinks", arguments[SINKS], &params->pinned, &given) < 0 ||
        sa_cast_ints(call, "window", arguments[WINDOW], &params->window) < 0) {
        return -1;
    }
    return 0;
}

static int parse_lengths(sa_call *call, PyObject *const *arguments, sa_attend_params *params)
{
    return sa_cast_ints(call, "starts", arguments[STARTS], &params->starts) < 0 ||
                   sa_cast_ints(call, "lengths", arguments[LENGTHS], &params->lengths) < 0 ||
                   sa_cast_ints(call, "q_lengths", arguments[Q_LENGTHS], &params->query_lengths) < 0 ||
                   sa_cast_ints(call, "cu_seqlens_q", arguments[CU_SEQLENS_Q], &params->cumulative_query) < 0 ||
                   sa_cast_ints(call, "cu_seqlens_k", arguments[CU_SEQLENS_K], &params->cumulative_key) < 0
               ? -1
               : 0;
}

int sa_parse_attend(sa_call *call, PyObject *const *arguments, PyObject *out, sa_attend_params *params, sa_like *like)
{
    const sa_score_arguments scores = {arguments[SINK_LOGITS], arguments[SINK_BIAS], arguments[SINK_KV],
                                       arguments[SCALE],       arguments[SOFTCAP],   arguments[ALIBI_SLOPES]};
    if (sa_parse_tensors(call, arguments[Q], arguments[K], arguments[V], out, params, like) < 0 ||
        parse_numbers(call, arguments, params) < 0 || sa_parse_scores(call, &scores, params) < 0) {
        return -1;
    }
    if (arguments[SINK_Q] != Py_None && sa_view_given(call, "sink_q", arguments[SINK_Q], &params->sink_query) < 0) {
        return -1;
    }
    return parse_lengths(call, arguments, params);
}

static int run(sa_call *call, const sa_attend_params *params, const sa_like *like)
{
    if (params->on_cuda) {
        return sa_run_on_cuda(call, params, NULL, like);
    }
    sa_released released;
    sa_release(&released);
    const sa_status status = sa_attend(params, released.poll);
    sa_reacquire(&released);
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

/* The same call through torch, which knows of gradients, of tensors without memory, of transformations. */
static PyObject *through_operator(sa_module *module, PyObject *const *arguments)
{
    PyErr_Clear();
    if (module->operator == NULL) {
        PyObject *package = PyImport_ImportModule("sinkattn.torch");
        module->operator = package != NULL ? PyObject_GetAttrString(package, "attend_in_order") : NULL;
        Py_XDECREF(package);
    }
    return module->operator != NULL ? PyObject_Vectorcall(module->operator, arguments, ARGUMENTS, NULL) : NULL;
}

static PyObject *attend_called(PyObject *module, PyObject *const *arguments, Py_ssize_t count, bool below_autograd)
{
    sa_call call = {
        .module = sa_module_of(module), .function = "attend", .has_operator = !below_autograd, .below_autograd = below_autograd};
    sa_attend_params params = {.function = "attend"};
    sa_results results = {0};
    PyObject *answer = NULL;
    if (count != ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "_core.attend takes %d arguments, got %zd", ARGUMENTS, count);
        return NULL;
    }
    bool return_lse, return_mass;
    if (sa_parse_bool(&call, "return_lse", arguments[RETURN_LSE], &return_lse) < 0 ||
        sa_parse_bool(&call, "return_mass", arguments[RETURN_MASS], &return_mass) < 0 ||
        sa_parse_attend(&call, arguments, arguments[OUT], &params, &results.like) < 0 || parse_mass(&call, arguments, &params) < 0) {
        goto end;
    }
    sa_status status = sa_attend_check(&params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    const int64_t kv_length = params.key.shape[2];
    if (sa_make_results(&call, &params, arguments[OUT], return_lse, return_mass, kv_length, &results) < 0 ||
        run(&call, &params, &results.like) < 0) {
        goto end;
    }
    answer = sa_take_results(&call, &results);
end:
    sa_drop_results(&results);
    sa_call_end(&call);
    return answer == NULL && call.to_operator ? through_operator(call.module, arguments) : answer;
}

static PyObject *attend(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    return attend_called(module, arguments, count, false);
}

static PyObject *attend_below_autograd(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    return attend_called(module, arguments, count, true);
}

PyMethodDef sa_attend_methods[] = {
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, "Positional form of sinkattn.attend."},
    {"attend_below_autograd", (PyCFunction)(void (*)(void))attend_below_autograd, METH_FASTCALL,
     "The same, for torch's operator: requires_grad is not looked at."},
    {0},
};
