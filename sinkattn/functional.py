"""attend, its gradients, and merge: the public face of the kernels."""

from sys import modules as _modules

from numpy import ndarray as _ndarray

from sinkattn import _core


def attend(q, k, v, *, causal=True, window=None, sinks=0, sink_logits=None, sink_bias=None,
           sink_q=None, sink_kv=None, scale=None, softcap=None, alibi_slopes=None, starts=None,
           lengths=None, q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, out=None,
           return_lse=False, return_mass=False, mass_reduce="sum", mass_queries=None):
    """Attention over pinned sink tokens and a recent window.

    q : [batch, heads_q, query_length, depth], float32, float16 or bfloat16. NumPy (bfloat16 of
        ml_dtypes), torch, CuPy, JAX, or anything with ``__dlpack__`` or
        ``__cuda_array_interface__``; CPU or CUDA, all tensors on one device. Any strides, but the
        last axis is contiguous; so for k, v, sink_q, sink_kv and out.
    k, v : [batch, heads_kv, kv_length, depth] and [batch, heads_kv, kv_length, depth_v], dtype of
        q. heads_q is a multiple of heads_kv; both depths are 1 to 256. Query i stands at key
        ``i + kv_length - query_length``: the last query at the last key.
    causal : bool. A query sees no key behind its own position.
    window : int, int array [heads_q] (0: none) or None. Keys visible to the left of a query,
        itself included; to both sides if not causal.
    sinks : int. The first `sinks` keys stay visible outside the window ("pinned tokens").
    sink_logits : float, [heads_q] or [heads_q, n]. Logits that enter the denominator only; natural
        log units, neither scaled nor capped. -inf: none. 0: softmax-off-by-one.
    sink_bias : [heads_q, sinks]. Added to the scores of the pinned keys, after scale and softcap.
    sink_q : like q. Used in place of q against the pinned keys (StreamingLLM positions).
    sink_kv : (k_s [heads_kv, n, depth], v_s [heads_kv, n, depth_v]). Learned rows that every query
        sees, outside causality and window.
    scale : float, default ``depth ** -0.5``. softcap : float > 0, ``s = c * tanh(s / c)``.
    alibi_slopes : [heads_q] or [batch, heads_q]. ``s -= slope * distance``.
    starts, lengths, q_lengths : int [batch]. Row b has the keys ``starts_b`` up to
        ``starts_b + lengths_b`` and the first ``q_lengths_b`` queries; the other queries get out 0
        and lse -inf.
    cu_seqlens_q, cu_seqlens_k : int [n + 1]. Packed sequences, end to end on the length axes.
    out : array to write into, of the shape and dtype of the result.
    mass_reduce : "sum" or "max" over the queries. mass_queries : count only the last so many.

    Returns out [batch, heads_q, query_length, depth_v], of the type and dtype of q; with
    return_lse also lse [batch, heads_q, query_length] float32, natural log, the sink logits
    included; with return_mass also mass [batch, heads_kv, kv_length] float32, the softmax weight
    that each key received, mean over the heads of its group.

    On CUDA the work goes to the caller's current stream and nothing waits; values of arrays there
    (lengths and the like) are clamped, not checked, unless SINKATTN_CHECK=1.

    Torch tensors that require grad get their gradients: the call then goes to the operator of
    `sinkattn.torch`, which says more, as it does under torch.compile, autocast and vmap.

    Raises TypeError and ValueError with the argument's name, NotImplementedError for other devices,
    RuntimeError with the driver's text where CUDA fails.

    Method: pinned tokens and window from Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks" (arXiv 2309.17453); sink logits as in the gpt-oss model card; one pass with
    online softmax.

    >>> import numpy as np
    >>> q = k = v = np.ones((1, 2, 8, 16), np.float32)
    >>> attend(q, k, v, window=4, sinks=1).shape
    (1, 2, 8, 16)
    """
    call = _core.attend
    if (type(q) is not _ndarray and "torch" in _modules
            and _modules["torch"].compiler.is_dynamo_compiling()):  # which cannot look into C
        from sinkattn.torch import attend_in_order as call
    return call(q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q, sink_kv, scale,
                softcap, alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k, out,
                return_lse, return_mass, mass_reduce, mass_queries)


def attend_backward(dout, q, k, v, out, lse, *, dlse=None, deterministic=True, causal=True,
                    window=None, sinks=0, sink_logits=None, sink_bias=None, sink_q=None,
                    sink_kv=None, scale=None, softcap=None, alibi_slopes=None, starts=None,
                    lengths=None, q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None):
    """Gradients of `attend`: of sum(dout * out) + sum(dlse * lse).

    dout : [batch, heads_q, query_length, depth_v], dtype of q, last axis contiguous.
    q, k, v and the keywords from causal on : as `attend` was called.
    out, lse : what that call returned with return_lse. lse is float32, any strides; so is dlse.
    deterministic : bool. The same bits in every run; on the CPU always so, for any number of
        threads. False lets CUDA add up dq as its blocks come, which is faster on Hopper.

    Returns a dict of arrays of the kind of q: "q", "k", "v" in their dtype, and of each that was
    given "sink_logits" (float32, the shape given), "sink_bias" (float32 [heads_q, sinks]),
    "sink_q" and "sink_kv" (a pair) in the dtype of q. "q" then has no part that came by sink_q.
    Queries that are not real, and keys that no query sees, get 0. A sink of +inf makes every
    gradient of its head 0; a sink_bias of -inf has gradient 0, and so has its column.

    Nothing of size [query_length, kv_length] is stored: weights are computed again from lse. On the
    CPU partial sums of dq take up to 8 times the float32 size of q (half of it where causal, less
    with a window) while the call runs, on CUDA 8 bytes for each query and head, and the float32
    size of q (at 64 or 128 columns) where not deterministic.

    Raises as `attend` does.

    Method: Dao et al., "FlashAttention" (arXiv 2205.14135), with the sink logit as one more term
    of the denominator.

    >>> import numpy as np
    >>> q = k = v = np.ones((1, 2, 8, 16), np.float32)
    >>> out, lse = attend(q, k, v, sink_logits=0.5, return_lse=True)
    >>> gradients = attend_backward(np.ones_like(out), q, k, v, out, lse, sink_logits=0.5)
    >>> {name: gradient.shape for name, gradient in gradients.items()}
    {'q': (1, 2, 8, 16), 'k': (1, 2, 8, 16), 'v': (1, 2, 8, 16), 'sink_logits': ()}
    """
    return _core.attend_backward(q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q,
                                 sink_kv, scale, softcap, alibi_slopes, starts, lengths, q_lengths,
                                 cu_seqlens_q, cu_seqlens_k, dout, out, lse, dlse, deterministic)


def mass(q, k, lse, *, row_weights=None, reduce="sum", queries=None, causal=True, window=None,
         sinks=0, sink_bias=None, sink_q=None, scale=None, softcap=None, alibi_slopes=None,
         starts=None, lengths=None, q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None):
    """The softmax weight that each key received, beside any attention that returns lse.

    q, k and the keywords from causal on : as of `attend`. Sink logits and learned rows have no
        place here: the lse of the attention has them in it.
    lse : [batch, heads_q, query_length] real numbers, natural log of the whole denominator. A row
        of -inf or +inf gives no key anything.
    row_weights : like lse, optional. Factors of the weights of each query and head: 0 leaves one
        out, lam ** age lets old ones fade.
    reduce : "sum" over the queries, or "max".
    queries : int, optional. Only the last so many real queries of each row or sequence.

    Returns mass [batch, heads_kv, kv_length] float32, of the kind of q: mean over the query heads
    of a group of row_weight * exp(score - lse), reduced over the queries; with "max" at least 0. It
    is what `attend(..., return_mass=True)` gives for its own lse. Nothing of size [query_length,
    kv_length] is stored, and every key has one writer: results do not depend on threads.

    Raises as `attend` does.

    >>> import numpy as np
    >>> q = k = v = np.ones((1, 2, 8, 16), np.float32)
    >>> out, lse = attend(q, k, v, return_lse=True)
    >>> mass(q, k, lse).sum(axis=-1).round(4)
    array([[8., 8.]], dtype=float32)
    """
    return _core.mass(q, k, k, causal, window, sinks, None, sink_bias, sink_q, None, scale, softcap,
                      alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k, lse,
                      row_weights, reduce, queries)


def merge(outs, lses):
    """Joins attention over disjoint sets of keys (split keys, cascades, context parallel).

    outs : sequence of arrays [..., depth_v], of one shape and dtype.
    lses : sequence of arrays [...] float32, natural log, as `attend` returns them. Sink logits
        belong to exactly one of the parts. A part with lse -inf contributes nothing.

    Returns (out, lse) as if all keys had been in one call, of the kind of outs[0].

    >>> import numpy as np
    >>> q, k, v = np.ones((3, 1, 1, 8, 4), np.float32)
    >>> parts = [attend(q, k[:, :, i:i + 4], v[:, :, i:i + 4], causal=False, return_lse=True)
    ...          for i in (0, 4)]
    >>> out, lse = merge(*zip(*parts))
    >>> bool(np.allclose(out, attend(q, k, v, causal=False)))
    True
    """
    return _core.merge(list(outs), list(lses))
