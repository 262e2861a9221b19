"""What a transformers configuration says of a backbone of this package, and what it must not say."""

from collections.abc import Sequence
from typing import Any, Final

from pydantic import ValidationError
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from backbone.config import BackboneConfig, explain
from backbone.stages import STAGE_NAMES

MODEL_TYPE: Final = "backbone_plugin"  # "resnet" in it would make DETR freeze every parameter

STAGES: Final = ("stem", "stage1", "stage2", "stage3", "stage4")
"""transformers' names of c1 (the stem before its pooling, stride 2) and C2 to C5."""

FEATURES: Final = dict(zip(STAGES, ("c1", *STAGE_NAMES[1:]), strict=True))

REMEDIES: Final = {
    "dilation": "output_stride: 16 (or 8)",
    "use_pretrained_backbone": "weights: IMAGENET1K_V2, or a path",
    "pretrained": "weights: IMAGENET1K_V2, or a path",
    "use_timm_backbone": "name: timm/<model>",
    "backbone_kwargs": "the keys themselves",
    "timm_kwargs": "the keys themselves",
    "num_channels": "in_channels",
    "in_chans": "in_channels",
    "freeze_batch_norm_2d": "norm: frozen_bn (or bn)",
    "features_only": "out_features, which are always returned alone",
}
"""Keys by which transformers' own backbones are set up, and what they are called here."""


class TransformersBackboneConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A backbone of this package as a transformers configuration, of model type ``backbone_plugin``.

    Args:
        backbone: A registered name, or a BackboneConfig, or its keys as a dict.
        out_features: Feature maps to return, of ``stem`` (c1) and ``stage1`` to ``stage4`` (C2 to C5), in this order.
            Without it and ``out_indices`` those that ``backbone`` names in its own ``out_features``, or else the last.
        out_indices: The same by number, 0 to 4; negative ones count from the end.
        settings: What every transformers configuration may hold, such as ``dtype``.

    Attributes:
        backbone: The keys of ``BackboneConfig`` that were given, ``name`` at least.
        stage_names: ``stem``, ``stage1`` ... ``stage4``.

    Raises:
        ValueError: If a key is unknown or out of range, the two ways to name features differ, or a setting means
            nothing for these backbones.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        backbone: str | dict[str, Any] | BackboneConfig = "resnet50",
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **settings: Any,  # noqa: ANN401 - PreTrainedConfig's own, and what a saved configuration carries
    ) -> None:
        _refuse_what_means_nothing(settings)
        self.backbone = _given_keys(backbone)
        self.stage_names = list(STAGES)
        own = self.backbone.pop("out_features", None)
        if own is not None:
            named = [stage for stage, feature in FEATURES.items() if feature in own]
            if out_features is not None and list(out_features) != named:
                raise ValueError(
                    f"out_features must be given once, got {list(out_features)} and, in backbone, {list(own)}; remove "
                    f"it from backbone"
                )
            out_features = named if out_indices is None else out_features
        super().__init__(**settings)
        self.set_output_features_output_indices(
            out_features=None if out_features is None else list(out_features),
            out_indices=None if out_indices is None else list(out_indices),
        )
        self.plan()

    def plan(self) -> BackboneConfig:
        """Return the configuration of the network that gives this configuration's ``out_features``.

        Raises:
            ValueError: If a key of ``backbone`` is unknown or out of range; one line for each.
        """
        features = tuple(FEATURES[stage] for stage in self.out_features)
        try:
            return BackboneConfig.model_validate({**self.backbone, "out_features": features})
        except ValidationError as error:
            raise ValueError("; ".join(f"backbone: {line}" for line in explain(error))) from None

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.plan().in_channels


def _given_keys(backbone: str | dict[str, Any] | BackboneConfig) -> dict[str, Any]:
    """Return the keys that were given, as JSON holds them; defaults stay unwritten."""
    if isinstance(backbone, str):
        return {"name": backbone}
    if isinstance(backbone, BackboneConfig):
        return backbone.model_dump(mode="json", exclude_unset=True)
    if isinstance(backbone, dict):
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in backbone.items()}
        return {key: str(value) if key == "weights" and value is not None else value for key, value in lists.items()}
    raise ValueError(f"backbone must be a name, a BackboneConfig or a dict of its keys, got {backbone!r}")


def _refuse_what_means_nothing(settings: dict[str, Any]) -> None:
    """Raise for settings of other backbones, and for ours outside of ``backbone``."""
    settings.pop("stage_names", None)  # of a saved configuration
    ours = [key for key in settings if key in BackboneConfig.model_fields]
    if ours:
        raise ValueError(
            f"{', '.join(ours)} must be given in backbone: backbone={{'name': ..., {ours[0]!r}: {settings[ours[0]]!r}}}"
        )
    for key in REMEDIES.keys() & settings.keys():
        if settings.pop(key) not in (None, False):
            raise ValueError(f"{key} means nothing for a backbone of this package; write in backbone: {REMEDIES[key]}")
