/* attend_backward: parse -> view -> check -> allocate -> release the GIL -> run -> a dict of what was given. */
#include "array.h"
#include "bind_params.h"

enum { DOUT = SA_ATTEND_ARGUMENTS, OUT, LSE, DLSE, DETERMINISTIC, ARGUMENTS };

enum { MAX_GRADIENTS = 8 };

/* Results so far: owned references, under the names of the arguments. */
typedef struct gradients {
    sa_like like;
    const char *name[MAX_GRADIENTS];
    PyObject *object[MAX_GRADIENTS];
    int count;
} gradients;

static int parse(sa_call *call, PyObject *const *arguments, sa_attend_backward_params *params, sa_like *like)
{
    if (sa_parse_attend(call, arguments, Py_None, &params->attend, like) < 0 ||
        sa_view_given(call, "dout", arguments[DOUT], &params->output_gradient) < 0 ||
        sa_view_given(call, "out", arguments[OUT], &params->output) < 0 || sa_view_given(call, "lse", arguments[LSE], &params->lse) < 0 ||
        (arguments[DLSE] != Py_None && sa_view_given(call, "dlse", arguments[DLSE], &params->lse_gradient) < 0)) {
        return -1;
    }
    return sa_parse_bool(call, "deterministic", arguments[DETERMINISTIC], &params->deterministic);
}

/* A dense array under `name`; false with an exception. An empty one may have no memory. */
static bool add(sa_call *call, gradients *results, const char *name, sa_dtype dtype, int rank, const int64_t *shape, void **data)
{
    PyObject *object = sa_new_result(call, &results->like, dtype, rank, shape, data);
    if (object == NULL) {
        return false;
    }
    results->name[results->count] = name;
    results->object[results->count++] = object;
    return true;
}

static bool add_like(sa_call *call, gradients *results, const char *name, const sa_tensor *tensor, void **data)
{
    return add(call, results, name, tensor->dtype, tensor->rank, tensor->shape, data);
}

static bool add_floats(sa_call *call, gradients *results, const char *name, const sa_floats *floats, float **data)
{
    void *made = NULL;
    const bool added = add(call, results, name, SA_F32, floats->rank, floats->shape, &made);
    *data = made;
    return added;
}

static int make_results(sa_call *call, sa_attend_backward_params *params, gradients *results)
{
    const sa_attend_params *given = &params->attend;
    const bool made =
        add_like(call, results, "q", &given->query, &params->query_gradient) &&
        add_like(call, results, "k", &given->key, &params->key_gradient) &&
        add_like(call, results, "v", &given->value, &params->value_gradient) &&
        (given->sink_logits.data == NULL || add_floats(call, results, "sink_logits", &given->sink_logits, &params->sink_logits_gradient)) &&
        (given->sink_bias.data == NULL || add_floats(call, results, "sink_bias", &given->sink_bias, &params->sink_bias_gradient)) &&
        (given->sink_query.rank == 0 || add_like(call, results, "sink_q", &given->sink_query, &params->sink_query_gradient)) &&
        (given->sink_key.rank == 0 || (add_like(call, results, "sink_kv", &given->sink_key, &params->sink_key_gradient) &&
                                       add_like(call, results, NULL, &given->sink_value, &params->sink_value_gradient)));
    return made ? 0 : -1;
}

static int run(sa_call *call, const sa_attend_backward_params *params, const sa_like *like)
{
    if (params->attend.on_cuda) {
        return sa_run_backward_on_cuda(call, params, like);
    }
    sa_released released;
    sa_release(&released);
    const sa_status status = sa_attend_backward(params, released.poll);
    sa_reacquire(&released);
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

/* As the caller's own kind; sink_kv, the last, is a pair. */
static PyObject *take_results(sa_call *call, gradients *results)
{
    PyObject *answer = PyDict_New();
    for (int i = 0; i < results->count && answer != NULL; i++) {
        results->object[i] = sa_finish_result(call, &results->like, results->object[i]);
        if (results->object[i] == NULL) {
            Py_CLEAR(answer);
        }
    }
    for (int i = 0; i < results->count && answer != NULL; i++) {
        const bool pair = i + 1 < results->count && results->name[i + 1] == NULL;
        PyObject *object = pair ? PyTuple_Pack(2, results->object[i], results->object[i + 1]) : Py_NewRef(results->object[i]);
        if (object == NULL || PyDict_SetItemString(answer, results->name[i], object) < 0) {
            Py_CLEAR(answer);
        }
        Py_XDECREF(object);
        i += pair;
    }
    return answer;
}

static PyObject *attend_backward(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    sa_call call = {.module = sa_module_of(module), .function = "attend_backward"};
    sa_attend_backward_params params = {.attend = {.function = "attend_backward", .mass_queries = -1}};
    gradients results = {0};
    PyObject *answer = NULL;
    if (count != ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "_core.attend_backward takes %d arguments, got %zd", ARGUMENTS, count);
        return NULL;
    }
    if (parse(&call, arguments, &params, &results.like) < 0) {
        goto end;
    }
    const sa_status status = sa_attend_backward_check(&params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    if (make_results(&call, &params, &results) < 0 || run(&call, &params, &results.like) < 0) {
        goto end;
    }
    answer = take_results(&call, &results);
end:
    for (int i = 0; i < results.count; i++) {
        Py_XDECREF(results.object[i]);
    }
    sa_call_end(&call);
    return answer;
}

PyMethodDef sa_backward_methods[] = {
    {"attend_backward", (PyCFunction)(void (*)(void))attend_backward, METH_FASTCALL, "sinkattn.attend_backward; dout, out, lse .. come last."},
    {0},
};
