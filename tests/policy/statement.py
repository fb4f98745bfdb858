"""Each policy's rule in plain NumPy, keyed by position, and a cache of unbounded memory that obeys
it: what sinkattn.KVCache is tested against.

A rule sees one kv head of one row, part by part: `scores(positions, mass, keys, values)` with the
tokens held and the new ones in ascending order, and the weights of each new query.
"""

import numpy as np

from sinkattn import reference


class Rule:
    """Remembers by position; `memory(p)` starts empty."""

    def __init__(self, policy, row=0, head=0):
        self.policy, self.row, self.head, self.seen, self.store = policy, row, head, 0, {}

    def scores(self, positions, mass, keys, values):
        mass = mass.astype(np.float64)
        fresh = len(mass)
        self.seen += fresh
        for i, position in enumerate(positions[len(positions) - fresh:]):
            self.store[int(position)] = self.meet(keys[len(positions) - fresh + i],
                                                  values[len(positions) - fresh + i])
        for i, row in enumerate(mass):
            query = self.seen - fresh + i
            self.observe(query, [int(p) for p in positions], row, int((positions <= query).sum()))
        return np.array(self.judge([int(p) for p in positions], mass, keys), dtype=np.float64)

    def meet(self, key, value):
        return 0.0

    def queries(self, queries, positions, model):
        pass

    def observe(self, query, positions, weights, visible):
        pass


class SinkWindow(Rule):
    def judge(self, positions, mass, keys):
        return positions


class Summed(Rule):
    def observe(self, query, positions, weights, visible):
        self.own = {p: self.store[p] for p in positions}
        for p, w in zip(positions, weights):
            self.store[p] += w


class H2O(Summed):
    def judge(self, positions, mass, keys):
        return [self.store[p] for p in positions]


class H2ONorm(Summed):
    def judge(self, positions, mass, keys):
        return [self.store[p] / (self.seen - p) for p in positions]


class H2OEMA(Rule):
    def observe(self, query, positions, weights, visible):
        for p, w in zip(positions, weights):
            self.store[p] = self.policy.lam * self.store[p] + w

    def judge(self, positions, mass, keys):
        return [self.store[p] for p in positions]


class VLengthH2O(Rule):
    def meet(self, key, value):
        return [0.0, np.sqrt(np.sum(value.astype(np.float64) ** 2))]

    def observe(self, query, positions, weights, visible):
        total = sum(w * self.store[p][1] for p, w in zip(positions, weights))
        for p, w in zip(positions, weights):
            if total > 0:
                self.store[p][0] += w * self.store[p][1] / total

    def judge(self, positions, mass, keys):
        return [self.store[p][0] for p in positions]


class Windowed(Rule):
    """Weights of the last w queries: {query: weight} a token."""

    def meet(self, key, value):
        return {}

    def observe(self, query, positions, weights, visible):
        for p, w in zip(positions, weights):
            self.store[p].pop(query - self.policy.w, None)
            self.store[p][query] = self.value(w, visible)


class Scissorhands(Windowed):
    def value(self, weight, visible):
        return float(weight * visible >= 1)

    def judge(self, positions, mass, keys):
        return [sum(self.store[p].values()) for p in positions]


class SnapKV(Windowed):
    def value(self, weight, visible):
        return weight

    def judge(self, positions, mass, keys):
        w, half = self.policy.w, self.policy.kernel // 2
        judged = [p for p in positions if p < self.seen - w]
        mean = [sum(self.store[p].values()) / w for p in judged]
        pooled = []
        for i in range(len(judged)):
            near = mean[max(i - half, 0):i + half + 1]
            pooled.append(max(near) if self.policy.pool == "max"
                          else sum(near) / self.policy.kernel)
        return pooled + [np.inf] * (len(positions) - len(judged))


class TOVA(Rule):
    """With one kv head: the mean over its group is that over all heads."""

    def judge(self, positions, mass, keys):
        return mass[-1]


class KeyDiff(Rule):
    def judge(self, positions, mass, keys):
        keys = keys.astype(np.float64)
        length = np.sqrt((keys ** 2).sum(axis=1))
        unit = keys / np.where(length > 0, length, 1)[:, None]
        mean = unit.mean(axis=0)
        return -(unit @ mean) / max(np.sqrt((mean ** 2).sum()), 1e-300)


class KNorm(Rule):
    def judge(self, positions, mass, keys):
        return -np.sqrt((keys.astype(np.float64) ** 2).sum(axis=1))


class CUR(Rule):
    def meet(self, key, value):
        """One square after the other: 3 of 1 and 1 of 3 are a tie that rounding decides."""
        return np.array([sum(float(y) ** 2 for y in x) for x in (key, value)])

    def judge(self, positions, mass, keys):
        squares, win = np.array([self.store[p] for p in positions]), self.policy.win
        scores = []
        for first in range(0, len(positions), win):
            total = squares[first:first + win].sum(axis=0)
            share = squares[first:first + win] / np.where(total > 0, total, 1)
            scores += list(share[:, 0] * share[:, 1])
        return scores


class ExpectedAttention(Rule):
    """The mean turn is a mean over turns, one by one, and the covariance is turned."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.past = []

    def meet(self, key, value):
        return np.sqrt(np.sum(value.astype(np.float64) ** 2))

    def queries(self, queries, positions, model):
        rope = model.rope
        for heads, p in zip(queries.swapaxes(0, 1).astype(np.float64), positions):
            if rope is not None and rope.applied:
                heads = reference.rotate(heads, np.full(len(heads), -p), rope, scaled=False)
            self.past += list(heads) if p >= model.bounds[0]["sinks"] else []
        self.turn = np.eye(queries.shape[2])
        if rope is not None:
            ahead = self.policy.n_future
            self.turn = np.mean([reference.rotate(self.turn, np.full(len(self.turn), model.length + o),
                                                  rope, scaled=not rope.applied)
                                 for o in range(ahead)], axis=0).T

    def judge(self, positions, mass, keys):
        past = np.array(self.past).reshape(-1, keys.shape[1])
        mean = self.turn @ (past.mean(axis=0) if len(past) else np.zeros(keys.shape[1]))
        spread = np.cov(past.T, bias=True) if len(past) else np.zeros(self.turn.shape)
        depth, keys = keys.shape[1], keys.astype(np.float64)
        around = np.einsum("nd,de,ne->n", keys, self.turn @ spread @ self.turn.T, keys)
        x = keys @ mean / np.sqrt(depth) + around / (2 * depth)
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum() * [self.store[p] for p in positions]


class Random(Rule):
    def judge(self, positions, mass, keys):
        stream = _mix(_mix(self.policy.seed + self.row) + self.head)
        return [(_mix(stream + p) >> 11) * 2.0**-53 for p in positions]


def _mix(x):
    """splitmix64, of Steele, Lea and Flood."""
    bits = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & bits
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & bits
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & bits
    return x ^ x >> 31


def rule_of(policy, row=0, head=0):
    return globals()[type(policy).__name__](policy, row, head)


def held_at(budget, every, length, least=1):
    """Tokens held once `length` were seen: evicted at the multiples of `every`."""
    last = length - length % every
    at_last = budget if isinstance(budget, int) else max(least, int(np.ceil(budget * last)))
    return min(last, at_last) + length - last


def leaving(positions, scores, length, *, budget, every, sinks, recent, least=1):
    """Positions that leave: the lowest scores, the older of equals first."""
    count = len(positions) - held_at(budget, every, length, least)
    last = length - length % every
    free = [(score, p) for p, score in zip(positions, scores) if sinks <= p < last - recent]
    return {p for _, p in sorted(free)[:max(count, 0)]}


class Model:
    """sinkattn.KVCache by its definition, in float64, for one row. One rule a kv head."""

    def __init__(self, kv_heads, policy, *, budget, sinks, recent, every=1, chunk=128, rope=None,
                 positions="original", row=0):
        recent = max(recent, policy.protects)
        self.rope, self.place, self.chunk, self.length = rope, positions, chunk, 0
        self.bounds = [dict(budget=b, every=every, sinks=sinks, recent=recent,
                            least=max(sinks + recent, 1))
                       for b in (budget if isinstance(budget, list) else [budget] * kv_heads)]
        self.rules = [rule_of(policy, row, head) for head in range(kv_heads)]
        self.tokens = [{} for _ in range(kv_heads)]      # position -> (key as it came, value)

    def kept(self):
        return [sorted(held) for held in self.tokens]

    def attend(self, q, k, v, **keywords):
        """q [heads_q, tokens, depth], k and v [heads_kv, tokens, ...] -> out, lse."""
        outs = [self._part(q[:, i:i + self.chunk], k[:, i:i + self.chunk], v[:, i:i + self.chunk],
                           **keywords) for i in range(0, max(q.shape[1], 1), self.chunk)]
        return tuple(np.concatenate(x, axis=1) for x in zip(*outs))

    def _part(self, q, k, v, sink_logits=None, sink_bias=None, sink_kv=None, scale=None,
              softcap=None, alibi_slopes=None):
        group, new = q.shape[0] // k.shape[0], np.arange(self.length, self.length + q.shape[1])
        heads = reference._heads(1, q.shape[0], k.shape[0], q.shape[2], v.shape[2], causal=True,
                                 window=None, sinks=self.bounds[0]["sinks"], sink_bias=sink_bias,
                                 sink_logits=sink_logits, sink_kv=sink_kv, scale=scale,
                                 softcap=softcap, alibi_slopes=alibi_slopes)[0]
        self.length += q.shape[1]
        for g, rule in enumerate(self.rules):
            rule.queries(q[g * group:(g + 1) * group], new, self)
        outs, lses, seen = [], [], []
        for g, held in enumerate(self.tokens):
            for i, p in enumerate(new):
                held[int(p)] = (k[g, i].astype(np.float64), v[g, i].astype(np.float64))
            positions = np.array(sorted(held), dtype=np.int64)
            stand = np.arange(len(positions)) if self.place == "slot" else positions
            first = len(positions) - len(new)
            keys = np.array([held[p][0] for p in positions]).reshape(-1, k.shape[2])
            values = np.array([held[p][1] for p in positions]).reshape(-1, v.shape[2])
            turned = self._turn(keys, stand)
            mean = 0.0
            for h in range(g * group, (g + 1) * group):
                out, lse, weights = _head(self._turn(q[h], stand[first:]), turned, values, heads[h],
                                          stand[first:], stand, positions)
                outs.append(out)
                lses.append(lse)
                mean = mean + weights / group
            seen.append((positions, mean, turned if self.place == "original" else keys, values))
        self._evict(seen)
        return np.array(outs), np.array(lses)

    def _turn(self, x, positions):
        if self.rope is None or self.rope.applied:
            return x.astype(np.float64)
        return reference.rotate(x, positions, self.rope)

    def _evict(self, seen):
        for g, (positions, mean, keys, values) in enumerate(seen):
            if not len(mean):
                continue
            if isinstance(self.rules[g], TOVA):
                mean = np.mean([m for _, m, _, _ in seen], axis=0)
            scores = self.rules[g].scores(positions, mean, keys, values)
            for p in leaving(positions, scores, self.length, **self.bounds[g]):
                del self.tokens[g][int(p)]


def _head(q, k, v, head, stand_q, stand_k, positions):
    """One query head against tokens that stand where they are said to."""
    visible = stand_k[None, :] <= stand_q[:, None]
    scores = reference._score(q, k, head) - head.slope * np.abs(stand_q[:, None] - stand_k)
    for column, p in enumerate(positions):
        if p < len(head.bias) and p < head.sinks:
            scores[:, column] += head.bias[p]
    scores[~visible] = -np.inf
    extra = reference._score(q, head.extra_k, head)
    logits = np.broadcast_to(head.logits, (len(q), len(head.logits)))
    lse = reference._log_sum_exp(np.concatenate([scores, extra, logits], axis=1))
    base = np.where(lse == -np.inf, 0.0, lse)[:, None]
    weights = np.exp(scores - base)
    return weights @ v + np.exp(extra - base) @ head.extra_v, lse, weights
