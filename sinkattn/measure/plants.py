"""Passkeys and key-value pairs, planted in a text at known distances from their questions."""

import dataclasses

import numpy as np

from .parts import at_least

GAP = 4  # tokens of text between the context's end and the first question's head, at least


@dataclasses.dataclass(frozen=True)
class Plants:
    """Texts with planted lines, and the questions to them; token arrays, so for any model.

    context : int [rows, n], read first.
    prompts : int [rows, k, p], what asks for each of the k plants of a row: some text and the
        line's head. answers : int [rows, k, m], what should follow.
    distances : int [rows, k], from the first token of the planted answer to that of the asked one,
        when the prompt follows the context directly.
    filler : int [rows, p + step], plain text: to stand where a first question would.
    tail : int [t], what closes an answer before the next prompt.
    alphabet : int [a], what the answers are drawn from.
    """

    context: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    distances: np.ndarray
    filler: np.ndarray
    tail: np.ndarray
    alphabet: np.ndarray

    @property
    def step(self):
        """How much farther a plant is asked after another question and its answer."""
        return self.filler.shape[1]

    @property
    def reach(self):
        """Tokens of a row up to the end of the last question's answer."""
        again = self.step if self.prompts.shape[1] > 1 else 0
        return self.context.shape[1] + self.prompts.shape[2] + self.answers.shape[2] + again

    def rows(self, part):
        """The same for some of the rows (a slice)."""
        own = {name: getattr(self, name)[part]
               for name in ("context", "prompts", "answers", "distances", "filler")}
        return dataclasses.replace(self, **own)


def default_heads():
    from sinkattn.demo.recall import NAMES

    return [list(f"\n{name} = '".encode()) for name in NAMES]


def plant(text, distances, rows, *, pairs=True, heads=None, alphabet=None, tail=None, answer=16,
          lead=0, start=256, seed=0):
    """Plants lines `head answer tail` in crops of `text`, `distances` tokens before they are asked.

    text : int [n], what the crops are taken from (round its end, if need be).
    distances : ints, one plant each. pairs=True: every row holds all of them (key-value pairs: the
        answer hangs on which head is asked). pairs=False: every row holds one (a passkey), and
        there are `rows` for each distance.
    heads : sequence of token sequences, at least as many different ones as plants in a row;
        alphabet : ints that answers are drawn from; tail : ints. Default: bytes for the shipped
        model, "\\nNAME = '", the letters a to z, "'\\n".
    answer : int, tokens of an answer. start : int or None, opens every row.
    lead : int, tokens of text before the farthest plant: a policy that favours the oldest does well
        on what stands at the very beginning.
    Returns `Plants`. ValueError where plants would overlap or reach into the question.
    """
    distances = sorted(at_least("plant(): distances", d, 1) for d in distances)
    rows, answer = at_least("plant(): rows", rows, 1), at_least("plant(): answer", answer, 1)
    heads = default_heads() if heads is None else [list(head) for head in heads]
    alphabet = np.arange(ord("a"), ord("z") + 1) if alphabet is None else np.asarray(alphabet)
    tail = np.asarray(list(b"'\n") if tail is None else tail, np.int64)
    text = np.asarray(text).astype(np.int64)
    if text.ndim != 1 or text.size == 0:
        raise ValueError(f"plant(): text has shape {list(text.shape)}, expected [1 or more]")
    if alphabet.ndim != 1 or len(set(alphabet.tolist())) < 2:
        raise ValueError("plant(): alphabet is expected to hold 2 or more different tokens")
    wanted = len(distances) if pairs else 1
    if not distances or len({tuple(head) for head in heads}) < wanted or not all(heads):
        raise ValueError(f"plant(): {len(heads)} heads for {wanted} plants in a row; expected at "
                         "least one plant, and as many different heads")
    lead, longest = at_least("plant(): lead", lead, 0), max(map(len, heads))
    _check_room(distances if pairs else distances[:1], longest, answer, tail.size)

    prompt = longest + GAP
    length = distances[-1] + longest - prompt + max(lead, GAP) + (start is not None)
    random = np.random.default_rng(seed)
    groups = [distances] if pairs else [[distance] for distance in distances]
    made = [_rows(text, group, rows, heads, alphabet, tail, answer, start, length, prompt, random)
            for group in groups]
    return Plants(*(np.concatenate(arrays) for arrays in zip(*made)), tail, alphabet)


def _check_room(distances, longest, answer, tail):
    nearest, apart = longest + GAP + answer + tail, longest + answer + tail
    if distances[0] < nearest:
        raise ValueError(f"plant(): distances begin at {distances[0]}, expected {nearest} or more: "
                         "the plant would reach into its question")
    for near, far in zip(distances, distances[1:]):
        if far - near < apart:
            raise ValueError(f"plant(): distances {near} and {far} are {far - near} apart, "
                             f"expected {apart} or more: the plants would overlap")


def _rows(text, distances, rows, heads, alphabet, tail, answer, start, length, prompt, random):
    """The arrays of `Plants` up to filler, for rows that hold one plant at each of `distances`."""
    plants, step = len(distances), prompt + answer + tail.size
    crops = np.take(text, random.integers(0, text.size, (rows, 1)) + np.arange(
        length + plants * prompt + step), mode="wrap")
    context = crops[:, :length]
    prompts = crops[:, length:length + plants * prompt].reshape(rows, plants, prompt)
    filler = crops[:, length + plants * prompt:]
    answers = random.choice(alphabet, (rows, plants, answer)).astype(np.int64)
    if start is not None:
        context[:, 0] = start
    for row in range(rows):
        for index, chosen in enumerate(random.permutation(len(heads))[:plants]):
            head = np.asarray(heads[chosen], np.int64)
            line = np.concatenate([head, answers[row, index], tail])
            begin = length + prompt - distances[index] - head.size
            context[row, begin:begin + line.size] = line
            prompts[row, index, prompt - head.size:] = head
    return (context.copy(), prompts.copy(), answers,
            np.tile(np.asarray(distances, np.int64), (rows, 1)), filler.copy())
