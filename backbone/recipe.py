"""A whole detector in one YAML file: backbone, pyramid, head and training, checked before anything is built."""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypedDict

from pydantic import BeforeValidator, Field, model_validator

from backbone.config import GN_GROUPS, BackboneConfig, StrictModel, read_yaml, rule
from backbone.stages import STAGE_NAMES

DetectorName = Literal["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos", "deeplabv3", "fcn"]
ExtraLevels = Literal["none", "maxpool", "p6p7"]
SourceOfP6 = Literal["p5", "c5"]
Part = Literal["stem", "c2", "c3", "c4", "c5", "pyramid", "head"]

R_CNNS: Final[tuple[DetectorName, ...]] = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn")
DENSE_DETECTORS: Final[tuple[DetectorName, ...]] = ("retinanet", "fcos")
SEGMENTERS: Final[tuple[DetectorName, ...]] = ("deeplabv3", "fcn")

PositiveInt = Annotated[int, Field(ge=1), rule("must be an integer of at least 1")]
NonNegative = Annotated[float, Field(ge=0, strict=False), rule("must be a number of at least 0")]


class PyramidConfig(StrictModel):
    """The feature pyramid between backbone and head."""

    out_channels: PositiveInt = Field(default=256, description="Channels of each level.")
    extra_levels: Annotated[ExtraLevels | None, rule("must be none, maxpool or p6p7")] = Field(
        default=None,
        description="Levels above the backbone's. By default maxpool (P6) for R-CNNs, p6p7 for RetinaNet and FCOS.",
    )
    p6_from: Annotated[SourceOfP6, rule("must be p5 or c5")] = Field(
        default="p5", description="What P6 of p6p7 is computed from: p5 as torchvision does, c5 as detectron2 does."
    )


class TrainConfig(StrictModel):
    """How ``backbone train`` trains the detector."""

    epochs: PositiveInt = Field(default=12, description="Passes over the training data.")
    batch_size: PositiveInt = Field(default=2, description="Images per process and step.")
    optimizer: Annotated[Literal["sgd", "adamw"], rule("must be sgd or adamw")] = Field(
        default="sgd", description="sgd has a momentum of 0.9."
    )
    learning_rate: NonNegative = Field(default=0.02, description="Learning rate of the head, after the warm-up.")
    weight_decay: NonNegative = Field(default=1e-4, description="Of weights; norms and biases have none.")
    warmup_steps: Annotated[int, Field(ge=0), rule("must be an integer of at least 0")] = Field(
        default=500, description="Steps in which the learning rate grows linearly from 0.001 of itself."
    )
    learning_rate_decay: Annotated[Literal["steps", "cosine", "none"], rule("must be steps, cosine or none")] = Field(
        default="steps", description="steps: a tenth from each of decay_epochs on; cosine: to zero at the last step."
    )
    decay_epochs: Annotated[tuple[int, ...], Field(strict=False), rule("must be a list of epochs")] = Field(
        default=(8, 11), description="For learning_rate_decay: steps."
    )
    lr_multipliers: Annotated[
        dict[Part, Annotated[float, Field(ge=0, strict=False)]],
        rule("must map stem, c2, c3, c4, c5, pyramid or head to a number of at least 0"),
    ] = Field(default={}, description="Factor on the learning rate of each part; 1 where nothing is said.")
    layer_decay: Annotated[float, Field(gt=0, le=1, strict=False), rule("must be above 0 and at most 1")] = Field(
        default=1.0,
        description="Layer-wise decay: c5 learns with this factor, c4 with its square, ... the stem with its fifth "
        "power, times lr_multipliers.",
    )
    freeze_schedule: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0, le=5)]] | None,
        Field(min_length=1),
        rule("must map one or more epochs, counted from 0, to freeze_at values of 0 to 5"),
    ] = Field(default=None, description="freeze_at by epoch, such as {0: 2, 5: 0}; null keeps the backbone's.")
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"], rule("must be 32-true, bf16-mixed or 16-mixed")
    ] = Field(default="32-true", description="Lightning's name for the arithmetic.")
    channels_last: Annotated[bool, rule("must be true or false")] = Field(
        default=True, description="Memory layout of backbone and pyramid."
    )
    gradient_clip_norm: Annotated[float | None, Field(gt=0), rule("must be null or above 0")] = Field(
        default=None, description="Largest norm of all gradients together."
    )
    horizontal_flip: Annotated[float, Field(ge=0, le=1, strict=False), rule("must be 0 to 1")] = Field(
        default=0.5, description="Probability that a training image is mirrored."
    )
    scale_jitter: Annotated[
        tuple[Annotated[float, Field(gt=0, strict=False)], Annotated[float, Field(gt=0, strict=False)]] | None,
        Field(strict=False),
        rule("must be null or two factors above 0, such as [0.1, 2.0]"),
    ] = Field(
        default=None,
        description="Large-scale jitter of a detector's training images: each is resized by a factor between the two "
        "and cropped or padded to a square of min_size.",
    )
    ema_decay: Annotated[float | None, Field(ge=0, lt=1, strict=False), rule("must be null or 0 to below 1")] = Field(
        default=None,
        description="Exponential moving average of the weights after each step, such as 0.999: it is what is measured "
        "and written.",
    )
    start_from: Annotated[str | None, rule("must be null or the path of a detector's weights")] = Field(
        default=None,
        description="model.pth of another run, or torchvision's weights of the same detector, to fine-tune from. "
        "Heads keep the rows of classes of the same name.",
    )
    validate_every: PositiveInt = Field(default=1, description="Epochs from one validation to the next.")
    num_workers: Annotated[int, Field(ge=0), rule("must be an integer of at least 0")] = Field(
        default=2, description="Processes that read images."
    )
    seed: Annotated[int, Field(ge=0), rule("must be an integer of at least 0")] = Field(
        default=0, description="Decides initial weights, order of images, augmentation and sampling."
    )


class DetectorKeys(TypedDict, total=False):
    """The keys of ``DetectorConfig`` but ``detector`` and ``backbone``, for the signatures that take them."""

    pyramid: "PyramidConfig | Mapping[str, Any] | None"
    num_classes: int
    num_keypoints: int
    box_head: Literal["mlp", "c5"]
    num_proposals: int
    rois_per_image: int
    smallest_anchor: int
    head_norm: Literal["none", "gn"]
    aux_classifier: bool
    min_size: int | Sequence[int]
    max_size: int
    image_mean: Sequence[float] | None
    image_std: Sequence[float] | None
    train: "TrainConfig | Mapping[str, Any]"


class DetectorConfig(StrictModel):
    """Everything that decides which detector is built, and how ``backbone train`` trains it.

    Raises:
        SettingsError: (a ValueError and pydantic's ValidationError) for an unknown key, a wrong type or an impossible
            combination.
    """

    detector: Annotated[
        DetectorName,
        rule("must be one of faster_rcnn, mask_rcnn, keypoint_rcnn, retinanet, fcos, deeplabv3, fcn"),
    ] = Field(description="torchvision's detector or segmenter.")
    backbone: BackboneConfig = Field(
        description="The backbone. Unless out_features says otherwise it gives what the detector is used to: C2-C5 "
        "to an R-CNN, C3-C5 to RetinaNet and FCOS, C5 to a segmenter (with aux_classifier C4, too), whose "
        "output_stride is 8. With pyramid: null it is C5, or C4 with box_head: c5."
    )
    pyramid: PyramidConfig | None = Field(
        default=PyramidConfig(), description="Feature pyramid; null gives the head one map (C4 or dilated C5)."
    )
    num_classes: PositiveInt = Field(
        default=91, description="Classes as torchvision counts them: the background is one of them."
    )
    num_keypoints: PositiveInt = Field(default=17, description="Of keypoint_rcnn: keypoints per object.")
    box_head: Annotated[Literal["mlp", "c5"], rule("must be mlp or c5")] = Field(
        default="mlp", description="Of faster_rcnn: two linear layers, or the backbone's C5 stage on C4 (the C4 model)."
    )
    num_proposals: PositiveInt = Field(
        default=2000,
        description="Of an R-CNN: proposals kept in training, of each level before suppression and of each image "
        "after it; half as many in evaluation.",
    )
    rois_per_image: PositiveInt = Field(
        default=512, description="Of an R-CNN: proposals of each image that the box head learns from."
    )
    smallest_anchor: PositiveInt = Field(
        default=32,
        description="Side in pixels of the resized image of the anchors on P2 of an R-CNN or P3 of RetinaNet, "
        "whichever levels there are; it doubles from level to level. On one map: the smallest of an R-CNN's five.",
    )
    head_norm: Annotated[Literal["none", "gn"], rule("must be none or gn")] = Field(
        default="none",
        description="Of retinanet: gn puts GroupNorm between its heads' convolutions, as torchvision's v2 does; its "
        "loss stays l1.",
    )
    aux_classifier: Annotated[bool, rule("must be true or false")] = Field(
        default=False, description="Of a segmenter: a second classifier on C4 that helps in training."
    )
    min_size: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
        Field(min_length=1, strict=False),
        rule("must be one size in pixels or a list of them"),
    ] = Field(default=(800,), description="Shorter image side in pixels; of several, one is drawn in training.")
    max_size: PositiveInt = Field(default=1333, description="Longer image side in pixels, at most.")
    image_mean: Annotated[tuple[float, ...] | None, Field(strict=False), rule("must be null or a list of numbers")] = (
        Field(default=None, description="Subtracted from each channel, of 0 to 1; null: as the weights expect it.")
    )
    image_std: Annotated[tuple[float, ...] | None, Field(strict=False), rule("must be null or a list of numbers")] = (
        Field(default=None, description="Divides each channel; null: as the weights expect it.")
    )
    train: TrainConfig = Field(default=TrainConfig(), description="How `backbone train` trains it.")

    @classmethod
    def mistaken_for(cls, data: dict[Any, Any]) -> str | None:
        """Return what to do with a backbone's keys."""
        if "name" in data and not {"detector", "backbone"} & data.keys():
            return (
                f"a detector's keys are detector, backbone, ..., got those of a backbone ({data['name']}); read its "
                f"file by load_config and build it by build_backbone"
            )
        return None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_what_the_detector_is_used_to(cls, data: object) -> object:
        if not isinstance(data, dict) or "backbone" not in data:
            return data
        usual: dict[str, object] = {}
        if data.get("detector") in SEGMENTERS:
            usual = {"out_features": ("c4", "c5") if data.get("aux_classifier") else ("c5",), "output_stride": 8}
            data = {"pyramid": None, **data}
        elif data.get("pyramid", "by default") is None:
            usual = {"out_features": ("c4",) if data.get("box_head") == "c5" else ("c5",)}
        elif data.get("detector") in DENSE_DETECTORS:
            usual = {"out_features": ("c3", "c4", "c5")}
        return {**data, "backbone": _with_defaults(data["backbone"], usual)}

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> "DetectorConfig":
        for key, detectors in _ONLY_FOR.items():
            said = getattr(self, key) != type(self).model_fields[key].default or key == "pyramid"
            if said and getattr(self, key) and self.detector not in detectors:
                raise ValueError(f"{key} is for {', '.join(detectors)} only, got detector {self.detector}; remove it")
        features = self.backbone.out_features
        if self.backbone.num_classes is not None:
            raise ValueError(
                f"a detector has no use for the backbone's classifier, got backbone.num_classes "
                f"{self.backbone.num_classes}; the detector's own classes are num_classes, outside of backbone"
            )
        if self.detector in DENSE_DETECTORS and self.pyramid is None:
            raise ValueError(f"pyramid must not be null for {self.detector}, which predicts on its levels; remove it")
        if self.detector in R_CNNS and self.pyramid is None and len(features) != 1:
            raise ValueError(
                f"pyramid: null gives the head one map, got out_features {', '.join(features)}; name one of them"
            )
        if self.box_head == "c5" and (self.pyramid is not None or features != ("c4",)):
            raise ValueError("box_head: c5 works on C4 alone; set pyramid: null and out_features: [c4]")
        if self.detector in SEGMENTERS and features != (("c4", "c5") if self.aux_classifier else ("c5",)):
            raise ValueError(
                f"a segmenter classifies c5 (and c4 with aux_classifier), got out_features {', '.join(features)}; "
                f"remove the key"
            )
        if self.head_norm == "gn" and self.pyramid is not None and self.pyramid.out_channels % GN_GROUPS:
            raise ValueError(
                f"head_norm: gn takes channels in {GN_GROUPS} groups, got pyramid.out_channels "
                f"{self.pyramid.out_channels}; choose a multiple of {GN_GROUPS}"
            )
        self._refuse_settings_of_wrong_length()
        self._refuse_impossible_freezing()
        self._refuse_impossible_jitter()
        return self

    def _refuse_settings_of_wrong_length(self) -> None:
        for key in ("image_mean", "image_std"):
            values, in_channels = getattr(self, key), self.backbone.in_channels
            if values is not None and len(values) != in_channels:
                raise ValueError(f"{key} must have one value for each of {in_channels} in_channels, got {list(values)}")

    def _refuse_impossible_jitter(self) -> None:
        scale = self.train.scale_jitter
        if scale is None:
            return
        if self.detector in SEGMENTERS:
            raise ValueError(f"scale_jitter is for detectors, got {self.detector}; give several min_size instead")
        if scale[0] > scale[1]:
            raise ValueError(f"scale_jitter must be the smaller factor and the larger one, got {list(scale)}")
        if len(self.min_size) > 1 or self.min_size[0] > self.max_size:
            raise ValueError(
                f"scale_jitter makes squares of one min_size, at most max_size, got min_size {list(self.min_size)} and "
                f"max_size {self.max_size}; give one min_size"
            )

    def _refuse_impossible_freezing(self) -> None:
        schedule, freeze_at = self.train.freeze_schedule, self.backbone.freeze_at
        if schedule is not None and freeze_at:
            raise ValueError("freeze_at and freeze_schedule say the same thing; keep freeze_schedule, with epoch 0")
        if schedule is not None and 0 not in schedule:
            raise ValueError(f"freeze_schedule must say what is frozen from epoch 0 on, got {schedule}; add epoch 0")
        if self.box_head == "c5" and len(STAGE_NAMES) in (freeze_at, *(schedule or {}).values()):
            raise ValueError(
                "freeze_at and freeze_schedule must be 0 to 4 with box_head: c5, which trains C5 as part of the head, "
                "got 5"
            )


_ONLY_FOR: Final[Mapping[str, tuple[DetectorName, ...]]] = {
    "pyramid": (*R_CNNS, *DENSE_DETECTORS),
    "num_keypoints": ("keypoint_rcnn",),
    "box_head": ("faster_rcnn",),
    "num_proposals": R_CNNS,
    "rois_per_image": R_CNNS,
    "smallest_anchor": (*R_CNNS, "retinanet"),
    "head_norm": ("retinanet",),
    "aux_classifier": SEGMENTERS,
}


def _with_defaults(backbone: object, defaults: Mapping[str, object]) -> object:
    """Add to the backbone's settings what they leave unsaid."""
    if isinstance(backbone, BackboneConfig):
        unsaid = {key: value for key, value in defaults.items() if key not in backbone.model_fields_set}
        return backbone.model_copy(update=unsaid)
    if isinstance(backbone, str):
        backbone = {"name": backbone}
    return {**defaults, **backbone} if isinstance(backbone, dict) else backbone


def load_detector_config(path: str | os.PathLike[str]) -> DetectorConfig:
    """Read a detector's recipe from YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML or breaks a rule; names file, key, rule and remedy.
    """
    return read_yaml(path, DetectorConfig)
