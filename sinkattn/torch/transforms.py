"""The operators as functions of autograd: for torch.func (grad, vjp, vmap of grad, ...), whose
levels know no gradient that was registered with an operator, and for a lighter call."""

import torch
from torch.autograd import forward_ad

from . import backward, batching, forward, schema


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return schema.attend(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        forward.remember(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *grads):
        return forward.backward(ctx, *grads, differentiate=_AttendBackward.apply)

    @staticmethod
    def vmap(info, axes, *arguments):
        return batching.attend(info, axes, *arguments, call=attend)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("attend(): a forward-mode derivative was asked for, and there "
                                  "are gradients alone: use torch.func.grad or vjp")


class _AttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return schema.attend_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        backward.refuse(ctx, *grads)

    @staticmethod
    def vmap(info, axes, *arguments):
        return batching.attend_backward(info, axes, *arguments,
                                        call=_AttendBackward.apply)


_FIRST_SINK, _SINKS = 7, 5  # where sink_logits, sink_bias, sink_q, sink_k, sink_v stand


def _tracked(q, k, v, sinks):
    return torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
        or any(tensor is not None and tensor.requires_grad for tensor in sinks))


def attend(*arguments):
    """The operator, by the way that what is at work needs.

    Its registered gradient would do outside torch.func, at 120 us a call where the function takes
    35; and operators drop the tangents of dual tensors without a word, which functions refuse.
    """
    if torch.compiler.is_dynamo_compiling():  # which traces through transformations itself
        return schema.attend(*arguments)
    if (_tracked(*arguments[:3], arguments[_FIRST_SINK:_FIRST_SINK + _SINKS])
            or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        device = arguments[0].device.type
        if torch.is_autocast_enabled(device):  # which an operator meets above its gradient
            arguments = forward.cast(device, arguments)
        return _Attend.apply(*arguments)
    return schema.attend(*arguments)
