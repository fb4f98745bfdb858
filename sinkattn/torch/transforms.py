"""The operators inside torch.func (grad, vjp, vmap of grad, ...), whose levels know functions of
autograd but no gradients that were registered with an operator."""

import torch

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
        raise NotImplementedError("attend(): a forward-mode derivative was asked for, and there are "
                                  "gradients alone: use torch.func.grad or vjp")


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


def at_work():
    """Not asked by a compiler, which traces through the transformations itself."""
    return (not torch.compiler.is_dynamo_compiling()
            and torch._C._are_functorch_transforms_active())


attend = _Attend.apply
