"""What a caller passes -> what a schema takes, refused by name where it cannot be.

`name` is how a message begins: "attend(): scale".
"""

import operator

import numpy as np
import torch

_DEVICES = ("cpu", "cuda", "meta")


def check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a torch tensor: "
                        f"gradients and compilation need all of q, k and v to be tensors")
    if value.device.type not in _DEVICES:
        raise NotImplementedError(f"{name} is on {value.device}; the backends are: cpu, "
                                  f"cuda")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} is sparse ({value.layout}), expected dense memory")


def window(name, value):
    """A number, or one for each head."""
    if value is None or type(value) is int:
        return value, None
    if isinstance(value, (torch.Tensor, np.ndarray, list, tuple)):
        return None, array(name, value)
    return integer(name, value), None


def pair(name, value):
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is {type(value).__name__}, expected a pair (k_s, v_s)")
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries, expected 2: (k_s, v_s)")
    return tuple(array(f"{name}[{i}]", x) for i, x in enumerate(value))


def array(name, value):
    """Numbers of the host become a tensor there, which a call carries to a device, waiting for
    nothing."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name} is bool, expected real numbers")
    return torch.as_tensor(value)


def integer(name, value):
    if value is None or type(value) in (int, torch.SymInt):
        return value
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is bool, expected an int")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {type(value).__name__}, expected an int") from None


def number(name, value):
    if value is None or type(value) is float:
        return value
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise NotImplementedError(
            f"{name} requires grad, and it has no gradient: pass a float")
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {type(value).__name__}, expected a number")
    return float(value)


def truth(name, value):
    if value is True or value is False:
        return value
    if isinstance(value, (int, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} is {type(value).__name__}, expected a bool")


def reduction(name, value):
    if value != "sum" and value != "max":
        raise ValueError(f"{name} is {value!r}, expected 'sum' or 'max'")
    return value


def written(name, out, result, q):
    """Into the caller's tensor, of the dtype of q also where autocast cast q. No gradient can
    follow it there."""
    check_tensor(name, out)
    if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise NotImplementedError(f"{name} cannot be given where a tensor requires grad: leave it "
                                  f"out, or call under torch.no_grad()")
    if (out.shape != result.shape or out.dtype not in (q.dtype, result.dtype)
            or out.device != result.device):
        raise ValueError(f"{name} is {out.dtype} {list(out.shape)} on {out.device}, expected "
                         f"{result.dtype} {list(result.shape)} on {result.device}")
    out.copy_(result)
    return out


def chosen(first, lse, mass, return_lse, return_mass):
    """What was asked for."""
    if return_lse:
        return (first, lse, mass) if return_mass else (first, lse)
    return (first, mass) if return_mass else first
