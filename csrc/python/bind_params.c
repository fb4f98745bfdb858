#include "bind_params.h"

#include "../cuda/driver.h"
#include "device.h"

int sa_view_given(sa_call *call, const char *name, PyObject *object, sa_tensor *tensor)
{
    if (sa_view(call, name, object, tensor, NULL) < 0) {
        return -1;
    }
    if (tensor->rank == 0) { /* which would mean: not given */
        PyErr_Format(PyExc_ValueError, "%s(): %s has 0 dimensions, expected an array with axes", call->function, name);
        return -1;
    }
    return 0;
}

int sa_parse_tensors(sa_call *call, PyObject *q, PyObject *k, PyObject *v, PyObject *out, sa_attend_params *params, sa_like *like)
{
    if (sa_view(call, "q", q, &params->query, like) < 0 || sa_view(call, "k", k, &params->key, NULL) < 0 ||
        sa_view(call, "v", v, &params->value, NULL) < 0 || (out != Py_None && sa_view_given(call, "out", out, &params->output) < 0)) {
        return -1;
    }
    params->on_cuda = sa_is_cuda(call->device);
    params->device = call->device.device_id;
    const sa_status status = params->on_cuda ? sa_device_check(call->function, params->device) : SA_OK;
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

static int parse_sink_kv(sa_call *call, PyObject *pair, sa_attend_params *params)
{
    if (pair == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(pair) && !PyList_Check(pair)) {
        PyErr_Format(PyExc_TypeError, "%s(): sink_kv is %s, expected a pair (k_s, v_s)", call->function, Py_TYPE(pair)->tp_name);
        return -1;
    }
    if (PySequence_Fast_GET_SIZE(pair) != 2) {
        PyErr_Format(PyExc_ValueError, "%s(): sink_kv has %zd entries, expected 2: (k_s, v_s)", call->function,
                     PySequence_Fast_GET_SIZE(pair));
        return -1;
    }
    PyObject *pair_held = PySequence_Tuple(pair); /* a list may lose its arrays while we run */
    if (pair_held == NULL || sa_hold(call, pair_held) < 0) {
        return -1;
    }
    return sa_view_given(call, "sink_kv[0]", PyTuple_GET_ITEM(pair_held, 0), &params->sink_key) < 0 ||
                   sa_view_given(call, "sink_kv[1]", PyTuple_GET_ITEM(pair_held, 1), &params->sink_value) < 0
               ? -1
               : 0;
}

int sa_parse_scores(sa_call *call, const sa_score_arguments *arguments, sa_attend_params *params)
{
    return sa_cast_floats(call, "sink_logits", arguments->sink_logits, &params->sink_logits) < 0 ||
                   sa_cast_floats(call, "sink_bias", arguments->sink_bias, &params->sink_bias) < 0 ||
                   parse_sink_kv(call, arguments->sink_kv, params) < 0 ||
                   sa_parse_float(call, "scale", arguments->scale, &params->scale, &params->has_scale) < 0 ||
                   sa_parse_float(call, "softcap", arguments->softcap, &params->softcap, &params->has_softcap) < 0 ||
                   sa_cast_floats(call, "alibi_slopes", arguments->alibi_slopes, &params->alibi_slopes) < 0
               ? -1
               : 0;
}

int sa_parse_cache_call(sa_call *call, PyObject *const *arguments, sa_attend_params *params, sa_like *like, bool *return_lse,
                        bool *return_mass)
{
    const sa_score_arguments scores = {arguments[SA_CACHE_SINK_LOGITS], arguments[SA_CACHE_SINK_BIAS], arguments[SA_CACHE_SINK_KV],
                                       arguments[SA_CACHE_SCALE],       arguments[SA_CACHE_SOFTCAP],   arguments[SA_CACHE_ALIBI_SLOPES]};
    return sa_parse_bool(call, "return_lse", arguments[SA_CACHE_RETURN_LSE], return_lse) < 0 ||
                   sa_parse_bool(call, "return_mass", arguments[SA_CACHE_RETURN_MASS], return_mass) < 0 ||
                   sa_parse_tensors(call, arguments[SA_CACHE_Q], arguments[SA_CACHE_K], arguments[SA_CACHE_V], arguments[SA_CACHE_OUT],
                                    params, like) < 0 ||
                   sa_parse_scores(call, &scores, params) < 0 ||
                   sa_cast_ints(call, "new_lengths", arguments[SA_CACHE_NEW_LENGTHS], &params->query_lengths) < 0
               ? -1
               : 0;
}

static void fill_dense(sa_tensor *tensor, void *data, sa_dtype dtype, const int64_t shape[4])
{
    *tensor = (sa_tensor){.data = data, .rank = 4, .dtype = dtype};
    int64_t stride = 1;
    for (int axis = 3; axis >= 0; axis--) {
        tensor->shape[axis] = shape[axis];
        tensor->stride[axis] = stride;
        stride *= shape[axis];
    }
}

int sa_make_results(sa_call *call, sa_attend_params *params, PyObject *out, bool lse, bool mass, int64_t mass_slots, sa_results *results)
{
    const sa_tensor *query = &params->query;
    const int64_t shape[4] = {query->shape[0], query->shape[1], query->shape[2], params->value.shape[3]};
    const int64_t mass_shape[3] = {query->shape[0], params->key.shape[1], mass_slots};
    void *data;
    if (out != Py_None) {
        results->out_given = true;
        results->out = Py_NewRef(out);
    } else {
        results->out = sa_new_result(call, &results->like, query->dtype, 4, shape, &data);
        if (results->out == NULL) {
            return -1;
        }
        fill_dense(&params->output, data, query->dtype, shape);
    }
    if (lse) {
        results->lse = sa_new_result(call, &results->like, SA_F32, 3, shape, &data);
        params->lse = data;
    }
    if (mass && (!lse || results->lse != NULL)) {
        results->mass = sa_new_result(call, &results->like, SA_F32, 3, mass_shape, &data);
        params->mass = data;
    }
    return (lse && results->lse == NULL) || (mass && results->mass == NULL) ? -1 : 0;
}

int sa_parse_rows(PyObject *mask, int64_t batch, const bool **rows)
{
    *rows = PyBytes_Check(mask) ? (const bool *)PyBytes_AS_STRING(mask) : NULL;
    if (mask != Py_None && (*rows == NULL || PyBytes_GET_SIZE(mask) != batch)) {
        PyErr_SetString(PyExc_ValueError, "reset(): expected one flag for each row");
        return -1;
    }
    return 0;
}

int sa_parse_order(sa_call *call, PyObject *index, sa_ints *order)
{
    if (sa_cast_ints(call, "index", index, order) < 0) {
        return -1;
    }
    if (order->data == NULL || order->rank != 1) {
        PyErr_SetString(PyExc_ValueError, "reorder(): index has another rank, expected [batch]");
        return -1;
    }
    return 0;
}

int sa_parse_crop(sa_call *call, PyObject *length, int64_t *tokens)
{
    bool given;
    if (length == Py_None) {
        PyErr_SetString(PyExc_TypeError, "crop(): n is None, expected an int");
        return -1;
    }
    return sa_parse_int(call, "n", length, tokens, &given);
}

PyObject *sa_take_results(sa_call *call, sa_results *results)
{
    if (!results->out_given) {
        results->out = sa_finish_result(call, &results->like, results->out);
    }
    const bool lse = results->lse != NULL, mass = results->mass != NULL;
    results->lse = sa_finish_result(call, &results->like, results->lse);
    results->mass = sa_finish_result(call, &results->like, results->mass);
    if (results->out == NULL || lse != (results->lse != NULL) || mass != (results->mass != NULL)) {
        return NULL;
    }
    if (lse && mass) {
        return PyTuple_Pack(3, results->out, results->lse, results->mass);
    }
    return lse || mass ? PyTuple_Pack(2, results->out, lse ? results->lse : results->mass) : Py_NewRef(results->out);
}

void sa_drop_results(sa_results *results)
{
    Py_CLEAR(results->out);
    Py_CLEAR(results->lse);
    Py_CLEAR(results->mass);
}
