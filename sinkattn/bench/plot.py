"""The roofline: what the machine allows at each arithmetic intensity, and what was reached."""

import math

from . import counts

COLOURS = {"sinkattn": "#0072B2", "torch": "#D55E00"}  # Okabe and Ito
APART = 1.13
ROOFS = {"fma": ("fp32 multiply-add", "-"), "bf16_dot": ("bf16 dot product", "--")}


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
    if "read" not in peaks:
        return 0.0
    read = peaks["read"]["rate"]
    kinds = [kind for kind in ROOFS if kind in peaks]
    top = max(kinds, key=lambda kind: peaks[kind]["rate"], default=None)
    for kind in kinds:
        flops, (name, style) = peaks[kind]["rate"], ROOFS[kind]
        knee = flops / read
        axes.plot([knee, high], [flops / 1e9] * 2, style, color="0.25", linewidth=1.4)
        axes.annotate(f"{name}, {flops / 1e9:.0f} GFLOP/s", (high, flops / 1e9), (-4, 4),
                      textcoords="offset points", ha="right", va="bottom", color="0.25")
        if kind == top:
            axes.plot([low, knee], [counts.roof(x, flops, read) / 1e9 for x in (low, knee)],
                      color="0.25", linewidth=1.4)
    label_read(axes, read, low)
    return min((peaks[kind]["rate"] / read for kind in kinds), default=0.0)


def label_points(axes, points, places, knee):
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
                          ha="right" if left else "left", fontsize=8.5, zorder=4,
                          color=COLOURS["sinkattn"],
                          arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7,
                                      "relpos": (1.0 if left else 0.0, 0.5)})


def plot(results, path):
    """Writes the roofline of a run as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
                      linestyle="none", color=COLOURS[who], label=names[who], zorder=3,
                      **styles[who])
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    least = min(p[2] for p in every) / 1e9
    top = max([p[2] for p in every] + [x["rate"] for kind, x in results["peaks"].items()
                                       if kind in ROOFS]) / 1e9
    axes.set_ylim(least / 2.5, top * 2)
    knee = draw_roofs(axes, results["peaks"], low, high)
    label_points(axes, points["sinkattn"], places, knee)
    axes.set_xlabel("arithmetic intensity: useful FLOP / byte that must move "
                    "(points of one intensity stand side by side)")
    axes.set_ylabel("useful GFLOP/s")
    machine = results["machine"]
    axes.set_title(f"{machine['processor']}, {machine['threads']} threads: what was reached, under "
                   "the roofs measured in the same run", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(which="major", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def label_read(axes, read, low):
    """Along the slope of the memory roof."""
    place = (low * 1.25, low * 1.25 * read / 1e9)
    axes.annotate(f"memory read, {read / 1e9:.0f} GB/s", place, (0, 5), textcoords="offset points",
                  rotation=math.degrees(math.atan2(1, 1)), rotation_mode="anchor",
                  transform_rotates_text=True, color="0.25", va="bottom")
