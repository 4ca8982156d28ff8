"""The figure of the card: what is left of quality at each size of the embedding."""

import io
from collections.abc import Mapping
from typing import Any

DPI, COLORS = 110, 64
# Blue, orange, green: told apart by all eyes, and by their markers in print.
STYLE = {"retrieval": ("#0072b2", "o"), "sts": ("#d55e00", "s"), "bitext": ("#009e73", "^")}
LABELS = {
    "retrieval": "retrieval, nDCG@10",
    "sts": "similarity, Spearman",
    "bitext": "translations, top-1",
    "start": "retrieval, untrained",
}


def curve(found: Mapping[str, Any]) -> bytes:
    """Two panels, values and shares of the full size.

    Args:
        found: Results of the measure "matryoshka".

    Returns:
        A PNG of few colours.
    """
    # Imported here because the card's text needs neither.
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    sizes = [int(size) for size in found["retrieval"]["shares"]]
    if start := found["retrieval"]["columns"].get("start"):
        values = list(start.values())
        grey = {"color": "#777777", "linestyle": ":", "marker": "o", "markersize": 4}
        left.plot(sizes, values, label=LABELS["start"], **grey)
        right.plot(sizes, [100 * value / max(values[-1], 1e-9) for value in values], **grey)
    for name, one in found.items():
        color, marker = STYLE[name]
        shares = [one["shares"][str(size)] for size in sizes]
        left.plot(sizes, list(one["columns"][one["own"]].values()), color=color, marker=marker, label=LABELS[name])
        right.plot(sizes, [100 * share["share"] for share in shares], color=color, marker=marker)
        low, high = ([100 * share[end] for share in shares] for end in ("low", "high"))
        right.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    left.set_ylabel("value")
    left.set_ylim(0, 1)
    right.set_ylabel("% of that at full size, with 95% interval")
    right.set_ylim(0, 120)
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel("dimensions kept")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    drawn, target = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLORS).save(target, format="png", optimize=True)
    return target.getvalue()
