"""Backbones, bare or in a detector, measured side by side on the user's own machine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backbone.builder import build_backbone
from backbone.command.description import describe
from backbone.command.detector_description import describe_detector
from backbone.command.live_memory import peak_memory
from backbone.command.timing import quartiles, time_rounds
from backbone.config import BackboneConfig
from backbone.inference.optimize import optimize_for_inference
from backbone.recipe import DetectorConfig, DetectorName
from backbone.weights.published import list_weights

MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one call, over the rounds.

    Attributes:
        median: Half of the rounds were faster.
        low: Lower quartile.
        high: Upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Latency":
        """Summarise the times of all rounds."""
        low, median, high = quartiles(times)
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Compared:
    """What was found of one candidate.

    Attributes:
        name: As it was asked for.
        parameters: Scalar parameters; with a detector, of all of it.
        multiply_adds: Of one image.
        plain: Latency of the model as it is built.
        optimized: Latency of its copy by ``optimize_for_inference``.
        memory: Bytes of the weights, and of what one plain forward pass holds at most beside them.
        weights: Published weights whose accuracy it is: the config's, else the library's own choice; None without.
        accuracy: Top-1 on ImageNet-1K in percent, as the weights' library states it; None where it states none.
    """

    name: str
    parameters: int
    multiply_adds: int
    plain: Latency
    optimized: Latency
    memory: int
    weights: str | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Question:
    """What is compared, and how.

    Attributes:
        image_size: Height and width, in pixels.
        batch: Images of one call.
        device: Where.
        rounds: How often each candidate is timed.
        detector: The detector around each backbone; None for bare backbones.
    """

    image_size: tuple[int, int] = (480, 640)
    batch: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 15
    detector: DetectorName | None = None


class Candidate:
    """One backbone, or a detector on it, plain and optimised, with random weights: they decide no latency.

    Args:
        name: What to call it.
        config: The backbone.
        question: What is asked of it.

    Raises:
        ValueError: If it cannot be built.
    """

    def __init__(self, name: str, config: BackboneConfig, question: Question) -> None:
        self.name, self.config, self.question = name, config, question
        bare = config.model_copy(update={"weights": None, "stem_channels_from": None})
        torch.manual_seed(0)
        self.parameters, self.multiply_adds = _counted(bare, question)
        model = _built(bare, question).eval().to(question.device)
        inputs = _inputs(config.in_channels, question)
        self.plain = _step(model, inputs)
        self.optimized = _step(optimize_for_inference(model), inputs)
        tensors = [*model.parameters(), *model.buffers()]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.memory = held + peak_memory(question.device, self.plain)

    def compared(self, plain: Sequence[float], optimized: Sequence[float]) -> Compared:
        """Return all that is known, now that it was timed."""
        published = {each.name: each.accuracy for each in list_weights(self.config.name)}
        weights = self.config.weights or next(iter(published), None)
        weights = weights if weights in published else None
        latencies = Latency.of(plain), Latency.of(optimized)
        accuracy = published.get(weights) if weights else None
        return Compared(self.name, self.parameters, self.multiply_adds, *latencies, self.memory, weights, accuracy)


Track = Callable[[Iterable[dict[str, float]], int], Iterable[dict[str, float]]]


def compare(
    candidates: Sequence[Candidate], question: Question, track: Track = lambda rounds, _: rounds
) -> list[Compared]:
    """Time the candidates against each other; return them with the quickest optimised copy first.

    Args:
        candidates: What to time; all are in memory at once.
        question: As they were built for.
        track: Wraps the rounds and their number, such as in a progress bar.
    """
    runs = {f"plain {number}": each.plain for number, each in enumerate(candidates)}
    runs |= {f"optimized {number}": each.optimized for number, each in enumerate(candidates)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for seconds in track(time_rounds(question.device.type, runs, question.rounds), question.rounds):
        for name, each in seconds.items():
            times[name].append(each)
    found = [
        candidate.compared(times[f"plain {number}"], times[f"optimized {number}"])
        for number, candidate in enumerate(candidates)
    ]
    return sorted(found, key=lambda each: each.optimized.median)


def _counted(config: BackboneConfig, question: Question) -> tuple[int, int]:
    """Return parameters, and multiply-adds of one image."""
    if question.detector is not None:
        detector = describe_detector(_detector_config(config, question), question.image_size)
        return detector.parameters, detector.multiply_adds
    with torch.device("meta"):
        description = describe(build_backbone(config), question.image_size, in_channels=config.in_channels)
    return description.parameters, description.multiply_adds


def _built(config: BackboneConfig, question: Question) -> nn.Module:
    if question.detector is None:
        return build_backbone(config)
    from backbone.hosts.torchvision import build_detector

    return build_detector(_detector_config(config, question))


def _detector_config(config: BackboneConfig, question: Question) -> DetectorConfig:
    """Return the detector for images as they are; the backbone says only what its recipe said."""
    said = {key: getattr(config, key) for key in config.model_fields_set if key != "weights"}
    sides = sorted(question.image_size)
    settings: dict[str, Any] = {"detector": question.detector, "backbone": said}
    return DetectorConfig.model_validate({**settings, "min_size": sides[0], "max_size": sides[1]})


def _inputs(in_channels: int, question: Question) -> Any:  # noqa: ANN401 - a batch, or a list of images
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(question.batch, in_channels, *question.image_size, generator=generator).to(question.device)
    segmenter = question.detector in ("deeplabv3", "fcn")
    return images if question.detector is None or segmenter else list(images)


def _step(model: nn.Module, inputs: Tensor | list[Tensor]) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return model(inputs)

    return step
