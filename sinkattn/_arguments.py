"""What the commands' options share."""

import argparse


def at_least(least):
    """A type for argparse: an int that is not below `least`."""
    def number(word):
        value = int(word)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {value}")
        return value

    number.__name__ = "int"
    return number
