"""The classes whose ``forward`` the engine knows, each by its exact type: a subclass may compute something else."""

import itertools
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias, TypeVar

from torch import nn

from backbone.engine.calls import has_hook

Layer: TypeAlias = tuple[nn.Module, nn.Module]
"""A convolution and its norm."""


class Parts(NamedTuple):
    """What a residual block consists of.

    Attributes:
        layers: The branch: convolutions and their norms, in order.
        activations: What follows each layer; the last one follows the sum with the shortcut.
        shortcut: What makes the shortcut of the input; None where it is the input itself.
    """

    layers: tuple[Layer, ...]
    activations: tuple[nn.Module, ...]
    shortcut: nn.Module | None


class Mlp(NamedTuple):
    """The two layers of a transformer's block.

    Attributes:
        plain: Its class.
        fused: The class that asks the engine.
        parts: The names of first layer, activation and last layer.
        is_chain: Whether nothing else is at work between them or behind.
    """

    plain: type[nn.Module]
    fused: type[nn.Module]
    parts: tuple[str, str, str]
    is_chain: Callable[[nn.Module], bool]


Block = TypeVar("Block", bound=nn.Module)
_blocks: dict[type[nn.Module], Callable[[nn.Module], Parts | None]] = {}
_mlps: dict[type[nn.Module], Mlp] = {}
_pairs: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {}
_forwards: Final[dict[type[nn.Module], Callable[..., object]]] = {}
"""What the ``forward`` of each class was when it was registered: a tool may put another in its place."""
_sequences: Final[set[type[nn.Module]]] = {nn.Sequential}


def register_block(cls: type[Block], parts: Callable[[Block], Parts | None]) -> None:
    """Let the engine stand in for residual blocks of exactly the class ``cls``.

    Args:
        cls: A block whose ``forward`` computes ``relu(layers(x) + shortcut(x))`` of its parts, and nothing else.
        parts: Returns them; None where something else in the block is at work.
    """
    _blocks[cls] = parts  # type: ignore[assignment]
    _forwards[cls] = cls.forward


def register_pairs(cls: type[nn.Module], *pairs: tuple[str, str]) -> None:
    """Let inference copies fold norms in modules of exactly the class ``cls``.

    Args:
        cls: A class in whose ``forward`` each of these norms takes its convolution's output, which nothing else does.
        pairs: The names of the convolutions and their norms.
    """
    _pairs[cls] = pairs
    _forwards[cls] = cls.forward


def register_mlp(
    cls: type[Block], fused: type[nn.Module], parts: tuple[str, str, str], is_chain: Callable[[Block], bool]
) -> None:
    """Let inference copies compute the two linear layers, or 1x1 convolutions, of exactly the class ``cls`` in one.

    Args:
        cls: A class whose ``forward`` calls first layer, activation and last layer one after the other.
        fused: What it becomes in a copy: its ``forward`` asks ``mlp`` first.
        parts: The names of the three.
        is_chain: Whether nothing else is at work in between or behind.
    """
    _mlps[cls] = _mlps[fused] = Mlp(cls, fused, parts, is_chain)  # type: ignore[arg-type]


def mlp_of(module: nn.Module) -> Mlp | None:
    """Return what is known of ``module``, if it is of exactly a registered class."""
    return _mlps.get(type(module))


def register_sequence(cls: type[nn.Module]) -> None:
    """Say that calling a module of exactly the class ``cls`` is calling its children one after the other."""
    _sequences.add(cls)
    _forwards[cls] = cls.forward


def is_block(module: nn.Module) -> bool:
    """Whether ``module`` is of exactly a registered class, and nobody watches or replaces its ``forward``."""
    cls = type(module)
    return cls in _blocks and cls.forward is _forwards[cls] and not has_hook(module)


def parts_of(block: nn.Module) -> Parts | None:
    """Return the parts of a block of a registered class or a subclass; None where something else is at work."""
    return next(_blocks[cls] for cls in type(block).__mro__ if cls in _blocks)(block)


def pairs_of(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of the convolutions and norms that follow each other in ``module``, as far as is known."""
    cls = type(module)
    if "forward" in module.__dict__ or cls.forward is not _forwards.get(cls, cls.forward):
        return []
    if runs_in_order(module):
        return list(itertools.pairwise(module._modules))
    return list(_pairs.get(cls, ()))


def runs_in_order(layers: nn.Module) -> bool:
    """Whether calling ``layers`` is calling its children one after the other, and nothing else."""
    cls = type(layers)
    is_plain = issubclass(cls, nn.Sequential) and (cls.forward, cls.__iter__) == _PLAIN_SEQUENCE
    is_known = cls in _sequences and cls.forward is _forwards.get(cls, _PLAIN_SEQUENCE[0])
    return (is_known or is_plain) and "forward" not in layers.__dict__


_PLAIN_SEQUENCE: Final = nn.Sequential.forward, nn.Sequential.__iter__
