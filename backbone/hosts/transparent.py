"""Wrappers that do not show in a state dict: ``encoder.conv1.weight``, not ``encoder.network.conv1.weight``.

A host's own checkpoints have the names of its own backbones, which are torchvision's and ours, without a wrapper.
"""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from backbone.features import Backbone, Preprocessing

WRAPPED: Final = "network"


class TransparentWrapper(Backbone):
    """A backbone around another one, ``network``, with the state-dict names of that one.

    Stages that are not built may be in a state dict that is loaded: hosts build all of their own, wanted or not.

    ``freeze_stages``, ``freeze_report`` and ``FreezeSchedule`` take it as they take every backbone. Parameters in
    ``named_parameters()`` keep the wrapper in their names, as hooks and optimizers of torch expect it.

    Attributes:
        network: The backbone under its own names.
        loading_under: Where in the whole model the state dict being loaded puts this module.
    """

    network: Backbone

    def __init__(self) -> None:
        super().__init__()
        self.loading_under = ""
        self.register_state_dict_post_hook(_strip_saved)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_wrap_given)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_strip_missing)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - torch's own says as much
        """Return also what lies directly in ``network``: ``encoder.layer4``, as scripts for a host's own have it."""
        try:
            return super().__getattr__(name)  # first: a library's model lies in a ``network`` of its own
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get(WRAPPED)
            if network is None or name not in network._modules:
                raise
            return network._modules[name]

    def named_weights(self, name: str) -> tuple[Mapping[str, Tensor], Preprocessing] | None:
        """Return the weights that the library of ``network`` publishes under ``name``."""
        return self.network.named_weights(name)

    def adapt_weights(self, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Preprocessing] | None:
        """Return a file's tensors in the names of ``network``, where its library has its own."""
        return self.network.adapt_weights(state)

    def saved_name(self, name: str) -> str:
        """Return the host's name of what ``network`` calls ``name``."""
        return name

    def own_name(self, name: str) -> str:
        """Return what ``network`` calls the host's ``name``."""
        return name

    def wrap(self, network: Backbone) -> None:
        """Hold ``network``, in place of the one before."""
        self.adopt(WRAPPED, network)
        self.feature_specs = dict(network.feature_specs)
        self.unbuilt_prefixes = network.unbuilt_prefixes


def _strip_saved(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    inside = f"{prefix}{WRAPPED}."
    assert isinstance(module, TransparentWrapper)
    for key in [key for key in state if key.startswith(inside)]:
        state[prefix + module.saved_name(key.removeprefix(inside))] = state.pop(key)


def _wrap_given(module: TransparentWrapper, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    module.loading_under = prefix  # the last hook is not told
    given = [key for key in state if key.startswith(prefix)]
    # all are taken out first: a library's model lies in a ``network`` of its own
    values = {f"{prefix}{WRAPPED}.{module.own_name(key.removeprefix(prefix))}": state.pop(key) for key in given}
    unbuilt = tuple(f"{prefix}{WRAPPED}.{beginning}" for beginning in module.network.unbuilt_prefixes)
    state.update({key: value for key, value in values.items() if not key.startswith(unbuilt)})


def _strip_missing(module: TransparentWrapper, incompatible: _IncompatibleKeys) -> None:
    prefix = module.loading_under
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        inside = f"{prefix}{WRAPPED}."
        keys[:] = [
            prefix + module.saved_name(key.removeprefix(inside)) if key.startswith(inside) else key for key in keys
        ]
