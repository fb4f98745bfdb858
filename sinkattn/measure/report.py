"""The tables of `python -m sinkattn measure`, and what they say in words."""

from sinkattn.demo.report import short, table

from .methods import FULL, SINKS, WINDOW


def text_report(found):
    """A `Comparison` as text."""
    parts = [_opening(found), _reading(found), _recall(found)]
    if any(policy.questions for policy in found.policies):
        parts.append(_questions(found))
    if any(policy.far for policy in found.policies):
        parts.append(_far(found))
    return "\n\n".join([*parts, _closing(found)])


def _opening(found):
    s = found.settings
    return (
        f"The shipped byte-level model, trained on {s['trained']} bytes at a time, reads "
        f"{found.text}.\n"
        f"Every cache gets the bytes of {s['budget']} tokens a kv head, its own bookkeeping "
        f"included ({SINKS}: {s['sinks']} + {s['budget'] - s['sinks']}).\n"
        f"Policies keep {s['sinks']} sinks and the last {s['recent']} tokens, and choose the rest. "
        f"Intervals are 95 %."
    )


def _reading(found):
    s = found.settings
    head = [f"text, {s['rows']} x {s['trained']} bytes", "slots", "KiB", "bits per byte",
            f"less {SINKS}", "attention lost", "at least", "output error",
            f"top {found.policies[0].attention.top_count} kept"]
    lines = []
    for policy in found.policies:
        gap, seen = policy.near_gap, policy.attention
        lines.append([
            policy.name, "all" if policy.budget is None else str(policy.budget),
            f"{policy.nbytes / 1024:.0f}", _wide(policy.near.bits[-1], 3),
            "-" if gap is None or policy.name == SINKS else _wide(gap, 3, sign=True),
            f"{seen.loss:.1%}", f"{seen.least:.1%}", f"{seen.error:.1%}", f"{seen.top:.1%}",
        ])
    return table(head, lines) + (
        f"\nfrom byte {s['budget']} on, where the budget is full. KiB: all layers of one stream at "
        f"the end. attention\nlost: weight that full attention gives to what was evicted; "
        f"at least: if each query chose anew\nwhich keys to hold. output error: "
        f"|out - full| / |full|."
    )


def _wide(estimate, digits, sign=False):
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.mean:{'+' if sign else ''}.{digits}f} ± {half:.{digits}f}"


def _recall(found):
    distances = [point.distance for point in found.policies[0].recall.first]
    budget, chance = found.settings["budget"], found.policies[0].recall.chance
    head = ["recall: letters right at", *map(str, distances), "then another", "it alone"]
    lines = [["", *("inside" if d <= budget else "beyond" for d in distances), "beyond", "beyond"]]
    for policy in found.policies:
        lines.append([
            policy.name, *(f"{point.accuracy:.2f}" for point in policy.recall.first),
            *(_mean_beyond(getattr(policy.recall, kind), budget) for kind in ("second", "alone"))])
    least = min(found.policies[0].recall.first, key=lambda point: point.accuracy.mean)
    return table(head, lines) + (
        f"\nlines NAME = '<16 letters>' planted so many bytes before they are asked for; "
        f"{least.accuracy.count} texts, chance {chance:.2f}; an\ninterval is at most "
        f"± {_widest(found):.2f} wide. The text is read {found.settings['chunk']} bytes at a time, "
        f"the question unknown. then another: a second\nplant is asked for after the first answer; "
        f"it alone: at the same distances, no question before it."
    )


def _widest(found):
    return max((point.accuracy.high - point.accuracy.low) / 2
               for policy in found.policies for point in policy.recall.first)


def _mean_beyond(points, budget):
    beyond = [point.accuracy.mean for point in points if point.distance > budget]
    return f"{sum(beyond) / len(beyond):.2f}" if beyond else "-"


def _questions(found):
    head = ["the whole text, then shrunk", "the question it saw", "another one, next",
            "the same, none seen"]
    lines = [[policy.name, *(_between(getattr(policy.questions, kind))
                             for kind in ("first", "second", "blind"))]
             for policy in found.policies if policy.questions]
    return table(head, lines) + (
        "\nletters right of plants beyond the budget, and 95 % interval. Text and question enter "
        "in one call, so that a policy\nmay look at the question before it evicts; then a second "
        f"question comes. {SINKS} and {WINDOW} never hold\nmore than the window."
    )


def _between(estimate):
    return f"{estimate.mean:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _far(found):
    s = found.settings
    shown = [policy for policy in found.policies if policy.far]
    buckets = [f"{short(begin)}-{short(end)}" for begin, end in shown[0].far.buckets]
    head = ["bits per byte, long streams", *buckets, f"less {SINKS}", "bytes/s", "single"]
    lines = [[policy.name, *(f"{bits:.3f}" for bits in policy.far.bits),
              "-" if policy.far_gap is None or policy.name == SINKS
              else _wide(policy.far_gap, 3, sign=True),
              f"{policy.far.tokens_per_second:,.0f}", f"{policy.single_per_second:,.0f}"]
             for policy in shown]
    return table(head, lines) + (
        f"\n{s['streams']} streams of {s['tokens']:,} bytes, positions counted in slots "
        f"({FULL}: in the text, so past {s['trained']} it is lost).\nbytes/s: the model included, "
        f"{s['chunk']} at a time, all streams; single: one byte at a time, one stream."
    )


def _closing(found):
    """What the figures say, computed from them."""
    by_name = {policy.name: policy for policy in found.policies}
    budget, lines = found.settings["budget"], []
    base = by_name.get(SINKS)
    if base is not None:
        beyond = [point.accuracy for point in base.recall.first if point.distance > budget]
        if beyond:
            worst = max(beyond, key=lambda accuracy: accuracy.mean)
            lines.append(f"{SINKS} forgets at the window's edge: beyond it at most {worst:.2f} of "
                         f"the letters are right (chance {base.recall.chance:.2f}).")
        scored = [p for p in found.policies if p.near_gap and p.name not in (FULL, WINDOW, SINKS)]
        better = [p.name for p in scored if p.near_gap.high < 0]
        worse = [p.name for p in scored if p.near_gap.low > 0]
        if scored:
            lines.append(f"Plain text at equal bytes, against {SINKS}: better {_listed(better)}; "
                         f"worse {_listed(worse)}; the other "
                         f"{len(scored) - len(better) - len(worse)} not told apart.")
    kept = [(p, [q.accuracy for q in p.recall.first if q.distance > budget])
            for p in found.policies if p.name not in (FULL, WINDOW, SINKS)]
    able = [(sum(a.mean for a in found_) / len(found_), p.name) for p, found_ in kept if found_]
    if able:
        best, drawn = max(able), [share for share, name in able if name == "Random"]
        lines.append(f"Beyond the window the best policy, {best[1]}, has {best[0]:.2f} of the "
                     "letters right, a mean over the distances"
                     + "".join(f"; tokens kept at random: {share:.2f}" for share in drawn) + ".")
    lost = [p.name for p in found.policies if p.questions and p.name != FULL
            and p.questions.first.low > p.questions.second.high]
    if lost:
        lines.append("Knew the question that they saw, and less of the next one: "
                     f"{_listed(lost)}.")
    lines.append("A bounded cache forgets; a policy chooses what. One small model, one text: what "
                 "holds here need not hold elsewhere.")
    return "\n".join(lines)


def _listed(names):
    return ", ".join(names) if names else "none"
