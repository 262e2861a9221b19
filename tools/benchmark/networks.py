"""What tools/benchmark.py compares: one case, and each library's network for it, with the same weights."""

import contextlib
import dataclasses
import functools
import importlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from backbone import Backbone, BackboneConfig, FeaturePyramid, build_backbone
from backbone.config import NormName

FREEZE_AT = 2  # stem and C2, as detectors are trained
CALIBRATION_BATCHES = 8
PYRAMID_CHANNELS = 256
TIMM = "timm/"  # begins the name of a model of timm's, which is compared with timm alone
TIMM_FAMILIES = ["resnet", "regnet"]  # timm's modules whose features_only models keep the parameters' names


class Workload(StrEnum):
    """What is timed."""

    INFER = "infer"
    TRAIN = "train"
    DETECTOR = "detector"


class DtypeName(StrEnum):
    """What convolutions compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class DeviceName(StrEnum):
    """Where it runs."""

    CPU = "cpu"
    CUDA = "cuda"


class NotHere(Exception):  # noqa: N818 - not an error: the reason stands in the table
    """A contender that cannot take part; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """One benchmark: the network, its images (sizes in pixels) and where it runs.

    Attributes:
        norms_train: Whether weight and bias of the norms train behind their fixed statistics, in a training step.
        pyramid: Whether a Feature Pyramid Network of 256 channels follows: P2 to P5 in place of C2 to C5.
    """

    workload: Workload
    name: str
    batch: int
    height: int
    width: int
    dtype_name: DtypeName
    device: DeviceName
    norms_train: bool = False
    pyramid: bool = False

    def __str__(self) -> str:
        size = f"{self.batch}x3x{self.height}x{self.width}"
        norms = ", norms train" if self.norms_train else ""
        pyramid = " with a pyramid" if self.pyramid else ""
        return f"{self.workload} {self.name}{pyramid}, {size}, {self.dtype_name}, {self.device}{norms}"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of that name."""
        return getattr(torch, self.dtype_name)  # type: ignore[no-any-return]

    @property
    def is_half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.dtype.itemsize == 2

    @property
    def is_int8(self) -> bool:
        """Whether it computes in 8 bits."""
        return self.dtype == torch.int8

    @property
    def is_train(self) -> bool:
        """Whether gradients are computed."""
        return self.workload is Workload.TRAIN

    @property
    def norm(self) -> NormName:
        """Our norm."""
        return "bn_eval" if self.norms_train else "frozen_bn"

    @property
    def memory_format(self) -> torch.memory_format:
        """channels_last on CUDA and in training; inference on the CPU is given images as they are loaded."""
        last = self.device is DeviceName.CUDA or self.is_train
        return torch.channels_last if last else torch.contiguous_format

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Autocast to the dtype; float32 runs without."""
        return torch.autocast(self.device, self.dtype, enabled=self.is_half)

    def place(self, network: nn.Module) -> nn.Module:
        """Move ``network`` to the device, in the case's memory format and mode; norms stay in evaluation mode."""
        network = network.to(self.device).to(memory_format=self.memory_format).train(self.is_train)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return network


def in_float32(case: Case) -> Case:
    """The same case in float32."""
    return dataclasses.replace(case, dtype_name=DtypeName.FLOAT32)


@functools.lru_cache(maxsize=1)
def images_of(case: Case) -> Tensor:
    """Random images (N, 3, H, W), as normalised; those of a detector are in 0 to 1."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, 3, case.height, case.width)
    draw = torch.rand if case.workload is Workload.DETECTOR else torch.randn
    return draw(shape, generator=generator).to(case.device).contiguous(memory_format=case.memory_format)


def calibration_of(case: Case) -> list[Tensor]:
    """Batches like ``images_of``, of other numbers, from which every contender in int8 learns its ranges."""
    draw = functools.partial(torch.randn, case.batch, 3, case.height, case.width)
    return [draw(generator=torch.Generator().manual_seed(seed)) for seed in range(2, 2 + CALIBRATION_BATCHES)]


@functools.lru_cache(maxsize=1)
def state_of(name: str) -> dict[str, Tensor]:
    """Random weights with uneven statistics, under torchvision's names, or timm's where the model is timm's.

    The last norm of each block is small, as it is after training, so that 50 blocks do not overflow.
    """
    torch.manual_seed(0)
    network: Any = (
        timm_features(name)
        if name.startswith(TIMM)
        else torchvision.models.get_model(name, norm_layer=FrozenBatchNorm2d)
    )
    with torch.no_grad():
        for module in network.modules():
            if hasattr(module, "running_var"):
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
        for block in network.modules():
            if type(block).__name__ in ("BasicBlock", "Bottleneck"):
                last = getattr(block, "bn3", None) or getattr(block, "bn2", None) or block.conv3.bn
                last.weight.mul_(0.3)
    return {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}


@functools.lru_cache(maxsize=1)
def trainable_names(name: str, norm: NormName) -> frozenset[str]:
    """Which parameters of ``state_of`` a training step moves: those behind stem and C2, without frozen norms."""
    parameters = frozen_backbone(name, FREEZE_AT, norm).named_parameters()
    return frozenset(key.removeprefix("network.") for key, parameter in parameters if parameter.requires_grad)


def frozen_backbone(name: str, freeze_at: int, norm: NormName) -> Backbone:
    """Ours, as a user builds it."""
    return build_backbone(BackboneConfig(name=name, freeze_at=freeze_at, norm=norm))


def torchvision_network(case: Case) -> nn.Module:
    """C2 to C5 by torchvision's own getter, with its frozen norms; in int8 with batch norms, which exporters fold."""
    if case.name.startswith(TIMM):
        raise NotHere("takes part with torchvision's models only")
    norm = nn.BatchNorm2d if case.norms_train or case.is_int8 else FrozenBatchNorm2d
    network = torchvision.models.get_model(case.name, norm_layer=norm)
    getter = IntermediateLayerGetter(network, return_layers={f"layer{n}": f"c{n + 1}" for n in range(1, 5)})
    getter.load_state_dict({**getter.state_dict(), **state_of(case.name)})
    return case.place(nn.Sequential(getter, pyramid_of(case.name)) if case.pyramid else getter)


def pyramid_of(name: str) -> FeaturePyramidNetwork:
    """Torchvision's pyramid on C2 to C5, the same weights every time."""
    specs = frozen_backbone(name, 0, "frozen_bn").feature_specs
    torch.manual_seed(0)
    return FeaturePyramidNetwork([spec.channels for spec in specs.values()], PYRAMID_CHANNELS)


def our_network(case: Case) -> nn.Module:
    """Ours, as a user builds it, or the detector around it."""
    network = frozen_backbone(case.name, FREEZE_AT if case.is_train else 0, case.norm)
    network.load_state_dict(
        {f"network.{k}" if case.name.startswith(TIMM) else k: v for k, v in state_of(case.name).items()}
    )
    if case.pyramid:
        network = FeaturePyramid(network, out_channels=PYRAMID_CHANNELS)
        network.fpn.load_state_dict(pyramid_of(case.name).state_dict())
    return detector(case, Body(network)) if case.workload is Workload.DETECTOR else case.place(network)


def timm_network(case: Case) -> nn.Module:
    """Timm's features_only network; its own frozen norms where it trains."""
    if case.pyramid:
        raise NotHere("has no pyramid")
    network = timm_features(case.name)
    network.load_state_dict(state_of(case.name))
    freeze_norms = import_peer("timm.layers").freeze_batch_norm_2d
    return case.place(freeze_norms(network) if case.is_train and not case.norms_train else network)


def timm_features(name: str) -> nn.Module:
    """Timm's own C2 to C5."""
    create = import_peer("timm").create_model
    return create(name.removeprefix(TIMM), features_only=True, out_indices=(1, 2, 3, 4))  # type: ignore[no-any-return]


def detectron2_network(case: Case) -> nn.Module:
    """Detectron2's ResNet with its own frozen norms and torchvision's place of the stride."""
    if case.name.startswith(TIMM):
        raise NotHere("takes part with torchvision's models only")
    if case.pyramid:
        raise NotHere("its pyramid has other names; torchvision's is compared")
    if case.norms_train:
        raise NotHere("its norms are frozen, or move their statistics")
    resnet, config = import_peer("detectron2.modeling.backbone.resnet"), import_peer("detectron2.config")
    cfg = config.get_cfg()
    cfg.MODEL.RESNETS.DEPTH = int(case.name.removeprefix("resnet"))
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if cfg.MODEL.RESNETS.DEPTH < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    network: nn.Module = resnet.build_resnet_backbone(cfg, import_peer("detectron2.layers").ShapeSpec(channels=3))
    network.load_state_dict({to_detectron2(key): value for key, value in state_of(case.name).items()})
    return case.place(network)


def to_detectron2(key: str) -> str:
    """Translate one of torchvision's parameter names to detectron2's."""
    if key.startswith(("conv1", "bn1")):
        return "stem." + key.replace("bn1", "conv1.norm")
    stage, block, layer, rest = key.removeprefix("layer").split(".", 3)
    if layer == "downsample":
        layer, rest = "shortcut", rest.replace("0.", "", 1) if rest.startswith("0.") else rest.replace("1.", "norm.", 1)
    elif layer.startswith("bn"):
        layer, rest = layer.replace("bn", "conv"), "norm." + rest
    return f"res{int(stage) + 1}.{block}.{layer}.{rest}"


class Body(nn.Module):
    """Our backbone in the place of ``backbone.body`` in a torchvision detector."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> the features under torchvision's names, "0" (C2) to "3" (C5)."""
        return {str(index): feature for index, feature in enumerate(self.backbone(images).values())}


def detector(case: Case, body: nn.Module | None = None) -> nn.Module:
    """Torchvision's fasterrcnn_<name>_fpn, with ``body`` for its backbone; it does not resize the images.

    Its classifier is sharpened, so that random weights find 100 objects per image as on a busy photo.
    """
    torch.manual_seed(0)
    fpn = resnet_fpn_backbone(backbone_name=case.name, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5)
    sides = sorted((case.height, case.width))
    network = FasterRCNN(fpn, num_classes=91, min_size=sides[0], max_size=sides[1])
    network.roi_heads.box_predictor.cls_score.weight.data.mul_(20)
    fpn.body.load_state_dict(state_of(case.name))
    if body is not None:
        fpn.body = body
    return case.place(network)


def import_peer(module: str) -> Any:  # noqa: ANN401
    """Import a peer, or say that it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotHere(f"not importable: {error}") from None
