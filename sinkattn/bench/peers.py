"""What a user would write without us: torch's scaled_dot_product_attention, and NumPy."""

import importlib.util

import numpy as np


def load_torch():
    """The module, or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    return torch


def load_bfloat16():
    """ml_dtypes' bfloat16 as a NumPy dtype, or None."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return None
    import ml_dtypes
    return np.dtype(ml_dtypes.bfloat16)


def tensor_of(torch, array):
    """The same memory as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# --- NumPy ----------------------------------------------------------------------------------------

def numpy_softmax(score):
    score -= score.max(-1, keepdims=True)
    np.exp(score, out=score)
    score /= score.sum(-1, keepdims=True)
    return score


def numpy_attention(q, k, v, mask=None):
    """Half types are widened first: NumPy multiplies them one by one."""
    kind = q.dtype
    q, k, v = (x.astype(np.float32, copy=False) for x in (q, k, v))
    score = q @ k.swapaxes(-1, -2)
    score *= np.float32(q.shape[-1] ** -0.5)
    if mask is not None:
        score = np.where(mask, score, np.float32(-np.inf))
    return (numpy_softmax(score) @ v).astype(kind, copy=False)


def numpy_decode(q, k, v):
    """Query heads of a group become rows over their kv head."""
    group = q.shape[1] // k.shape[1]
    folded = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
    return numpy_attention(folded, k, v).reshape(q.shape)


def numpy_stream_step(cell, q, k, v, sinks):
    """cell: [keys, values, steps]. Drops the oldest token behind the pinned ones, appends, attends.
    """
    for i, new in ((0, k), (1, v)):
        held = cell[i]
        cell[i] = np.concatenate([held[:, :, :sinks], held[:, :, sinks + 1:], new], axis=2)
    cell[2] += 1
    return numpy_decode(q, cell[0], cell[1])


# --- torch ----------------------------------------------------------------------------------------

def torch_causal(torch):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v: sdpa(q, k, v, is_causal=True)


def torch_masked(torch):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask)


def torch_backward(torch, q, k, v, dout, mask=None):
    """A call that runs the backward of one recorded SDPA and returns (dq, dk, dv)."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(*leaves, attn_mask=mask, is_causal=mask is None)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def torch_grouped(torch):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v: sdpa(q, k, v, enable_gqa=True)


def torch_folded(torch):
    """Query heads of a group as rows over their kv head: each key is read once for the group."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v):
        return sdpa(q.view(q.shape[0], k.shape[1], -1, q.shape[3]), k, v).view(q.shape)
    return attend


def torch_matmul(torch):
    """The folded form written out."""
    def attend(q, k, v):
        folded = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        weight = torch.softmax(folded @ k.mT * q.shape[-1] ** -0.5, -1)
        return (weight @ v).view(q.shape)
    return attend


DECODE_FORMS = {"SDPA enable_gqa": torch_grouped, "SDPA, group folded": torch_folded,
                "matmul, group folded": torch_matmul}


def torch_stream_step(torch, attend, sinks):
    """cell: [keys, values, steps], as numpy_stream_step."""
    def step(cell, q, k, v):
        for i, new in ((0, k), (1, v)):
            held = cell[i]
            cell[i] = torch.cat([held[:, :, :sinks], held[:, :, sinks + 1:], new], dim=2)
        cell[2] += 1
        return attend(q, cell[0], cell[1])
    return step
