"""Latency against accuracy, or against size where accuracy is not known of two."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backbone.command.comparison import Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLAIN, _OPTIMIZED = "#9aa5b1", "#1f6fb4"
_WIDEST_LINEAR: Final = 8
"""Slowest / quickest above which the axis is logarithmic."""


def save_comparison(rows: Sequence[Compared], title: str, path: Path) -> None:
    """Draw a dot for each optimised copy, a ring for the plain model it came of, and whiskers over the quartiles."""
    from matplotlib.figure import Figure

    known = [row for row in rows if row.accuracy is not None]
    drawn = known if len(known) > 1 else list(rows)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for row in drawn:
        height = row.accuracy if row.accuracy is not None and drawn is known else row.parameters / 1e6
        for latency, color, filled in ((row.plain, _PLAIN, False), (row.optimized, _OPTIMIZED, True)):
            middle, low, high = (1e3 * each for each in (latency.median, latency.low, latency.high))
            axes.errorbar(
                [middle], [height], xerr=[[middle - low], [high - middle]], fmt="o", color=color, capsize=3,
                elinewidth=1, markersize=8, markerfacecolor=color if filled else "white", zorder=3 if filled else 2,
            )  # fmt: skip
        ends = [1e3 * row.optimized.median, 1e3 * row.plain.median]
        axes.plot(ends, [height, height], color="#d5dbe1", linewidth=1, zorder=1)
        axes.annotate(
            row.name, (ends[0], height), xytext=(0, 9), textcoords="offset points", fontsize=9, parse_math=False,
            ha="center",
        )  # fmt: skip
    _label(axes, drawn, title, is_accuracy=drawn is known)
    if drawn is known and len(known) < len(rows):
        absent = ", ".join(row.name for row in rows if row.accuracy is None)
        figure.supxlabel(f"without a stated accuracy: {absent}", fontsize=8, color="#555555", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=140)


def _label(axes: "Axes", drawn: Sequence[Compared], title: str, *, is_accuracy: bool) -> None:
    times = [1e3 * latency.median for row in drawn for latency in (row.plain, row.optimized)]
    if max(times) > _WIDEST_LINEAR * min(times):
        axes.set_xscale("log")
    axes.set_xlabel("ms (median; whiskers: quartiles)")
    axes.set_ylabel("top-1 on ImageNet, %, as published" if is_accuracy else "million parameters")
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for label, color, filled in (("optimised copy", _OPTIMIZED, True), ("plain", _PLAIN, False)):
        face = color if filled else "white"
        axes.plot([], [], "o", color=color, markerfacecolor=face, markersize=8, label=label)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
