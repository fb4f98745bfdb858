"""The demo's tables and its plot."""

from .recall import LETTERS

COLOURS = {  # Okabe and Ito's palette, told apart by colour-blind readers
    "dense": "#D55E00",
    "window": "#E69F00",
    "1 sink + window": "#56B4E9",
    "sinks + window": "#0072B2",
    "window, re-computed": "#000000",
}
MARKS = {
    "dense": {"marker": "s"},
    "window": {"marker": "^"},
    "1 sink + window": {
        "marker": "o", "markersize": 13, "fillstyle": "none", "linestyle": "none",
        "markeredgewidth": 1.5,
    },
    "sinks + window": {"marker": "o"},
    "window, re-computed": {
        "marker": "x", "markersize": 9, "linestyle": "none", "zorder": 3, "markeredgewidth": 1.5,
    },
}


def short(number):
    """512 -> "512", 8192 -> "8k", 600 -> "600", 1000000 -> "1000000"."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if number and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def label(name, settings):
    slots, sinks = settings["window"], settings["sinks"]
    return {
        "dense": "dense, all keys",
        "window": f"window {slots}",
        "1 sink + window": f"1 sink + window {slots - 1}",
        "sinks + window": f"{sinks} sink{'s' * (sinks != 1)} + window {slots - sinks}",
        "window, re-computed": f"window {slots}, re-computed",
    }[name]


def table(head, lines):
    widths = [max(len(row[column]) for row in [head, *lines]) for column in range(len(head))]
    rows = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, ["-" * width for width in widths], *lines]
    ]
    return "\n".join(rows)


def _number(value, digits=3):
    return "-" if value is None else f"{value:.{digits}f}"


def _size(value):
    return f"{value / 2**20:.1f} MiB" if value else "0"


def text_report(results):
    """Everything that was measured, as text."""
    settings, model = results["settings"], results["model"]
    buckets = [f"{short(first)}-{short(end)}" for first, end in results["buckets"]]
    parts = [_opening(results)]

    lines = [
        [
            label(name, settings) + (" *" if "sampled" in found else ""),
            *map(_number, found["bits_per_byte"]),
            f"{found['bytes_per_second']:,.0f}",
            f"{found['bytes_per_second_one_at_a_time']:,.0f}",
            _size(found["cache_bytes_per_stream"]),
        ]
        for name, found in results["methods"].items()
    ]
    head = ["bits per byte at position", *buckets, "bytes/s", "single", "cache/stream"]
    sampled = results["methods"]["window, re-computed"]["sampled"]
    parts.append(table(head, lines) + (
        f"\n* sampled at {sampled} positions. bytes/s: text read in chunks, all streams together; "
        "single: one byte\n  at a time, one stream (dense: at its end). dense keeps what it has "
        "read, the caches what fits."
    ))
    stopped = results["methods"]["dense"]["stopped_at"]
    if stopped:
        parts.append(
            f"dense stopped at {stopped}: its cache and its work for each byte grow with the text "
            "(--dense-tokens)."
        )

    same = results["same_positions"]
    lines = [
        [label(name, settings), *map(_number, row), _number(same["past_trained_length"][name])]
        for name, row in same["bits_per_byte"].items()
    ]
    parts.append(table(["at the same positions", *buckets, "past trained"], lines) + (
        f"\n{label('sinks + window', settings)} / re-computed, past the trained length: "
        f"{same['sinks_window_over_recomputed']:.3f} "
        f"(95 %: {same['interval_95'][0]:.3f} to {same['interval_95'][1]:.3f}; "
        f"{same['count_past_trained_length']} positions)"
        + (f"\ndense, past trained: only as far as {stopped}." if stopped else "")
    ))

    lines = []
    for distance in sorted({entry["distance"] for entry in results["recall"]}):
        found = {e["method"]: e for e in results["recall"] if e["distance"] == distance}
        cells = [
            f"{found[name]['bits_per_letter']:.2f} ± {found[name]['half_width_95']:.2f}"
            if name in found else "-"
            for name in ("sinks + window", "dense")
        ]
        inside = found["sinks + window"]["in_window"]
        lines.append([f"{distance}", "inside" if inside else "beyond", *cells])
    head = ["recall: distance in bytes", "window", label("sinks + window", settings),
            f"dense, within {model['trained_length']}"]
    parts.append(table(head, lines) + (
        f"\nbits per letter, mean and 95 % interval; {results['recall'][0]['plants']} plants of "
        f"{LETTERS} random letters each; chance is {results['recall_chance']:.2f}."
    ))

    lines = [
        [name, *(f"{share:.1%}" for share in shares)]
        for name, shares in results["first_token_mass"].items()
    ]
    head = ["attention on the first token", *(f"layer {i}" for i in range(model["layers"]))]
    parts.append(table(head, lines))
    parts.append(_closing(results))
    return "\n\n".join(parts)


def _opening(results):
    settings, text = results["settings"], results["text"]
    lines = [
        f"A byte-level model of {results['model']['parameters'] / 1e6:.1f} M parameters, trained "
        "on "
        f"{results['model']['trained_length']} tokens at a time, reads",
        f"{text['name']} ({text['bytes']:,} bytes): {settings['streams']} stream"
        f"{'s' * (settings['streams'] != 1)} of {settings['tokens']:,} bytes, "
        f"{settings['window']} cache slots a layer.",
    ]
    if text["times_round"] > 1:
        lines.append(
            f"The text is shorter than a stream: each goes "
            f"round it {text['times_round']:.1f} times."
        )
    return "\n".join(lines)


def _closing(results):
    """What the figures say, computed from them."""
    settings, lines = results["settings"], []
    past = {name: found["past_trained_length"] for name, found in results["methods"].items()}
    ours, one = past["sinks + window"], past.get("1 sink + window")
    if ours is not None and one is not None and settings["sinks"] > 1:
        said = "One pinned token is enough" if one <= ours * 1.01 else "One pinned token is worse"
        lines.append(
            f"{said}: {one:.3f} bits per byte past the trained length with 1, {ours:.3f} with "
            f"{settings['sinks']}. The sink is BOS, the first token."
        )
    if ours is not None and settings["sinks"]:
        lines.append(
            f"The window alone needs {past['window'] / ours - 1:+.0%} against sinks + window. "
            "Neither remembers what has left it: see the recall."
        )
    growth = results["resident_growth_bytes"]
    if growth is not None:
        lines.append(
            f"Resident memory from a tenth of the sinks + window stream to its end: "
            f"{growth / 2**20:+.1f} MiB."
        )
    return "\n".join(lines)


def plot(results, path):
    """Writes both halves as one picture: bits per byte by position, recall against distance."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "sinkattn demo: --plot needs matplotlib: pip install 'sinkattn[demo]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings, trained = results["settings"], results["model"]["trained_length"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")

    buckets = results["buckets"]
    places = range(len(buckets))
    for name, found in results["same_positions"]["bits_per_byte"].items():
        known = [(x, y) for x, y in zip(places, found, strict=True) if y is not None]
        left.plot(
            *zip(*known, strict=True), label=label(name, settings), color=COLOURS[name],
            **MARKS[name],
        )
    top = 1.12 * left.get_ylim()[1]
    left.set_ylim(0, top)
    if len(buckets) > 1:
        left.axvline(0.5, color="0.5", linestyle=":")
        left.text(0.56, top * 0.985, f"past the trained length, {trained}", va="top", color="0.35")
    left.set_xticks(places, [f"{short(first)}–{short(end)}" for first, end in buckets])
    left.set_xlabel("position in the text (bytes)")
    left.set_ylabel("bits per byte (lower is better)")
    left.set_title(
        f"Prediction of held-out text ({results['same_positions']['count']} positions, "
        "the same for all)"
    )
    left.legend(loc="center right", frameon=False)

    for name in ("dense", "sinks + window"):
        found = [entry for entry in results["recall"] if entry["method"] == name]
        if found:
            within = f"dense, within {trained}" if name == "dense" else label(name, settings)
            right.errorbar(
                [entry["distance"] for entry in found],
                [entry["bits_per_letter"] for entry in found],
                yerr=[entry["half_width_95"] for entry in found],
                label=within, color=COLOURS[name], marker=MARKS[name]["marker"], capsize=3,
                linestyle="--" if name == "dense" else "-", clip_on=False,
                markersize=8 if name == "dense" else 5,
            )
    right.axhline(results["recall_chance"], color="0.5", linestyle="--")
    right.axvline(settings["window"], color="0.5", linestyle=":")
    right.set_ylim(0, max(right.get_ylim()[1], 6))
    right.set_xlim(0, None)
    right.text(
        right.get_xlim()[1] * 0.99, results["recall_chance"] - 0.12, "chance, log2 26", ha="right",
        va="top", color="0.35",
    )
    right.text(
        settings["window"] + right.get_xlim()[1] * 0.012, 0.35,
        f"cache of {settings['window']} slots ends", color="0.35",
    )
    right.set_xlabel("distance to the planted line (bytes)")
    right.set_ylabel("bits per letter (lower is better)")
    plants = results["recall"][0]["plants"]
    right.set_title(f"Recall of {LETTERS} random letters ({plants} plants, 95 % intervals)")
    right.legend(loc="upper left", frameon=False)

    for axes in (left, right):
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
