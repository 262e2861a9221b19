"""Our backbone against its peers, interleaved in one run, with the limit of the machine beside them.

    python tools/benchmark.py --image-size 480 640
    python tools/benchmark.py --workload train --image-size 512 512 --dtype float32 --dtype bfloat16
    python tools/benchmark.py --device cuda --workload infer --workload train --batch 1 --batch 8 --dtype bfloat16

Every contender gets the same weights and images and must agree with torchvision in float32 before it is timed. A round
times each contender once, in shuffled order, and ratios are taken within rounds, so that a slow moment of the machine
touches both sides. Contenders are added in ``PEERS``.
"""

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import torchvision
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d, box_iou

from backbone import Backbone, BackboneConfig, build_backbone, optimize_for_inference

FREEZE_AT = 2  # stem and C2, as detectors are trained
FROZEN = ("conv1", "bn1", "layer1")  # the same in torchvision's names
TIMED_SECONDS = 0.05  # at least this long per contender and round, so that the clock's grain does not count
FLOAT32_LIMIT = 1e-5  # largest difference in units of the largest value, from torchvision in float32
HALF_LIMIT = 5e-2  # the same in half precision, where torchvision's own error times three is the other limit
GRADIENT_LIMIT = 1e-3  # in float32: a ReLU input that rounds to the other side of zero switches a whole gradient
OVERLAP = 0.9  # intersection over union above which two detections are the same
MIB = 2**20

Run: TypeAlias = Callable[[], list[Tensor]]
console = Console(width=None if sys.stdout.isatty() else 140)


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


class DeviceName(StrEnum):
    """Where it runs."""

    CPU = "cpu"
    CUDA = "cuda"


class NotHere(Exception):  # noqa: N818 - not an error: the reason stands in the table
    """A contender that cannot take part; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """One benchmark: the network, its images (sizes in pixels) and where it runs."""

    workload: Workload
    name: str
    batch: int
    height: int
    width: int
    dtype_name: DtypeName
    device: DeviceName

    def __str__(self) -> str:
        size = f"{self.batch}x3x{self.height}x{self.width}"
        return f"{self.workload} {self.name}, {size}, {self.dtype_name}, {self.device}"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of that name."""
        return getattr(torch, self.dtype_name)  # type: ignore[no-any-return]

    @property
    def is_half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.dtype != torch.float32

    @property
    def is_train(self) -> bool:
        """Whether gradients are computed."""
        return self.workload is Workload.TRAIN

    @property
    def memory_format(self) -> torch.memory_format:
        """channels_last where a user in the know has it: on CUDA and in training."""
        last = self.device is DeviceName.CUDA or self.is_train
        return torch.channels_last if last else torch.contiguous_format

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Autocast to the dtype; float32 runs without."""
        return torch.autocast(self.device, self.dtype, enabled=self.is_half)

    def place(self, network: nn.Module) -> nn.Module:
        """Move ``network`` to the device, in the case's memory format and mode."""
        return network.to(self.device).to(memory_format=self.memory_format).train(self.is_train)  # type: ignore[call-overload,no-any-return]


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name: Shown in the table.
        forward: Returns the features, or the boxes of a detector; prepares itself at the first call.
        step: What is timed: the same, or forward and backward.
        network: The module at work; None outside torch.
        parameters: The trainable parameters by torchvision's names.
        first_call: Seconds of the first step, compilation included.
        error: Largest difference from torchvision in float32, in units of its largest value; in a detector the
            fraction of its detections that have no equal.
        gradient_error: Largest norm of a gradient's difference over the norm of that gradient.
        memory: Bytes saved for backward (CPU) or allocated at the peak over what was there before (CUDA).
        held: Bytes that the contender keeps allocated between its steps (CUDA).
        times: Seconds per step, one per round.
    """

    name: str
    forward: Run
    step: Run
    network: nn.Module | None = None
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    first_call: float = 0.0
    error: float = 0.0
    gradient_error: float = 0.0
    memory: int | None = None
    held: int | None = None
    times: list[float] = field(default_factory=list)

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients of the last step, on the CPU."""
        return {name: p.grad.float().cpu() for name, p in self.parameters.items() if p.grad is not None}


# Networks and images: one set of weights for all


@functools.lru_cache(maxsize=1)
def images_of(case: Case) -> Tensor:
    """Random images (N, 3, H, W), as normalised; those of a detector are in 0 to 1."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, 3, case.height, case.width)
    draw = torch.rand if case.workload is Workload.DETECTOR else torch.randn
    return draw(shape, generator=generator).to(case.device).contiguous(memory_format=case.memory_format)


@functools.lru_cache(maxsize=1)
def state_of(name: str) -> dict[str, Tensor]:
    """Random weights with uneven statistics, under torchvision's names.

    The last norm of each block is small, as it is after training, so that 50 blocks do not overflow.
    """
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, norm_layer=FrozenBatchNorm2d)
    for norm in network.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.normal_(0, 0.1)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.8, 1.2)
    for block in network.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            getattr(block, "bn3", block.bn2).weight.mul_(0.3)
    return {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}


def torchvision_network(case: Case) -> nn.Module:
    """C2 to C5 by torchvision's own getter, with its own frozen norms."""
    network = torchvision.models.get_model(case.name, norm_layer=FrozenBatchNorm2d)
    getter = IntermediateLayerGetter(network, return_layers={f"layer{n}": f"c{n + 1}" for n in range(1, 5)})
    getter.load_state_dict(state_of(case.name))
    return case.place(getter)


def our_network(case: Case) -> Backbone:
    """Ours, as a user builds it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*frozen at random weights")
        network = build_backbone(BackboneConfig(name=case.name, freeze_at=FREEZE_AT if case.is_train else 0))
    network.load_state_dict(state_of(case.name))
    case.place(network)
    return network


def timm_network(case: Case) -> nn.Module:
    """Timm's features_only network; its own frozen norms where it trains."""
    timm = import_peer("timm")
    network = timm.create_model(case.name, features_only=True, pretrained=False, out_indices=(1, 2, 3, 4))
    network.load_state_dict(state_of(case.name))
    return case.place(timm.layers.freeze_batch_norm_2d(network) if case.is_train else network)


def detectron2_network(case: Case) -> nn.Module:
    """Detectron2's ResNet with its own frozen norms and torchvision's place of the stride."""
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


# Contenders


def import_peer(module: str) -> Any:  # noqa: ANN401
    """Import a peer, or say that it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotHere(f"not importable: {error}") from None


def tensors_of(output: object) -> list[Tensor]:
    """The tensors of a library's output, finest first; of detections a row (image, label, score, box) each."""
    if isinstance(output, Mapping):
        return [tensor for tensor in output.values() if isinstance(tensor, Tensor)]
    assert isinstance(output, list | tuple)
    if output and isinstance(output[0], Mapping):
        rows = [
            torch.cat((torch.full_like(d["scores"], n)[:, None], d["labels"][:, None], d["scores"][:, None], d["boxes"]), 1)
            for n, d in enumerate(output)
        ]  # fmt: skip
        return [torch.cat(rows)]
    return list(output)


def inference(
    case: Case, name: str, prepare: Callable[[], Callable[..., object]], network: nn.Module | None = None
) -> Contender:
    """Make a contender that runs what ``prepare`` returns, without gradients."""
    images = images_of(case)
    arguments = list(images) if case.workload is Workload.DETECTOR else images
    prepared = functools.cache(prepare)

    def forward() -> list[Tensor]:
        call = prepared()
        with torch.inference_mode():
            return tensors_of(call(arguments))

    return Contender(name, forward, forward, network)


def training(case: Case, name: str, network: nn.Module, call: Callable[..., object]) -> Contender:
    """Make a contender of one training step without the optimizer; stem and C2 are frozen."""
    images = images_of(case)
    names = {to_detectron2(key): key for key in state_of(case.name)}
    parameters = {names.get(key, key): parameter for key, parameter in network.named_parameters()}
    for key, parameter in parameters.items():
        parameter.requires_grad_(parameter.requires_grad and not key.startswith(FROZEN))

    def forward() -> list[Tensor]:
        with case.autocast():
            return tensors_of(call(images))

    def step() -> list[Tensor]:
        contender.clear()
        features = forward()
        torch.stack([feature.float().square().mean() for feature in features]).sum().backward()  # type: ignore[no-untyped-call]
        return features

    trainable = {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    contender = Contender(name, forward, step, network, trainable)
    return contender


def eager(case: Case, name: str, network: nn.Module, call: Callable[..., object] | None = None) -> Contender:
    """Make a contender of a network as it stands (or of ``call``, made of it), under autocast."""
    call = call or network
    if case.is_train:
        return training(case, name, network, call)

    def autocast(images: object) -> object:
        with case.autocast():
            return call(images)

    return inference(case, name, lambda: autocast, network)


def ours(case: Case) -> list[Contender]:
    """Ours as it is meant to be used, and for inference without ``optimize_for_inference`` besides."""
    backbone = our_network(case)
    if case.is_train:
        return [eager(case, "ours", backbone)]
    in_detector = case.workload is Workload.DETECTOR
    network = detector(case, Body(backbone)) if in_detector else backbone
    dtype = case.dtype if case.is_half else None
    optimized = optimize_for_inference(network, dtype=dtype)

    def call(images: object) -> object:
        with case.autocast() if in_detector else contextlib.nullcontext():  # for the heads; the features need none
            return optimized(images)

    return [inference(case, "ours", lambda: call, optimized), eager(case, "ours (not optimised)", network)]


def torchvision_peer(case: Case) -> Contender:
    """Torchvision as users run it."""
    network = detector(case) if case.workload is Workload.DETECTOR else torchvision_network(case)
    return eager(case, "torchvision", network)


def compiled_peer(case: Case) -> Contender:
    """Torchvision compiled as well as torch can."""
    if case.workload is Workload.DETECTOR:
        raise NotHere("compiles backbones only: a detector's shapes change")
    network = torchvision_network(case)
    if case.device is DeviceName.CUDA:
        return eager(case, "torchvision-compile", network, torch.compile(network, mode="max-autotune", dynamic=False))
    options: dict[str, Any] = {} if case.is_train else {"freezing": True}
    return eager(case, "torchvision-compile", network, torch.compile(network, options=options, dynamic=False))


def library_peer(name: str, build: Callable[[Case], nn.Module]) -> Callable[[Case], Contender]:
    """Another library's backbone."""

    def peer(case: Case) -> Contender:
        if case.workload is Workload.DETECTOR:
            raise NotHere("its detectors are other networks")
        return eager(case, name, build(case))

    return peer


@functools.lru_cache(maxsize=1)
def onnx_of(case: Case) -> bytes:
    """Torchvision's network as ONNX."""
    import_peer("onnx")
    if case.workload is not Workload.INFER or case.device is not DeviceName.CPU:
        raise NotHere("takes part in inference on the CPU only")
    network, file = torchvision_network(case), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation: the new one needs onnxscript
        torch.onnx.export(network, (images_of(case),), file, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    return file.getvalue()


def onnxruntime_peer(case: Case) -> Contender:
    """ONNX Runtime on the CPU, in float32."""
    onnxruntime = import_peer("onnxruntime")
    if case.is_half:
        raise NotHere("its CPU convolutions are float32")
    model, images = onnx_of(case), images_of(case).numpy()

    def prepare() -> Callable[..., object]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it disturbs the next contender
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        return lambda _: list(map(torch.from_numpy, session.run(None, feed)))

    return inference(case, "onnxruntime", prepare)


def openvino_peer(case: Case) -> Contender:
    """OpenVINO on the CPU."""
    openvino = import_peer("openvino")
    if case.dtype == torch.float16:
        raise NotHere("its CPU plugin computes in float32 or bfloat16")
    model, images = onnx_of(case), images_of(case).numpy()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if case.is_half else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }

    def prepare() -> Callable[..., object]:
        request = openvino.Core().compile_model(model, b"", "CPU", settings).create_infer_request()

        def call(_: object) -> list[Tensor]:
            results = request.infer([images], share_inputs=True, share_outputs=True)
            return [torch.from_numpy(value) for value in results.values()]

        return call

    return inference(case, "openvino", prepare)


PEERS: dict[str, Callable[[Case], Contender]] = {
    "torchvision": torchvision_peer,
    "torchvision-compile": compiled_peer,
    "timm": library_peer("timm", timm_network),
    "detectron2": library_peer("detectron2", detectron2_network),
    "onnxruntime": onnxruntime_peer,
    "openvino": openvino_peer,
}
