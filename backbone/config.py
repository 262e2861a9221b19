"""What a user writes in YAML or Python, checked before anything is built. This file knows no torch."""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, TypedDict, Unpack

from pydantic import BeforeValidator, Field, model_validator

from backbone.stages import STAGE_NAMES, stage_number
from backbone.strict import SettingsError, StrictModel, did_you_mean, explain, read_yaml, rule

__all__ = [
    "GN_GROUPS",
    "BackboneConfig",
    "BackboneKeys",
    "FeatureName",
    "NormName",
    "SettingsError",
    "StrictModel",
    "WeightsSource",
    "did_you_mean",
    "explain",
    "json_schema",
    "load_config",
    "read_yaml",
    "rule",
]

NormName = Literal["frozen_bn", "bn_eval", "bn", "sync_bn", "gn"]
GN_GROUPS: Final = 32  # of GroupNorm, arXiv:1803.08494, section 4.1
FeatureName = Literal["c1", "c2", "c3", "c4", "c5"]
ResidualStage = Literal["c2", "c3", "c4", "c5"]


WeightsSource: TypeAlias = str | os.PathLike[str] | Enum | Mapping[str, Any] | None
"""Weights as a caller may give them: a name, path or address, a member of torchvision's enums, a state dict."""


class BackboneKeys(TypedDict, total=False):
    """The keys of ``BackboneConfig`` but ``name``, for the signatures that take them: one line a key, held by a test.

    Sequences are wider here than in the config, which makes tuples of them; a state dict as weights is for
    ``build_backbone`` alone.
    """

    weights: WeightsSource
    norm: NormName
    freeze_at: int
    output_stride: Literal[32, 16, 8]
    dilate_first_block: bool
    stride_in_1x1: bool
    dilations: Sequence[int] | None
    multi_grid: Sequence[int] | None
    in_channels: int
    stem_channels_from: Sequence[int | None] | None
    out_features: Sequence[FeatureName]
    num_classes: int | None
    zero_init_residual: bool
    checkpoint_stages: Sequence[FeatureName]


def _weights_name(value: object) -> object:
    """Return a path or a member of torchvision's enums as the string that says the same."""
    if isinstance(value, Enum) and not isinstance(value, str):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, Mapping):
        raise ValueError(
            f"must be a name, path or address in a config, got a state dict of {len(value)} entries; give it "
            f"to build_backbone(..., weights=...) or load_weights(model, ...)"
        )
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class BackboneConfig(StrictModel):
    """Everything that decides which backbone is built and in what state it arrives.

    Args:
        name: Registered name; may come first without ``name=``.
        keys: The other keys, each described by its field.

    Raises:
        SettingsError: (a ValueError and pydantic's ValidationError) for an unknown key, a wrong type or an impossible
            combination.
    """

    name: Annotated[str, Field(min_length=1), rule("must be a backbone's name, such as resnet50")] = Field(
        description="Registered name; `backbone list` shows them all."
    )
    weights: Annotated[
        str | None,
        rule("must be null, a torchvision weights name such as IMAGENET1K_V2, or a checkpoint's path or address"),
        BeforeValidator(_weights_name),  # outside of the rule: it runs first and has its own words
    ] = Field(
        default=None,
        description="torchvision weights name (IMAGENET1K_V2, RetinaNet_ResNet50_FPN_Weights.COCO_V1), checkpoint "
        "path, URL#sha256=<digest>, timm/<model>, hf://org/repo/file or package://<package>/<path in it>.",
    )
    norm: Annotated[NormName, rule("must be frozen_bn, bn_eval, bn, sync_bn or gn")] = Field(
        default="frozen_bn",
        description="Norm layers. frozen_bn never trains; the others do, outside frozen stages. bn_eval trains weight "
        "and bias and keeps its statistics.",
    )
    freeze_at: Annotated[
        int, Field(ge=0, le=5), rule("must be 0 to 5 (stages counted from the stem; 0 freezes nothing)")
    ] = Field(default=0, description="Freeze the first n of stem, C2, C3, C4, C5 (detectron2's FREEZE_AT).")
    output_stride: Annotated[
        Literal[32, 16, 8],
        BeforeValidator(lambda value: value if type(value) is int else None),  # Literal would take 16.0 for 16
        rule("must be 32, 16 or 8 (image pixels)"),
    ] = Field(default=32, description="Largest stride; stages beyond it dilate instead.")
    dilate_first_block: Annotated[bool, rule("must be true or false")] = Field(
        default=False,
        description="Dilation of the first block in a dilated stage: false keeps the previous one (torchvision, "
        "timm), true takes the new one (detectron2, mmdetection, SMP).",
    )
    stride_in_1x1: Annotated[bool, rule("must be true or false")] = Field(
        default=False,
        description="Bottleneck stride in the first 1x1 (v1: the paper's, MSRA/Caffe2 weights) instead of the "
        "3x3 (v1.5: torchvision's weights).",
    )
    dilations: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...] | None,
        Field(min_length=4, max_length=4, strict=False),
        rule("must be null or a list of four integers of at least 1 (dilations of C2, C3, C4, C5)"),
    ] = Field(
        default=None,
        description="Dilation of the 3x3 convolutions in C2 to C5, whatever output_stride would give them; strides "
        "are output_stride's.",
    )
    multi_grid: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...] | None,
        Field(min_length=1, strict=False),
        rule("must be null or a list of integers of at least 1, one for each block of C5"),
    ] = Field(
        default=None,
        description="Multiplies the dilation in each block of C5, the first included: [1, 2, 4] is DeepLab's "
        "(arXiv:1706.05587).",
    )
    in_channels: Annotated[int, Field(ge=1), rule("must be an integer of at least 1")] = Field(
        default=3, description="Channels of the input images."
    )
    stem_channels_from: Annotated[
        tuple[Annotated[int, Field(ge=0)] | None, ...] | None,
        Field(strict=False),
        rule("must be null or a list of one pre-trained channel (0, 1, 2 or null for none) for each input channel"),
    ] = Field(
        default=None,
        description="For each input channel the pre-trained channel whose stem weights it takes, null for zeros: "
        "[2, 1, 0] feeds RGB to BGR weights. By default RGB weights are summed for 1 channel, repeated for more.",
    )
    out_features: Annotated[
        tuple[FeatureName, ...],
        Field(min_length=1, strict=False),
        rule("must be a list of one or more of c1, c2, c3, c4, c5"),
    ] = Field(
        default=("c2", "c3", "c4", "c5"),
        description="Feature maps to return; later stages are not built. c1 (stride 2) is the stem's, before its pool.",
    )
    num_classes: Annotated[
        int | None, Field(ge=1), rule("must be null or an integer of at least 1 (classes of the classifier)")
    ] = Field(default=None, description="Adds the ImageNet classifier and `logits` to the outputs.")
    zero_init_residual: Annotated[bool, rule("must be true or false")] = Field(
        default=False,
        description="Start the last norm of every block at zero, so that a block starts as the identity "
        "(arXiv:1706.02677). Useful with trained norms only.",
    )
    checkpoint_stages: Annotated[
        tuple[ResidualStage, ...], Field(strict=False), rule("must be a list of c2, c3, c4, c5")
    ] = Field(default=(), description="Stages that recompute their activations in backward to save memory.")

    if TYPE_CHECKING:

        def __init__(self, name: str, **keys: Unpack[BackboneKeys]) -> None: ...

    else:

        def __init__(self, *name: str, **keys: Any) -> None:  # noqa: ANN401
            if len(name) > 1 or (name and "name" in keys):
                raise TypeError(f"a BackboneConfig takes one name and then keys, such as freeze_at=2; got {name!r}")
            super().__init__(**({"name": name[0]} if name else {}), **keys)

        __init__.__pydantic_base_init__ = True

    @classmethod
    def mistaken_for(cls, data: dict[Any, Any]) -> str | None:
        """Return what to do with a detector's keys."""
        if "detector" in data:
            return (
                f"a backbone's keys begin with name, got those of a detector ({data['detector']}); read its file by "
                f"load_detector_config and build it by hosts.torchvision.build_detector"
            )
        return None

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> "BackboneConfig":
        chosen = self.stem_channels_from
        if chosen is not None and (len(chosen) != self.in_channels or self.weights is None):
            raise ValueError(
                f"stem_channels_from maps pre-trained weights to in_channels: {self.in_channels}, one entry each; "
                f"got {list(chosen)} with weights: {self.weights or 'null'}; give weights and {self.in_channels} "
                f"entries, or remove it"
            )
        for key in ("out_features", "checkpoint_stages"):
            names = getattr(self, key)
            if len(set(names)) != len(names):
                raise ValueError(f"{key} must not repeat a stage, got {list(names)}")
        if self.multi_grid is not None and STAGE_NAMES[-1] not in self.built_stages:
            raise ValueError(
                f"multi_grid dilates the blocks of c5, which out_features {', '.join(self.out_features)} does without; "
                f"remove it or add c5"
            )
        unbuilt = set(self.checkpoint_stages) - set(self.built_stages)
        if unbuilt:
            built = ", ".join(self.built_stages[1:]) or "none"
            raise ValueError(
                f"checkpoint_stages must be among the stages that are built, {built}; "
                f"got {', '.join(sorted(unbuilt))}: add it to out_features or drop it from checkpoint_stages"
            )
        return self

    @property
    def built_stages(self) -> tuple[str, ...]:
        """The stages needed for ``out_features`` (and the classifier), from the stem on."""
        last = max(map(stage_number, self.out_features))
        return STAGE_NAMES if self.num_classes is not None else STAGE_NAMES[: last + 1]


NAME: Final = inspect.Parameter("name", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)


def spelled_out(
    settings: type[StrictModel], keys: type, *leading: inspect.Parameter, returns: object
) -> inspect.Signature:
    """Return a signature with every one of ``keys`` as a keyword, for ``help()`` and completion at runtime.

    Args:
        settings: The class whose fields have the defaults.
        keys: The TypedDict of them, which type checkers read.
        leading: The parameters before them.
        returns: What the call returns.
    """
    keywords = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=settings.model_fields[name].get_default(), annotation=kind
        )
        for name, kind in keys.__annotations__.items()
    ]
    return inspect.Signature([*leading, *keywords], return_annotation=returns)


BackboneConfig.__signature__ = spelled_out(BackboneConfig, BackboneKeys, NAME, returns=None)


def load_config(path: str | os.PathLike[str]) -> BackboneConfig:
    """Read a backbone recipe from YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML or breaks a rule; names file, key, rule and remedy.
    """
    return read_yaml(path, BackboneConfig)


def json_schema(settings: type[StrictModel] = BackboneConfig) -> str:
    """Return the JSON schema of a recipe, a backbone's by default, for editors that check YAML while it is typed."""
    schema = settings.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part["description"] = part["description"].splitlines()[0]
    return json.dumps(schema, indent=2) + "\n"
