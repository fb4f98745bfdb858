"""attend in plain torch: every score at once, the sinks as columns, the rules as a mask. What a user
would write, differentiable by torch itself; any dtype, so also float64."""

import torch


def positions(q, k, starts, lengths, q_lengths):
    """Query positions [batch, queries], and the first and last + 1 valid key [batch]."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    first = torch.zeros(batch, dtype=torch.long) if starts is None else starts.long()
    last = first.new_full((batch,), keys) if lengths is None else first + lengths.long()
    real = first.new_full((batch,), queries) if q_lengths is None else q_lengths.long()
    return (last - real)[:, None] + torch.arange(queries), first, last, real


def attend(q, k, v, *, causal=True, window=None, sinks=0, sink_logits=None, sink_bias=None,
           sink_q=None, sink_kv=None, scale=None, softcap=None, alibi_slopes=None, starts=None,
           lengths=None, q_lengths=None):
    """out and lse, in the dtype of the accumulation."""
    batch, heads, queries, depth = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    wide = lambda x: x.repeat_interleave(group, -3)  # noqa: E731
    cap = lambda s: s if softcap is None else softcap * torch.tanh(s / softcap)  # noqa: E731
    scale = depth ** -0.5 if scale is None else scale
    p, first, last, real = positions(q, k, starts, lengths, q_lengths)
    j = torch.arange(keys)
    pinned = (j >= first[:, None]) & (j < first[:, None] + sinks)  # [batch, keys]

    scores = q @ wide(k).mT
    if sink_q is not None:
        scores = torch.where(pinned[:, None, None], sink_q @ wide(k).mT, scores)
    scores = cap(scale * scores)
    if sink_bias is not None:
        column = (j - first[:, None]).clamp(0, sinks - 1)  # [batch, keys]
        bias = sink_bias.to(scores.dtype)[:, column].transpose(0, 1)[:, :, None]
        scores = torch.where(pinned[:, None, None], scores + bias, scores)
    distance = p[:, None, :, None] - j
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(batch, heads)[:, :, None, None]
        scores = scores - slopes.to(scores.dtype) * distance.abs()

    width = torch.as_tensor(10**9 if window is None else window).expand(heads)[:, None, None]
    seen = (distance.abs() < torch.where(width == 0, 10**9, width)) | pinned[:, None, None]
    seen = seen & ((j >= first[:, None]) & (j < last[:, None]))[:, None, None]
    if causal:
        seen = seen & (distance >= 0)
    scores = scores.masked_fill(~seen, -torch.inf)

    columns, values = [scores], [wide(v)]
    if sink_kv is not None:
        columns.append(cap(scale * q @ wide(sink_kv[0]).mT))
        values.append(wide(sink_kv[1]).expand(batch, -1, -1, -1))
    if sink_logits is not None:
        logits = sink_logits.to(scores.dtype).reshape(-1 if sink_logits.dim() == 0 else heads, 1, 1
                                                      if sink_logits.dim() < 2 else sink_logits.shape[1])
        columns.append(logits.expand(batch, heads, queries, -1))
    everything = torch.cat(columns, -1)
    none = (everything == -torch.inf).all(-1, keepdim=True)
    everything = everything.masked_fill(none, 0.0)
    weights = torch.softmax(everything, -1).masked_fill(none, 0.0)
    lse = torch.logsumexp(everything, -1).masked_fill(none[..., 0], -torch.inf)
    out = weights[..., :sum(x.shape[2] for x in values)] @ torch.cat(values, 2)
    padding = torch.arange(queries) >= real[:, None]  # [batch, queries]
    return (out.masked_fill(padding[:, None, :, None], 0.0),
            lse.masked_fill(padding[:, None], -torch.inf))
