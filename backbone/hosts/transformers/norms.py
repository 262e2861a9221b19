"""Norms that a detector of transformers replaced by a frozen class of its own, as this package's frozen norms."""

from torch import Tensor, nn

from backbone.features import Backbone
from backbone.norm import FrozenBatchNorm2d, freeze_norms, frozen_form


def own_norms(network: Backbone) -> dict[str, nn.Module]:
    """Return the batch norms that detectors such as DETR replace, by their path."""
    return {path: m for path, m in network.named_modules() if isinstance(m, nn.BatchNorm2d) and frozen_form(m)}


def keep_own_norms(network: Backbone, norms: dict[str, nn.Module]) -> list[str]:
    """Put this package's frozen norms in the place of a detector's, with its values, in place.

    The detector's know no eps but 1e-5 and no activation. It wants every norm frozen: so all count as built frozen.

    Args:
        network: The backbone, after its detector was built.
        norms: What ``own_norms`` found before.

    Returns:
        Their paths.
    """
    replaced = {path: norm for path, norm in norms.items() if _is_frozen_elsewhere(network.get_submodule(path))}
    for path, norm in replaced.items():
        theirs = network.get_submodule(path)
        ours = freeze_norms(norm, built_frozen=True)
        for name in ("weight", "bias"):
            setattr(ours, name, nn.Parameter(_tensor(theirs, name), requires_grad=False))
        for name in ("running_mean", "running_var"):
            setattr(ours, name, _tensor(theirs, name))
        ours.num_batches_tracked = _tensor(theirs, "running_mean").new_zeros((), dtype=int)  # type: ignore[call-overload]
        ours.train(theirs.training)
        network.set_submodule(path, ours)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module._modules.pop("thawed", None)  # what a norm thaws to looks like a norm to replace
            module.built_frozen |= bool(replaced)
    return list(replaced)


def _is_frozen_elsewhere(norm: nn.Module) -> bool:
    """Whether it is one of transformers' frozen norms: DetrFrozenBatchNorm2d, RTDetrFrozenBatchNorm2d, ..."""
    kind = type(norm)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith("FrozenBatchNorm2d")


def _tensor(norm: nn.Module, name: str) -> Tensor:
    value = getattr(norm, name)
    assert isinstance(value, Tensor)
    return value.detach()
