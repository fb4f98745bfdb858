"""Every place that words an error, against the messages that tests have checked.

    SINKATTN_ERROR_LOG=FILE pytest; python tests/error_sites.py FILE

A site is a format of sa_fail, PyErr_Format or PyErr_SetString in csrc, a name that a check is called
with there, or a raise statement of the package. Prints the sites whose message no test has matched,
and fails if there are any.
"""

import ast
import re
import sys
from pathlib import Path

from on_device import has_cuda

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ("cache.py", "config.py", "functional.py", "kv_cache.py", "policy.py", "rope.py", *[f"torch/{path.name}" for path in
           sorted((ROOT / "sinkattn/torch").glob("*.py"))])  # commands speak to a person instead
STRING = r'"((?:[^"\\]|\\.)*)"'
FORMAT = rf"((?:{STRING}|PRI\w64|\s)+)"
NEEDS_GPU = ("csrc/cuda/", "csrc/python/bind_cuda_", "csrc/python/cuda_object.c", "csrc/python/device.c")
SILENT = {"interrupted": "Python's own KeyboardInterrupt is raised in its place: test_interrupt.py",
          "has a loop for this kind": "met by the bench's tests where the processor has no bf16 dot product",
          "too many arrays in one call": "two for each argument are fewer than there is room for",
          "__cuda_array_interface__": "says that there is no such attribute, to whoever asks for it"}


def pattern_of(form):
    """A printf format as a regular expression."""
    parts = re.split(r"%[-.0-9]*(?:ll|l|z)?[a-zA-Z]", form)
    return ".*".join(re.escape(part) for part in parts)


def joined(text):
    """Neighbouring C strings, with PRId64 between them, as one format."""
    parts = (match[1] if match[1] is not None else "lld"
             for match in re.finditer(rf"{STRING}|PRI\w64", text))
    return "".join(parts).replace('\\"', '"')


def sites_of_c():
    for path in sorted((ROOT / "csrc").rglob("*.[ch]")):
        text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), path.read_text(), flags=re.S)
        where = lambda match, text=text, path=path: f"{path.relative_to(ROOT)}:{text[:match.start()].count(chr(10)) + 1}"  # noqa: E731
        for match in re.finditer(rf"\b(?:sa_fail|PyErr_Format|PyErr_SetString)\(\s*\w+,\s*{FORMAT}[,)]", text):
            yield where(match), pattern_of(joined(match[1]))
        for match in re.finditer(rf'\bcheck_\w+\((?:params->)?function, {STRING}', text):
            yield where(match), rf"\(\): {re.escape(match[1])} |\(\): the (?:last axis|strides) of {re.escape(match[1])} "
        for match in re.finditer(rf"\bsa_no_memory\({STRING}", text):
            yield where(match), pattern_of(f"out of memory: %lld bytes for {match[1]}")


def sites_of_python():
    for name in PACKAGE:
        path = ROOT / "sinkattn" / name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = node.exc.args[0]
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                pattern = "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*"
                                  for part in parts)
                yield f"sinkattn/{name}:{node.lineno}", pattern


def main(log):
    seen = sorted(set(Path(log).read_text().splitlines()))
    sites = [(where, pattern) for where, pattern in [*sites_of_c(), *sites_of_python()]
             if not any(pattern.endswith(re.escape(text)) for text in SILENT)
             and (has_cuda() or not where.startswith(NEEDS_GPU))]
    missed = [(where, pattern) for where, pattern in sites
              if not any(re.search(pattern, message) for message in seen)]
    for where, pattern in missed:
        print(f"  {where}: no test has matched  {pattern}")
    print(f"error sites: {len(sites) - len(missed)} of {len(sites)} reached by a test that checks the message")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
