"""python -m sinkattn info | doctor | demo | measure | bench"""

import sys

COMMANDS = {
    "info": "what was built, which kernel table was chosen and why, what is missing",
    "doctor": "a self test against the reference, with a plain verdict",
    "demo": "a small language model streams real text past its trained length",
    "measure": "what bounded caches keep and forget, at equal bytes, on the demo's model",
    "bench": "the kernels against torch, NumPy and this machine's own peaks",
}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print("usage: python -m sinkattn COMMAND [options]\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:8} {purpose}")
        return 0
    if command == "info":
        from sinkattn.doctor import info
        return info(rest)
    if command == "doctor":
        from sinkattn.doctor import doctor
        return doctor(rest)
    if command == "demo":
        from sinkattn.demo import main as demo
        return demo(rest)
    if command == "measure":
        from sinkattn.measure.cli import main as measure
        return measure(rest)
    if command == "bench":
        from sinkattn.bench import main as bench
        return bench(rest)
    print(f"sinkattn: no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
