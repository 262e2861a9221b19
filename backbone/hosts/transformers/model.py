"""A backbone of this package as a transformers backbone, whose freezing holds whatever its host does."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Final, Self

import torch
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from backbone.builder import build_backbone, construct
from backbone.config import BackboneConfig
from backbone.features import Backbone
from backbone.features import find_backbone as network_in
from backbone.freeze import freeze_stages
from backbone.hosts.transformers.configuration import FEATURES, STAGES, TransformersBackboneConfig
from backbone.hosts.transformers.heads import register_heads
from backbone.hosts.transformers.norms import keep_own_norms, own_norms
from backbone.norm import FrozenBatchNorm2d
from backbone.stages import STAGE_NAMES

COUNTER: Final = "num_batches_tracked"


class TransformersBackbone(BackboneMixin, PreTrainedModel):
    """A backbone of this package for transformers' detectors and segmenters.

    What is frozen stays so: through ``from_pretrained``, which sets every ``requires_grad`` anew, through a detector's
    ``unfreeze_backbone`` and through ``train()``. Thaw by ``freeze_stages(model.network, 0)``. Norms that a detector
    replaces by a frozen class of its own, as DETR does, become this package's frozen ones, which are faster.

    Args:
        config: What to build.

    Attributes:
        network: The backbone; ``freeze_stages``, ``freeze_report`` and ``load_weights`` take it.
        num_features: Channels of each of ``stage_names``, whether built or not; 0 for a stage the network lacks.

    Raises:
        ValueError: As ``build_backbone`` does, or if the detector's configuration sets what ours alone can.
    """

    config_class = TransformersBackboneConfig
    config: TransformersBackboneConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - transformers declares it so
    has_attentions = False
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    network: Backbone

    def __init__(self, config: TransformersBackboneConfig) -> None:
        super().__init__(config)
        register_heads()
        _refuse_detectors_dilation(config)
        plan = config.plan()
        self._awaits_weights = torch.empty(0).is_meta  # from_pretrained builds there and brings the weights
        self.network = construct(plan) if self._awaits_weights else build_backbone(plan)
        freeze_stages(self.network, plan.freeze_at)
        self.num_features = _channels(plan, self.network)
        self._own_norms = own_norms(self.network)
        self._uncounted = {path for path, m in self.network.named_modules() if _is_built_frozen(m)}
        self._frozen: list[nn.Parameter] | None = None  # None until the first call: the detector is not built yet
        self.register_state_dict_post_hook(_leave_out_counters)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput:
        """Images (N, C, H, W) -> ``feature_maps``, one for each of ``out_features``, finest first; sizes round up.

        Args:
            pixel_values: The images.
            output_hidden_states: Whether ``hidden_states`` are returned as well: the same maps, for a network of this
                package gives none but those of ``out_features``.
            output_attentions: Must not be true.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: If attentions are asked for.
        """
        if output_attentions:
            raise ValueError("output_attentions must be false: a backbone of this package returns none, got true")
        if not torch.compiler.is_compiling():
            self._hold()
        features = self.network(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = tuple(features[FEATURES[stage]] for stage in STAGES if FEATURES[stage] in features)
        return BackboneOutput(
            feature_maps=tuple(features[FEATURES[stage]] for stage in self.out_features),
            hidden_states=hidden if output_hidden_states else None,
        )

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, as every module does; what is frozen stays so."""
        super().train(mode)
        if "network" in self._modules:
            self._settle()
        return self

    def _hold(self) -> None:
        """Freeze again what the detector thawed without ``freeze_stages``."""
        if self._frozen is None or any(parameter.requires_grad for parameter in self._frozen):
            self._settle()

    def _settle(self) -> None:
        network = network_in(self.network)  # CUDA graphs may stand around it
        self._uncounted.update(keep_own_norms(network, self._own_norms))
        self._frozen = list(_frozen_parameters(network))
        for parameter in self._frozen:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as the network's own initialisation made them."""

    def _initialize_weights(self, module: nn.Module, *_: object) -> None:
        """Once a checkpoint is loaded, give what it lacks the values of a fresh network, and freeze again."""
        if module is not self or not self._awaits_weights:
            return
        self._awaits_weights = False
        plan = self.config.plan()
        _fill(self.network, _missing(self.network), plan)
        freeze_stages(self.network, plan.freeze_at)
        self._settle()


def find_backbone(model: nn.Module) -> TransformersBackbone:
    """Return the backbone inside ``model``, wherever its class keeps it.

    Raises:
        ValueError: If there is none of this package.
    """
    for module in model.modules():
        if isinstance(module, TransformersBackbone):
            return module
    raise ValueError(
        f"the model must have a TransformersBackbone, got {type(model).__name__} without one; build it with "
        f"backbone_config=TransformersBackboneConfig(...)"
    )


def _frozen_parameters(network: Backbone) -> Iterator[nn.Parameter]:
    """Return the parameters that must not train: those of frozen stages, and of frozen norms anywhere."""
    for norm in network.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            yield from norm.parameters(recurse=False)
    for stage, modules in network.stages.items():
        paths = network.stage_modules[stage]
        if paths and all(getattr(network.get_submodule(path), "is_frozen", False) for path in paths):
            yield from modules.parameters()


def _leave_out_counters(module: TransformersBackbone, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Leave out the batch counters of norms that stay frozen: transformers' own frozen norms have none either."""
    for path in module._uncounted:
        state.pop(f"{prefix}network.{path}.{COUNTER}", None)
    for key in [key for key in state if key.startswith(f"{prefix}network.") and ".thawed." in key]:
        del state[key]  # of a norm that a detector replaced where there was none


def _is_built_frozen(norm: nn.Module) -> bool:
    return isinstance(norm, FrozenBatchNorm2d) and norm.built_frozen


def _missing(network: Backbone) -> list[str]:
    """Return the tensors that ``from_pretrained``, which marks what it loads, has not filled."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return [name for name, tensor in tensors if not getattr(tensor, "_is_hf_initialized", False)]


@torch.no_grad()
def _fill(network: Backbone, names: list[str], plan: BackboneConfig) -> None:
    """Give tensors that no checkpoint filled the values of a fresh network; a counter starts at zero."""
    some = next((t for t in (*network.parameters(), *network.buffers()) if not t.is_meta), torch.empty(0))
    values: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.long) for name in names if name.endswith(COUNTER)}
    if len(values) < len(names):
        fresh = build_backbone(plan)
        values = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers()), **values}
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        old = getattr(owner, leaf)
        dtype, device = old.dtype, some.device if old.is_meta else old.device
        value = values[name].detach().to(device, dtype, copy=True)
        setattr(owner, leaf, nn.Parameter(value, old.requires_grad) if leaf in owner._parameters else value)
        getattr(owner, leaf)._is_hf_initialized = True


def _channels(plan: BackboneConfig, network: Backbone) -> list[int]:
    """Return the channels of every stage, of those that are not built as well."""
    channels = {name: spec.channels for name, spec in network.feature_specs.items()}
    stem = [m.out_channels for m in network.stages["stem"].modules() if isinstance(m, nn.Conv2d)]
    channels.setdefault("c1", stem[-1] if stem else 0)
    if set(STAGE_NAMES[1:]) - set(channels):
        whole = {**plan.model_dump(), "out_features": STAGE_NAMES[1:], "weights": None, "stem_channels_from": None}
        try:
            with torch.device("meta"):
                rest = construct(BackboneConfig.model_validate(whole))
        except ValueError:  # a network without one of them: only what it was asked for is known
            return [channels.get(feature, 0) for feature in FEATURES.values()]
        channels = {name: spec.channels for name, spec in rest.feature_specs.items()} | channels
    return [channels.get(feature, 0) for feature in FEATURES.values()]


def _refuse_detectors_dilation(config: TransformersBackboneConfig) -> None:
    """Raise if the detector's own configuration asks for dilation, which transformers tells no backbone of.

    It hands the detector's configuration to ``load_backbone`` and only ours on to us; once it hands on both, read it
    from there.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "load_backbone":
        frame = frame.f_back
    detector = frame.f_locals.get("config") if frame is not None else None
    if getattr(detector, "backbone_config", None) is config and getattr(detector, "dilation", False):
        raise ValueError(
            f"dilation of {type(detector).__name__} means nothing for a backbone of this package, got true; remove it "
            f"and write output_stride: 16 in backbone"
        )
