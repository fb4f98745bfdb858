"""The pictures of the records. matplotlib is imported here alone, and first when it is needed."""

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKS = "os^Dv<>PX*"


def pyplot():
    """matplotlib.pyplot; ImportError that says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "plot() needs matplotlib: pip install 'sinkattn[demo]'") from None
    if "matplotlib.pyplot" not in __import__("sys").modules:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finished(figure, path):
    if path is None:
        return figure
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
    return None


def _clean(axes, axis="y"):
    axes.grid(axis=axis, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(index):
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKS[index % len(MARKS)],
            "linestyle": ("-", "--", ":")[index // len(PALETTE) % 3]}


def _errors(estimates):
    low, means, high = np.array([(e.low, e.mean, e.high) for e in estimates]).T
    return means, np.stack([means - low, high - means])


def recall(found, path=None):
    """Accuracy against distance; found : {name: Recall}."""
    figure, axes = pyplot().subplots(figsize=(7, 4.4), layout="constrained")
    for index, (name, record) in enumerate(found.items()):
        for kind, fill in (("first", "full"), ("second", "none")):
            points = getattr(record, kind)
            if points:
                means, errors = _errors([point.accuracy for point in points])
                said = "first question" if kind == "first" else "second question"
                axes.errorbar([point.distance for point in points], means, yerr=errors, capsize=3,
                              label=f"{name}, {said}" if name else said, fillstyle=fill,
                              **_style(index if name else ("first", "second").index(kind)))
    chance = next(iter(found.values())).chance
    axes.axhline(chance, color="0.5", linestyle="--", linewidth=1)
    axes.text(0.99, chance + 0.012, "chance", ha="right", color="0.35",
              transform=axes.get_yaxis_transform())
    axes.set(xlabel="distance to the planted answer (tokens)", xlim=(0, None), ylim=(0, 1.04),
             ylabel="share of answer tokens right")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _clean(axes)
    return _finished(figure, path)


def streams(found, path=None):
    """Bits per token by bucket; found : {name: Stream} of the same buckets."""
    figure, axes = pyplot().subplots(figsize=(7, 4.4), layout="constrained")
    buckets = next(iter(found.values())).buckets
    for index, (name, record) in enumerate(found.items()):
        means, errors = _errors(record.bits)
        axes.errorbar(range(len(buckets)), means, yerr=errors, capsize=3, label=name or None,
                      **_style(index))
    axes.set_xticks(range(len(buckets)), [f"{begin}–{end}" for begin, end in buckets])
    axes.set(xlabel="position in the stream (tokens)", ylabel="bits per token (lower is better)")
    axes.set_ylim(0, None)
    if any(found):
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _clean(axes)
    return _finished(figure, path)


def attention(record, path=None):
    """Loss by position; loss and sink mass by layer and head."""
    figure, (left, middle, right) = pyplot().subplots(
        1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=(1.4, 1, 1))
    left.plot(record.positions, record.loss_by_position, color=PALETTE[0])
    left.set(xlabel="position of the query", ylabel="attention on evicted keys", ylim=(0, None),
             title="Attention loss along the text")
    _clean(left)
    for axes, values, title in ((middle, record.loss_by_head, "Attention loss"),
                                (right, record.sink_by_head, f"On the first {record.sink_count}")):
        _heat(axes, np.asarray(values), "{:.2f}")
        axes.set(xlabel="kv head", ylabel="layer", title=title)
        axes.set_xticks(range(len(values[0])))
        axes.set_yticks(range(len(values)))
    return _finished(figure, path)


def _heat(axes, values, form):
    """A map of shares in 0 to 1 with its numbers written in."""
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, form.format(value), ha="center", va="center", fontsize=8,
                  color="black" if value > 0.55 else "white")


def comparison(record, path=None):
    """Recall, second question, attention loss and bits of each policy, one line for each."""
    policies, settings = record.policies, record.settings
    lines = range(len(policies))
    figure, panels = pyplot().subplots(
        1, 4, figsize=(16, 2.1 + 0.33 * len(policies)), layout="constrained", sharey=True,
        width_ratios=(1.5, 1, 0.8, 1.1))
    _recall_map(panels[0], policies, settings)
    _questions(panels[1], policies)
    losses, errors = _errors([policy.attention.loss for policy in policies])
    panels[2].errorbar(losses, lines, xerr=errors, fmt="o", color=PALETTE[0], capsize=3)
    panels[2].set(title="Attention on evicted keys", xlabel="share of attention (lower is better)",
                  xlim=(-0.01, None))
    _bits(panels[3], policies, settings)
    panels[0].set_yticks(lines, [policy.name for policy in policies])
    panels[0].set_ylim(len(policies) - 0.5, -0.5)
    for axes in panels[1:]:
        _clean(axes, "both")
        axes.tick_params(axis="y", length=0)
    figure.suptitle(
        f"Policies at the bytes of {settings['budget']} tokens a kv head, within "
        f"{settings['trained']} trained tokens ({settings['plants']} rows of plants, "
        f"{settings['rows']} of text; 95 % intervals)")
    return _finished(figure, path)


def _recall_map(axes, policies, settings):
    distances = [point.distance for point in policies[0].recall.first]
    _heat(axes, np.array([[point.accuracy.mean for point in policy.recall.first]
                          for policy in policies]), "{:.2f}")
    axes.set_xticks(range(len(distances)), distances)
    inside = sum(distance <= settings["budget"] for distance in distances)
    if 0 < inside < len(distances):
        axes.axvline(inside - 0.5, color="white", linewidth=3)
        axes.axvline(inside - 0.5, color="black", linewidth=1, linestyle=":")
    chance = policies[0].recall.chance
    axes.set(title=f"Letters right (chance {chance:.2f}); dotted: the window ends",
             xlabel="bytes back to the planted line")


def _questions(axes, policies):
    shown = (("first", "asked when it shrank", 0, "o", "full"),
             ("second", "another one, asked next", 1, "s", "full"),
             ("blind", "the same, no question seen", 6, "D", "none"))
    known = [(line, policy.questions) for line, policy in enumerate(policies) if policy.questions]
    axes.set(title="Whole text, then shrunk", xlabel="letters right, beyond the window",
             xlim=(-0.03, 1.03))
    if not known:
        axes.text(0.5, 0.5, "not asked", ha="center", transform=axes.transAxes, color="0.35")
        return
    for index, (kind, said, colour, mark, fill) in enumerate(shown):
        means, errors = _errors([getattr(found, kind) for _, found in known])
        axes.errorbar(means, [line + 0.24 * (index - 1) for line, _ in known], xerr=errors,
                      linestyle="none", color=PALETTE[colour], marker=mark, fillstyle=fill,
                      markersize=5, elinewidth=0.8, label=said)
    _legend_below(axes)


def _legend_below(axes):
    """Under the label of the x axis: borderaxespad counts letters, whatever the figure's height."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5, fontsize=8,
                frameon=False)


def _bits(axes, policies, settings):
    """Bits less those of sinks + window on the same rows, where it took part; else bits."""
    gaps = all(policy.near_gap for policy in policies)
    near = [policy.near_gap if gaps else policy.near.bits[-1] for policy in policies]
    _across(axes, range(len(policies)), near, 0, "o", f"within {settings['trained']} tokens")
    far = [(line + 0.22, policy.far_gap if gaps else policy.far.bits[-1])
           for line, policy in enumerate(policies) if policy.far]
    if far:
        begin, end = policies[0].far.buckets[-1]
        _across(axes, *zip(*far), 1, "D", f"at {begin}–{end}, positions by slot")
    axes.set(xlabel="bits (lower is better)",
             title="Bits per byte" + ", less sinks + window's" * gaps)
    if gaps:
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(min(-0.12, axes.get_xlim()[0]), None)
        axes.axvline(0, color="0.5", linewidth=1)
        axes.set_xticks([-0.1, 0, 0.1, 0.5, 2], ["-0.1", "0", "+0.1", "+0.5", "+2"])
        axes.minorticks_off()
    _legend_below(axes)


def _across(axes, lines, estimates, colour, mark, label):
    means, errors = _errors(estimates)
    axes.errorbar(means, lines, xerr=errors, fmt=mark, fillstyle="none" if colour else "full",
                  color=PALETTE[colour], capsize=3, markersize=5, label=label)
