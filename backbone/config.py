"""What a user writes in YAML, checked before anything is built. This file knows no torch."""

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from backbone.stages import STAGE_NAMES, stage_number

NormName = Literal["frozen_bn", "bn_eval", "bn", "sync_bn", "gn"]
GN_GROUPS: Final = 32  # of GroupNorm, arXiv:1803.08494, section 4.1
FeatureName = Literal["c1", "c2", "c3", "c4", "c5"]
ResidualStage = Literal["c2", "c3", "c4", "c5"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or ``";"`` when none is near.

    Of several near words the one that starts most alike: for resnet52 resnet50, not resnet152.
    """
    nearest = difflib.get_close_matches(str(word), list(known), n=5)  # best first, and max keeps the first of equals
    if not nearest:
        return ";"
    best = max(nearest, key=lambda near: len(os.path.commonprefix([str(word), near])))  # noqa: RUF071 - by letters
    return f"; did you mean {best!r}?"


def rule(text: str) -> WrapValidator:
    """State the rule in the field's own words, with the value received, in place of pydantic's message."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"{text}, got {value!r}") from None

    return WrapValidator(check)


class StrictModel(BaseModel):
    """A frozen settings object: unknown keys are errors, and no value is converted behind the user's back."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: object) -> object:
        if isinstance(data, dict):
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                hints = [f"unknown key {key!r}{did_you_mean(key, cls.model_fields)}" for key in unknown]
                raise ValueError(f"{' '.join(hints)} known keys: {', '.join(cls.model_fields)}")
        return data


class BackboneConfig(StrictModel):
    """Everything that decides which backbone is built and in what state it arrives.

    Raises:
        pydantic.ValidationError: (a ValueError) for an unknown key, a wrong type or an impossible combination.
    """

    name: Annotated[str, Field(min_length=1), rule("must be a backbone's name, such as resnet50")] = Field(
        description="Registered name; `backbone list` shows them all."
    )
    weights: Annotated[
        str | None,
        BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
        rule("must be null, a torchvision weights name such as IMAGENET1K_V2, or a checkpoint's path or address"),
    ] = Field(
        default=None,
        description="torchvision weights name (IMAGENET1K_V2, RetinaNet_ResNet50_FPN_Weights.COCO_V1), checkpoint "
        "path, URL#sha256=<digest>, timm/<model> or hf://org/repo/file.",
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


Config = TypeVar("Config", bound=StrictModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win in silence; here the second one is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            problem = ""
            if not isinstance(key_node, yaml.ScalarNode):
                problem = f"a key must be a word, got a {key_node.id}"
            elif key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | os.PathLike[str]) -> BackboneConfig:
    """Read a backbone recipe from YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML or breaks a rule; names file, key, rule and remedy.
    """
    return read_yaml(path, BackboneConfig)


def read_yaml(path: str | os.PathLike[str], schema: type[Config]) -> Config:
    """Read a YAML file into a checked configuration of class ``schema``; raises as ``load_config`` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"config must be an existing YAML file, got {os.fspath(path)!r}; check the path")
    content = Path(path).read_bytes()
    try:
        data = yaml.load(content, Loader=_UniqueKeyLoader)
    except Exception as error:  # PyYAML lets through whatever int() or date() raises
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a mapping of keys such as `name: resnet50`, got {type(data).__name__}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in explain(error))) from None


def explain(error: ValidationError) -> list[str]:
    """Return one readable line per broken rule: the key, the rule, the value received and the remedy."""
    lines = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        rule = re.sub("^Value error, ", "", detail["msg"])
        rule = "is required; give it a value" if detail["type"] == "missing" else rule
        lines.append(f"{key} {rule}".strip())
    return lines


def json_schema(settings: type[StrictModel] = BackboneConfig) -> str:
    """Return the JSON schema of a recipe, a backbone's by default, for editors that check YAML while it is typed."""
    schema = settings.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part["description"] = part["description"].splitlines()[0]
    return json.dumps(schema, indent=2) + "\n"
