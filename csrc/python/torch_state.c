/* What torch knows of a tensor, and of the thread, beside the memory. */
#include "raw.h"

/* An attribute of a module that is imported already; NULL without an exception where there is none. */
static PyObject *attribute_of(const char *module_name, const char *name)
{
    PyObject *module = PyDict_GetItemString(PyImport_GetModuleDict(), module_name);
    PyObject *value = module != NULL ? PyObject_GetAttrString(module, name) : NULL;
    PyErr_Clear();
    return value;
}

static bool is_true(PyObject *names, const char *name)
{
    PyObject *value = names != NULL ? PyDict_GetItemString(names, name) : NULL;
    return value == Py_True;
}

/* Autocast, a dispatch mode (tracing, counting, checkpointing by rule) or forward-mode derivatives are at work, which no tensor tells of: 1, and
 * the call goes to the operator. Looked up once: a call has 0.2 us for all of this. */
static int must_be_seen(sa_call *call)
{
    sa_module *module = call->module;
    if (!call->has_operator || call->watched) {
        return 0;
    }
    call->watched = true;
    if (module->autocast == NULL) {
        module->autocast = attribute_of("torch._C", "_is_any_autocast_enabled");
        module->modes = attribute_of("torch.utils._python_dispatch", "__dict__");
        module->forward = attribute_of("torch.autograd.forward_ad", "__dict__");
    }
    PyObject *answer = module->autocast != NULL ? PyObject_CallNoArgs(module->autocast) : Py_NewRef(Py_False);
    PyObject *level = module->forward != NULL ? PyDict_GetItemString(module->forward, "_current_level") : NULL;
    if (answer == NULL) {
        return -1;
    }
    call->to_operator = answer == Py_True || is_true(module->modes, "_is_in_torch_dispatch_mode") ||
                        (level != NULL && PyLong_Check(level) && PyLong_AsLong(level) >= 0);
    Py_DECREF(answer);
    if (call->to_operator) {
        PyErr_SetNone(PyExc_NotImplementedError); /* nobody sees it */
    }
    return call->to_operator ? 1 : 0;
}

static int grad_mode(void)
{
    PyObject *torch = PyDict_GetItemString(PyImport_GetModuleDict(), "torch");
    PyObject *answer = torch != NULL ? PyObject_CallMethod(torch, "is_grad_enabled", NULL) : Py_NewRef(Py_True);
    const int enabled = answer != NULL ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return enabled;
}

int sa_refuse_lost_state(sa_call *call, const char *name, PyObject *object)
{
    PyObject *flag;
    const int found = sa_optional_attribute(object, call->module->grad_name, &flag);
    if (found <= 0) {
        return found;
    }
    const int tracked = call->below_autograd ? 0 : PyObject_IsTrue(flag);
    Py_DECREF(flag);
    const int enabled = tracked > 0 ? grad_mode() : 0;
    if (tracked < 0 || enabled < 0) {
        return -1;
    }
    if (enabled && call->has_operator) {
        call->to_operator = true;
        PyErr_SetNone(PyExc_NotImplementedError); /* nobody sees it */
        return -1;
    }
    if (enabled) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s(): %s requires grad, and this function has no gradients: call under torch.no_grad(), or pass %s.detach()",
                     call->function, name, name);
        return -1;
    }
    if (must_be_seen(call) != 0) {
        return -1;
    }
    flag = PyObject_CallMethodNoArgs(object, call->module->negated_name);
    if (flag == NULL && !PyErr_ExceptionMatches(PyExc_AttributeError)) {
        return -1;
    }
    PyErr_Clear(); /* no such method: nothing is negated */
    const bool negated = flag == Py_True;
    Py_XDECREF(flag);
    if (negated) {
        PyErr_Format(PyExc_ValueError, "%s(): %s is a negated view, expected plain memory: pass %s.resolve_neg()", call->function, name,
                     name);
        return -1;
    }
    return 1;
}
