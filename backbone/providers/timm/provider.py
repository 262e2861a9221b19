"""Any timm model behind the contract: ``name: timm/convnext_tiny``, or with a tag, ``timm/convnext_tiny.in12k``."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, SyncBatchNormAct, convert_sync_batchnorm
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from torch import Tensor, nn
from torch.fx import Proxy

from backbone.bn_eval import EvalBatchNorm2d, fix_statistics, register_eval_form
from backbone.config import BackboneConfig, NormName, did_you_mean
from backbone.features import Backbone, Features, Preprocessing, require_images
from backbone.norm import FrozenBatchNorm2d, freeze_norms, norm_layer, register_frozen_form
from backbone.providers.hub import require_reachable
from backbone.providers.input_channels import adapt_preprocessing, stem_mapping
from backbone.providers.timm import fused as timm_fused
from backbone.providers.timm import plan as timm_plan
from backbone.providers.timm.vit_pyramid import SimplePyramid
from backbone.registry import BackboneConstructor, UnknownBackboneError
from backbone.stages import stage_number

PREFIX: Final = "timm/"
MAX_REASON: Final = 500  # letters of what timm says; torch names every key that does not fit


def names() -> list[str]:
    """Return the names of all of timm's architectures, as a config writes them."""
    return [PREFIX + name for name in timm.list_models()]


def find_constructor(name: str) -> BackboneConstructor:
    """Return the constructor of ``timm/<architecture>`` or ``timm/<architecture>.<tag>``.

    Raises:
        UnknownBackboneError: If timm has no such architecture, or no weights under such a tag for it.
    """
    model, tag = split_model_name_tag(name.removeprefix(PREFIX))
    if not timm.is_model(model):
        raise UnknownBackboneError(
            f"unknown backbone {name!r}{did_you_mean(name, names())} `backbone list 'timm/*'` shows them all"
        )
    tags = _tags(model)
    if tag and tag not in tags:
        raise UnknownBackboneError(
            f"unknown backbone {name!r}{did_you_mean(tag, tags)} tags of {model}: {', '.join(tags) or 'none'}"
        )
    return partial(_build, name.removeprefix(PREFIX))


def measure(name: str) -> tuple[int, tuple[int, ...]]:
    """Return parameters and strides of a model as timm states them, quicker than building it would tell.

    Raises:
        ValueError: If it has none of the strides 4, 8, 16, 32.
    """
    model = split_model_name_tag(name.removeprefix(PREFIX))[0]
    with torch.device("meta"):
        network: Any = timm.create_model(model)
    strides = [int(entry["reduction"]) for entry in network.feature_info]
    found = timm_plan.levels(model, strides)
    network.prune_intermediate_layers(list(found.values()), prune_norm=True, prune_head=True)
    return sum(p.numel() for p in network.parameters()), tuple(timm_plan.STRIDES[level] for level in found)


def _build(model: str, config: BackboneConfig) -> "TimmBackbone":
    """Build what ``config`` says; refuse what timm has no way to do."""
    rules = {
        "dilate_first_block must be false: timm's first dilated block keeps the previous dilation": (
            config.dilate_first_block and config.output_stride != max(timm_plan.STRIDES.values())
        ),
        "dilations must be null: timm dilates by output_stride alone": config.dilations is not None,
        "multi_grid must be null: timm has none": config.multi_grid is not None,
        "stride_in_1x1 must be false: timm's own weights have the stride where the model has it": config.stride_in_1x1,
        "num_classes must be null: classify with timm.create_model itself": config.num_classes is not None,
        "stem_channels_from must be null: timm itself adapts its weights to in_channels": (
            config.stem_channels_from is not None
        ),
        "checkpoint_stages must be empty: timm recomputes all stages or none": bool(config.checkpoint_stages),
    }
    for rule, broken in rules.items():
        if broken:
            raise ValueError(f"{config.name}: {rule}")
    return TimmBackbone(
        model,
        in_channels=config.in_channels,
        norm=config.norm,
        output_stride=config.output_stride,
        out_features=config.out_features,
        zero_init_residual=config.zero_init_residual,
    )


class TimmBackbone(Backbone):
    """A timm model as C2 to C5 feature maps; its parameters have timm's names after ``network.``.

    The levels are timm's maps at strides 4, 8, 16 and 32; a plain vision transformer, which has one map, gets a simple
    pyramid, whose parameters belong to no stage. A parameter's stage is the first one whose map depends on it; the
    stages of a plain vision transformer are the quarters of its blocks. Sizes that the model cannot take are padded
    with zeros at the right and below, and what comes of the padding is cut off again.

    Args:
        model: timm's name of the architecture, with or without the tag of its weights.
        in_channels: Channels of the images.
        norm: What becomes of batch norms; other norms stay as they are.
        output_stride: Largest stride, in image pixels: 32, 16 or 8, where timm can dilate the model.
        out_features: Levels to return; what only later ones need is not built.
        zero_init_residual: Whether the last norm of each block starts at zero.

    Raises:
        ValueError: If the model cannot keep the contract or a setting cannot be honoured.
    """

    traced_method: ClassVar[str] = "maps"

    def __init__(
        self,
        model: str,
        *,
        in_channels: int = 3,
        norm: NormName = "frozen_bn",
        output_stride: int = 32,
        out_features: Sequence[str] = ("c2", "c3", "c4", "c5"),
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.in_channels = model, in_channels
        last = max(out_features, key=stage_number)
        plan = timm_plan.plan(
            model,
            in_channels=in_channels,
            output_stride=output_stride,
            last_level=last,
            with_c1="c1" in out_features,
        )
        self._create = partial(
            timm_plan.create,
            in_channels=in_channels,
            output_stride=output_stride,
            zero_init_residual=zero_init_residual,
        )
        network: Any = self._create(model)
        network.prune_intermediate_layers(list(plan.kept), prune_norm=True, prune_head=True)
        timm_plan.drop(network, plan.division.unused)
        self._pretrained_cfg = network.pretrained_cfg
        self.network = _with_norms(network, norm, model)
        timm_fused.fuse(self.network)
        self.pyramid: SimplePyramid | None = None
        if plan.is_plain_vit:
            strides = {name: stride for name, stride in timm_plan.STRIDES.items() if name in out_features}
            self.pyramid = SimplePyramid(plan.specs["c5"].channels, plan.specs["c5"].stride, strides)
            self.feature_specs, self.indices = self.pyramid.specs, [plan.indices["c5"]]
        else:
            self.feature_specs = {name: spec for name, spec in plan.specs.items() if name in out_features}
            self.indices = [plan.indices[name] for name in self.feature_specs]
        self.size_multiple, self.only_size = plan.size_multiple, plan.only_size
        self.stage_modules = _prefixed(plan.division.modules)
        self.stage_parameters = _prefixed(plan.division.parameters)
        self.unpublished_prefixes = ("pyramid.",) if self.pyramid is not None else ()
        self.unbuilt_prefixes = tuple(f"network.{beginning}" for beginning in plan.dropped_prefixes)

    def forward(self, images: Tensor) -> Features:
        """Images (N, in_channels, H, W) -> ``{"c2": (N, C, H/4, W/4), ..., "c5": (N, C, H/32, W/32)}``; round up."""
        height, width = self._require_images(images)
        bottom, right = (_steps(side, self.size_multiple) * self.size_multiple - side for side in (height, width))
        maps = self.maps(F.pad(images, (0, right, 0, bottom)))
        if self.pyramid is not None:
            features: Features = self.pyramid(maps[0])
        else:
            features = dict(zip(self.feature_specs, maps, strict=True))
        # in an export the question would fix the size, and a symbolic trace has no answer
        is_open = torch.compiler.is_exporting() or isinstance(images, Proxy)
        if not is_open and not bottom and not right:
            return features
        return {
            name: features[name][..., : _steps(height, spec.stride), : _steps(width, spec.stride)]
            for name, spec in self.feature_specs.items()
        }

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images (N, in_channels, H, W) of sizes the model can take -> timm's maps, (N, C_i, H_i, W_i) each."""
        return timm_plan.features_at(self.network, images, self.indices)

    def named_weights(self, name: str) -> tuple[Mapping[str, Tensor], Preprocessing]:
        """Return timm's weights under the tag ``name``, fetched by timm.

        ``default`` is the tag in the model's name or else timm's first choice.
        """
        model, own_tag = split_model_name_tag(self.model)
        tags = _tags(model)
        tag = (own_tag or next(iter(tags), "")) if name == "default" else name
        if tag not in tags:
            offered = f"one of default, {', '.join(tags)}" if tags else "null, for timm publishes none"
            named_model, named_tag = split_model_name_tag(name.removeprefix(PREFIX))
            is_this = tags and named_model == model and named_tag in ("", *tags)
            hint = f"; write {named_tag or 'default'}" if is_this else ""
            raise ValueError(f"weights of timm/{model} must be {offered}, or a file; got {name!r}{hint}")
        published = get_arch_pretrained_cfgs(model)[f"{model}.{tag}" if tag else model]
        try:
            if published.hf_hub_id and not published.file:
                require_reachable(published.hf_hub_id.partition("@")[0])
            return self._pretrained(f"{model}.{tag}", {})
        except (OSError, RuntimeError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"timm's weights {tag}: cannot be loaded into timm/{model}: {_one_line(error)}") from None

    def adapt_weights(self, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Preprocessing]:
        """Return a file's tensors, of this backbone or of timm's complete model, with a classifier of any size.

        What timm adapts for its own weights it adapts here, too: older names, input channels, position embeddings.
        """
        if any(key.startswith("network.") for key in state):
            return state, _preprocessing(self._pretrained_cfg, self.in_channels)
        with torch.device("meta"):
            complete: Any = self._create(self.model)
        classifier = complete.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
        own = {key: torch.zeros(v.shape) for key, v in complete.state_dict().items() if key.startswith(heads)}
        overlay = {"state_dict": {**state, **own}, "custom_load": False, "label_offset": 0}
        try:
            return self._pretrained(self.model, overlay)
        except Exception as error:  # timm's adapters, one for each family, take the names they expect for granted
            raise ValueError(f"cannot be loaded into timm/{self.model}: {_one_line(error)}") from None

    def _pretrained(self, model: str, overlay: dict[str, object]) -> tuple[Mapping[str, Tensor], Preprocessing]:
        """Let timm build the complete ``model`` with weights and return them in this backbone's names."""
        network: Any = self._create(model, pretrained=True, pretrained_cfg_overlay=overlay)
        return self._own_names(network.state_dict()), _preprocessing(network.pretrained_cfg, self.in_channels)

    def _own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``state``, in timm's names, in this backbone's."""
        return {f"network.{key}": value for key, value in state.items()}

    def _require_images(self, images: Tensor) -> tuple[int, int]:
        require_images(images, self.in_channels)
        height, width = images.shape[-2:]
        if self.only_size not in (None, (height, width)):
            raise ValueError(
                f"images of timm/{self.model} must be {self.only_size[0]}x{self.only_size[1]} pixels, the only size "
                f"its position embeddings or windows are made for, got {height}x{width}; resize them, or choose a "
                f"model that takes any size"
            )
        return height, width


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """The frozen form of timm's BatchNormAct2d: norm, then drop layer and activation."""

    drop: nn.Module
    act: nn.Module

    def remainder(self) -> nn.Module:
        """Return the activation, after the drop layer where that one works."""
        return self.act if timm_fused.is_idle(self.drop) else nn.Sequential(self.drop, self.act)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) -> the same shape."""
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


class EvalBatchNormAct2d(EvalBatchNorm2d):
    """timm's BatchNormAct2d with fixed statistics: norm, then drop layer and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) -> the same shape."""
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


register_eval_form(BatchNormAct2d, EvalBatchNormAct2d)
register_frozen_form(EvalBatchNormAct2d, FrozenBatchNormAct2d)
register_frozen_form(BatchNormAct2d, FrozenBatchNormAct2d)
register_frozen_form(SyncBatchNormAct, FrozenBatchNormAct2d)


def _steps(side: int, stride: int) -> int:
    """Return ``side / stride``, rounded up without a negative number: ONNX's division of integers rounds towards 0."""
    return (side + stride - 1) // stride


def _with_norms(network: nn.Module, norm: NormName, model: str) -> nn.Module:
    """Replace the batch norms of ``network`` by ``norm``."""
    if norm == "frozen_bn":
        return freeze_norms(network, built_frozen=True)
    if norm == "bn_eval":
        return fix_statistics(network)
    if norm == "sync_bn":
        return convert_sync_batchnorm(network)  # type: ignore[no-any-return, no-untyped-call]
    if norm == "gn":
        _replace_by_group_norms(network, model)
    return network


def _replace_by_group_norms(network: nn.Module, model: str) -> None:
    norms = {path: m for path, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if not norms:
        raise ValueError(f"norm must not be gn for timm/{model}, which has no batch norm that GroupNorm could replace")
    for path, old in norms.items():
        try:
            new: Any = norm_layer("gn")(old.num_features)
        except ValueError as error:
            raise ValueError(f"norm must not be gn for timm/{model}: {path}: {error}") from None
        if isinstance(old, BatchNormAct2d):
            new = GroupNormAct(old.num_features, num_groups=new.num_groups, apply_act=False)
            new.drop, new.act = old.drop, old.act
        if old.affine:  # zero where the model was built with zero_init_residual
            new.weight, new.bias = old.weight, old.bias
        network.set_submodule(path, new)


def _tags(model: str) -> list[str]:
    """Return the tags under which timm publishes weights of ``model``, its first choice first."""
    configs = get_arch_pretrained_cfgs(model)
    return [split_model_name_tag(name)[1] for name, config in configs.items() if config.has_weights]


def _preprocessing(config: Mapping[str, Any], in_channels: int) -> Preprocessing:
    """Return what timm says of its weights, for the channels to which timm adapts them as we do our own."""
    rgb = Preprocessing(tuple(config["mean"]), tuple(config["std"]), interpolation=config["interpolation"])
    mapping = stem_mapping(len(rgb.mean), in_channels, None)
    return rgb if mapping is None else adapt_preprocessing(rgb, mapping)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."


def _prefixed(names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {stage: [f"network.{path}" for path in paths] for stage, paths in names.items()}
