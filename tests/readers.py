"""Readers that know everything, or nothing."""

import numpy as np

VOCABULARY = 257


class Perfect:
    """Has all it read at hand: the next token is the one that followed the longest earlier run that
    ends like now. With window, it forgets what lies farther back than that."""

    nbytes = 0

    def __init__(self, rows, window=None):
        self.past, self.window = [[] for _ in range(rows)], window

    def read(self, tokens):
        logits = np.zeros((*np.shape(tokens), VOCABULARY))
        for row, (past, new) in enumerate(zip(self.past, np.asarray(tokens).tolist())):
            for column, token in enumerate(new):
                past.append(token)
                logits[row, column, self._next(past[-self.window:] if self.window else past)] = 50
        return logits

    @staticmethod
    def _next(past):
        best, follows = 0, 0
        for end in range(len(past) - 1):
            length = 0
            while length <= end and past[end - length] == past[-1 - length] and length < 40:
                length += 1
            if length > best:
                best, follows = length, past[end + 1]
        return follows

    def copy(self):
        twin = type(self)(0, self.window)
        twin.past = [list(past) for past in self.past]
        return twin


class Amnesiac:
    """Knows the alphabet and nothing else: logits over the letters at random."""

    nbytes = 0

    def __init__(self, rows):
        self.random = np.random.default_rng(rows)

    def read(self, tokens):
        logits = np.full((*np.shape(tokens), VOCABULARY), -50.0)
        logits[..., 97:123] = 1e-3 * self.random.random((*np.shape(tokens), 26))
        return logits

    def copy(self):
        return self
