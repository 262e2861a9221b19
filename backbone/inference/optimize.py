"""A copy of a model for inference: every norm folded once, every weight in the layout its kernel wants."""

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from backbone.engine.calls import has_hook, has_hook_within, is_plain
from backbone.engine.folded import FoldedConv2d, QuickLinear
from backbone.engine.known import pairs_of, runs_in_order
from backbone.inference.extractors import find_extractors, replace_everywhere, returns_features
from backbone.inference.foreign_norms import frozen_eps, what_follows
from backbone.inference.graphs import GraphedExtractor
from backbone.inference.reparameterize import reparameterize
from backbone.norm import FrozenBatchNorm2d, freeze_norms, frozen_form, is_frozen_form

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
    """

    folded: int
    prepared: int
    kept: tuple[str, ...]
    dtype: torch.dtype
    linear: int = 0

    def __str__(self) -> str:
        kept = f"; kept {len(self.kept)} norms ({', '.join(self.kept[:3])}, ...)" if self.kept else ""
        dtype = str(self.dtype).removeprefix("torch.")
        others = f"{self.prepared} other convolutions and {self.linear} linear layers"
        return f"folded {self.folded} norms, prepared {others}, computes in {dtype}{kept}"


@torch.inference_mode(False)  # the copy's tensors must not be inference tensors: those change unseen
@torch.no_grad()
def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype | None = None, keep_weights: bool = True, cuda_graphs: bool = False
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

    Raises:
        ValueError: If ``dtype`` is none of float16, bfloat16, float32 and float64.
    """
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))} or None, got {dtype}")
    model = _without_graphs(_copied(model).eval())
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
        for extractor in extractors:
            _compute_in(dtype, extractor, casts_back=not returns_features(model))
    model.requires_grad_(False)
    model.eval()  # adapters that list their parameters forget those that were folded
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
    model.optimization = Optimization(folded, prepared, kept, computes_in, len(layers))  # type: ignore[assignment]
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
        if conv is None or norm is None or not _is_plain_conv(conv) or has_hook_within(norm):
            continue
        if path and not _ends_in(owner, leaf):
            continue
        constants = _constants(norm)
        if constants is not None:
            owner._modules[leaf] = _fold(conv, constants, keep_weights)
            parent._modules[norm_name] = _remainder(norm)
            folded += 1
    return folded


def _ends_in(layers: nn.Module, name: str) -> bool:
    """Whether what ``layers`` return is the output of their child ``name``, and no hook on them sees it."""
    return runs_in_order(layers) and not has_hook(layers) and next(reversed(layers._modules)) == name


def _is_plain_conv(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``conv`` is a convolution that another may replace: torch's own, with dense weights, and no hooks."""
    is_known = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return (
        is_known
        and not has_hook(conv)
        and all(is_plain(each) and each.is_floating_point() for each in conv.parameters())
    )


class _Constants(NamedTuple):
    """What a batch norm computes: ``(x - mean) / sqrt(variance + eps) * weight + bias``."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _constants(norm: nn.Module) -> _Constants | None:
    """Return what ``norm`` computes; None where it is no batch norm that is known, by its exact class."""
    eps = norm.eps if frozen_form(norm) or is_frozen_form(norm) else frozen_eps(norm)
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if eps is None or mean is None or variance is None:  # without statistics it depends on the input
        return None
    return _Constants(mean, variance, norm.weight, norm.bias, float(eps))  # type: ignore[arg-type]


def _remainder(norm: nn.Module) -> nn.Module:
    """Return what ``norm`` does besides, such as an activation."""
    form = frozen_form(norm)
    if form is FrozenBatchNorm2d:
        return nn.Identity()
    known = freeze_norms(norm) if form else norm  # the frozen form tells
    return known.remainder() if isinstance(known, FrozenBatchNorm2d) else what_follows(known)


def _fold(conv: nn.Conv2d, norm: _Constants, keep_weight: bool) -> FoldedConv2d:
    """Fold in double precision and round to the dtype of ``conv``."""
    scale = torch.rsqrt(norm.variance.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    mean = norm.mean.double()
    shift = -mean * scale if conv.bias is None else (conv.bias.double() - mean) * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    weight = (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype)
    return FoldedConv2d(conv, weight, shift.to(conv.weight.dtype), keep_weight=keep_weight)


def _prepare(model: nn.Module, keep_weights: bool) -> int:
    """Let the remaining plain convolutions use prepared weights, too; return how many."""
    prepared = 0
    for parent in list(model.modules()):
        for name, conv in parent._modules.items():
            if conv is not None and _is_plain_conv(conv):
                bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
                parent._modules[name] = FoldedConv2d(conv, conv.weight, bias, keep_weight=keep_weights)
                prepared += 1
    return prepared


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
