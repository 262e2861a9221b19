"""Our backbone against its peers, interleaved in one run, with the limit of the machine beside them.

    python tools/benchmark.py --image-size 480 640
    python tools/benchmark.py --workload train --image-size 512 512 --dtype float32 --dtype bfloat16
    python tools/benchmark.py --workload train --norms-train --image-size 512 512 --peers torchvision,timm
    python tools/benchmark.py --name timm/regnetx_032 --peers timm
    python tools/benchmark.py --dtype int8 --peers openvino,onnxruntime
    python tools/benchmark.py --dtype int8 --peers openvino,onnxruntime --pyramid
    python tools/benchmark.py --device cuda --workload infer --workload train --batch 1 --batch 8 --dtype bfloat16

Every contender gets the same weights and images and must agree with torchvision, or with timm about timm's models, in
float32 before it is timed. A round times each contender once, in shuffled order, and ratios are taken within rounds,
so that a slow moment of the machine touches both sides. In inference each eager library takes part twice: as it is
mostly used, and tuned, in channels_last with its weights cast once instead of autocast.
"""

import dataclasses
import gc
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.ops import box_iou

from benchmark.contenders import PEERS, Contender, builders_of, gradient_of, onnx_of, reference_contender, tensors_of
from benchmark.measures import Layer, count_layers, measure_machine, memory_of, paired_ratio, synchronize, time_rounds
from benchmark.networks import (
    TIMM,
    TIMM_FAMILIES,
    Case,
    DeviceName,
    DtypeName,
    NotHere,
    Workload,
    images_of,
    import_peer,
    in_float32,
)

FLOAT32_LIMIT = 1e-5  # largest difference in units of the largest value, from torchvision in float32
INT8_LIMIT = 0.3  # the same in int8, a step of which is some hundredths of the largest value where ranges are cut
HALF_LIMIT = 5e-2  # the same in half precision, where torchvision's own error sets another
OWN_ERRORS = 3  # times torchvision's own error in half precision is what ours may have
# In float32. A ReLU input that rounds to the other side of zero switches a whole gradient; a score that rounds to the
# other side of a neighbour's can let another box win.
MISMATCH_LIMIT = 5e-3
OVERLAP = 0.9  # intersection over union above which two detections are the same
MIB = 2**20

console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Answer:
    """What one contender computes, as float32 on the CPU."""

    features: list[Tensor]
    gradients: dict[str, Tensor]
    detections: Tensor | None

    @classmethod
    def of(cls, case: Case, contender: Contender) -> "Answer":
        """Ask ``contender``, and add the time of its first step."""
        start = time.perf_counter()
        outputs = contender.step()
        synchronize(case)
        contender.first_call += time.perf_counter() - start
        outputs = [output.detach().float().cpu().clone() for output in outputs]
        gradients = {name: p.grad.float().cpu() for name, p in contender.parameters.items() if p.grad is not None}
        contender.clear()
        if case.workload is not Workload.DETECTOR:
            return cls(outputs, gradients, None)
        assert contender.network is not None
        with torch.inference_mode(), case.autocast():
            maps = contender.network.get_submodule("backbone")(images_of(case))
        return cls([tensor.float().cpu() for tensor in tensors_of(maps)], {}, outputs[0])

    def errors(self, reference: "Answer") -> tuple[float, float]:
        """The ``error`` and the ``mismatch`` of a contender."""
        assert len(self.features) == len(reference.features)
        assert self.gradients.keys() == reference.gradients.keys()
        error = max(map(relative_error, self.features, reference.features))
        if self.detections is not None and reference.detections is not None:
            return error, unequal_detections(self.detections, reference.detections)
        pairs = [(self.gradients[name], gradient) for name, gradient in reference.gradients.items()]
        return error, max([float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs], default=0.0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the largest expected value; NaN if there is one."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} in place of {tuple(expected.shape)}"
    return float((actual - expected).abs().max() / expected.abs().max())


def unequal_detections(actual: Tensor, expected: Tensor) -> float:
    """The fraction of rows (image, label, score, box) without an equal on the other side, the worse side's."""
    if not len(actual) or not len(expected):
        return float(len(actual) != len(expected))
    equal = (actual[:, None, :2] == expected[None, :, :2]).all(2) & (box_iou(actual[:, 3:], expected[:, 3:]) > OVERLAP)
    return 1.0 - min(float(equal.any(side).float().mean()) for side in (0, 1))


def disagreement(case: Case, contender: Contender, own: tuple[float, float]) -> str | None:
    """Why ``contender`` must not be timed; ``own`` are torchvision's errors in the dtype of the case."""
    limit = min(OWN_ERRORS * own[0], HALF_LIMIT) if case.is_half else INT8_LIMIT if case.is_int8 else FLOAT32_LIMIT
    mismatch_limit = max(OWN_ERRORS * own[1], HALF_LIMIT) if case.is_half else MISMATCH_LIMIT
    if not contender.error <= limit:
        return f"features differ by {contender.error:.1e}, more than {limit:.1e}"
    if not contender.mismatch <= mismatch_limit:
        what = "gradients differ by" if case.is_train else "detections without an equal:"
        return f"{what} {contender.mismatch:.1e}, more than {mismatch_limit:.1e}"
    return None


def run_case(case: Case, peers: Sequence[str], compile_at: Sequence[int], rounds: int) -> dict[str, Any]:
    """Build, compare and time the contenders of one case; return the record that goes into the JSON file."""
    reference = reference_contender(in_float32(case))
    layers = count_layers(reference)
    expected = Answer.of(in_float32(case), reference)
    own = Answer.of(case, reference_contender(case)).errors(expected) if case.is_half else (0.0, 0.0)
    del reference
    contenders: list[Contender] = []
    missing: dict[str, dict[str, str]] = {"absent": {}, "rejected": {}}
    for name, build in builders_of(case, peers, compile_at).items():
        with console.status(f"{case}: preparing {name}"):
            try:
                contender = enter(case, build, expected)
            except NotHere as reason:
                missing["absent"][name] = str(reason)
            except Exception as error:  # a peer's failure is a result
                missing["rejected"][name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            else:
                if problem := disagreement(case, contender, own):
                    missing["rejected"][name] = problem
                else:
                    contenders.append(contender)
    if "ours" in missing["rejected"]:
        contenders = []  # nothing to compare with
    time_rounds(case, contenders, rounds, console)
    machine = measure_machine(case.device, case.dtype)
    limit = machine.roofline(layers, case.dtype.itemsize)
    return {
        "case": dataclasses.asdict(case),
        "roofline": {**dataclasses.asdict(machine), "flops": total_flops(layers), "seconds": limit},
        "contenders": [summarise(contender, contenders[0], limit) for contender in contenders],
        **missing,
    }


def total_flops(layers: Sequence[Layer]) -> int:
    """Operations of forward and backward."""
    return sum(layer.flops * (1 + layer.backward_passes) for layer in layers)


def enter(case: Case, build: Callable[[Case], Contender], expected: Answer) -> Contender:
    """Build a contender, run it for the first time, compare it and measure its memory."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    contender = build(case)
    contender.error, contender.mismatch = Answer.of(case, contender).errors(expected)
    contender.memory = memory_of(case, contender)
    gc.collect()
    contender.held = torch.cuda.memory_allocated() - before if case.device is DeviceName.CUDA else None
    return contender


def summarise(contender: Contender, ours: Contender, limit: float) -> dict[str, Any]:
    """One contender's results; times in seconds, memory in bytes. ``limit`` is the roofline's seconds."""
    low, median, high = np.quantile(contender.times, (0.25, 0.5, 0.75)).tolist()
    ratio, ratio_low, ratio_high = paired_ratio(contender.times, ours.times)
    return {
        "name": contender.name,
        "median": median,
        "quartiles": [low, high],
        "ratio": ratio,
        "ratio_interval": [ratio_low, ratio_high],
        "roofline_fraction": limit / median,
        "memory": contender.memory,
        "memory_alone": None if contender.held is None else contender.held + (contender.memory or 0),
        "first_call": contender.first_call,
        "error": contender.error,
        "mismatch": contender.mismatch,
        "times": contender.times,
    }


def print_record(record: Mapping[str, Any]) -> None:
    """Print the table of one case, and below it who is missing and why."""
    roofline = record["roofline"]
    limit = (
        f"roofline {roofline['seconds'] * 1e3:.2f} ms: {roofline['flops'] / 1e9:.1f} GFLOP at "
        f"{roofline['rate'] / 1e9:.0f} GFLOP/s, copies at {roofline['bandwidth'] / 1e9:.1f} GB/s, both measured here"
    )
    table = Table(title=f"{record['title']}, {record['hardware']}", caption=limit)
    table.add_column("contender")
    memory = "saved MiB" if record["case"]["device"] == DeviceName.CPU else "peak MiB (alone)"
    for title in ("ms", "quartiles", "ratio to ours", "95%", "of roofline", memory, "first call s", "error"):
        table.add_column(title, justify="right")
    for row in record["contenders"]:
        low, high = (f"{value * 1e3:.2f}" for value in row["quartiles"])
        megabytes = "-" if row["memory"] is None else f"{row['memory'] / MIB:.1f}"
        megabytes += "" if row["memory_alone"] is None else f" ({row['memory_alone'] / MIB:.1f})"
        table.add_row(
            row["name"], f"{row['median'] * 1e3:.2f}", f"{low} - {high}", f"{row['ratio']:.3f}",
            "{:.2f} - {:.2f}".format(*row["ratio_interval"]), f"{row['roofline_fraction']:.0%}", megabytes,
            f"{row['first_call']:.2f}", f"{row['error']:.0e}",
            style="bold" if row["name"] == "ours" else None,
        )  # fmt: skip
    console.print(table)
    for title in ("absent", "rejected"):
        for name, reason in record[title].items():
            console.print(f"{title}: {name}: {reason}", highlight=False)


def save_picture(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a bar per contender and a panel per case, each bar labelled with its ratio to ours."""
    heights = [1.3 + 0.36 * len(record["contenders"]) for record in records]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(records), squeeze=False, height_ratios=heights)[:, 0]
    for axes, record in zip(panels, records, strict=True):
        rows = record["contenders"][::-1]
        names, medians = [row["name"] for row in rows], np.array([row["median"] for row in rows]) * 1e3
        quartiles = np.array([row["quartiles"] for row in rows]).T * 1e3
        bars = axes.barh(
            names, medians, xerr=abs(quartiles - medians), height=0.7, ecolor="#444444",
            color=["#1f6fb4" if name.startswith("ours") else "#b9c4cf" for name in names],
        )  # fmt: skip
        labels = [f"{row['median'] * 1e3:.4g} ms   {row['ratio']:.2f}x" for row in rows]
        axes.bar_label(bars, labels, padding=6, fontsize=9, bbox={"color": "white", "pad": 1}, zorder=3)
        limit = record["roofline"]["seconds"] * 1e3
        axes.axvline(limit, color="#c0392b", linestyle="--", linewidth=1.2, label=f"roofline {limit:.4g} ms")
        axes.set_xlim(0, 1.25 * max(medians.max(), limit))
        axes.set_xlabel("ms (median; whiskers: quartiles)")
        axes.set_title(record["title"], fontsize=10, loc="left")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def append_json(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Add ``records`` to the list in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, *records], indent=1) + "\n")


def hardware(device: DeviceName) -> str:
    """The name of the GPU, or of the CPU and how many threads run on it."""
    if device is DeviceName.CUDA:
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{[*models, platform.processor()][0]}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries at work."""
    names = ("torch", "torchvision", "timm", "detectron2", "onnxruntime", "openvino", "nncf")
    found = {name: str(sys.modules[name].__version__) for name in names if sys.modules.get(name)}
    return {"python": platform.python_version(), **found}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    workload: Annotated[list[Workload] | None, typer.Option(help="Repeatable.  [default: infer]")] = None,
    name: Annotated[list[str] | None, typer.Option(help="Repeatable.  [default: resnet50]")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.  [default: 1]")] = None,
    image_size: Annotated[tuple[int, int], typer.Option(metavar="H W", min=1, help="In pixels.")] = (480, 640),
    dtype: Annotated[list[DtypeName] | None, typer.Option(help="Repeatable.  [default: float32]")] = None,
    device: Annotated[DeviceName, typer.Option()] = DeviceName.CPU,
    peers: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(PEERS),
    compile_peers_at: Annotated[
        list[int] | None, typer.Option(help="Batches at which to compile torchvision; repeatable.  [default: all]")
    ] = None,
    norms_train: Annotated[
        bool, typer.Option("--norms-train", help="In training, weight and bias behind fixed statistics (bn_eval).")
    ] = False,
    pyramid: Annotated[bool, typer.Option("--pyramid", help="In inference, P2 to P5 of a pyramid.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="List of results to append to.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Bar chart (PNG).")] = None,
) -> None:
    """Run every combination of the repeatable options."""
    chosen = [peer for peer in peers.split(",") if peer]
    if unknown := set(chosen) - set(PEERS):
        raise typer.BadParameter(f"unknown peers {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    dtypes, workloads, names = dtype or [DtypeName.FLOAT32], workload or [Workload.INFER], name or ["resnet50"]
    if device is DeviceName.CUDA and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; use --device cpu")
    if DtypeName.INT8 in dtypes and (device is DeviceName.CUDA or set(workloads) != {Workload.INFER}):
        raise typer.BadParameter("int8 is for inference on the CPU; take --workload infer --device cpu")
    if norms_train and set(workloads) != {Workload.TRAIN}:
        raise typer.BadParameter("--norms-train concerns training alone: add --workload train, and no other")
    if pyramid and set(workloads) != {Workload.INFER}:
        raise typer.BadParameter("--pyramid concerns inference alone: add --workload infer, and no other")
    require_comparable([each.removeprefix(TIMM) for each in names if each.startswith(TIMM)], workloads, pyramid)
    records: list[dict[str, Any]] = []
    for settings in itertools.product(workloads, names, dtypes, batch or [1]):
        case = Case(settings[0], settings[1], settings[3], *image_size, settings[2], device, norms_train, pyramid)
        # Every contender gets cuDNN's best algorithm for its shapes, and float32 means float32.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            result = run_case(case, chosen, compile_peers_at or [], rounds)
        records.append({**origin_of(case), **result})
        print_record(records[-1])
        if json_file:
            append_json(records[-1:], json_file)  # at once, in case a later one fails
        if picture:
            save_picture(records, picture)
        forget()
    if any("ours" in record["rejected"] for record in records):
        raise typer.Exit(1)


def require_comparable(of_timm: Sequence[str], workloads: Sequence[Workload], pyramid: bool) -> None:
    """Refuse models of timm's that no peer has."""
    if not of_timm:
        return
    if Workload.DETECTOR in workloads or pyramid:
        raise typer.BadParameter(
            "detector and pyramid are torchvision's on its own ResNet; take --workload infer or train, no --pyramid"
        )
    try:
        comparable = import_peer("timm").list_models(module=TIMM_FAMILIES)
    except NotHere as reason:
        raise typer.BadParameter(f"timm's models need timm: {reason}") from None
    if others := [each for each in of_timm if each not in comparable]:
        raise typer.BadParameter(
            f"timm's models must be of its modules {', '.join(TIMM_FAMILIES)}, got {', '.join(others)}; take one "
            "of its ResNets, ResNeXts or RegNets"
        )


def origin_of(case: Case) -> dict[str, Any]:
    """What a reader needs to know to repeat a measurement."""
    return {
        "title": str(case),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "hardware": hardware(case.device),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }


def forget() -> None:
    """Give back what the last case left, and let the next one compile for its own sizes."""
    images_of.cache_clear()
    gradient_of.cache_clear()
    onnx_of.cache_clear()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
