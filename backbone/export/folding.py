"""Norms that are constants, folded into the convolution before them: once, for every runtime."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from backbone.norm import FrozenBatchNorm2d, is_frozen_form


def for_export(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the CPU in evaluation mode, in which every frozen norm is torch's own batch norm.

    In evaluation mode they compute the same, and every exporter and runtime knows how to fold a batch norm.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    return _with_batch_norms(model)


def _with_batch_norms(module: nn.Module) -> nn.Module:
    if _is_frozen(module):
        return _as_batch_norm(module)
    for name, child in module._modules.items():  # named_children() would skip a shared one
        if child is not None:
            module._modules[name] = _with_batch_norms(child)
    return module


def _is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` is a frozen batch norm of known code: ours, torchvision's or detectron2's, without hooks."""
    theirs = type(module).__name__ == "FrozenBatchNorm2d" and not isinstance(module, FrozenBatchNorm2d)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return (is_frozen_form(module) or theirs) and not hooked and getattr(module, "running_var", None) is not None


def _as_batch_norm(frozen: nn.Module) -> nn.Module:
    variance = frozen.get_buffer("running_var")
    norm = nn.BatchNorm2d(len(variance), eps=float(frozen.eps)).to(variance)  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(frozen.weight)  # type: ignore[arg-type]
        norm.bias.copy_(frozen.bias)  # type: ignore[arg-type]
        norm.running_mean.copy_(frozen.get_buffer("running_mean"))  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
    norm.eval().requires_grad_(False)
    rest = frozen.remainder() if isinstance(frozen, FrozenBatchNorm2d) else nn.Identity()
    return norm if isinstance(rest, nn.Identity) else nn.Sequential(norm, rest)


def fold_norms(program: ExportedProgram) -> int:
    """Fold each batch norm of ``program`` into the convolution whose output it alone takes, in place.

    The convolution's weight is scaled and the norm's bias becomes the convolution's, computed in double precision.

    Returns:
        Number of norms folded.
    """
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    uses = Counter(names[node.name] for node in program.graph.nodes if node.name in names for _ in node.users)
    folded = 0
    for norm in list(program.graph.nodes):
        if norm.target is torch.ops.aten.batch_norm.default and _fold(program, norm, names, uses):
            folded += 1
    program.graph.lint()
    program.graph_module.recompile()
    return folded


def _fold(program: ExportedProgram, norm: Node, names: dict[str, str], uses: "Counter[str]") -> bool:
    arguments: tuple[Any, ...] = norm.args
    conv, *constants = arguments[:5]
    eps: float = arguments[7]
    if not _is_convolution(conv) or len(conv.users) != 1 or not all(isinstance(node, Node) for node in constants):
        return False
    weight_node, bias_node = conv.args[1], conv.args[2] if len(conv.args) > 2 else None  # noqa: PLR2004
    own = [node for node in (weight_node, bias_node, *constants) if node is not None]
    if any(not isinstance(node, Node) or uses.get(names.get(node.name, ""), 0) != 1 for node in own):
        return False  # shared with another layer, such as a head's among the levels
    state = program.state_dict
    weight, scale, shift, mean, variance = (state[names[node.name]].double() for node in (weight_node, *constants))
    bias = 0.0 if bias_node is None else state[names[bias_node.name]].double()
    scale = scale * torch.rsqrt(variance + eps)
    _replace(state, names[weight_node.name], weight * scale.view(-1, *(1,) * (weight.ndim - 1)))
    _replace(state, names[constants[1].name], (bias - mean) * scale + shift)
    conv.args = (conv.args[0], weight_node, constants[1], *conv.args[3:])
    norm.replace_all_uses_with(conv)
    program.graph.erase_node(norm)
    return True


def _is_convolution(node: object) -> bool:
    kinds = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
    return isinstance(node, Node) and node.target in kinds


def _replace(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    before = state[name]
    value = value.to(before.dtype)
    state[name] = nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value
