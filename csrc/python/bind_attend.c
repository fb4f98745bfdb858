/* attend and merge: parse -> view -> check -> allocate -> release the GIL -> run -> convert. */
#include <string.h>

#include "array.h"
#include "bind_params.h"

enum {
    Q, K, V, CAUSAL, WINDOW, SINKS, SINK_LOGITS, SINK_BIAS, SINK_Q, SINK_KV, SCALE, SOFTCAP, ALIBI_SLOPES, STARTS, LENGTHS, Q_LENGTHS,
    CU_SEQLENS_Q, CU_SEQLENS_K, OUT, RETURN_LSE, RETURN_MASS, MASS_REDUCE, MASS_QUERIES, ARGUMENTS
};

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
    const int causal = PyObject_IsTrue(arguments[CAUSAL]);
    params->causal = causal > 0;
    if (arguments[WINDOW] != Py_None && PyBool_Check(arguments[WINDOW])) {
        PyErr_SetString(PyExc_TypeError, "attend(): window is bool, expected an int, an int array [heads_q] or None");
        return -1;
    }
    if (causal < 0 || sa_parse_int(call, "sinks", arguments[SINKS], &params->pinned, &given) < 0 ||
        sa_cast_ints(call, "window", arguments[WINDOW], &params->window) < 0) {
        return -1;
    }
    return parse_mass(call, arguments, params);
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

static int parse(sa_call *call, PyObject *const *arguments, sa_attend_params *params, sa_like *like)
{
    const sa_score_arguments scores = {arguments[SINK_LOGITS], arguments[SINK_BIAS], arguments[SINK_KV],
                                       arguments[SCALE],       arguments[SOFTCAP],   arguments[ALIBI_SLOPES]};
    if (sa_parse_tensors(call, arguments[Q], arguments[K], arguments[V], arguments[OUT], params, like) < 0 ||
        parse_numbers(call, arguments, params) < 0 || sa_parse_scores(call, &scores, params) < 0) {
        return -1;
    }
    if (arguments[SINK_Q] != Py_None && sa_view(call, "sink_q", arguments[SINK_Q], &params->sink_query, NULL) < 0) {
        return -1;
    }
    return parse_lengths(call, arguments, params);
}

static PyObject *attend(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    sa_call call = {.module = sa_module_of(module), .function = "attend"};
    sa_attend_params params = {.function = "attend"};
    sa_results results = {0};
    PyObject *answer = NULL;
    if (count != ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "_core.attend takes %d arguments, got %zd", ARGUMENTS, count);
        return NULL;
    }
    const int return_lse = PyObject_IsTrue(arguments[RETURN_LSE]), return_mass = PyObject_IsTrue(arguments[RETURN_MASS]);
    if (return_lse < 0 || return_mass < 0 || parse(&call, arguments, &params, &results.like) < 0) {
        goto end;
    }
    sa_status status = sa_attend_check(&params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    const int64_t kv_length = params.key.shape[2];
    if (sa_make_results(&call, &params, arguments[OUT], return_lse, return_mass, kv_length, &results) < 0) {
        goto end;
    }
    sa_released released;
    sa_release(&released);
    status = sa_attend(&params, released.poll);
    sa_reacquire(&released);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    answer = sa_take_results(&call, &results);
end:
    sa_drop_results(&results);
    sa_call_end(&call);
    return answer;
}

/* --- merge ------------------------------------------------------------------------------------------------------------------------ */

enum { MAX_PARTS = 12 }; /* two held objects each; more are joined pairwise by the Python face */

typedef struct part_list {
    sa_tensor outs[MAX_PARTS], lses[MAX_PARTS];
    const void *out_data[MAX_PARTS];
    const float *lse_data[MAX_PARTS];
    int64_t count, rows, depth;
} part_list;

static const void *dense_copy(sa_call *call, const sa_tensor *tensor)
{
    int64_t count = 1;
    for (int axis = 0; axis < tensor->rank; axis++) {
        count *= tensor->shape[axis];
    }
    const int64_t size = sa_dtype_size(tensor->dtype);
    char *memory = call->memory_count < SA_MAX_HELD ? PyMem_Malloc((size_t)(count > 0 ? count * size : 1)) : NULL;
    if (memory == NULL) {
        return PyErr_NoMemory();
    }
    call->memory[call->memory_count++] = memory;
    for (int64_t i = 0; i < count; i++) {
        int64_t offset = 0, rest = i;
        for (int axis = tensor->rank - 1; axis >= 0; axis--) {
            offset += rest % tensor->shape[axis] * tensor->stride[axis];
            rest /= tensor->shape[axis];
        }
        memcpy(memory + i * size, (const char *)tensor->data + offset * size, (size_t)size);
    }
    return memory;
}

static int check_part(const part_list *parts, int64_t i)
{
    const sa_tensor *out = &parts->outs[i], *lse = &parts->lses[i], *first = &parts->outs[0];
    if (out->dtype != first->dtype || lse->dtype != SA_F32) {
        PyErr_Format(PyExc_TypeError, "merge(): part %lld has outs of %s and lses of %s, expected %s (as outs[0]) and float32", (long long)i,
                     sa_dtype_name(out->dtype), sa_dtype_name(lse->dtype), sa_dtype_name(first->dtype));
        return -1;
    }
    const size_t bytes = (size_t)first->rank * sizeof first->shape[0];
    if (first->rank < 1 || out->rank != first->rank || memcmp(out->shape, first->shape, bytes) != 0) {
        PyErr_Format(PyExc_ValueError, "merge(): outs[%lld] differs in shape from outs[0]", (long long)i);
        return -1;
    }
    if (lse->rank != first->rank - 1 || memcmp(lse->shape, first->shape, bytes - sizeof first->shape[0]) != 0) {
        PyErr_Format(PyExc_ValueError, "merge(): lses[%lld] has another shape than outs[0] without its last axis", (long long)i);
        return -1;
    }
    if (out->shape[out->rank - 1] < 1 || out->shape[out->rank - 1] > 256) {
        PyErr_Format(PyExc_ValueError, "merge(): outs[%lld] has a last axis of %lld, expected 1 to 256", (long long)i,
                     (long long)out->shape[out->rank - 1]);
        return -1;
    }
    return 0;
}

static int parse_parts(sa_call *call, PyObject *outs, PyObject *lses, part_list *parts, sa_like *like)
{
    parts->count = PySequence_Fast_GET_SIZE(outs);
    if (parts->count < 1 || parts->count > MAX_PARTS || PySequence_Fast_GET_SIZE(lses) != parts->count) {
        PyErr_Format(PyExc_ValueError, "merge(): %zd outs and %zd lses, expected as many of each, and at least one",
                     PySequence_Fast_GET_SIZE(outs), PySequence_Fast_GET_SIZE(lses));
        return -1;
    }
    for (int64_t i = 0; i < parts->count; i++) {
        sa_like other;
        if (sa_view(call, "outs", PySequence_Fast_GET_ITEM(outs, i), &parts->outs[i], i == 0 ? like : &other) < 0 ||
            sa_view(call, "lses", PySequence_Fast_GET_ITEM(lses, i), &parts->lses[i], NULL) < 0 || check_part(parts, i) < 0 ||
            (parts->out_data[i] = dense_copy(call, &parts->outs[i])) == NULL ||
            (parts->lse_data[i] = dense_copy(call, &parts->lses[i])) == NULL) {
            return -1;
        }
    }
    parts->rows = 1;
    for (int axis = 0; axis < parts->lses[0].rank; axis++) {
        parts->rows *= parts->lses[0].shape[axis];
    }
    parts->depth = parts->outs[0].shape[parts->outs[0].rank - 1];
    return 0;
}

static PyObject *merge(PyObject *module, PyObject *arguments)
{
    sa_call call = {.module = sa_module_of(module), .function = "merge"};
    PyObject *outs, *lses, *out = NULL, *lse = NULL, *answer = NULL;
    part_list parts = {0};
    sa_like like;
    void *out_data, *lse_data;
    if (!PyArg_ParseTuple(arguments, "O!O!", &PyList_Type, &outs, &PyList_Type, &lses) ||
        parse_parts(&call, outs, lses, &parts, &like) < 0) {
        goto end;
    }
    const sa_tensor *first = &parts.outs[0];
    out = sa_new_result(&call, &like, first->dtype, first->rank, first->shape, &out_data);
    lse = out != NULL ? sa_new_result(&call, &like, SA_F32, first->rank - 1, first->shape, &lse_data) : NULL;
    if (lse == NULL) {
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    sa_merge(parts.out_data, parts.lse_data, parts.count, parts.rows, parts.depth, first->dtype, out_data, lse_data);
    Py_END_ALLOW_THREADS
    out = sa_finish_result(&call, &like, out);
    lse = sa_finish_result(&call, &like, lse);
    answer = out != NULL && lse != NULL ? PyTuple_Pack(2, out, lse) : NULL;
end:
    Py_XDECREF(out);
    Py_XDECREF(lse);
    sa_call_end(&call);
    return answer;
}

PyMethodDef sa_attend_methods[] = {
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, "Positional form of sinkattn.attend."},
    {"merge", merge, METH_VARARGS, "merge(list of outs, list of lses): the body of sinkattn.merge, up to 12 parts."},
    {0},
};
