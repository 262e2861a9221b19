"""A backbone that computes in 8 bits: what stands in for its method, and when its modules are called instead."""

import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from backbone.engine import switch
from backbone.engine.calls import has_hook, is_watched, needs_grad
from backbone.engine.folded import FoldedConv2d
from backbone.engine.int8 import has_int8, has_int8_linear, why_no_int8, why_no_int8_linear
from backbone.engine.torch_internals import is_any_hooked
from backbone.features import Backbone, input_channels, require_images
from backbone.inference.int8 import by_module
from backbone.inference.int8.by_module import LayerObserver, Layers
from backbone.inference.int8.calibration import Calibration, Observer, calibrate
from backbone.inference.int8.kernel import IN_INT8, Int8Conv2d, require_same_modules
from backbone.inference.int8.program import Program
from backbone.inference.int8.tracing import Network, fold_by_flow, trace

_UNFOLDED: Final = ("LayerNorm", "GroupNorm", "RmsNorm", "RMSNorm", "InstanceNorm")
CalibrationSource: TypeAlias = Calibration | str | os.PathLike[str] | Iterable[Any]
"""Batches of images, or the ranges they gave, or a file of these."""

_turn: Final = threading.RLock()


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What one layer computes in.

    Attributes:
        name: Its path in the backbone or pyramid.
        dtype: torch.int8, or the dtype it had.
        error: What 8 bits cost it on the calibration images: the root of the mean squared error of its output for exact
            inputs, in units of the output's root mean square.
    """

    name: str
    dtype: torch.dtype
    error: float


class Int8Method:
    """Stands in for the method of ``root`` that calls its modules, as an attribute of that name.

    It computes in 8 bits by oneDNN. Where that cannot run, and where the engine is off, the same arithmetic runs in
    float32. The modules are called, in floats, where somebody watches them: in a trace or an export, with hooks within,
    where a gradient of the images is needed.

    Args:
        root: The backbone.
        calibration: The ranges of its values.
        choices: What its convolutions compute in.
    """

    def __init__(
        self, root: Backbone, network: Network, calibration: Calibration, choices: tuple[LayerChoice, ...]
    ) -> None:
        self.root, self.network, self.calibration, self.choices = root, network, calibration, choices
        self._program: Program | None = None
        self._modules = [(module, dict(module._modules)) for module in root.modules()]
        self._inner = [module for module in root.modules() if module is not root]

    def __call__(self, images: Tensor) -> Any:  # noqa: ANN401
        """Images (N, C, H, W) -> what the method returns, in float32.

        Raises:
            RuntimeError: If a module of the backbone was replaced since; weights may change.
        """
        root = self.root
        trained = root.parameters() if torch.is_grad_enabled() else ()
        if is_watched(images) or needs_grad(images, *trained) or is_any_hooked(self._inner):
            return getattr(type(root), root.traced_method)(root, images)
        require_images(images, input_channels(root))
        require_same_modules(root, self._modules)
        return self._ready().run(images, kernels=switch.is_on() and has_int8() and images.device.type == "cpu")

    @property
    def __code__(self) -> CodeType:
        """What torch.export looks at in a method, to name its arguments."""
        return type(self).__call__.__code__

    def _ready(self) -> Program:
        """Return the program, made at the first call."""
        if self._program is None:
            with _turn:
                in_int8 = frozenset(choice.name for choice in self.choices if choice.dtype == torch.int8)
                self._program = self._program or Program(
                    self.network, self.calibration.codes, self.calibration.input_means(), in_int8
                )
        return self._program

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the program, which is made again."""
        return {**self.__dict__, "_program": None}


def int8_methods(model: nn.Module) -> list[Int8Method]:
    """Return what stands in for methods in ``model``."""
    return [each for module in model.modules() for each in vars(module).values() if isinstance(each, Int8Method)]


def in_floats_again(model: nn.Module) -> None:
    """Turn what computes in 8 bits in ``model`` into an inference copy in floats, in place."""
    for method in int8_methods(model):
        delattr(method.root, method.root.traced_method)
    by_module.in_floats_again(model)
    for module in model.modules():
        if isinstance(module, Int8Conv2d):
            module.plain_again()


class InInt8(NamedTuple):
    """What was done.

    Attributes:
        choices: What each layer computes in.
        calibration: What calibration images showed.
        folded: How many norms were folded on the way.
    """

    choices: tuple[LayerChoice, ...]
    calibration: Calibration
    folded: int


def compute_in_int8(
    model: nn.Module, calibration: CalibrationSource | None, max_error: float, keep_weights: bool
) -> InInt8:
    """Let the backbone in ``model`` compute in 8 bits, in place.

    Args:
        model: An inference copy in floats: a backbone, or what holds one.
        calibration: Batches of images as ``model`` takes them, or what earlier ones showed, or a file of that.
        max_error: Largest error of a layer that computes in 8 bits.
        keep_weights: Whether plain weights stay beside those in 8 bits.

    Raises:
        ValueError: If the network or its calibration does not suit.
    """
    if not max_error > 0:
        raise ValueError(f"max_error must be above 0, got {max_error}; 0.1 keeps layers that lose a tenth in floats")
    if calibration is None:
        raise ValueError(
            "dtype=torch.int8 needs calibration: 50 to 300 images in batches as the model takes them, or a Calibration "
            "of the same network; got None"
        )
    if isinstance(calibration, str | os.PathLike):
        calibration = Calibration.load(calibration)
    if isinstance(calibration, Tensor) or not isinstance(calibration, Calibration | Iterable):
        raise ValueError(
            f"calibration must be an iterable of batches, got a {type(calibration).__name__}; give [batch, ...]"
        )
    inner = _backbone_of(model)
    done = _by_flow if not _unfolded(inner) else _by_module
    return done(model, inner, calibration, max_error, keep_weights)


def _by_flow(
    model: nn.Module, inner: Backbone, calibration: Calibration | Iterable[Any], max_error: float, keep_weights: bool
) -> InInt8:
    """Let a network of convolutions compute in 8 bits from its images to its features."""
    root = _with_pyramid(model, inner)
    if hooked := _watched(root):
        raise ValueError(
            f"dtype=torch.int8 needs modules that nobody watches, got hooks on {', '.join(hooked[:3])}; remove them"
        )
    folded = fold_by_flow(root, keep_weights)
    if not isinstance(calibration, Calibration):
        calibration = calibrate(model, Observer(root), calibration)
    network = trace(root, frozenset(calibration.apart))
    _require_same(network.fingerprint, calibration)
    convs = {step.path: step.module for step in network.convs()}
    choices = _choose(convs, calibration, max_error)
    in_int8 = {choice.name for choice in choices if choice.dtype == torch.int8}
    for path, conv in convs.items():
        if path in in_int8 and type(conv) in IN_INT8:  # once, if it is called more than once
            conv.__class__ = IN_INT8[type(conv)]
    setattr(root, root.traced_method, Int8Method(root, network, calibration, choices))
    if not has_int8():
        _warn_of_floats("convolutions do", why_no_int8())
    return InInt8(choices, calibration, folded)


def _by_module(
    model: nn.Module, inner: Backbone, calibration: Calibration | Iterable[Any], max_error: float, keep_weights: bool
) -> InInt8:
    """Let the linear layers of a network compute in 8 bits, one by one."""
    layers = Layers(inner)
    if not layers.layers:
        name, norm = _unfolded(inner)[0]
        raise ValueError(
            f"dtype=torch.int8 needs linear layers, or norms that fold into convolutions, got {type(norm).__name__} at "
            f"{name}, which depends on its input and would turn codes into floats and back; use dtype=torch.bfloat16"
        )
    if not isinstance(calibration, Calibration):
        calibration = calibrate(model, LayerObserver(layers), calibration)
    _require_same(layers.fingerprint, calibration)
    seen = {path: layer for path, layer in layers.layers.items() if path in calibration.errors}
    if not seen:
        raise ValueError(
            f"dtype=torch.int8 needs linear layers that are called as modules, got {type(inner).__name__}, which calls "
            f"none of its {len(layers.layers)}; use dtype=torch.bfloat16"
        )
    choices = _choose(seen, calibration, max_error)
    in_int8 = frozenset(choice.name for choice in choices if choice.dtype == torch.int8)
    layers.convert(calibration, in_int8, keep_weights)
    if not has_int8_linear():
        _warn_of_floats("products do", why_no_int8_linear())
    return InInt8(choices, calibration, 0)


def _warn_of_floats(what: str, reason: str) -> None:
    warnings.warn(
        f"8-bit {what} not run here, the copy computes the same by float32, slower than a float copy: {reason}",
        stacklevel=5,
    )


def _require_same(fingerprint: str, calibration: Calibration) -> None:
    if fingerprint != calibration.fingerprint:
        raise ValueError(
            f"calibration must be of the same network, got that of another ({calibration.fingerprint} in place of "
            f"{fingerprint}); calibrate this one by images"
        )


def _choose(layers: Mapping[str, nn.Module], calibration: Calibration, max_error: float) -> tuple[LayerChoice, ...]:
    choices = []
    for path, layer in layers.items():
        error = calibration.errors[path]
        dtype = torch.int8 if error <= max_error else next(layer.parameters()).dtype
        choices.append(LayerChoice(path, dtype, error))
    return tuple(choices)


def _backbone_of(model: nn.Module) -> Backbone:
    """Return the only backbone in ``model``, without its wrappers."""
    found = [module for module in model.modules() if isinstance(module, Backbone) and module.adopted is None]
    if len(found) != 1:
        raise ValueError(
            f"dtype=torch.int8 needs one backbone of this package in the model, got {len(found)} in "
            f"{type(model).__name__}; give a model whose backbone comes from build_backbone"
        )
    device = next(found[0].parameters()).device
    if device.type != "cpu":
        raise ValueError(f"dtype=torch.int8 is for CPUs, got a model on {device}; move it first, or use float16")
    return found[0]


def _with_pyramid(model: nn.Module, inner: Backbone) -> Backbone:
    """Return the outermost wrapper of ``inner`` that adds convolutions and suits 8 bits, or ``inner`` itself."""
    for wrapper in model.modules():  # a module comes before what is in it
        if isinstance(wrapper, Backbone) and wrapper.adopted is not None and _convs(wrapper) - _convs(wrapper.adopted):
            if _watched(wrapper) or _unfolded(wrapper):
                continue
            try:
                trace(wrapper)
            except ValueError:
                continue
            return wrapper
    return inner


def _convs(module: nn.Module) -> set[FoldedConv2d]:
    return {each for each in module.modules() if isinstance(each, FoldedConv2d)}


def _watched(root: Backbone) -> list[str]:
    """Return the names of the modules in ``root`` that have hooks."""
    return [name for name, child in root.named_modules() if child is not root and has_hook(child)]


def _unfolded(root: Backbone) -> list[tuple[str, nn.Module]]:
    """Return the norms in ``root`` that depend on their input."""
    return [
        (name, each) for name, each in root.named_modules() if any(kind in type(each).__name__ for kind in _UNFOLDED)
    ]
