"""What calibration images showed of a network: the range of every value, and what 8 bits cost every convolution."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine.int8 import Codes, Means, decode, encode, int8_weight
from backbone.features import Backbone, input_channels, require_images
from backbone.inference.int8.kernel import padded
from backbone.inference.int8.program import after, in_floats
from backbone.inference.int8.ranges import Histogram
from backbone.inference.int8.tracing import Conv, Network, Selection, Shape, filled, names_in, trace

_KEPT_IMAGES: Final = 8
_FORMAT: Final = 1
_SAME: Final = 1e-3  # of the norm: other kernels round otherwise


@dataclass(frozen=True, slots=True)
class Calibration:
    """The ranges of one network's values, from calibration images; give it instead of images to do without them.

    Attributes:
        fingerprint: Tells the network it belongs to.
        codes: Scale and zero point of each value, by name.
        means: Of each value that a convolution takes: its mean by channel, and what codes lose of it.
        errors: What 8 bits cost each layer, by its path: the root of the mean squared error of its output for
            exact inputs, in units of the output's root mean square.
        apart: Sums that are computed by themselves.
        num_images: How many images there were.
        per_channel: Of inputs of linear layers what each channel is divided by before it is written.
    """

    fingerprint: str
    codes: Mapping[str, Codes]
    means: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]
    errors: Mapping[str, float]
    apart: tuple[str, ...]
    num_images: int
    per_channel: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def means_of(self, name: str) -> Means:
        """Return the ``means`` of a value as tensors."""
        value, lost = self.means[name]
        return Means(torch.tensor(value, device="cpu"), torch.tensor(lost, device="cpu"))

    def input_means(self) -> dict[str, Means]:
        """Return ``means`` as tensors."""
        return {name: self.means_of(name) for name in self.means}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON to ``path``, whose folder must exist."""
        path = Path(path)
        path.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what ``save`` wrote.

        Raises:
            ValueError: If something else is there.
        """
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
            if read.pop("format") != _FORMAT:
                raise KeyError("format")
            codes = {name: Codes(float(scale), int(zero)) for name, (scale, zero) in read.pop("codes").items()}
            means = {name: (tuple(value), tuple(lost)) for name, (value, lost) in read.pop("means").items()}
            per_channel = {name: tuple(value) for name, value in read.pop("per_channel", {}).items()}
            return cls(codes=codes, means=means, apart=tuple(read.pop("apart")), per_channel=per_channel, **read)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: must be what Calibration.save wrote, got something else ({error!r}); calibrate anew and save"
            ) from None


class Observer:
    """Stands in for a backbone's method while calibration images pass: computes in floats and counts.

    Args:
        root: The backbone.
    """

    def __init__(self, root: Backbone) -> None:
        self.root = root
        self.network = trace(root)
        self.apart: set[str] = set()
        self.num_images = 0
        self._named, self._inputs = _named(self.network), {step.x for step in self.network.convs()}
        self._pixels: dict[str, int] = {}
        self._sums: dict[str, Any] = {}
        self._histograms: dict[str, Histogram] = {}
        self._kept: list[Tensor] = []

    def __call__(self, images: Tensor) -> Any:  # noqa: ANN401
        """Images (N, C, H, W) -> what the backbone makes of them."""
        require_images(images, input_channels(self.root))
        self._require_same_shapes(images)
        values = self._run(images, self._count)
        if not self.num_images:
            with torch.inference_mode(False), torch.no_grad():
                self._require_pure_steps(images.clone())
        self.num_images += len(images)
        missing = _KEPT_IMAGES - sum(map(len, self._kept))
        if missing > 0:
            self._kept.append(images[:missing].detach().clone())
        return filled(self.network.result, values.__getitem__)

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Return the convolutions by path."""
        return [(step.path, step.module) for step in self.network.convs()]

    def watch(self, stack: ExitStack) -> None:
        """Stand in for the method until ``stack`` closes."""
        setattr(self.root, self.root.traced_method, self)
        stack.callback(delattr, self.root, self.root.traced_method)

    def calibration(self) -> Calibration:
        """Return what was seen."""
        codes = {name: histogram.codes() for name, histogram in self._histograms.items()}
        for step in self.network.steps:
            if isinstance(step, Selection) and step.out in codes:
                codes[step.out] = codes[step.x]  # a maximum of codes is the code of the maximum
        means = self._means(codes)
        return Calibration(
            self.network.fingerprint,
            codes,
            {name: (numbers(of.value), numbers(of.lost)) for name, of in means.items()},
            self._errors(codes, means),
            tuple(sorted(self.apart)),
            self.num_images,
        )

    def _count(self, name: str, values: dict[str, Any]) -> None:
        if name not in self._named:
            return
        value = values[name]
        if not self._histograms.setdefault(name, Histogram()).add(value):
            what = "the images" if name == self.network.images else f"the output of {name}"
            raise ValueError(
                f"calibration must give finite numbers, got NaN or infinity in {what} after {self.num_images} images; "
                f"check the images and the weights"
            )
        if name in self._inputs:
            self._pixels[name] = self._pixels.get(name, 0) + value.numel() // value.shape[1]
            self._sums[name] = self._sums.get(name, 0) + value.float().sum((0, 2, 3))

    def _run(self, images: Tensor, see: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
        """Compute in floats and show every value, with those that are still there: its inputs are."""
        last_read = {name: step.out for step in self.network.steps for name in step.reads()}
        kept = set(names_in(self.network.result))
        values: dict[str, Any] = {self.network.images: images}
        see(self.network.images, values)
        for step in self.network.steps:
            if isinstance(step, Conv):
                residual = None if step.residual is None else values[step.residual]
                values[step.out] = in_floats(step, values[step.x], residual)
            elif isinstance(step, Shape):
                values[step.out] = step.run(values[step.x])
            else:
                call = step.call if isinstance(step, Selection) else step
                values[step.out] = call.run(values.__getitem__)
            see(step.out, values)
            for name in set(step.reads()) - kept:
                if last_read[name] == step.out:
                    del values[name]
        return values

    def _require_same_shapes(self, images: Tensor) -> None:
        """Take sums of different shapes apart from their convolutions, once."""
        if self.num_images:
            return
        apart: set[str] = set()
        adding = {step.out: step for step in self.network.convs() if step.residual is not None}

        def see(name: str, values: dict[str, Any]) -> None:
            step = adding.get(name)
            if step is not None and step.module(values[step.x]).shape != values[str(step.residual)].shape:
                apart.add(str(step.addition))

        self._run(images, see)
        if apart - self.apart:
            self.apart |= apart
            self.network = trace(self.root, frozenset(self.apart))
            self._named, self._inputs = _named(self.network), {step.x for step in self.network.convs()}
            self._require_same_shapes(images)  # the other side's convolution may take the sum along now

    def _require_pure_steps(self, images: Tensor) -> None:
        """Refuse a network that writes into a value by way of another, or otherwise does more than its steps say.

        Raises:
            ValueError: If a value changes before its last reader, or the modules' own result is another.
        """
        network, root = self.network, self.root
        kept, versions = set(names_in(network.result)), dict[str, int]()
        order = {step.out: number for number, step in enumerate(network.steps)}
        last_read = {name: order[step.out] for step in network.steps for name in step.reads()}

        def see(name: str, values: dict[str, Any]) -> None:
            now = order.get(name, -1)
            for other, version in versions.items():
                is_read_again = other in kept or last_read.get(other, -1) > now
                if is_read_again and other in values and values[other]._version != version:
                    raise ValueError(_overwritten(root, other))
            if isinstance(values[name], Tensor):
                versions[name] = values[name]._version

        result = filled(network.result, self._run(images, see).__getitem__)
        own = getattr(type(root), root.traced_method)(root, images)
        for name, step, value in zip(names_in(network.result), _tensors(result), _tensors(own), strict=True):
            if (step - value).norm() > _SAME * value.norm():
                raise ValueError(_overwritten(root, name))

    def _means(self, codes: Mapping[str, Codes]) -> dict[str, Means]:
        """Return the mean of each convolution's input, and what codes lose of it on the images that were kept."""
        inputs = {step.x for step in self.network.convs()}
        lost: dict[str, Tensor] = {}
        for images in self._kept:

            def see(name: str, values: dict[str, Any], weight: float = len(images) / sum(map(len, self._kept))) -> None:
                if name in inputs:
                    value = values[name]
                    of_value = (value - decode(encode(value, codes[name]), codes[name])).mean((0, 2, 3)) * weight
                    lost[name] = lost.get(name, torch.zeros_like(of_value)) + of_value

            self._run(images, see)
        return {name: Means(self._sums[name] / self._pixels[name], lost[name]) for name in sorted(inputs)}

    def _errors(self, codes: Mapping[str, Codes], means: Mapping[str, Means]) -> dict[str, float]:
        """Return the error of each convolution on the images that were kept."""
        squares: dict[str, list[float]] = {}
        convs = {step.out: step for step in self.network.convs()}

        def see(name: str, values: dict[str, Any]) -> None:
            step = convs.get(name)
            if step is None:
                return
            exact = values[name].float()
            error = _written(step, values, codes, means[step.x]) - exact
            of_step = squares.setdefault(step.path, [0.0, 0.0])
            of_step[0] += float(error.double().square().sum())
            of_step[1] += float(exact.double().square().sum())

        for images in self._kept:
            self._run(images, see)
        return {path: math.sqrt(wrong / right) if right else 0.0 for path, (wrong, right) in squares.items()}


def _overwritten(root: Backbone, name: str) -> str:
    return (
        f"dtype=torch.int8 needs values that no other step overwrites, got a {type(root).__name__} that writes into "
        f"{name} by way of another; use dtype=torch.bfloat16"
    )


def _tensors(result: Any) -> list[Tensor]:  # noqa: ANN401
    """Return the tensors in containers of a network's own, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [each for part in (result.values() if isinstance(result, Mapping) else result) for each in _tensors(part)]


def _named(network: Network) -> set[str]:
    """Return the values that may be written in 8 bits."""
    names = {network.images}
    for step in reversed(network.steps):
        if isinstance(step, Conv):
            names |= {step.x, step.out, step.residual or step.x}
        elif isinstance(step, Selection) and step.out in names:
            names.add(step.x)
    return names


def numbers(values: Tensor) -> tuple[float, ...]:
    """Return the seven digits that float32 has."""
    return tuple(float(f"{value:.7g}") for value in values.tolist())


def _written(step: Conv, values: Mapping[str, Tensor], codes: Mapping[str, Codes], means: Means) -> Tensor:
    """Return the output of ``step`` with its exact inputs, its weight and its output in 8 bits."""

    def rounded(name: str) -> Tensor:
        return decode(encode(values[name], codes[name]), codes[name])

    weight = int8_weight(step.module.weight, step.module.bias, step.module.groups, means)  # type: ignore[arg-type]
    x = padded(step.module, rounded(step.x), 0)
    out = F.conv2d(x, weight.floats(), weight.bias, *step.module.geometry)
    out = after(out, None if step.residual is None else rounded(step.residual), step.act)
    return decode(encode(out, codes[step.out]), codes[step.out])


class Watching(Protocol):
    """Who looks at a network while calibration images pass."""

    num_images: int

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Return what may compute in 8 bits, by path."""

    def watch(self, stack: ExitStack) -> None:
        """Look at the calls until ``stack`` closes."""

    def calibration(self) -> Calibration:
        """Return what was seen."""


def calibrate(model: nn.Module, observer: Watching, batches: Iterable[Any]) -> Calibration:
    """Let ``model`` see ``batches`` and return what ``observer`` saw of its backbone.

    Args:
        model: An inference copy, in floats.
        observer: Of the backbone in it.
        batches: Images as ``model`` takes them.

    Raises:
        ValueError: If there is none, one is not what the model takes, or a number is not finite.
    """
    from rich.progress import track  # where nobody calibrates it is not needed

    from backbone.console import errors

    for path, layer in observer.layers():
        if not all(torch.isfinite(each).all() for each in layer.parameters()):
            raise ValueError(
                f"weights must be finite to be written in 8 bits, got NaN or infinity in {path}; load others"
            )
    with ExitStack() as stack, torch.inference_mode():
        observer.watch(stack)
        shown = track(batches, "calibrating", console=errors, transient=True, disable=not errors.is_terminal)
        for number, batch in enumerate(shown):
            try:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
            except (TypeError, RuntimeError, IndexError, AttributeError, KeyError) as error:
                raise ValueError(
                    f"calibration must give batches as {type(model).__name__} takes them, got {_told(batch)} as batch "
                    f"{number}: {' '.join(str(error).split())[:200]}"
                ) from error
        if not observer.num_images:
            raise ValueError(
                "calibration must give at least one batch of images, got none; a generator gives them once: make it "
                "anew, or give a list"
            )
        return observer.calibration()


def _told(batch: object) -> str:
    return f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
