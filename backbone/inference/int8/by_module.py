"""8 bits layer by layer, where norms depend on their input: which layers, and what calibration images show of them."""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine.folded import FoldedConv2d, QuickLinear
from backbone.engine.int8 import Codes, Gelu, Means, decode, encode, multiply
from backbone.engine.known import Mlp, mlp_of
from backbone.features import Backbone
from backbone.inference.int8.calibration import Calibration, numbers
from backbone.inference.int8.kernel import require_same_modules
from backbone.inference.int8.linear import (
    IN_ROWS,
    InRows,
    Layer,
    Written,
    as_linear,
    gelu_of,
    in_8_bits,
    rows_of,
)
from backbone.inference.int8.ranges import Histogram

_ROWS: Final = 512  # of a layer's input are kept
_ROWS_OF_A_CALL: Final = 64
_SHARES: Final = (0.25, 0.5, 0.75)  # how much of an input's unevenness goes into the weight (arXiv:2211.10438)


class Layers:
    """The linear layers of a network, and the 1x1 convolutions of its MLPs.

    Attributes:
        root: The network, an inference copy.
        layers: By path.
        hidden: For the last layer of each MLP, by its path: the path of the first, and the GELU between.
    """

    def __init__(self, root: Backbone) -> None:
        self.root = root
        self.layers: dict[str, Layer] = {}
        self.hidden: dict[str, tuple[str, Gelu]] = {}
        self._mlps: list[tuple[nn.Module, set[str]]] = []
        modules = dict(root.named_modules())
        self.layers.update(
            {path: each for path, each in modules.items() if type(each) is QuickLinear and _has_weight(each)}
        )
        for path, module in modules.items():
            known = mlp_of(module)
            if known is not None:
                self._add_mlp(path, module, known)

    def _add_mlp(self, path: str, module: nn.Module, known: Mlp) -> None:
        first, act, last = (module.get_submodule(name) for name in known.parts)
        paths = [f"{path}.{known.parts[0]}", f"{path}.{known.parts[2]}"]
        for each, layer in zip(paths, (first, last), strict=True):
            is_new = not any(layer is other for other in self.layers.values())
            if is_new and type(layer) is FoldedConv2d and _is_pointwise(layer):
                self.layers[each] = layer
        gelu = gelu_of(act)
        if gelu is not None and self.layers.keys() >= set(paths) and known.is_chain(module):
            self.hidden[paths[1]] = paths[0], gelu
            self._mlps.append((module, set(paths)))

    @property
    def fingerprint(self) -> str:
        """A digest of what there is."""
        told = [(path, _sizes(layer)) for path, layer in self.layers.items()]
        return hashlib.sha256(repr((told, self.hidden)).encode()).hexdigest()[:16]

    def convert(self, calibration: Calibration, paths: frozenset[str], keep_weights: bool) -> None:
        """Let the layers at ``paths`` compute in 8 bits, in place."""
        for path in paths:
            layer: Any = self.layers[path]
            if isinstance(layer, FoldedConv2d):
                layer.forget_shapes()  # those of calibration images
            layer.__class__ = IN_ROWS[type(layer)]
            layer.written, layer.keep_weight = written_of(calibration, path), keep_weights
        for module, of_mlp in self._mlps:
            known = mlp_of(module)
            if of_mlp <= paths and known is not None:
                module.__class__ = known.fused
        self.root.register_forward_pre_hook(RequireSame(self.root))


def in_floats_again(model: nn.Module) -> None:
    """Take back what ``Layers.convert`` did to ``model``, in place."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, RequireSame):
                module._forward_pre_hooks.pop(key)
        known = mlp_of(module)
        if known is not None:
            module.__class__ = known.plain
        if isinstance(module, InRows):
            module.plain_again()


class RequireSame:
    """A hook before the forward of a network in 8 bits: its modules must be those that were calibrated.

    Args:
        root: The network.
    """

    def __init__(self, root: Backbone) -> None:
        self._modules = [(module, dict(module._modules)) for module in root.modules()]

    def __call__(self, root: nn.Module, _inputs: object) -> None:
        """Look at them.

        Raises:
            RuntimeError: If one was replaced.
        """
        require_same_modules(root, self._modules)


class LayerObserver:
    """Sees the input of every layer while calibration images pass.

    Args:
        layers: The layers, in floats.
    """

    def __init__(self, layers: Layers) -> None:
        self._of = layers
        self._inputs: dict[str, _Input] = {}
        self.num_images = 0

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Return the layers by path."""
        return list(self._of.layers.items())

    def watch(self, stack: ExitStack) -> None:
        """Look at the calls until ``stack`` closes."""
        self._look(stack, self._of.root, self._count)
        for path, layer in self._of.layers.items():
            self._look(stack, layer, partial(self._see, path, layer))

    def calibration(self) -> Calibration:
        """Return what was seen."""
        written: dict[str, Written] = {}
        errors: dict[str, float] = {}
        behind = {first: (last, gelu) for last, (first, gelu) in self._of.hidden.items()}
        for path, seen in reversed(self._inputs.items()):  # the second layer of an MLP before its first
            layer, (last, gelu) = self._of.layers[path], behind.get(path, ("", None))
            after = None if gelu is None or last not in written else (gelu, written[last].codes)
            candidates = [seen.written(None)]
            if path not in self._of.hidden:
                peaks = as_linear(layer.weight).abs().amax(0)
                candidates += [seen.written(_evened(seen.peaks(), peaks, share)) for share in _SHARES]
            lost = [_error(layer, seen.rows(), each, after) for each in candidates]
            errors[path] = min(lost)
            written[path] = candidates[lost.index(errors[path])]
        order = [path for path in self._of.layers if path in written]
        return Calibration(
            self._of.fingerprint,
            {path: written[path].codes for path in order},
            {path: (numbers(written[path].means.value), numbers(written[path].means.lost)) for path in order},
            {path: errors[path] for path in order},
            (),
            self.num_images,
            {path: numbers(per) for path in order if (per := written[path].per_channel) is not None},
        )

    def _see(self, path: str, layer: Layer, x: Tensor) -> None:
        self._inputs.setdefault(path, _Input(path)).add(rows_of(x, layer))

    def _count(self, images: Tensor) -> None:
        if not torch.isfinite(images).all():
            raise ValueError(
                f"calibration must give finite numbers, got NaN or infinity in the images after {self.num_images} "
                f"images; check the images and the weights"
            )
        self.num_images += len(images)

    def _look(self, stack: ExitStack, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], by_name: dict[str, Any]) -> None:
            see(next(iter((*inputs, *by_name.values()))))

        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


class _Input:
    """What a layer takes: some of its rows, and the ends of all.

    Args:
        path: The layer's.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._kept: list[Tensor] = []
        self._low = self._high = torch.zeros((), device="cpu")
        self._of_a_call = _ROWS_OF_A_CALL

    def add(self, rows: Tensor) -> None:
        """Look at (M, C) numbers."""
        low, high = torch.aminmax(rows.float(), dim=0)
        if not torch.isfinite(low + high).all():
            raise ValueError(
                f"calibration must give finite numbers, got NaN or infinity in the input of {self._path}; check the "
                f"images and the weights"
            )
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        step = max(1, len(rows) // self._of_a_call) | 1  # odd: no common factor with a power of two
        self._kept.append(rows[::step].float().clone())
        if sum(map(len, self._kept)) > _ROWS:
            self._kept, self._of_a_call = [torch.cat(self._kept)[::2]], max(1, self._of_a_call // 2)

    def peaks(self) -> Tensor:
        """Return the largest magnitude of each channel, (C,)."""
        return torch.maximum(-self._low, self._high)

    def rows(self) -> Tensor:
        """Return those that were kept, (M, C)."""
        self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    def written(self, per_channel: Tensor | None) -> Written:
        """Return how to write the input, divided by ``per_channel``."""
        by: Any = 1.0 if per_channel is None else per_channel
        rows, histogram = self.rows() / by, Histogram()
        histogram.add(rows)
        histogram.add(torch.stack([(self._low / by).min(), (self._high / by).max()]))
        codes = histogram.codes()
        return Written(codes, per_channel, Means(rows.mean(0), (rows - decode(encode(rows, codes), codes)).mean(0)))


def written_of(calibration: Calibration, path: str) -> Written:
    """Return how the input of the layer at ``path`` is written."""
    given = calibration.per_channel.get(path)
    per_channel = None if given is None else torch.tensor(given, device="cpu")
    return Written(calibration.codes[path], per_channel, calibration.means_of(path))


def _evened(peaks: Tensor, of_weight: Tensor, share: float) -> Tensor:
    """Return what to divide an input by, so that it and the weight are about as uneven from channel to channel."""
    peaks, of_weight = peaks.clamp_min(peaks.max() * 1e-5 + 1e-30), of_weight.clamp_min(of_weight.max() * 1e-5 + 1e-30)
    return peaks**share / of_weight ** (1 - share)


def _error(layer: Layer, rows: Tensor, written: Written, after: tuple[Gelu, Codes] | None) -> float:
    """Return what 8 bits cost the layer's output, or the GELU of it in codes where they are ``after`` it."""
    gelu, of_out = (None, None) if after is None else after
    exact = F.linear(rows, as_linear(layer.weight), None if layer.bias is None else layer.bias.float())
    exact = exact if gelu is None else F.gelu(exact, approximate=gelu)
    codes, weight = encode(rows, written.codes, written.per_channel), in_8_bits(layer.weight, layer.bias, written)
    out = multiply(codes, written.codes, weight, gelu, of_out, kernels=False)
    wrong = (out if of_out is None else decode(out, of_out)) - exact
    return float(wrong.double().square().sum().sqrt() / exact.double().square().sum().sqrt().clamp_min(1e-300))


def _has_weight(layer: nn.Module) -> bool:
    """Whether weight and bias are parameters of the layer's own: none is pruned or parametrised."""
    return layer._parameters.get("weight") is not None and "bias" in layer._parameters


def _sizes(layer: Layer) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features


def _is_pointwise(conv: FoldedConv2d) -> bool:
    return conv.kernel_size == (1, 1) and tuple(conv.geometry) == ((1, 1), (0, 0), (1, 1), 1) and _has_weight(conv)
