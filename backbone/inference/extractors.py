"""Where in a model the feature extractors are: what computes in another dtype, and what CUDA graphs replay."""

from collections.abc import Iterator

from torch import nn

from backbone.features import Backbone


def find_extractors(model: nn.Module) -> list[nn.Module]:
    """Return the feature extractors in ``model``, a backbone or a detector of whichever library.

    They are its backbones of this package, wherever they are; wrappers that are backbones themselves, such as a
    pyramid, come whole. So does an attribute ``backbone`` with parameters of its own besides, such as a library's
    pyramid. A model without any is its own extractor.
    """
    if isinstance(model, Backbone):
        return [model]
    found: list[nn.Module] = list(_outermost(model))
    whole = _attribute(model)
    if whole is not None and not _is_shell(whole):
        inside = {id(module) for module in whole.modules()}
        return [whole, *(each for each in found if id(each) not in inside)]
    return found or [model]


def returns_features(model: nn.Module) -> bool:
    """Whether what ``model`` returns is its extractor's: whether it is one, or nothing but a shell around it."""
    return find_extractors(model) == [model] or (_is_shell(model) and _attribute(model) is None)


def replace_everywhere(model: nn.Module, others: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in the place of some, wherever ``model`` holds them; return what stands for ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in others:
                parent._modules[name] = others[child]
    return others.get(model, model)


def _attribute(model: nn.Module) -> nn.Module | None:
    backbone = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else None


def _outermost(module: nn.Module) -> Iterator[Backbone]:
    """Yield the backbones in ``module`` that are in no other, each once."""
    covered: set[int] = set()
    for each in module.modules():  # a module comes before what is in it
        if isinstance(each, Backbone) and id(each) not in covered:
            covered |= {id(inner) for inner in each.modules()}
            yield each


def _is_shell(module: nn.Module) -> bool:
    """Whether there are backbones in ``module`` and no other parameters."""
    backbones = list(_outermost(module))
    theirs = {id(parameter) for each in backbones for parameter in each.parameters()}
    return bool(backbones) and all(id(parameter) in theirs for parameter in module.parameters())
