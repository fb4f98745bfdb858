"""Recall against distance: what a model with its cache still knows of a text it has read."""

import math

import numpy as np

from .parts import at_least, bits_of, in_parts, read
from .records import Estimate, Recall, RecallPoint, TwoQuestions


def recall(model, plants, *, chunk=16, second=None, workers=None, progress=None):
    """Asks for every plant at its distance, and for another one after that.

    model : called with a number of rows, returns a `Reader` with `copy`.
    plants : `Plants` of `plant`.
    chunk : int, tokens in one call of the reader; a cache that evicts between calls has no question
        in sight while it reads the text.
    second : bool, ask the next plant too once the first question was answered, and, to compare,
        after plain text of the same length. Default: where a row has two plants or more.
    Answers are teacher-forced: each token is predicted from the right ones before it. Returns
    `Recall`; the rows are the independent samples of its intervals.
    """
    chunk = at_least("recall(): chunk", chunk, 1)
    several = plants.prompts.shape[1] > 1
    second = several if second is None else second
    if second and not several:
        raise ValueError("recall(): second is True, expected False where rows have one plant")
    found = in_parts(workers, len(plants.context), lambda part: _ask_all(
        model, plants.rows(part), chunk, second, progress))
    merged = {kind: np.concatenate([part[kind] for part in found]) for kind in found[0]}
    far, each = plants.distances + plants.step, plants.answers.shape[2]
    chance = len(set(plants.alphabet.tolist()))
    return Recall(
        first=_points(plants.distances, merged["first"], each),
        second=_points(far, merged["second"], each) if second else [],
        alone=_points(far, merged["alone"], each) if second else [],
        chance=1 / chance, chance_bits=math.log2(chance),
    )


def _ask_all(model, plants, chunk, second, progress):
    """{"first", "second", "alone": float64 [rows, plants, 2]}, accuracy and bits of each answer;
    [:, k] is about plant k."""
    count = plants.prompts.shape[1]
    shape = (len(plants.context), count, 2)
    found = {"first": np.zeros(shape), "second": np.zeros(shape), "alone": np.zeros(shape)}
    reader = model(shape[0])
    read(reader, plants.context, chunk, progress)
    if second:
        aside = reader.copy()
        read(aside, plants.filler, chunk, progress)
    for index in range(count):
        asked = reader.copy()
        found["first"][:, index] = _ask(asked, plants, index, chunk, progress)
        if second:
            other = (index + 1) % count
            read(asked, _closing(plants, index), chunk, progress)
            found["second"][:, other] = _ask(asked, plants, other, chunk, progress)
            found["alone"][:, other] = _ask(aside.copy(), plants, other, chunk, progress)
    return found


def _closing(plants, index):
    """The answer's last token, which was predicted but not read, and the tail."""
    tail = np.broadcast_to(plants.tail, (len(plants.context), plants.tail.size))
    return np.concatenate([plants.answers[:, index, -1:], tail], axis=1)


def _ask(reader, plants, index, chunk, progress):
    """Reads the prompt and all but the last token of the answer; -> [rows, 2] accuracy and bits."""
    logits = read(reader, plants.prompts[:, index], chunk, progress)[:, -1:]
    return _answer(reader, logits, plants.answers[:, index], chunk, progress)


def _answer(reader, logits, answer, chunk, progress):
    if answer.shape[1] > 1:
        rest = read(reader, answer[:, :-1], chunk, progress)
        logits = np.concatenate([logits, rest], axis=1)
    right = (logits.argmax(axis=-1) == answer).mean(axis=1)
    return np.stack([right, bits_of(logits, answer).mean(axis=1)], axis=1)


def _points(distances, found, each):
    """Estimates over all rows, by distance: int [rows, k], float64 [rows, k, 2]; each: tokens of an
    answer."""
    points = []
    for distance in np.unique(distances):
        at = found[distances == distance]
        points.append(RecallPoint(int(distance), Estimate.of_shares(at[:, 0], each),
                                  Estimate.of(at[:, 1])))
    return points


def two_questions(model, plants, *, among=None, chunk=16, workers=None, progress=None):
    """A cache that shrinks with a question in sight, and what it then knows of anything else.

    The text and the first question's prompt are read in one call, so that a cache which scores by
    the newest queries and evicts after the call has seen the question; it then answers, and is
    asked for another plant. To compare, the same other plant is asked where plain text stood in the
    first question's place. A cache that never sees more than its budget (`SinkCache`) shrinks while
    it reads.

    among : ints, the plants of a row that are asked for, in the order of `plants.distances`;
        default all. Row r is asked for the r-th of them first, going round, and then for the next.
    Returns `TwoQuestions` (accuracies). ValueError where there are fewer than two plants.
    """
    chunk = at_least("two_questions(): chunk", chunk, 1)
    rows, count, width = plants.prompts.shape
    among = np.arange(count) if among is None else np.asarray(among)
    if among.ndim != 1 or among.dtype.kind not in "iu" or len(set(among.tolist())) < 2 \
            or among.min() < 0 or among.max() >= count:
        raise ValueError(f"two_questions(): among is {among.tolist()}, expected two or more of the "
                         f"row's plants, 0 to {count - 1}")
    turn = np.arange(rows)
    first, other = among[turn % len(among)], among[(turn + 1) % len(among)]

    def run(part):
        own, row = plants.rows(part), np.arange(part.stop - part.start)
        asked, then = first[part], other[part]
        prompt, answer = own.prompts[row, asked], own.answers[row, asked]
        next_prompt, next_answer = own.prompts[row, then], own.answers[row, then]
        tail = np.broadcast_to(own.tail, (len(row), own.tail.size))

        def then_ask(reader, between):
            logits = read(reader, np.concatenate([between, next_prompt], axis=1), chunk, progress)
            return _answer(reader, logits[:, -1:], next_answer, chunk, progress)[:, 0]

        reader = model(len(row))
        seen = read(reader, np.concatenate([own.context, prompt], axis=1), None, progress)
        right = _answer(reader, seen[:, -1:], answer, chunk, progress)[:, 0]
        second = then_ask(reader, np.concatenate([answer[:, -1:], tail], axis=1))
        reader = model(len(row))
        read(reader, np.concatenate([own.context, own.filler[:, :width]], axis=1), None, progress)
        return right, second, then_ask(reader, own.filler[:, width:])

    found = [np.concatenate(parts) for parts in zip(*in_parts(workers, rows, run))]
    estimates = [Estimate.of_shares(shares, plants.answers.shape[2]) for shares in found]
    return TwoQuestions(*estimates, chance=1 / len(set(plants.alphabet.tolist())))


def work(plants, second=True, questions=True):
    """Tokens that `recall` and `two_questions` read, for a progress bar."""
    rows, count, width = plants.prompts.shape
    length, step = plants.context.shape[1], plants.step
    asked = width + plants.answers.shape[2] - 1
    total = length + count * asked
    if second:
        total += step + count * (2 * asked + 1 + plants.tail.size)
    if questions:
        total += 2 * (length + step + asked)
    return rows * total
