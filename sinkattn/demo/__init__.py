"""python -m sinkattn demo: a small language model reads real text far past its trained length.

NumPy and `sinkattn` alone; the model and the held-out text lie in `data/`. See `main`.
"""


def main(argv=None):
    """Runs the demo with the command line `argv` (a list of str); returns the exit status."""
    from .cli import main as run

    return run(argv)
