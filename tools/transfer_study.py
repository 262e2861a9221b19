"""What freezing is worth: a backbone pre-trained on some shapes learns others from few images, four ways.

    make train-demo
    python tools/transfer_study.py --weights out/train-demo/backbone.pth --out out/transfer

Trains the recipe's detector on a few images of shapes that the weights have never seen: from scratch, and from the
pre-trained backbone with freeze_at 0, 2 and 4. Prints after how many steps and seconds of training each run passed an
AP50, and draws the four curves into OUT/transfer.png. Every run is one of `backbone train`.
"""

import json
import subprocess
import sys
from itertools import accumulate
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
NUM_TRAIN_IMAGES: Final = 100
NUM_VAL_IMAGES: Final = 100
RUNS: Final[dict[str, int | None]] = {"from scratch": None, "freeze_at 0": 0, "freeze_at 2": 2, "freeze_at 4": 4}
TRAIN: Final = (sys.executable, "-m", "backbone", "train")

console = Console(highlight=False)


def fine_tuned(recipe: DetectorConfig, freeze_at: int | None, weights: Path, epochs: int) -> dict[str, Any]:
    """Return the recipe of one run; ``freeze_at`` None starts from scratch, all else being equal."""
    settings = recipe.model_dump(mode="json", exclude_unset=True)
    backbone = {"freeze_at": freeze_at, "weights": str(weights)} if freeze_at is not None else {}
    settings["backbone"] |= {"norm": "bn", **backbone}
    settings["train"] |= {"epochs": epochs, "learning_rate_decay": "none", "warmup_steps": 10, "validate_every": 1}
    return settings


def run(settings: dict[str, Any], data: Path, out: Path) -> list[dict[str, float]]:
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


def draw(curves: dict[str, list[dict[str, float]]], target: float, path: Path) -> None:
    """Draw AP50 over steps and over seconds of training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("step", "seconds"), strict=True):
        for name, epochs in curves.items():
            measured = [row for row in epochs if "AP50" in row]
            style = {"color": "#888888", "linestyle": "--"} if name == "from scratch" else {}
            points = [row[unit] for row in measured], [row["AP50"] for row in measured]
            axes.plot(*points, label=name, marker="o", markersize=3, **style)
        axes.axhline(target, color="#cccccc", linewidth=1, zorder=0)
        axes.set(xlabel="steps" if unit == "step" else "seconds of training", ylim=(0, 1), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="AP50 on new shapes")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main(
    weights: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="backbone.pth of a run of the same recipe on other shapes."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for data, runs and picture.")],
    config: Annotated[Path, typer.Option(help="Detector recipe for four classes and the background.")] = Path(
        "configs/detectors/shapes_faster_rcnn.yaml"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Of each run.")] = 30,
    target: Annotated[float, typer.Option(min=0, max=1, help="AP50 whose time is told.")] = 0.5,
) -> None:
    """Run the study."""
    recipe = load_detector_config(config)
    data = out / "new_shapes"
    if not data.exists():
        make_shapes_dataset(
            data,
            shapes=NEW_SHAPES,
            num_train=NUM_TRAIN_IMAGES,
            num_val=NUM_VAL_IMAGES,
            max_objects=4,
            min_scale=0.2,
            seed=1,
        )
    curves = {}
    for name, freeze_at in RUNS.items():
        settings = fine_tuned(recipe, freeze_at, weights, epochs)
        curves[name] = run(settings, data, out / name.replace(" ", "_"))
        steps = NUM_TRAIN_IMAGES // recipe.train.batch_size
        for number, row in enumerate(curves[name], start=1):
            row["step"] = number * steps
    draw(curves, target, out / "transfer.png")
    table = Table("run", f"steps to AP50 {target}", "seconds", "best AP50")
    for name, epochs_of_run in curves.items():
        best = max(row.get("AP50", 0) for row in epochs_of_run)
        reached = first_above(epochs_of_run, target)
        when = (f"{reached['step']:.0f}", f"{reached['seconds']:.0f}") if reached else ("not reached", "-")
        table.add_row(name, *when, f"{best:.3f}")
    console.print(table)
    print(out / "transfer.png")


if __name__ == "__main__":
    typer.run(main)
