"""RT-DETR and DETR of transformers on our backbone against the same on its own, interleaved in one run.

    python tools/benchmark_transformers.py
    python tools/benchmark_transformers.py --model rt_detr --rounds 15 --image-size 640 640

Both have the same random weights: ours are loaded from the checkpoint of theirs, and must agree before they are timed.
A round times each contender once, in shuffled order, for the backbone alone and for the whole detector; ratios are
taken within rounds. Ours take part as built, as a copy of ``optimize_for_inference``, and as one whose backbone
computes in bfloat16; theirs as built and under autocast to bfloat16. Needs: pip install 'backbone[transformers]'
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final, TypeAlias

import numpy as np
import torch
import transformers
import typer
from benchmark.command import hardware, relative_error
from benchmark.measures import paired_ratio
from benchmark.networks import DeviceName
from rich.console import Console
from rich.table import Table
from torch import Tensor

from backbone import optimize_for_inference
from backbone.command.timing import time_rounds
from backbone.hosts.transformers import TransformersBackboneConfig, find_backbone

Run: TypeAlias = Callable[[], list[Tensor]]

LIMITS: Final = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of a map or answer, in units of the largest value."""

_transformers: Any = transformers  # its configurations take more than their types say

console = Console(width=None if sys.stdout.isatty() else 120)


class Model(StrEnum):
    """What is timed."""

    RT_DETR = "rt_detr"
    DETR = "detr"


@dataclass(frozen=True)
class Detector:
    """A detector of transformers, as published, and what stands in for its backbone.

    Attributes:
        title: How it is known.
        model: Its class.
        config: The class of its configuration.
        body: The class of its own backbone's configuration.
        ours: Our name of that backbone.
        features: Stages it reads.
        answer: The output that is compared; RT-DETR's neck, whose best places are chosen later, when close calls count.
    """

    title: str
    model: Any
    config: Any
    body: Any
    ours: str
    features: list[str]
    answer: str

    def pair(self) -> tuple[Any, Any]:
        """Return it on its own backbone, and on ours with the same weights."""
        torch.manual_seed(0)
        theirs = self.model(self.config(backbone_config=self.body(out_features=self.features))).eval()
        body = TransformersBackboneConfig({"name": self.ours, "norm": "frozen_bn"}, out_features=self.features)
        with TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            return theirs, self.model.from_pretrained(folder, config=self.config(backbone_config=body)).eval()


DETECTORS: Final = {
    Model.RT_DETR: Detector(
        "RT-DETR r50vd",
        _transformers.RTDetrForObjectDetection,
        _transformers.RTDetrConfig,
        _transformers.RTDetrResNetConfig,
        "resnet50d",
        ["stage2", "stage3", "stage4"],
        "encoder_last_hidden_state",
    ),
    Model.DETR: Detector(
        "DETR-R50",
        _transformers.DetrForObjectDetection,
        _transformers.DetrConfig,
        _transformers.ResNetConfig,
        "resnet50",
        ["stage4"],
        "logits",
    ),
}


def runner(model: Any, output: str, images: Tensor, autocast: bool) -> Run:  # noqa: ANN401
    """Return a call of ``model`` that gives what it calls ``output``, one tensor or several."""

    def run() -> list[Tensor]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            found = model(images)[output]
        return [found] if isinstance(found, Tensor) else list(found)

    return run


def backbone_path(ours: torch.nn.Module) -> str:
    """Return where the detector keeps its backbone."""
    body = find_backbone(ours)
    return next(str(path) for path, module in ours.named_modules() if module is body)


def contenders(detector: Detector, images: Tensor) -> dict[str, dict[str, Run]]:
    """Return what is timed, ``backbone`` and ``detector``: each contender's name and call, theirs first."""
    theirs, ours = detector.pair()
    path = backbone_path(ours)
    fast, half = optimize_for_inference(ours), optimize_for_inference(ours, dtype=torch.bfloat16)
    models = {
        "transformers": (theirs, False),
        "transformers, autocast bfloat16": (theirs, True),
        "ours": (ours, False),
        "ours, optimised": (fast, False),
        "ours, optimised, bfloat16": (half, False),
    }
    parts: dict[str, dict[str, Run]] = {"backbone": {}, "detector": {}}
    for name, (model, autocast) in models.items():
        parts["backbone"][name] = runner(model.get_submodule(path), "feature_maps", images, autocast)
        parts["detector"][name] = runner(model, detector.answer, images, autocast)
    return parts


def errors(calls: dict[str, Run]) -> dict[str, float]:
    """Return each contender's largest difference from the first.

    Raises:
        RuntimeError: If one computes something else.
    """
    expected = next(iter(calls.values()))()
    found = {}
    for name, call in calls.items():
        found[name] = max(relative_error(a.float(), b) for a, b in zip(call(), expected, strict=True))
        limit = LIMITS["bfloat16" if "bfloat16" in name else "float32"]
        if not found[name] <= limit:
            raise RuntimeError(f"{name} must agree to {limit:.0e} before it is timed, got {found[name]:.1e}")
    return found


def measure(detector: Detector, images: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the results of the backbone alone and of the whole detector."""
    for part, calls in contenders(detector, images).items():
        found = errors(calls)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for seconds in time_rounds("cpu", calls, rounds):
            for name, value in seconds.items():
                times[name].append(value)
        rows = [
            {
                "name": name,
                "median": float(np.median(times[name])),
                "ratio": paired_ratio(times["transformers"], times[name]),
                "error": found[name],
            }
            for name in calls
        ]
        yield {"title": f"{detector.title}, {part}", "rows": rows}


def show(record: dict[str, Any], images: Tensor) -> None:
    """Print one table; a ratio above 1 is faster than transformers."""
    size = "x".join(map(str, images.shape))
    table = Table(title=f"{record['title']}, {size}, {hardware(DeviceName.CPU)}")
    table.add_column("contender")
    for title in ("ms", "transformers / this", "95%", "error"):
        table.add_column(title, justify="right")
    for row in record["rows"]:
        ratio, low, high = row["ratio"]
        cells = f"{row['median'] * 1e3:.1f}", f"{ratio:.2f}", f"{low:.2f} - {high:.2f}", f"{row['error']:.0e}"
        table.add_row(row["name"], *cells)
    console.print(table)


def main(
    model: Annotated[list[Model] | None, typer.Option(help="Repeatable.  [default: both]")] = None,
    image_size: Annotated[tuple[int, int], typer.Option(metavar="H W", min=128, help="In pixels.")] = (640, 640),
    batch: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="File of the results.")] = None,
) -> None:
    """Compare and time."""
    _transformers.logging.set_verbosity_error()
    _transformers.logging.disable_progress_bar()
    images = torch.randn(batch, 3, *image_size, generator=torch.Generator().manual_seed(1))
    records = []
    for name in model or list(Model):
        for record in measure(DETECTORS[name], images, rounds):
            show(record, images)
            records.append({**record, "date": f"{datetime.now(UTC):%Y-%m-%d}", "hardware": hardware(DeviceName.CPU)})
            if json_file:  # at once, in case a later one fails
                json_file.parent.mkdir(parents=True, exist_ok=True)
                json_file.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
