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
        return batching.attend(info, axes, *arguments, call=_Attend.apply)

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
_DEFAULTS = tuple(schema.bind(schema.attend, ()).values())


def _tracked(arguments):
    if not torch.is_grad_enabled():
        return False
    if arguments[0].requires_grad or arguments[1].requires_grad or arguments[2].requires_grad:
        return True
    for tensor in arguments[_FIRST_SINK:_FIRST_SINK + _SINKS]:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def attend(arguments):
    """The operator, by the way that what is at work needs.

    Its registered gradient would do outside torch.func, at 120 us a call where the function takes
    35; and operators drop the tangents of dual tensors without a word, which functions refuse.
    """
    if torch.compiler.is_dynamo_compiling():  # which traces through transformations itself
        return schema.attend(*arguments)
    if (_tracked(arguments) or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0):
        device = arguments[0].device.type
        if torch.is_autocast_enabled(device):  # which an operator meets above its gradient
            arguments = forward.cast(device, arguments)
        return _Attend.apply(*arguments)
    given = len(arguments)
    while arguments[given - 1] is _DEFAULTS[given - 1]:  # each that is passed costs 0.1 us
        given -= 1
    return schema.attend(*arguments[:given])
