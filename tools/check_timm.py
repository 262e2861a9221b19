"""Every architecture family of timm against the contract: which pass, and which are refused and why.

    python tools/check_timm.py
    python tools/check_timm.py --family convnext --family swin_transformer

Of each family the smallest model that is not refused is built at random weights. Its features must equal timm's own,
its specs the real outputs, freezing must hold in training for every freeze_at, and one training step of torchvision's
Faster R-CNN on it must give gradients to exactly what is not frozen.
"""

import sys
import time
import warnings
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from backbone import Backbone, BackboneConfig, build_backbone, freeze_stages
from backbone.hosts.torchvision import build_detector
from backbone.providers.timm.plan import features_at, plan
from backbone.providers.timm.provider import TimmBackbone
from backbone.recipe import DetectorConfig, PyramidConfig
from backbone.stages import STAGE_NAMES

LIMIT = 1e-5  # largest difference in units of the largest value
SIDE = 128  # image pixels

console = Console(width=None if sys.stdout.isatty() else 160)


def main(family: Annotated[list[str] | None, typer.Option(help="Only these of timm's modules.")] = None) -> None:
    """Check one model of each family and print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table("family", "model", "levels", "verdict", title="timm families behind the contract")
    num_passed = num_refused = 0
    families = family or timm.list_modules()
    for each in track(families, console=Console(stderr=True), description="families"):
        model, levels, reason = smallest(each)
        verdict = f"refused: {reason}"
        if levels:
            start = time.perf_counter()
            verdict = check(model, levels) or f"passes ({time.perf_counter() - start:.1f} s)"
        num_passed += verdict.startswith("passes")
        num_refused += verdict.startswith("refused")
        table.add_row(each, model, " ".join(levels), verdict)
    console.print(table)
    num_failed = len(families) - num_passed - num_refused
    console.print(f"{len(families)} families: {num_passed} pass, {num_refused} are refused, {num_failed} fail")
    raise typer.Exit(int(num_failed > 0))


def smallest(family: str) -> tuple[str, tuple[str, ...], str]:
    """Return the smallest model of ``family`` that is not refused, with its levels; else the smallest and why."""
    first = ""
    for model in sorted(timm.list_models(module=family), key=_num_parameters):
        try:
            levels = plan(model, in_channels=3, output_stride=32, last_level="c5").indices
        except ValueError as error:
            first = first or f"{model}\n{error}"
        else:
            return model, tuple(levels), ""
    model, _, reason = first.partition("\n")
    return model, (), reason


def _num_parameters(model: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(model).parameters())


def check(model: str, levels: tuple[str, ...]) -> str:
    """Return what ``model`` fails in; empty if it keeps the whole contract."""
    torch.manual_seed(0)
    backbone = build_backbone(_config(f"timm/{model}", levels))
    assert isinstance(backbone, TimmBackbone)
    try:
        if largest_error(backbone, torch.float32) > LIMIT:  # rounding may have grown on the way
            if (error := largest_error(backbone, torch.float64)) > LIMIT:
                return f"features differ from timm's by {error:.1e}"
            backbone.float()
        if shapes := wrong_specs(backbone):
            return f"specs differ from the outputs: {shapes}"
        for freeze_at in range(len(STAGE_NAMES) + 1):
            if stages := wrongly_moved(backbone, freeze_at):
                return f"freeze_at {freeze_at}: {stages}"
        return detector_fault(f"timm/{model}", levels, side_of(backbone))
    except Exception as error:
        return f"fails: {' '.join(str(error).split())[:200]}"


def _config(name: str, levels: tuple[str, ...], freeze_at: int = 0) -> BackboneConfig:
    settings = {"name": name, "norm": "bn", "out_features": levels, "freeze_at": freeze_at}
    return BackboneConfig.model_validate(settings)


def side_of(backbone: TimmBackbone) -> int:
    """Return a small side in pixels of a square image that the model takes."""
    return backbone.only_size[0] if backbone.only_size else SIDE


def largest_error(backbone: TimmBackbone, dtype: torch.dtype) -> float:
    """Return the largest relative difference between the maps of ``backbone`` and timm's own features_only model.

    ``backbone``, which is cast to ``dtype``, computes them twice, the second time with all its stages frozen.
    """
    side = -(-side_of(backbone) // backbone.size_multiple) * backbone.size_multiple
    images = torch.randn(1, 3, side, side, dtype=dtype)
    complete = timm.create_model(backbone.model)
    state = complete.state_dict() | {k.removeprefix("network."): v for k, v in backbone.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.startswith("pyramid.")}
    overlay = {"state_dict": state, "custom_load": False}
    settings: dict[str, Any] = {"features_only": True, "out_indices": backbone.indices, "pretrained": True}
    try:
        reference: Any = timm.create_model(
            backbone.model, dynamic_img_size=True, pretrained_cfg_overlay=overlay, **settings
        ).eval()
    except TypeError:
        reference = timm.create_model(backbone.model, pretrained_cfg_overlay=overlay, **settings).eval()
    backbone.to(dtype).eval()
    with torch.no_grad():
        expected = reference.to(dtype)(images)
        actual = features_at(backbone.network, images, backbone.indices)
        freeze_stages(backbone, len(STAGE_NAMES))
        frozen = features_at(backbone.network, images, backbone.indices)
        freeze_stages(backbone, 0)
    if "NHWC" in str(getattr(reference, "output_fmt", "")) and expected[0].shape != actual[0].shape:
        expected = [each.permute(0, 3, 1, 2) for each in expected]
    strides = [spec.stride for spec in backbone.feature_specs.values()]
    if backbone.pyramid is None and reference.feature_info.reduction() != strides:
        return float("inf")
    pairs = zip([*actual, *frozen], [*expected, *expected], strict=True)
    return max(_relative_error(mine, theirs) for mine, theirs in pairs)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def wrong_specs(backbone: TimmBackbone) -> dict[str, tuple[int, ...]]:
    """Return the shapes of features that are not what ``feature_specs`` says, for an image of odd size."""
    height, width = backbone.only_size or (SIDE + 1, SIDE + 35)
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, height, width))
    return {
        name: tuple(features[name].shape)
        for name, spec in backbone.feature_specs.items()
        if features[name].shape != (1, spec.channels, -(-height // spec.stride), -(-width // spec.stride))
    }


def wrongly_moved(backbone: TimmBackbone, freeze_at: int) -> list[str]:
    """Freeze, take one training step, and return the stages that moved or stood still against ``freeze_at``."""
    freeze_stages(backbone, freeze_at)
    before = _bytes(backbone)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-4, weight_decay=0.1)  # steps of any loss are small
    features = backbone.train()(torch.randn(2, 3, side_of(backbone), side_of(backbone)))
    loss = torch.stack([feature.square().mean() for feature in features.values()]).sum()
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    after = _bytes(backbone)
    frozen = STAGE_NAMES[:freeze_at]
    return [stage for stage in after if (after[stage] == before[stage]) != (stage in frozen)]


def _bytes(backbone: Backbone) -> dict[str, list[bytes]]:
    return {
        stage: [value.detach().numpy().tobytes() for value in modules.state_dict().values()]
        for stage, modules in backbone.stages.items()
    }


def detector_fault(name: str, levels: tuple[str, ...], side: int) -> str:
    """Train torchvision's Faster R-CNN on the backbone for one step; return what is wrong with its gradients."""
    config = DetectorConfig(
        detector="faster_rcnn",
        backbone=_config(name, levels, freeze_at=2),
        pyramid=PyramidConfig(out_channels=32),
        num_classes=3,
        min_size=(side,),
        max_size=side,
    )
    detector = build_detector(config).train()
    images = list(torch.rand(2, 3, side, side))
    boxes = torch.tensor([[8.0, 8.0, side / 2, side / 2]])
    losses = detector(images, [{"boxes": boxes, "labels": torch.tensor([1])}] * len(images))
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    wrong = [key for key, p in detector.named_parameters() if (p.grad is not None) != p.requires_grad]
    return f"gradients of {len(wrong)} parameters, such as {wrong[0]}" if wrong else ""


if __name__ == "__main__":
    typer.run(main)
