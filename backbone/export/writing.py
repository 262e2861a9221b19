"""One export from beginning to end: trace, write a draft, compare it with the model, put it in its place."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from torch import Tensor, nn

from backbone.export import checking, runners
from backbone.export.checking import Difference
from backbone.export.metadata import PREFIX, describe
from backbone.export.network import Network, understand
from backbone.export.request import DEFAULT_OPSET, DType, Request, Target
from backbone.export.tracing import Traced, trace
from backbone.weights.writing import put_in_place

_DISK_FAILURES: Final = ("iostream error", "No space left", "File too large", "File size limit exceeded", "Can't open")
"""What libraries and compilers say that raise no OSError."""


@dataclass(frozen=True)
class ExportReport:
    """What an export came to.

    Attributes:
        path: The file.
        target: Runtime it is for.
        outputs: Their names, in order.
        difference: Largest differences between file and model over all checked batches.
        cases: The batches that were compared: number, height and width in pixels.
        latency: Of the file in its runtime, in milliseconds, for the first of the smallest batches.
        latency_of: That batch.
        size: Of the file in bytes.
        smallest_image: Smallest height and width in pixels that the trace promises to hold for.
    """

    path: Path
    target: Target
    outputs: tuple[str, ...]
    difference: Difference
    cases: tuple[tuple[int, int, int], ...]
    latency: float
    latency_of: tuple[int, int, int]
    size: int
    smallest_image: tuple[int, int]

    def __str__(self) -> str:
        found = self.difference
        apart = f"{found.features:.1e} of a map's largest value"
        if "count" in self.outputs:
            apart = f"{found.boxes:.1e} pixels and {found.scores:.1e} in score over {found.num_detections} detections"
        if found.cosines:
            apart = "in cosine " + ", ".join(f"{name} {cosine:.4f}" for name, cosine in found.cosines.items())
        batches = ", ".join(" x ".join(map(str, case)) for case in self.cases)
        lines = [
            f"{self.path} ({self.size / 1e6:.1f} MB, {self.target}): {', '.join(self.outputs)}",
            f"largest difference to PyTorch {apart}, at {batches}",
            f"{self.latency:.1f} ms for {' x '.join(map(str, self.latency_of))}",
        ]
        if "count" in self.outputs and not found.num_detections:
            lines.insert(2, "nothing was detected in the check images, by file and model alike")
        return "\n".join(lines)


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    to: Target = "onnx",
    *,
    image_size: tuple[int, int] | None = None,
    batch: int | None = None,
    dtype: DType = "float32",
    opset: int = DEFAULT_OPSET,
    with_preprocessing: bool = False,
    class_names: Sequence[str] = (),
    calibration: Sequence[Tensor] = (),
    triton: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Write ``model`` as a file for another runtime, and compare both before the file is put in its place.

    Outputs are called as the model calls them, ``c2`` to ``c5`` or ``p2`` to ``p7``. A detector of torchvision gives
    ``boxes`` (N, D, 4), ``scores`` (N, D), ``labels`` (N, D) and ``count`` (N,), best first and zeros after ``count``;
    Mask R-CNN also ``masks`` (N, D, 28, 28) within the boxes, Keypoint R-CNN ``keypoints`` (N, D, J, 3) and
    ``keypoints_scores``. Detectors resize and normalise themselves, as in PyTorch. ``model`` stays as it is.

    Args:
        model: A backbone, a backbone with pyramid, a detector or segmenter of torchvision, or any module that takes
            images (N, C, H, W) and returns tensors.
        path: The file; its suffix must be the target's. OpenVINO has its weights in a ``.bin`` beside it.
        to: ``onnx``, ``openvino``, ``aoti``, ``torch-export`` or ``executorch``.
        image_size: Height and width in pixels; None for any. With ``with_preprocessing`` a backbone's images are
            resized to it inside the file.
        batch: Images at a time; None for any number.
        dtype: What the network computes in. Images and outputs are float32 all the same.
        opset: Of ONNX, at least 18.
        with_preprocessing: Let the file take uint8 RGB images (N, 3, H, W) and prepare them as the weights expect.
        class_names: By label, for the file's metadata.
        calibration: For int8: batches of images as the file takes them, typical of what it will see. Some hundred
            images are enough; a sequence that reads them one by one keeps them out of memory.
        triton: Folder of a Triton model repository to write an entry for the file into.

    Raises:
        ValueError: If something is not on offer or the model cannot be exported.
        ExportMismatchError: (a ValueError) If the file does not compute what the model computes. No file is left.
        MissingExtraError: (a ModuleNotFoundError) If a library is missing: ``pip install 'backbone[export]'``.
        OSError: If the file cannot be written. A file that was there is as it was.
    """
    if (dtype == "int8") != bool(calibration):
        raise ValueError("dtype int8 needs calibration images, and only int8 does; give both or neither")
    request = Request(
        Path(path),
        to,
        image_size,
        batch,
        dtype,
        opset,
        with_preprocessing,
        class_names,
        Path(triton) if triton is not None else None,
    )
    network = understand(model, request)
    traced = trace(network, request)
    checked = checking.cases(network, traced, request)
    expected = checking.expectations(network, checked)
    metadata = describe(model, network, traced, request)
    metadata[PREFIX + "check"] = checking.fingerprints(network, expected)
    with tempfile.TemporaryDirectory(dir=request.path.parent, prefix=f".{request.path.name}.", suffix=".part") as name:
        draft = Path(name) / request.path.name
        write_draft(network, traced, request, metadata, draft, calibration)
        run = runners.load(draft, to)
        difference = checking.compare(network, expected, run, dtype)
        timed = min(checked, key=lambda case: case.batch)
        milliseconds = checking.latency(run, timed, network)
        del run  # it may hold the file open
        size = sum(file.stat().st_size for file in draft.parent.iterdir())
        _put_in_place(draft, request.path)
    if request.triton is not None:
        from backbone.export.triton import write_entry

        write_entry(request.triton, request.path, network, request)
    batches = tuple(case[:3] for case in checked)
    return ExportReport(
        request.path,
        to,
        network.outputs,
        difference,
        batches,
        milliseconds,
        timed[:3],
        size,
        traced.smallest,
    )


def write_draft(
    network: Network,
    traced: Traced,
    request: Request,
    metadata: dict[str, str],
    draft: Path,
    calibration: Sequence[Tensor],
) -> None:
    """Write the draft; a library's own error about the disk becomes an OSError."""
    try:
        if request.to in ("onnx", "openvino"):
            from backbone.export import onnx, openvino

            model = onnx.build(network, traced, request, metadata)
            if request.to == "onnx":
                if request.dtype == "int8":
                    from backbone.export.quantization import quantise

                    model = quantise(model, calibration, draft.parent)
                onnx.write(model, draft)
            else:
                half, images = request.dtype == "float16", calibration if request.dtype == "int8" else ()
                openvino.write(model, draft, metadata, half_weights=half, calibration=images)
        elif request.to == "aoti":
            from backbone.export import aoti

            aoti.write(traced.program, draft, metadata)
        elif request.to == "torch-export":
            from backbone.export import torch_export

            torch_export.write(traced.program, draft, metadata)
        else:
            from backbone.export import executorch

            executorch.write(traced.program, draft, metadata)
    except OSError as error:
        raise OSError(error.errno, f"{request.path}: cannot be written ({error.strerror or error})") from error
    except RuntimeError as error:
        raise _understood(error, request) from error


def _understood(error: RuntimeError, request: Request) -> OSError | ValueError:
    """Return what a library's error says of the disk or of the model."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, OSError):
            return OSError(cause.errno, f"{request.path}: cannot be written ({cause.strerror or cause})")
        for line in str(cause).splitlines():
            if any(word in line for word in _DISK_FAILURES):
                return OSError(f"{request.path}: cannot be written ({line.strip()[-200:]})")
    return ValueError(f"{request.to} cannot express this model: {': '.join(map(_told, chain[1:] or chain))}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error``, what it came of, and so on to the root; exporters wrap that in advice on themselves."""
    while error is not None:
        yield error
        error = error.__cause__


def _told(error: BaseException) -> str:
    """Return the first line of an error, and its kind where that line alone says little."""
    name, line = type(error).__name__, next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not line:
        return name
    return f"{name} {line[:200]}" if isinstance(error, LookupError) else line[:200]


def _put_in_place(draft: Path, path: Path) -> None:
    """Move every file of the draft's folder; the one that was asked for comes last, once what it needs is there."""
    for file in sorted(draft.parent.iterdir(), key=lambda each: each == draft):
        with suppress(PermissionError):
            file.chmod(0o644)
        put_in_place(file, path.parent / file.name)


def check_file(file: str | os.PathLike[str]) -> str:
    """Run an exported file on the images it was checked with and compare with what PyTorch gave then.

    Returns:
        What the file is, and the largest relative difference, for people.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of ``export_model``, or gives something else here (an ExportMismatchError).
    """
    path = Path(file)
    metadata = runners.read_metadata(path)
    if "check" not in metadata:
        raise ValueError(f"{path}: carries nothing to check it by; only files of `backbone export` do")
    target = runners.target_of(path)
    run = runners.load(path, target)
    difference = checking.check_fingerprints(metadata["check"], run, cast(DType, metadata["dtype"]))
    outputs = metadata["outputs"].strip("[]").replace('"', "")
    return (
        f"{path}: {metadata['model']} for {target}, {outputs}; weights {metadata['weights_sha256'][:12]}\n"
        f"largest difference to what PyTorch gave at the export {difference:.1e}"
    )
