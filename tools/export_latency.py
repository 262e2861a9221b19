"""Time exported files in their runtimes beside our optimised copy in PyTorch and torchvision's exported network.

python tools/export_latency.py --name resnet50 --json docs/export_latency.json --table docs/deployment.md

All run in shuffled rounds on the same image, with the same number of threads. A ratio above 1 is slower than our
optimised copy. Files that are in the folder already are timed as they are.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from backbone import build_backbone, optimize_for_inference
from backbone.command.timing import Run, time_rounds
from backbone.export import SUFFIXES, export_model
from backbone.export.quiet import quiet
from backbone.export.request import Target

TARGETS: tuple[Target, ...] = ("onnx", "openvino", "aoti")
MARKS = ("<!-- latency: begin -->", "<!-- latency: end -->")


def main() -> None:
    """Export what is missing, time all, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="resnet50", help="one of our ResNets that torchvision has, too")
    parser.add_argument("--image-size", nargs=2, type=int, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--to", action="append", choices=TARGETS, help="runtime; may be given again (default: all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--files", type=Path, default=Path("out/latency"), help="folder of the exported files")
    parser.add_argument("--json", type=Path, help="file to add the ratios to")
    parser.add_argument("--table", type=Path, help="page to write the table of that file into")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    size: tuple[int, int] = tuple(arguments.image_size)
    candidates = prepare(arguments.name, size, arguments.to or TARGETS, arguments.files)
    times = list(time_rounds("cpu", candidates, arguments.rounds))
    result = summary(times)
    for name, (milliseconds, ratio) in result.items():
        print(f"{name:32} {milliseconds:8.1f} ms {ratio:6.2f}")
    if arguments.json:
        results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        stamp = {"image_size": size, "threads": torch.get_num_threads(), "date": date.today().isoformat()}
        results[arguments.name] = {"times": result, "torch": torch.__version__, **stamp}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        if arguments.table:
            write_table(arguments.table, results)


def prepare(name: str, size: tuple[int, int], targets: tuple[Target, ...], folder: Path) -> dict[str, Run]:
    """Return what is timed, by name; each has been compared with PyTorch by its export."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = build_backbone(name, norm="bn").eval()
    theirs = Levels(name, ours.state_dict()).eval()
    images = torch.rand(1, 3, *size)
    optimised = optimize_for_inference(ours)
    candidates = {"ours, optimised, in PyTorch": inference(optimised, images)}
    for owner, model in (("ours", ours), ("torchvision", theirs)):
        for target in targets:
            file = folder / f"{owner}_{name}_{size[0]}x{size[1]}_{target}{SUFFIXES[target]}"
            if not file.exists():
                write(owner, model, images, file, target)
            candidates[f"{owner}, {target} file"] = RUNTIMES[target](file, images.numpy())
    return candidates


class Levels(nn.Module):
    """torchvision's ResNet as a backbone: C2 to C5.

    Args:
        name: Of torchvision's function.
        state: Weights without a classifier.
    """

    def __init__(self, name: str, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = torchvision.models.get_model(name)
        self.network.fc = nn.Identity()
        self.network.load_state_dict(state)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> ``c2`` to ``c5``."""
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        levels = {}
        for level, stage in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=2):
            levels[f"c{level}"] = x = stage(x)
        return levels


def write(owner: str, model: nn.Module, images: Tensor, file: Path, target: Target) -> None:
    """Export ours by this package, and torchvision's as PyTorch's and OpenVINO's manuals do."""
    if owner == "ours":
        export_model(model, file, target, image_size=(images.shape[2], images.shape[3]), batch=1)
        return
    import openvino

    with quiet(), torch.no_grad():
        if target == "onnx":
            torch.onnx.export(model, (images,), file, dynamo=True, external_data=False, verbose=False)
        elif target == "openvino":
            openvino.save_model(openvino.convert_model(model, example_input=images), file, compress_to_fp16=False)
        else:
            program = torch.export.export(model, (images,), strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def inference(model: Callable[[Tensor], object], images: Tensor) -> Run:
    """Return a run of a network without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def in_onnxruntime(file: Path, images: np.ndarray[Any, Any]) -> Run:
    """Return a run of ONNX Runtime; its threads must not spin while the others are timed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def in_openvino(file: Path, images: np.ndarray[Any, Any]) -> Run:
    """Return a run of OpenVINO in float32."""
    import openvino

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **threads})
    request = compiled.create_infer_request()
    return lambda: request.infer([images], share_inputs=True, share_outputs=True)


def in_aoti(file: Path, images: np.ndarray[Any, Any]) -> Run:
    """Return a run of AOTInductor's package."""
    with quiet():
        model = torch._inductor.aoti_load_package(str(file))
    return inference(model, torch.from_numpy(images))


RUNTIMES: dict[Target, Callable[[Path, np.ndarray[Any, Any]], Run]] = {
    "onnx": in_onnxruntime,
    "openvino": in_openvino,
    "aoti": in_aoti,
}


def summary(times: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return of each its median in milliseconds, and the median over rounds of its time over the first one's."""
    first = next(name for name in times[0] if name.startswith("ours, optimised"))
    return {
        name: (
            float(np.median([each[name] for each in times])) * 1000,
            float(np.median([each[name] / each[first] for each in times])),
        )
        for name in sorted(times[0], key=lambda name: (name != first, name))
    }


def write_table(page: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table between its marks in ``page``."""
    names = list(dict.fromkeys(name for row in results.values() for name in row["times"]))
    lines = [f"| | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for name in names:
        cells = [row["times"].get(name) for row in results.values()]
        shown = " | ".join(f"{cell[1]:.2f} ({cell[0]:.0f} ms)" if cell else "not run" for cell in cells)
        lines.append(f"| {name} | {shown} |")
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
