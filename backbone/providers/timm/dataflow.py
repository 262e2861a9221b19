"""Which parts of a foreign network make each feature map: read from a run of it, not from its modules' names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run of a network showed.

    Attributes:
        sizes: Height and width of each output.
        needs: For each output the parameters it depends on.
        called: Modules that took part, in order.
    """

    sizes: list[tuple[int, int]]
    needs: list[set[nn.Parameter]]
    called: list[nn.Module]


@dataclass(slots=True)
class Division:
    """A network's parts by stage, as dotted names.

    Attributes:
        modules: For each stage the largest modules all of whose parameters belong to it.
        parameters: For each stage its parameters that lie beside modules of several stages.
        unused: The largest modules, and the parameters beside them, that no feature map depends on.
    """

    modules: dict[str, list[str]] = field(default_factory=dict)
    parameters: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def trace(network: nn.Module, forward: Forward, image_shape: Sequence[int]) -> Trace:
    """Run ``forward`` on the meta device, which costs neither memory nor arithmetic; gradients must be enabled.

    Args:
        network: A network on the meta device.
        forward: Calls ``network``: images (N, C, H, W) -> feature maps (N, C_i, H_i, W_i).
        image_shape: N, C, H, W.
    """
    called: dict[nn.Module, None] = {}
    hooks = [m.register_forward_pre_hook(lambda module, _: called.setdefault(module)) for m in network.modules()]
    try:
        outputs = forward(torch.empty(*image_shape, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    sizes = [(output.shape[-2], output.shape[-1]) for output in outputs]
    return Trace(sizes, [_leaves(output) for output in outputs], list(called))


def _leaves(output: Tensor) -> set[nn.Parameter]:
    """Return the parameters at the ends of the autograd graph of ``output``."""
    found: set[nn.Parameter] = set()
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter):
                found.add(leaf)
            waiting += [previous for previous, _ in node.next_functions]
    return found


def divide(network: nn.Module, owners: Mapping[nn.Parameter, str], first: str) -> Division:
    """Divide ``network`` among the stages that own its parameters.

    A module without parameters goes with the one registered before it, and with stage ``first`` where there is none.
    """
    division = Division()
    last = first

    def visit(module: nn.Module, path: str) -> None:
        nonlocal last
        parameters = list(module.parameters())
        stages = {owners.get(parameter) for parameter in parameters}
        if stages == {None}:
            division.unused.append(path)
        elif path and len(stages) <= 1:
            last = next(iter(stages), None) or last
            division.modules.setdefault(last, []).append(path)
        else:
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                stage = owners.get(parameter)
                names = division.parameters.setdefault(stage, []) if stage else division.unused
                names.append(name)
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)

    visit(network, "")
    return division
