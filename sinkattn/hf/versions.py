"""Which transformers this works with."""

import importlib.metadata

OLDEST, NEXT_MAJOR = (5, 17), 6  # masks by q_length and q_offset; layers cropped by a count
TESTED = ("5.17.0", "5.23.0", "5.24.0")


def require():
    """ImportError unless torch and a transformers of the range are installed."""
    for package in ("torch", "transformers"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"sinkattn.hf needs {package}, which is not installed: "
                              "pip install 'sinkattn[hf]'") from None
    if not supported(found):
        raise ImportError(f"sinkattn.hf: transformers is {found}, expected {OLDEST[0]}.{OLDEST[1]} "
                          f"or later and below {NEXT_MAJOR} (tested with {', '.join(TESTED)})")


def supported(version):
    numbers = [int(part) for part in version.split(".")[:2]]
    return numbers >= list(OLDEST) and numbers[0] < NEXT_MAJOR
