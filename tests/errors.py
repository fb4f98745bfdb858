"""Messages that a test has checked, for tests/error_sites.py: one a line into $SINKATTN_ERROR_LOG."""

import functools
import os

import pytest

LOG = os.environ.get("SINKATTN_ERROR_LOG")


def record(message):
    if LOG:
        with open(LOG, "a") as file:
            file.write(str(message).replace("\n", " ") + "\n")


def watch():
    """From here on pytest.raises(..., match=...) records what it matched."""
    plain = pytest.raises

    @functools.wraps(plain)
    def raises(*arguments, **keywords):
        context = plain(*arguments, **keywords)
        if keywords.get("match") is None or not hasattr(context, "__exit__"):
            return context
        return _Recorded(context)

    pytest.raises = raises


class _Recorded:
    def __init__(self, context):
        self.context = context

    def __enter__(self):
        self.info = self.context.__enter__()
        return self.info

    def __exit__(self, *exception):
        expected = self.context.__exit__(*exception)
        if expected:
            record(self.info.value)
        return expected
