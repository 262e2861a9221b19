"""Whether a file gives what the model gives: compared in the file's own runtime before it is put in its place."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from backbone.export.network import Network, Outputs
from backbone.export.request import DType, Request
from backbone.export.tracing import Traced

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[NDArray[Any]], Arrays]

TOLERANCE: Final[Mapping[DType, float]] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2, "int8": 0.3}
"""Largest difference of a feature, in units of the map's largest value; int8 is held to its cosine instead."""
LEAST_COSINE: Final = 0.97
"""Of the angle between a map of an int8 file and the model's, over all of its values."""
BOX_TOLERANCE: Final = 0.1
"""Largest difference of a box's corner, in pixels; keypoints are places of a maximum and may jump."""
SCORE_TOLERANCE: Final = 1e-3

_COARSE: Final = 16
_TIMED_RUNS: Final = 5
_ODD: Final = (161, 225)
_EVEN: Final = (160, 224)


class ExportMismatchError(ValueError):
    """The file does not compute what the model computes; it was not kept."""


class Case(NamedTuple):
    """One batch of check images.

    Attributes:
        batch: Number of images.
        height: In pixels.
        width: In pixels.
        seed: Decides what is seen.
    """

    batch: int
    height: int
    width: int
    seed: int


class Difference(NamedTuple):
    """How far file and model are apart.

    Attributes:
        features: In units of the largest value of each feature map.
        boxes: In pixels.
        scores: Of detections.
        num_detections: How many were compared; 0 for a model without.
        cosines: Of each output of an int8 file with the model's, the lowest of all batches.
    """

    features: float = 0.0
    boxes: float = 0.0
    scores: float = 0.0
    num_detections: int = 0
    cosines: Mapping[str, float] = MappingProxyType({})

    def larger(self, other: "Difference") -> "Difference":
        """Return the larger of each difference, and the sum of detections."""
        return Difference(
            max(self.features, other.features),
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
            self.num_detections + other.num_detections,
            {name: min(self.cosines.get(name, 1.0), cosine) for name, cosine in other.cosines.items()},
        )


def cases(network: Network, traced: Traced, request: Request) -> list[Case]:
    """Return batches of two sizes and two numbers of images, as far as the file takes more than one."""
    batches = [request.batch] * 2 if request.batch else [2, 1]
    if request.image_size is not None and network.resizes_to is None:
        sizes = [request.image_size] * 2
    else:
        sizes = [network.example_size, _second_size(network, traced)]
    if network.detector is not None:
        pairs = list(zip(batches, sizes, strict=True))
    else:
        pairs = [(batch, size) for size in sizes for batch in batches]
    return [Case(batch, *size, seed) for seed, (batch, size) in enumerate(pairs)]


def _second_size(network: Network, traced: Traced) -> tuple[int, int]:
    """An odd size where the network takes one."""
    if network.detector is not None:
        height, width = network.example_size
        return width * 3 // 4 + 1, height
    for size in (_ODD, _EVEN):
        height, width = (max(pair) for pair in zip(size, traced.smallest, strict=True))
        try:
            with torch.no_grad():
                network.reference(_tensor(images_of(Case(1, height, width, 0), network.channels, network.takes_bytes)))
        except (RuntimeError, ValueError, AssertionError):
            continue
        return height, width
    return network.example_size[0] * 2, network.example_size[1]


def images_of(case: Case, channels: int, takes_bytes: bool) -> NDArray[Any]:
    """Return blots of colour under fine noise (N, C, H, W), the same on every machine."""
    random = np.random.RandomState(case.seed)  # its streams are frozen for good
    rows, columns = -(-case.height // _COARSE), -(-case.width // _COARSE)
    blots = random.random_sample((case.batch, channels, rows, columns))
    blots = blots.repeat(_COARSE, 2).repeat(_COARSE, 3)[:, :, : case.height, : case.width]
    images = 0.8 * blots + 0.2 * random.random_sample(blots.shape)
    return (images * 255).astype(np.uint8) if takes_bytes else images.astype(np.float32)


def expectations(network: Network, checked: Sequence[Case]) -> list[tuple[Case, Outputs]]:
    """Return what PyTorch computes for each case."""
    with torch.no_grad():
        return [
            (case, network.reference(_tensor(images_of(case, network.channels, network.takes_bytes))))
            for case in checked
        ]


def compare(network: Network, expected: Sequence[tuple[Case, Outputs]], run: Run, dtype: DType) -> Difference:
    """Return the largest differences over all cases.

    Raises:
        ExportMismatchError: If one is beyond its tolerance, or an output is missing or of another shape.
    """
    largest = Difference()
    for case, outputs in expected:
        try:
            actual = run(images_of(case, network.channels, network.takes_bytes))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ExportMismatchError(f"the runtime cannot run the file on {_say(case)}: {reason}") from error
        if network.detector is None:
            found = _feature_difference(outputs, actual, case, dtype)
        else:
            from backbone.export.detection.comparison import detection_difference

            found = detection_difference(outputs, actual, case)
        largest = largest.larger(found)
    return largest


def _feature_difference(expected: Outputs, actual: Arrays, case: Case, dtype: DType) -> Difference:
    largest, cosines = 0.0, {}
    for name, value in expected.items():
        reference = value.double().numpy()
        if name not in actual or actual[name].shape != reference.shape:
            got = actual[name].shape if name in actual else f"only {', '.join(actual)}"
            raise ExportMismatchError(f"{name} must be {reference.shape} for {_say(case)}, the file gives {got}")
        difference = float(np.abs(actual[name] - reference).max() / max(np.abs(reference).max(), 1e-30))
        if dtype == "int8":
            cosines[name] = _cosine(actual[name], reference)
            _require_cosine(name, cosines[name], case)
        elif not difference <= TOLERANCE[dtype]:  # NaN, too
            raise ExportMismatchError(
                f"{name} of file and model differ by {difference:.1e} of its largest value for {_say(case)}, more than "
                f"{TOLERANCE[dtype]:.0e}; no file was kept"
            )
        largest = max(largest, difference)
    return Difference(features=largest, cosines=cosines)


def _cosine(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    a, b = actual.astype(np.float64).reshape(-1), reference.reshape(-1)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def _require_cosine(name: str, cosine: float, case: Case) -> None:
    if not cosine >= LEAST_COSINE:
        raise ExportMismatchError(
            f"{name} of the int8 file has a cosine of {cosine:.3f} with the model's for {_say(case)}, less than "
            f"{LEAST_COSINE}: this network loses too much in int8, or the calibration images are unlike what it sees; "
            f"no file was kept"
        )


def latency(run: Run, case: Case, network: Network) -> float:
    """Return the median time of one run on ``case`` in milliseconds."""
    images, times = images_of(case, network.channels, network.takes_bytes), []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def fingerprints(network: Network, expected: Sequence[tuple[Case, Outputs]]) -> str:
    """Return, as JSON, what a file must give for each case: for checking it where the model is not at hand."""
    records = []
    for case, outputs in expected:
        summary = {name: _summary(value.double().numpy()) for name, value in outputs.items() if value.numel()}
        if network.detector is not None:
            summary = {"count": [sum(len(value) for name, value in outputs.items() if name.startswith("boxes/"))]}
        records.append({"case": case, "channels": network.channels, "bytes": network.takes_bytes, "summary": summary})
    return json.dumps(records)


def check_fingerprints(text: str, run: Run, dtype: DType) -> float:
    """Return the largest relative difference between what the file gives here and what it was exported with.

    Raises:
        ExportMismatchError: If it is beyond the tolerance.
    """
    largest = 0.0
    for record in json.loads(text):
        case = Case(*record["case"])
        actual = run(images_of(case, record["channels"], record["bytes"]))
        for name, summary in record["summary"].items():
            if name not in actual:
                raise ExportMismatchError(f"{name} is missing among the file's outputs: {', '.join(actual)}")
            found = [float(actual[name].sum())] if name == "count" else _summary(actual[name].astype(np.float64))
            scale = max(map(abs, summary)) or 1.0
            difference = max(abs(a - b) for a, b in zip(found, summary, strict=True)) / scale
            if not difference <= (TOLERANCE[dtype] if name != "count" else 0.02):
                raise ExportMismatchError(
                    f"{name} differs from what PyTorch gave at the export by {difference:.1e} for {_say(case)}"
                )
            largest = max(largest, difference)
    return largest


def _summary(values: NDArray[Any]) -> list[float]:
    """Largest magnitude, mean magnitude and some values of all over the tensor."""
    flat = values.reshape(-1)
    some = flat[:: max(len(flat) // 8, 1)][:8]
    return [float(np.abs(flat).max()), float(np.abs(flat).mean()), *map(float, some)]


def _say(case: Case) -> str:
    return f"{case.batch} x {case.height} x {case.width} pixels"


def _tensor(images: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(images)
