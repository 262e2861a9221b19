"""``backbone compare``: which backbone is how fast, large and accurate, on this machine."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from backbone.command.comparison import MEGABYTE, Candidate, Compared, Latency, Question, compare
from backbone.command.comparison_picture import save_comparison
from backbone.command.describe import named
from backbone.command.terminal import progress_bar, torch_device
from backbone.config import BackboneConfig
from backbone.console import Device, console, readable_errors, say
from backbone.recipe import DetectorConfig, DetectorName


def compare_command(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Registered names or backbones' recipes.")],
    image_size: Annotated[tuple[int, int], typer.Option(metavar="H W", min=1, help="In pixels.")] = (480, 640),
    batch: Annotated[int, typer.Option(min=1, help="Images of one call.")] = 1,
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.AUTO,
    detector: Annotated[DetectorName | None, typer.Option(help="Measure this detector on each backbone.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers there.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw latency against accuracy or parameters there (PNG).")
    ] = None,
) -> None:
    """Measure parameters, GFLOPs, latency and memory here, beside the accuracy that the weights' library states."""
    with readable_errors():
        target = torch_device(device)
        question = Question(image_size, batch, target, rounds, detector)
        configs = {name: _backbone_of(name) for name in names}  # a wrong name is told before anything is measured
        with progress_bar("building") as bar:
            candidates = [Candidate(name, configs[name], question) for name in bar.track(list(configs))]
        with progress_bar("measuring") as bar:
            rows = compare(candidates, question, lambda each, count: bar.track(each, total=count))
    title = _title(question)
    _print_table(rows, title)
    for path in (json_file, picture):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        content = {"title": title, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
        say(str(json_file))
    if picture is not None:
        save_comparison(rows, title, picture)
        say(str(picture))


def _backbone_of(name: str) -> BackboneConfig:
    config, _ = named(name)
    return config.backbone if isinstance(config, DetectorConfig) else config


def _title(question: Question) -> str:
    height, width = question.image_size
    where = torch.cuda.get_device_name() if question.device.type == "cuda" else _processor()
    what = f"{question.detector} on " if question.detector else ""
    return f"{what}{question.batch} x 3 x {height} x {width}, float32, {where}"


def _processor() -> str:
    """Return the name of the CPU, and how many threads run on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{[*models, platform.processor() or 'CPU'][0]}, {torch.get_num_threads()} threads"


def _print_table(rows: list[Compared], title: str) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
    table.add_column("backbone", overflow="fold")
    for column in ("parameters", "GFLOPs", "ms plain", "ms optimised", "memory MB", "ImageNet %"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.parameters / 1e6:.1f} M",
            f"{row.multiply_adds / 1e9:.2f}",
            _milliseconds(row.plain),
            _milliseconds(row.optimized),
            f"{row.memory / MEGABYTE:.0f}",
            "-" if row.accuracy is None else f"{row.accuracy:.1f}",
        )
    console.print(table)
    if stated := [f"{row.name} {row.weights}" for row in rows if row.accuracy is not None]:
        say(f"accuracy: {', '.join(stated)}")
    say(
        "ms: median ± half the distance of the quartiles; random weights. GFLOPs: 10^9 multiply-adds of one image. "
        "Memory: weights and what a plain forward pass holds. ImageNet: top-1 as the weights' library states it.",
    )


def _milliseconds(latency: Latency) -> str:
    return f"{latency.median * 1e3:.2f} ± {(latency.high - latency.low) / 2 * 1e3:.2f}"
