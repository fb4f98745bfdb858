/* merge: parse -> view -> check -> allocate -> release the GIL -> run -> convert. */
#include <string.h>

#include "../cuda/work.h"
#include "device.h"

typedef struct part_list {
    sa_part *parts;
    PyObject *kept; /* what the views have borrowed: there may be more of it than a call holds */
    int64_t count;
} part_list;

static void free_parts(part_list *list)
{
    PyMem_Free(list->parts);
    Py_XDECREF(list->kept);
}

static int make_parts(part_list *list, Py_ssize_t count)
{
    list->count = count;
    list->kept = PyList_New(0);
    list->parts = list->kept != NULL ? PyMem_Calloc((size_t)count, sizeof *list->parts) : NULL;
    if (list->kept != NULL && list->parts == NULL) {
        PyErr_NoMemory();
    }
    return list->parts != NULL ? 0 : -1;
}

static int view_part(sa_call *call, const char *name, PyObject *object, sa_tensor *tensor, sa_like *like, part_list *list)
{
    int failed = sa_view(call, name, object, tensor, like);
    for (int i = 0; i < call->held_count && failed == 0; i++) {
        failed = PyList_Append(list->kept, call->held[i]);
    }
    sa_call_end(call);
    return failed;
}

static int check_part(const part_list *list, int64_t i)
{
    const sa_tensor *out = &list->parts[i].out, *lse = &list->parts[i].lse, *first = &list->parts[0].out;
    if (out->dtype != first->dtype || lse->dtype != SA_F32) {
        PyErr_Format(PyExc_TypeError, "merge(): part %lld has outs of %s and lses of %s, expected %s (as outs[0]) and float32",
                     (long long)i, sa_dtype_name(out->dtype), sa_dtype_name(lse->dtype), sa_dtype_name(first->dtype));
        return -1;
    }
    const size_t bytes = (size_t)first->rank * sizeof first->shape[0];
    if (first->rank < 1 || out->rank != first->rank || memcmp(out->shape, first->shape, bytes) != 0) {
        PyErr_Format(PyExc_ValueError, "merge(): outs[%lld] differs in shape from outs[0], expected [..., depth_v]", (long long)i);
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

static int parse_parts(sa_call *call, PyObject *outs, PyObject *lses, part_list *list, sa_like *like)
{
    const Py_ssize_t count = PyList_GET_SIZE(outs);
    if (count < 1 || PyList_GET_SIZE(lses) != count) {
        PyErr_Format(PyExc_ValueError, "merge(): %zd outs and %zd lses, expected as many of each, and at least one", count,
                     PyList_GET_SIZE(lses));
        return -1;
    }
    if (make_parts(list, count) < 0) {
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        sa_part *one = &list->parts[i];
        if (view_part(call, "outs", PyList_GET_ITEM(outs, i), &one->out, i == 0 ? like : NULL, list) < 0 ||
            view_part(call, "lses", PyList_GET_ITEM(lses, i), &one->lse, NULL, list) < 0 || check_part(list, i) < 0) {
            return -1;
        }
    }
    return 0;
}

static sa_status merge_on_cuda(sa_call *call, const part_list *list, void *out, float *lse, void *memory)
{
    SA_TRY(sa_cuda_merge("merge", call->device.device_id, list->parts, list->count, out, lse, memory, call->stream));
    return sa_settle_streams(call);
}

static int run(sa_call *call, const part_list *list, const sa_like *like, void *out, float *lse)
{
    const bool on_cuda = sa_is_cuda(call->device);
    const int64_t bytes = on_cuda ? sa_cuda_merge_bytes(list->count) : 0;
    sa_status status = SA_OK;
    void *memory = NULL;
    if (bytes > 0 && sa_new_memory(call, like, bytes, &memory) < 0) {
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
        if (on_cuda) {
            status = merge_on_cuda(call, list, out, lse, memory);
        } else {
            sa_merge(list->parts, list->count, out, lse);
        }
    Py_END_ALLOW_THREADS
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

static PyObject *merge(PyObject *module, PyObject *arguments)
{
    sa_call call = {.module = sa_module_of(module), .function = "merge", .device_of = "outs[0]"};
    PyObject *outs, *lses, *out = NULL, *lse = NULL, *answer = NULL;
    part_list list = {0};
    sa_like like;
    void *out_data, *lse_data;
    if (!PyArg_ParseTuple(arguments, "O!O!", &PyList_Type, &outs, &PyList_Type, &lses) ||
        parse_parts(&call, outs, lses, &list, &like) < 0) {
        goto end;
    }
    const sa_tensor *first = &list.parts[0].out;
    out = sa_new_result(&call, &like, first->dtype, first->rank, first->shape, &out_data);
    lse = out != NULL ? sa_new_result(&call, &like, SA_F32, first->rank - 1, first->shape, &lse_data) : NULL;
    if (lse == NULL || run(&call, &list, &like, out_data, lse_data) < 0) {
        goto end;
    }
    out = sa_finish_result(&call, &like, out);
    lse = sa_finish_result(&call, &like, lse);
    answer = out != NULL && lse != NULL ? PyTuple_Pack(2, out, lse) : NULL;
end:
    Py_XDECREF(out);
    Py_XDECREF(lse);
    free_parts(&list);
    sa_call_end(&call);
    return answer;
}

PyMethodDef sa_merge_methods[] = {
    {"merge", merge, METH_VARARGS, "merge(list of outs, list of lses): the body of sinkattn.merge."},
    {0},
};
