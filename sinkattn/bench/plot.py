"""The roofline: what the machine allows at each arithmetic intensity, and what was reached."""

import math

from . import counts
from .report import PEAK_NAMES, quantity

COLOURS = {"sinkattn": "#0072B2", "torch": "#D55E00"}  # Okabe and Ito
APART = 1.13


def points_of(lines):
    """{who: [(name, FLOP/byte, FLOP/s)]}: of each work that moves bytes, our first line and the
    fastest of each peer's forms."""
    found = {}
    for line in lines:
        if line["who"] in COLOURS and not line["hot"] and line["flops"] and line["bytes"]:
            key = (line["who"], line["suite"], line["work"])
            if key not in found or line["median_s"] < found[key]["median_s"]:
                found[key] = line
    points = {who: [] for who in COLOURS}
    for (who, _, name), line in found.items():
        points[who].append((name, line["flops"] / line["bytes"], line["flops"] / line["median_s"]))
    return points


def thinned(points):
    """Works of the linearity suite lie on one another: the longest stands for them."""
    linear = [name for name, _, _ in points if name.startswith("linear")]
    return [p for p in points if p[0] not in linear[:-1]]


def columns_of(points):
    """Points of one intensity together, from left to right, each column from the top down."""
    columns = {}
    for point in sorted(points, key=lambda p: -p[2]):
        columns.setdefault(round(math.log10(point[1]), 2), []).append(point)
    return [columns[key] for key in sorted(columns)]


def side_by_side(points):
    """{name: where it stands}: points of one intensity a little apart, the highest at the right."""
    places = {}
    for column in columns_of(points):
        for i, (name, intensity, _) in enumerate(column):
            places[name] = intensity * APART ** ((len(column) - 1) / 2 - i)
    return places


def going_down(heights, least):
    """Label heights (log10), from the top down, at least `least` apart."""
    moved = []
    for height in heights:
        moved.append(height if not moved else min(height, moved[-1] - least))
    return moved


def draw_roofs(axes, peaks, low, high):
    """Returns where the memory roof meets the lowest of the others: 0 where there is none."""
    memory = [(kind, peak["rate"]) for kind, peak in peaks.items() if peak["unit"] == "byte/s"]
    flat = sorted((peak["rate"], kind) for kind, peak in peaks.items() if peak["unit"] == "FLOP/s")
    if not memory or not flat:
        return 0.0
    kind, read = memory[0]
    knees = [rate / read for rate, _ in flat]
    for i, ((rate, name), knee) in enumerate(zip(flat, knees)):
        axes.plot([knee, high], [rate / 1e9] * 2, "--" if i else "-", color="0.25", linewidth=1.4)
        axes.annotate(f"{PEAK_NAMES.get(name, name)}, {quantity(rate, 'FLOP/s')}",
                      (knee, rate / 1e9), (24, 4), textcoords="offset points", va="bottom",
                      color="0.25")
    top = flat[-1][0]
    axes.plot([low, knees[-1]], [counts.roof(x, top, read) / 1e9 for x in (low, knees[-1])],
              color="0.25", linewidth=1.4)
    axes.annotate(f"{PEAK_NAMES.get(kind, kind)}, {quantity(read, 'byte/s')}",
                  (low * 1.25, low * 1.25 * read / 1e9), (0, 5), textcoords="offset points",
                  rotation=45, rotation_mode="anchor", transform_rotates_text=True, color="0.25",
                  va="bottom")
    return knees[0]


def label_points(axes, points, places, knee, halo):
    """Names beside our points: at the left where the next column would be covered, but never into
    the memory roof, which rises from left to right."""
    columns = columns_of(points)
    for column, after in zip(columns, [*columns[1:], None]):
        intensity = column[0][1]
        left = after is not None and intensity > knee and after[0][1] < 4 * intensity
        edge = intensity * (1 / 1.3 if left else 1.3)
        heights = going_down([math.log10(p[2] / 1e9) for p in column], 0.075)
        for (name, _, rate), height in zip(column, heights):
            axes.annotate(name, (places[name], rate / 1e9), (edge, 10 ** height), va="center",
                          ha="right" if left else "left", fontsize=8.5, zorder=3,
                          color=COLOURS["sinkattn"], path_effects=halo,
                          arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7,
                                      "relpos": (1.0 if left else 0.0, 0.5)})


def plot(results, path):
    """Writes the roofline of a run as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import patheffects, pyplot

    points = {who: thinned(found) for who, found in points_of(results["lines"]).items()}
    every = [p for found in points.values() for p in found]
    if not every:
        raise SystemExit("sinkattn bench: --plot has no work with both flops and bytes to show")
    places = side_by_side(points["sinkattn"])
    low = min(p[1] for p in every) / 3
    high = max(p[1] for p in every) * 6
    figure, axes = pyplot.subplots(figsize=(9.6, 6), layout="constrained")
    torch = {name: rate for name, _, rate in points["torch"]}
    for name, _, y in points["sinkattn"]:
        if name in torch:
            axes.plot([places[name]] * 2, [y / 1e9, torch[name] / 1e9], color="0.75",
                      linewidth=1, zorder=1)
    styles = {"sinkattn": {"marker": "o", "markersize": 8},
              "torch": {"marker": "s", "markersize": 7, "fillstyle": "none",
                        "markeredgewidth": 1.5}}
    version = results["versions"]["torch"]
    names = {"sinkattn": f"sinkattn {results['versions']['sinkattn']}",
             "torch": f"torch {version}, its fastest form"}
    for who, found in points.items():
        if found:
            axes.plot([places.get(p[0], p[1]) for p in found], [p[2] / 1e9 for p in found],
                      linestyle="none", color=COLOURS[who], label=names[who], zorder=4,
                      **styles[who])
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    least = min(p[2] for p in every) / 1e9
    top = max([p[2] for p in every] + [x["rate"] for x in results["peaks"].values()
                                       if x["unit"] == "FLOP/s"]) / 1e9
    axes.set_ylim(least / 2.5, top * 2)
    knee = draw_roofs(axes, results["peaks"], low, high)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    label_points(axes, points["sinkattn"], places, knee, halo)
    axes.set_xlabel("arithmetic intensity: useful FLOP / byte that must move "
                    "(points of one intensity stand side by side)")
    axes.set_ylabel("useful GFLOP/s")
    machine = results["machine"]
    threads = f", {machine['threads']} threads" if results["device"] == "cpu" else ""
    axes.set_title(f"{machine['processor']}{threads}: what was reached, under the roofs measured "
                   "in the same run", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(which="major", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
