"""The table."""

PEAK_NAMES = {"fma": "fp32 multiply-add", "bf16_dot": "bf16 dot product", "read": "memory read",
              "matmul": "bf16 matrix product", "copy": "memory copy"}
WIDTHS = (44, 20, 11, 11, 14, 8, 9, 9)
HEAD = ("", "kernel", "median", "min", "rate", "of peak", "x ours", "error")
QUIET = 0.05  # of the processors, taken by others: more is worth a word


def three_digits(number):
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def duration(seconds):
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds * 1e6)} us"


def quantity(rate, unit):
    if rate is None:
        return ""
    if unit == "token/s":
        return f"{rate:.4g} token/s"
    if unit == "byte/s":
        return f"{rate / 1e9:.4g} GB/s"
    return f"{rate / 1e9:.4g} GFLOP/s" if rate < 1e13 else f"{rate / 1e12:.4g} TFLOP/s"


def row(cells):
    left, kernel, *numbers = cells
    text = [f"{left:{WIDTHS[0]}} {kernel:{WIDTHS[1]}}"]
    text += [f"{cell:>{width}}" for cell, width in zip(numbers, WIDTHS[2:])]
    return " ".join(text).rstrip()


def line_cells(line, first):
    percent = "" if line["percent"] is None else f"{line['percent']:.0f} %"
    ratio = "" if line is first else f"{line['times_ours']:.2f}"
    wrong = " !" if line["who"] == "sinkattn" and not line["error"] <= line["bound"] else ""
    return (f"  {line['who']:9}{line['form']}", line["kernel"] or "", duration(line["median_s"]),
            duration(line["min_s"]), quantity(line["rate"], line["unit"]), percent, ratio,
            f"{line['error']:.1e}{wrong}")


def blocks(lines):
    """Lines of one work stand together."""
    groups = {}
    for line in lines:
        groups.setdefault((line["suite"], line["title"]), []).append(line)
    return groups.items()


def work_text(title, lines):
    useful = {"FLOP/s": f"{lines[0]['flops'] / 1e9:.3g} GFLOP", "call": "a call",
              "token/s": f"{lines[0].get('items')} tokens",
              "byte/s": f"{lines[0]['bytes'] / 1e6:.3g} MB"}[lines[0]["unit"]]
    note = f"; {lines[0]['note']}" if lines[0]["note"] else ""
    return "\n".join([f"{title}  [{useful}{note}]", *(row(line_cells(x, lines[0])) for x in lines)])


def peak_text(results):
    lines = ["peaks of this machine, the same threads, timed between the repeats: best, median",
             *(f"  {PEAK_NAMES.get(kind, kind):20} {quantity(peak['rate'], peak['unit']):>14} "
               f"{quantity(peak['median'], peak['unit']):>14}   {peak['trials']} trials, "
               f"{peak['table']}" for kind, peak in results["peaks"].items())]
    lines[-1] += f", {results['settings']['read_buffer_bytes'] / 2**20:.0f} MiB"
    return "\n".join(lines)


def opening(results):
    machine, versions = results["machine"], results["versions"]
    torch = f"torch {versions['torch']}" if versions["torch"] else "no torch"
    cache = machine["last_cache_bytes"]
    threads = f", {machine['threads']} of {machine['processors']} processors"
    lines = [
        f"sinkattn {versions['sinkattn']}, NumPy {versions['numpy']}, {torch}, "
        f"Python {versions['python']}, compiled by {versions['compiler']}",
        f"{machine['processor']}{threads if results['device'] == 'cpu' else ''}, "
        + (f"last cache {cache / 2**20:.0f} MiB" if cache else "last cache of unknown size"),
    ]
    busy = machine["busy_elsewhere"]
    if busy is not None and busy > QUIET:
        lines.append(f"Not a quiet machine: other processes took {busy:.0%} of the processors.")
    return "\n".join(lines)


def closing(results):
    settings = results["settings"]
    lines = [
        f"Times: per call, of {settings['repeats']} interleaved repeats. Rates: useful work over "
        "the median. of peak: of the best trial between those repeats.\nx ours: their median over "
        "our first line. error: relative L2 of the timed call's result against float64, over a "
        "sample of rows."]
    lines += [f"Left out: {reason}." for reason in results["skipped"]]
    lines += [f"WRONG: the result of '{title}' is out of bounds." for title in results["failed"]]
    return "\n".join(lines)


def text_report(results):
    parts = [opening(results), peak_text(results), row(HEAD)]
    parts += [work_text(title, lines) for (_, title), lines in blocks(results["lines"])]
    return "\n\n".join([*parts, closing(results)])
