"""An entry of a Triton Inference Server model repository: ``NAME/config.pbtxt`` and ``NAME/1/`` with the file."""

import shutil
from pathlib import Path
from typing import Final

import torch

from backbone.export.network import Network
from backbone.export.request import Request
from backbone.weights.writing import write_atomically

LARGEST_BATCH: Final = 8
"""What Triton may batch together where the file takes any number; a deployer's to change."""

_FILES: Final = {"onnx": ("onnxruntime", "model.onnx"), "openvino": ("openvino", "model.xml")}
_COUNTED: Final = ("boxes", "scores", "labels", "masks", "keypoints", "keypoints_scores")


def write_entry(repository: Path, file: Path, network: Network, request: Request) -> Path:
    """Copy ``file`` into the repository under its own name, with the configuration, and return the latter's path."""
    backend, name = _FILES[request.to]
    entry = repository / file.stem
    (entry / "1").mkdir(parents=True, exist_ok=True)
    for suffix in (".bin", file.suffix):
        source = file.with_suffix(suffix)
        if source.exists() and (suffix == file.suffix or request.to == "openvino"):
            target = (entry / "1" / name).with_suffix(suffix)
            write_atomically(target, lambda draft, source=source: shutil.copyfile(source, draft))  # type: ignore[misc]
    config = entry / "config.pbtxt"
    text = configuration(file.stem, backend, network, request)
    write_atomically(config, lambda draft: _write_text(draft, text))
    return config


def _write_text(draft: Path, text: str) -> None:
    draft.write_text(text)


def configuration(name: str, backend: str, network: Network, request: Request) -> str:
    """Return the text of ``config.pbtxt``: axes that vary are -1, and Triton batches where the file lets it."""
    largest = LARGEST_BATCH if request.batch is None else 0
    leading = [] if largest else [request.batch or 1]
    size = [-1, -1] if request.image_size is None or network.resizes_to else list(request.image_size)
    kind = "TYPE_UINT8" if network.takes_bytes else "TYPE_FP32"
    blocks = [_tensor("input", "images", kind, [*leading, network.channels, *size])]
    for output, shape in output_shapes(network).items():
        kind = "TYPE_INT64" if output in ("labels", "count") else "TYPE_FP32"
        blocks.append(_tensor("output", output, kind, [*leading, *shape]))
    lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {largest}", *blocks]
    if largest:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def output_shapes(network: Network) -> dict[str, list[int]]:
    """Return each output's shape without the batch; -1 where it follows from the image's size."""
    if network.detector is None:
        images = torch.zeros(1, network.channels, *network.example_size)
        with torch.no_grad():
            outputs = network.reference(images.to(torch.uint8) if network.takes_bytes else images)
        fixed = network.resizes_to is not None
        return {
            name: [value.shape[1], *(value.shape[2:] if fixed else [-1] * (value.ndim - 2))]
            for name, value in outputs.items()
        }
    from backbone.export.detection.core import fixed_shapes

    return fixed_shapes(network.detector)


def _tensor(role: str, name: str, kind: str, dims: list[int]) -> str:
    reshape = " reshape { shape: [ ] }" if dims == [1] and name == "count" else ""
    return f'{role} [ {{ name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, dims))} ]{reshape} }} ]'
