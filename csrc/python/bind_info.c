/* Threads, kernel tables, and what show_config() tells. */
#include <string.h>

#include "array.h"

static PyObject *set_num_threads(PyObject *module, PyObject *count)
{
    sa_call call = {.module = sa_module_of(module), .function = "set_num_threads"};
    int64_t threads;
    bool given;
    if (count == Py_None) {
        PyErr_SetString(PyExc_TypeError, "set_num_threads(): count is None, expected an int");
        return NULL;
    }
    if (sa_parse_int(&call, "count", count, &threads, &given) < 0) {
        return NULL;
    }
    if (threads < 1) {
        PyErr_Format(PyExc_ValueError, "set_num_threads(): count is %lld, expected at least 1", (long long)threads);
        return NULL;
    }
    sa_set_threads(threads);
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromLongLong(sa_get_threads());
}

static PyObject *use_cpu_table(PyObject *module, PyObject *name)
{
    (void)module;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
    if (text == NULL) {
        PyErr_Clear();
        PyErr_SetString(PyExc_TypeError, "use_cpu_table(): name is not a string");
        return NULL;
    }
    PyObject *before = PyUnicode_FromString(sa_table_chosen());
    const sa_status status = sa_table_use(text);
    if (status != SA_OK) {
        Py_XDECREF(before);
        sa_raise(status);
        return NULL;
    }
    return before;
}

/* peak(kind, buffer) -> (work per second, table): one trial. */
static PyObject *peak(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    static const char *const kinds[] = {"fma", "bf16_dot", "read"}; /* in the order of sa_peak_kind */
    (void)module;
    const char *text = count == 2 && PyUnicode_Check(arguments[0]) ? PyUnicode_AsUTF8(arguments[0]) : NULL;
    int kind = 0;
    while (text != NULL && kind < 3 && strcmp(text, kinds[kind]) != 0) {
        kind++;
    }
    if (text == NULL || kind == 3) {
        PyErr_SetString(PyExc_ValueError, "peak(): expected kind, 'fma', 'bf16_dot' or 'read', and a buffer or None");
        return NULL;
    }
    Py_buffer view = {0};
    if (arguments[1] != Py_None && PyObject_GetBuffer(arguments[1], &view, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    double rate;
    const char *table;
    sa_released released;
    sa_release(&released);
    const sa_status status = sa_peak((sa_peak_kind)kind, view.buf, view.len, released.poll, &rate, &table);
    sa_reacquire(&released);
    PyBuffer_Release(&view);
    if (status != SA_OK) {
        sa_raise(status);
        return NULL;
    }
    return Py_BuildValue("ds", rate, table);
}

static int put(PyObject *dictionary, const char *key, PyObject *value)
{
    const int failed = value == NULL || PyDict_SetItemString(dictionary, key, value) < 0;
    Py_XDECREF(value);
    return failed ? -1 : 0;
}

static PyObject *tables(void)
{
    PyObject *all = PyDict_New();
    for (int i = 0; all != NULL && i < sa_table_count(); i++) {
        const char *state = sa_table_usable(i) ? "usable" : sa_table_built(i) ? "built, but this processor lacks it" : "not built";
        if (put(all, sa_table_name(i), PyUnicode_FromString(state)) < 0) {
            Py_CLEAR(all);
        }
    }
    return all;
}

static PyObject *paths(void)
{
    PyObject *all = PyDict_New();
    for (int i = 0; all != NULL && i < sa_path_count(); i++) {
        if (put(all, sa_path_name(i), PyLong_FromLongLong(sa_path_calls(i))) < 0) {
            Py_CLEAR(all);
        }
    }
    return all;
}

static PyObject *config(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *all = PyDict_New();
    if (all == NULL || put(all, "compiler", PyUnicode_FromString(__VERSION__)) < 0 || put(all, "cpu_tables", tables()) < 0 ||
        put(all, "cpu_table", PyUnicode_FromString(sa_table_chosen())) < 0 ||
        put(all, "cpu_table_reason", PyUnicode_FromString(sa_table_reason())) < 0 ||
        put(all, "cpu_features", PyUnicode_FromString(sa_cpu_features())) < 0 ||
        put(all, "threads", PyLong_FromLongLong(sa_get_threads())) < 0 || put(all, "rows_by_path", paths()) < 0) {
        Py_XDECREF(all);
        return NULL;
    }
    return all;
}

PyMethodDef sa_info_methods[] = {
    {"set_num_threads", set_num_threads, METH_O, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"use_cpu_table", use_cpu_table, METH_O, "Switches the kernel table; returns the name of the one before."},
    {"peak", (PyCFunction)(void (*)(void))peak, METH_FASTCALL, "One trial of what the machine can do at most."},
    {"config", config, METH_NOARGS, NULL},
    {0},
};
