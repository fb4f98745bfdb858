"""Recall against distance: what a method still knows of a line it has read.

A line `NAME = '<16 random letters>'` is planted in held-out text and asked for again d bytes
later: NAME = ' is repeated and the 16 letters are predicted. A method that still holds the first
line needs few bits; one that does not cannot do better than chance, log2 26 = 4.70 bits a letter,
and does worse if it is sure of something else.
"""

import math

import numpy as np

from .methods import Dense, Streaming, stream_rows

LETTERS = 16
CHANCE = math.log2(26)
NAMES = (
    "COLOUR_OF_COAT SHOE_BOX garden_gnome LIGHTHOUSE tea_kettle HARBOUR_FOG violin_bow PEPPER_JAR "
    "snowy_owl MARBLE_ARCH copper_pan WINTER_BOOTS plum_jam ATTIC_STAIRS rowing_oar LEMON_TREE"
).split()


def place(text, distance, plants, at, generator):
    """Rows of text in which the letters of a planted line come again `distance` bytes later.

    Returns uint8 [plants, at + 16]: the letters stand at [at - distance, ...) and at [at, ...).
    """
    length = at + LETTERS
    starts = generator.integers(0, max(len(text) - length, 1), plants)
    rows = np.take(text, starts[:, None] + np.arange(length), mode="wrap")
    for index, row in enumerate(rows):
        head = f"\n{NAMES[index % len(NAMES)]} = '".encode()
        letters = generator.integers(ord("a"), ord("z") + 1, LETTERS).astype(np.uint8).tobytes()
        for position, tail in ((at - distance, b"'\n"), (at, b"")):
            line = head + letters + tail
            first = position - len(head)
            row[first : first + len(line)] = np.frombuffer(line, dtype=np.uint8)
    return rows


def shortest_distance():
    """Below this the two lines of the longest name would touch."""
    return max(map(len, NAMES)) + len("\n = ''\n") + LETTERS + 8


def distances(slots):
    """Where to ask, inside the window of `slots` tokens and beyond it."""
    shares = (0.2, 0.4, 0.6, 0.8, 0.94, 1.06, 1.25, 1.6, 2.5)
    return sorted({max(round(slots * share), shortest_distance()) for share in shares})


def ask(model, make_attention, rows, workers, progress=None):
    """Mean bits a letter of each row, float64 [plants], reading the rows as a batch of streams."""
    cost, _ = stream_rows(model, make_attention, rows, workers, progress)
    return cost[:, -LETTERS:].mean(axis=1, dtype=np.float64)


def letters_at(distance, slots):
    """The byte at which the asked letters begin: late enough that a ring has evicted by then."""
    return max(distance + 48, slots + 48)


def work(config, slots, plants):
    """Bytes that `measure` reads, for the progress bar."""
    lengths = [letters_at(distance, slots) + LETTERS for distance in distances(slots)]
    return plants * (sum(lengths) + sum(n for n in lengths if n <= config.context))


def measure(model, text, sinks, slots, plants, seed, workers, progress=None):
    """Recall of sinks + window at every distance, and of dense attention where the whole row fits
    into the trained length.

    Returns a list of dicts: distance, method, bits_per_letter, half_width_95, plants, in_window.
    """
    found = []
    for distance in distances(slots):
        generator = np.random.default_rng([seed, distance])
        rows = place(text, distance, plants, letters_at(distance, slots), generator)
        length = rows.shape[1]
        methods = {"sinks + window": lambda n: Streaming(model.config, n, sinks, slots)}
        if length <= model.config.context:
            methods["dense"] = lambda n, length=length: Dense(model.config, n, length)
        for method, make_attention in methods.items():
            cost = ask(model, make_attention, rows, workers, progress)
            found.append({
                "distance": distance, "method": method, "in_window": distance < slots - sinks,
                "bits_per_letter": float(cost.mean()), "plants": plants,
                "half_width_95": float(1.96 * cost.std(ddof=1) / math.sqrt(plants)),
            })
    return found
