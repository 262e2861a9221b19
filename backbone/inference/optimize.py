"""A copy of a model for inference: every norm folded once, every weight in the layout its kernel wants."""

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from backbone.engine.calls import has_hook, has_hook_within
from backbone.engine.folded import FoldedConv2d, QuickLinear
from backbone.engine.known import pairs_of, runs_in_order
from backbone.inference.extractors import find_extractors, replace_everywhere, returns_features
from backbone.inference.folding import constants_of, fold, is_plain_conv, remainder_of
from backbone.inference.graphs import GraphedExtractor
from backbone.inference.int8 import CalibrationSource, LayerChoice, compute_in_int8, in_floats_again
from backbone.inference.reparameterize import reparameterize
from backbone.initial import stop_watching

_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Optimization:
    """What ``optimize_for_inference`` did; the optimised model carries it as ``model.optimization``.

    Attributes:
        folded: Number of norms folded into the convolution before them.
        prepared: Number of other convolutions whose weights are kept in their kernel's layout.
        kept: Names of norm layers that stay, because they depend on the input (GroupNorm and the like) or follow
            no convolution.
        dtype: What the feature extractors compute in.
        linear: Number of linear layers that run by oneDNN in float32 on a CPU with AVX-512, and as before elsewhere.
        int8: With ``dtype=torch.int8`` what each layer that may compute in 8 bits computes in, and its error in them.
    """

    folded: int
    prepared: int
    kept: tuple[str, ...]
    dtype: torch.dtype
    linear: int = 0
    int8: tuple[LayerChoice, ...] = ()

    def __str__(self) -> str:
        if self.int8:
            return f"{self._folded()}, {self._in_int8()}"
        kept = f"; kept {len(self.kept)} norms ({', '.join(self.kept[:3])}, ...)" if self.kept else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self._folded()}, computes in {dtype}{kept}"

    def _folded(self) -> str:
        others = f"{self.prepared} other convolutions and {self.linear} linear layers"
        return f"folded {self.folded} norms, prepared {others}"

    def _in_int8(self) -> str:
        left = [f"{choice.name} ({choice.error:.1%})" for choice in self.int8 if choice.dtype != torch.int8]
        worst = max(
            (choice for choice in self.int8 if choice.dtype == torch.int8), key=lambda each: each.error, default=None
        )
        text = f"computes in int8 in {len(self.int8) - len(left)} of {len(self.int8)} layers"
        text += "" if worst is None else f", of which {worst.name} loses most ({worst.error:.1%})"
        return text + (f"; left in floats: {', '.join(left)}" if left else "")


@torch.inference_mode(False)  # the copy's tensors must not be inference tensors: those change unseen
@torch.no_grad()
def optimize_for_inference(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    keep_weights: bool = True,
    cuda_graphs: bool = False,
    calibration: CalibrationSource | None = None,
    max_error: float = 0.1,
) -> nn.Module:
    """Return a copy of ``model`` in eval mode that gives the same outputs faster; ``model`` stays as it is.

    Batch norms, frozen or not, are folded into the convolution before them, and each block ends in one fused kernel. On
    the CPU weights are packed and linear layers run by oneDNN. It takes a bare backbone, a backbone with its pyramid,
    or a whole detector or segmenter. Its feature extractors are its ``backbone`` attribute and the backbones of this
    package in it, wherever its library keeps them. Convolutions and norms with hooks stay as they are. Neighbours in an
    ``nn.Sequential`` are taken to run one after the other, and nowhere else.

    Args:
        model: The model, with its final weights. Those of the copy may be loaded anew, moved or edited in place under
            ``torch.no_grad()``, the latter without ``cuda_graphs``; edits through ``.data`` go unseen. On CUDA they are
            prepared by the first calls: let those finish before others run on another stream.
        dtype: What the feature extractors compute in, such as torch.bfloat16; the weights' own dtype by default.
            Images may stay float32. A bare backbone returns features in this dtype; inside a detector they are cast
            back, so that the heads run as before.
        keep_weights: Whether the plain weights stay beside those in their kernels' layout. Without them a copy takes
            about the memory of the model, and a few per cent more time on the CPU; ``weight`` and the state dict are
            still there, unpacked for who asks.
        cuda_graphs: Whether each feature extractor is replayed as one CUDA graph per image shape: worth it for few
            shapes and small batches, where launching kernels takes longer than running them.
        calibration: For ``dtype=torch.int8``: 50 to 300 images, in batches as the model takes them, whose values tell
            which numbers 8 bits must write. Or the ``calibration`` of an earlier copy, or a file that its ``save``
            wrote.
        max_error: For ``dtype=torch.int8``: layers whose output would lose more stay in floats. In units of the
            output's root mean square, for exact inputs, on the first calibration images.

    Raises:
        ValueError: If ``dtype`` is none of float16, bfloat16, float32, float64 and int8, or if int8 does not suit the
            network or its calibration.
    """
    if dtype not in (None, *_DTYPES, torch.int8):
        raise ValueError(f"dtype must be one of {', '.join(map(str, (*_DTYPES, torch.int8)))} or None, got {dtype}")
    if calibration is not None and dtype != torch.int8:
        raise ValueError(f"calibration is for dtype=torch.int8, got dtype={dtype}; leave it out")
    model = _without_graphs(_copied(model).eval())
    stop_watching(model)  # no training begins with a copy, and a module with a hook counts as one that somebody watches
    in_floats_again(model)
    reparameterize(model)
    folded = sum(_fold_norms(module, keep_weights) for module in list(model.modules()))
    prepared = _prepare(model, keep_weights)
    for module in model.modules():
        if isinstance(module, FoldedConv2d):  # of an earlier optimisation, too
            module.keep_weight = keep_weights
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = QuickLinear
    extractors = find_extractors(model)
    if dtype is not None:
        floats = torch.float32 if dtype == torch.int8 else dtype
        for extractor in extractors:
            _compute_in(floats, extractor, casts_back=not returns_features(model))
    model.requires_grad_(False)
    model.eval()  # adapters that list their parameters forget those that were folded
    in_int8: tuple[LayerChoice, ...] = ()
    if dtype == torch.int8:
        in_int8, ranges, more = compute_in_int8(model, calibration, max_error, keep_weights)
        folded += more
        model.calibration = ranges  # type: ignore[assignment]
    if cuda_graphs and not torch.cuda.is_available():
        warnings.warn(
            "cuda_graphs=True needs a CUDA device, and torch sees none here: until the copy is moved to one it runs "
            "without graphs; leave it out for a CPU",
            stacklevel=2,
        )
    if cuda_graphs:
        model = replace_everywhere(model, {extractor: GraphedExtractor(extractor) for extractor in extractors})
    kept = tuple(name for name, module in model.named_modules() if _is_norm(module))
    computes_in = next((parameter.dtype for parameter in extractors[0].parameters()), dtype or torch.float32)
    computes_in = torch.int8 if in_int8 else computes_in
    model.optimization = Optimization(folded, prepared, kept, computes_in, len(layers), in_int8)  # type: ignore[assignment]
    _log.info("%s: %s", type(model).__name__, model.optimization)
    return model


def forget_shapes(model: nn.Module) -> None:
    """Let a copy compute the next images as if they were its first.

    On the CPU the shapes that came before decide by which kernels the next are computed, and so their last bits.
    """
    for module in model.modules():
        if isinstance(module, FoldedConv2d):
            module.forget_shapes()


def _copied(model: nn.Module) -> nn.Module:
    """Return a deep copy; of weights that a hook computes, as pruning does, the value copies."""
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf})


def _without_graphs(model: nn.Module) -> nn.Module:
    graphed = [module for module in model.modules() if isinstance(module, GraphedExtractor)]
    return replace_everywhere(model, {module: module.extractor for module in graphed})


def _fold_norms(parent: nn.Module, keep_weights: bool) -> int:
    """Fold each batch norm among the children of ``parent`` into the convolution it follows; return how many."""
    folded = 0
    for conv_name, norm_name in pairs_of(parent):
        path, _, leaf = conv_name.rpartition(".")  # a deep stem's last convolution lies within it
        owner = parent.get_submodule(path)
        conv, norm = owner._modules.get(leaf), parent._modules.get(norm_name)
        if conv is None or norm is None or not is_plain_conv(conv) or has_hook_within(norm):
            continue
        if path and not _ends_in(owner, leaf):
            continue
        constants = constants_of(norm)
        if constants is not None:
            owner._modules[leaf] = fold(conv, constants, keep_weights)
            parent._modules[norm_name] = remainder_of(norm)
            folded += 1
    return folded


def _ends_in(layers: nn.Module, name: str) -> bool:
    """Whether what ``layers`` return is the output of their child ``name``, and no hook on them sees it."""
    return runs_in_order(layers) and not has_hook(layers) and next(reversed(layers._modules)) == name


def _prepare(model: nn.Module, keep_weights: bool) -> int:
    """Let the remaining plain convolutions use prepared weights, too; return how many."""
    made: dict[nn.Module, FoldedConv2d] = {}  # what is in two places stays one module
    for parent in list(model.modules()):
        for name, conv in parent._modules.items():
            if conv is not None and is_plain_conv(conv):
                if conv not in made:
                    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
                    made[conv] = FoldedConv2d(conv, conv.weight, bias, keep_weight=keep_weights)
                parent._modules[name] = made[conv]
    return len(made)


def _is_norm(module: nn.Module) -> bool:
    # a name such as ConvNormAct is a container's
    return "Norm" in type(module).__name__ and not any(isinstance(child, nn.Conv2d) for child in module.children())


def _compute_in(dtype: torch.dtype, extractor: nn.Module, *, casts_back: bool) -> None:
    """Let ``extractor`` take any floats and compute in ``dtype``; ``casts_back``: and return the dtype it did."""
    before = next((parameter.dtype for parameter in extractor.parameters()), torch.float32)
    for module in extractor.modules():  # what was optimised earlier, it or a part of it, casts to another dtype
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _CastInputs | _CastOutputs):
                    before = hook.dtype if module is extractor else before  # at last the one of the outputs
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
    extractor.to(dtype)
    extractor.register_forward_pre_hook(_CastInputs(dtype), with_kwargs=True)
    if casts_back:
        extractor.register_forward_hook(_CastOutputs(before))


@dataclass(frozen=True, slots=True)
class _CastInputs:
    """A hook before a forward; unlike a function in a function it can be pickled."""

    dtype: torch.dtype

    def __call__(self, _module: nn.Module, args: object, kwargs: object) -> tuple[Any, Any]:
        return _cast(args, self.dtype), _cast(kwargs, self.dtype)


@dataclass(frozen=True, slots=True)
class _CastOutputs:
    """A hook after a forward."""

    dtype: torch.dtype

    def __call__(self, _module: nn.Module, _inputs: object, outputs: object) -> object:
        return _cast(outputs, self.dtype)


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)((name, _cast(each, dtype)) for name, each in value.items())
    if isinstance(value, list | tuple):
        cast = [_cast(each, dtype) for each in value]
        return value._make(cast) if hasattr(value, "_make") else type(value)(cast)  # _make: a named tuple
    return value
