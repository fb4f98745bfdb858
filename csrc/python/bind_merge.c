/* merge: parse -> dense copies -> check -> allocate -> release the GIL -> run -> convert. */
#include <string.h>

#include "device.h"

/* One part, copied dense: it outlives the array that it came from. */
typedef struct part {
    sa_tensor out, lse;
} part;

typedef struct part_list {
    part *parts;
    const void **outs;  /* [count] dense [rows, depth] */
    const float **lses; /* [count] dense [rows] */
    int64_t count, rows, depth;
} part_list;

static void free_parts(part_list *list)
{
    for (int64_t i = 0; list->parts != NULL && i < list->count; i++) {
        PyMem_Free(list->parts[i].out.data);
        PyMem_Free(list->parts[i].lse.data);
    }
    PyMem_Free(list->parts);
    PyMem_Free((void *)list->outs);
    PyMem_Free((void *)list->lses);
}

static int make_parts(part_list *list, Py_ssize_t count)
{
    list->parts = PyMem_Calloc((size_t)count, sizeof *list->parts);
    list->outs = PyMem_Calloc((size_t)count, sizeof *list->outs);
    list->lses = PyMem_Calloc((size_t)count, sizeof *list->lses);
    list->count = count;
    if (list->parts == NULL || list->outs == NULL || list->lses == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* Points the tensor at a dense copy of its elements. */
static int make_dense(sa_tensor *tensor)
{
    const int64_t size = sa_dtype_size(tensor->dtype);
    int64_t count = 1;
    for (int axis = 0; axis < tensor->rank; axis++) {
        if (__builtin_mul_overflow(count, tensor->shape[axis], &count) || count > PY_SSIZE_T_MAX / size) {
            count = -1;
            break;
        }
    }
    char *memory = count >= 0 ? PyMem_Malloc((size_t)(count > 0 ? count * size : 1)) : NULL;
    if (memory == NULL) {
        tensor->data = NULL;
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t offset = 0, rest = i;
        for (int axis = tensor->rank - 1; axis >= 0; axis--) {
            offset += rest % tensor->shape[axis] * tensor->stride[axis];
            rest /= tensor->shape[axis];
        }
        memcpy(memory + i * size, (const char *)tensor->data + offset * size, (size_t)size);
    }
    tensor->data = memory;
    return 0;
}

static int view_dense(sa_call *call, const char *name, PyObject *object, sa_tensor *tensor, sa_like *like)
{
    sa_tensor view;
    int failed = sa_view(call, name, object, &view, like);
    if (failed == 0 && sa_is_cuda(call->device)) {
        PyErr_Format(PyExc_NotImplementedError, "merge(): %s is on cuda:%d; the backends that have merge are: cpu", name,
                     (int)call->device.device_id);
        failed = -1;
    }
    if (failed == 0) {
        failed = make_dense(&view);
        *tensor = view;
    }
    sa_call_end(call); /* nothing borrowed is left */
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
        part *one = &list->parts[i];
        if (view_dense(call, "outs", PyList_GET_ITEM(outs, i), &one->out, i == 0 ? like : NULL) < 0 ||
            view_dense(call, "lses", PyList_GET_ITEM(lses, i), &one->lse, NULL) < 0 || check_part(list, i) < 0) {
            return -1;
        }
        list->outs[i] = one->out.data;
        list->lses[i] = one->lse.data;
    }
    list->rows = 1;
    for (int axis = 0; axis < list->parts[0].lse.rank; axis++) {
        list->rows *= list->parts[0].lse.shape[axis];
    }
    list->depth = list->parts[0].out.shape[list->parts[0].out.rank - 1];
    return 0;
}

static PyObject *merge(PyObject *module, PyObject *arguments)
{
    sa_call call = {.module = sa_module_of(module), .function = "merge"};
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
    if (lse == NULL) {
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
        sa_merge(list.outs, list.lses, list.count, list.rows, list.depth, first->dtype, out_data, lse_data);
    Py_END_ALLOW_THREADS
    out = sa_finish_result(&call, &like, out);
    lse = sa_finish_result(&call, &like, lse);
    answer = out != NULL && lse != NULL ? PyTuple_Pack(2, out, lse) : NULL;
end:
    Py_XDECREF(out);
    Py_XDECREF(lse);
    free_parts(&list);
    return answer;
}

PyMethodDef sa_merge_methods[] = {
    {"merge", merge, METH_VARARGS, "merge(list of outs, list of lses): the body of sinkattn.merge."},
    {0},
};
