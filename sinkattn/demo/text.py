"""The held-out text, and the check that no 64-byte run of it was trained on."""

import pathlib

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"
HELD_OUT = DATA / "peewee-4.5.3.txt"
HELD_OUT_LICENCE = DATA / "peewee-4.5.3.LICENSE"
RUN = 64
_FILTER_BITS = 25


def held_out_text(path=None):
    """The text to stream as (bytes, name). Default: the shipped one, a module under the MIT
    licence by Charles Leifer (licence beside it)."""
    path = pathlib.Path(path) if path else HELD_OUT
    content = path.read_bytes()
    if len(content) < 2:
        raise ValueError(f"{path}: expected at least 2 bytes of text, got {len(content)}")
    return content, path.name


def hash_runs(text):
    """A 64-bit hash of every run of 64 bytes: text uint8 [n] -> uint64 [n - 63].

    Six doublings: the hash of 2 n bytes is a mix of the hashes of its halves.
    """
    hashes = (np.asarray(text).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    half = 1
    while half < RUN:
        hashes = hashes[:-half] * np.uint64(0xD6E8FEB86659FD93 + 2 * half) + hashes[half:]
        hashes ^= hashes >> np.uint64(29)
        half *= 2
    return hashes


def run_hashes(text):
    """The set of runs to look for, as (filter bool [2^25], sorted hashes)."""
    hashes = np.unique(hash_runs(text))
    table = np.zeros(1 << _FILTER_BITS, dtype=bool)
    table[hashes >> np.uint64(64 - _FILTER_BITS)] = True
    return table, hashes


def shares_run(document, forbidden):
    """Whether `document` (bytes or uint8 [n]) holds, at any offset, a 64-byte run of the text
    behind `forbidden` (from `run_hashes`)."""
    document = np.frombuffer(document, dtype=np.uint8)
    table, hashes = forbidden
    block = 1 << 22
    for first in range(0, max(document.size - RUN + 1, 0), block):
        found = hash_runs(document[first : first + block + RUN - 1])
        found = found[table[found >> np.uint64(64 - _FILTER_BITS)]]
        nearest = np.searchsorted(hashes, found).clip(max=hashes.size - 1)
        if np.any(hashes[nearest] == found):
            return True
    return False
