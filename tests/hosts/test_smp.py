"""segmentation_models_pytorch's segmenters on our encoders equal those on its own."""

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn

from backbone import BackboneConfig, freeze_report, freeze_stages, optimize_for_inference
from backbone.inference.graphs import GraphedExtractor
from backbone.norm import FrozenBatchNorm2d

smp: Any = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is an extra: smp")
host: Any = pytest.importorskip("backbone.hosts.smp")

ROOT = Path(__file__).parents[2]
THIN = (32, 16, 16, 8, 8)
ARCHITECTURES: dict[str, dict[str, object]] = {
    "Unet": {},
    "UnetPlusPlus": {"decoder_channels": THIN},
    "FPN": {},
    "MAnet": {"encoder_depth": 4, "decoder_channels": THIN[1:]},  # with C5 it has 150 million parameters
    "Linknet": {},
    "PSPNet": {},
    "UPerNet": {},
    "Segformer": {},
    "PAN": {},  # 16
    "DeepLabV3": {},  # output stride 8
    "DeepLabV3Plus": {},  # 16
}
STRIDES = [("DeepLabV3", 16), ("DeepLabV3Plus", 8), ("PAN", 32)]
SIDE = 64  # image pixels; PAN halves the coarsest map three times more


def pair(architecture: str, encoder: str, **settings: object) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return SMP's segmenter on its own encoder, the same on ours with the same weights, and images."""
    make = getattr(smp, architecture)
    theirs = make(encoder, encoder_weights=None, **settings).double()
    ours = make(f"backbone-{encoder}", encoder_weights=None, **settings).double()
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    side = 2 * SIDE * (2 if settings.get("encoder_output_stride") == 32 else 1) if architecture == "PAN" else SIDE
    return theirs.eval(), ours.eval(), torch.randn(1, 3, side, side, dtype=torch.float64)


def assert_equal_outputs_and_gradients(theirs: nn.Module, ours: nn.Module, images: Tensor) -> None:
    expected, actual = theirs(images), ours(images)
    assert relative_error(actual, expected) < 1e-5
    for output in (expected, actual):
        output.square().mean().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found: dict[str, Any] = {
        name.replace("encoder.network.", "encoder."): p.grad for name, p in ours.named_parameters()
    }
    assert set(wanted) == {name for name, grad in found.items() if grad is not None}
    assert max(relative_error(found[name], grad) for name, grad in wanted.items()) < 1e-5


ENCODERS = ("resnet18", "resnet50", "resnext50_32x4d")
# Each architecture with one encoder in turn, and the U-Net with all: an architecture asks every encoder for the same.
PAIRS = {(name, ENCODERS[number % 3]) for number, name in enumerate(ARCHITECTURES)} | {("Unet", e) for e in ENCODERS}


@pytest.mark.parametrize(("architecture", "encoder"), sorted(PAIRS))
def test_outputs_and_gradients_equal_those_on_smps_own_encoder(architecture: str, encoder: str) -> None:
    assert_equal_outputs_and_gradients(*pair(architecture, encoder, **ARCHITECTURES[architecture]))


@pytest.mark.parametrize(("architecture", "output_stride"), STRIDES)
@pytest.mark.parametrize("encoder", ["resnet18"])
def test_dilates_as_smp_does(architecture: str, output_stride: int, encoder: str) -> None:
    assert_equal_outputs_and_gradients(*pair(architecture, encoder, encoder_output_stride=output_stride))


def test_training_mode_moves_the_same_statistics() -> None:
    theirs, ours, images = pair("Unet", "resnet18")
    for model in (theirs, ours):
        model.train()(torch.cat([images, images.flip(-1)]))
    own = ours.state_dict()
    assert max(relative_error(own[key], value) for key, value in theirs.state_dict().items() if "running" in key) < 1e-9


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_depth_gives_one_map_each_and_builds_no_more(depth: int) -> None:
    theirs = smp.encoders.get_encoder("resnet18", depth=depth).eval()
    ours = smp.encoders.get_encoder("backbone-resnet18", depth=depth).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    maps, expected = ours(images), theirs(images)
    assert ours.out_channels == theirs.out_channels
    assert ours.output_stride == theirs.output_stride
    assert [relative_error(a, b) < 1e-6 for a, b in zip(maps, expected, strict=True)] == [True] * (depth + 1)
    assert maps[0] is images
    assert len(ours.stages) == depth


def test_depth_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder_depth must be 1 to 5"):
        smp.encoders.get_encoder("backbone-resnet18", depth=6)


@pytest.mark.parametrize("in_channels", [1, 2, 3, 4])
def test_the_stem_takes_other_channels_as_smps_own_does(in_channels: int, tmp_path: Path) -> None:
    source = smp.encoders.get_encoder("resnet18")
    path = tmp_path / "resnet18.pth"
    torch.save(source.state_dict(), path)
    source.set_in_channels(in_channels, pretrained=True)
    ours = smp.Unet("backbone-resnet18", encoder_weights=str(path), in_channels=in_channels).encoder.eval()
    images = torch.randn(1, in_channels, 64, 64)
    assert ours.out_channels == source.out_channels
    assert relative_error(ours(images)[-1], source.eval()(images)[-1]) < 1e-5


def test_without_weights_a_stem_of_other_channels_starts_at_random() -> None:
    encoder = smp.Unet("backbone-resnet18", encoder_weights=None, in_channels=4).encoder
    assert encoder.network.conv1.weight.shape == (64, 4, 7, 7)
    assert encoder.network.conv1.weight.std() > 0


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    network = build("resnet18")
    randomise_norms(network)
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def test_encoder_weights_takes_what_our_configs_take(weights: Path) -> None:
    model = smp.FPN("backbone-resnet18", encoder_weights=str(weights))
    expected = torch.load(weights, weights_only=True)
    state = model.encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_weights_that_no_source_has_are_explained() -> None:
    with pytest.raises(ValueError, match="weights of resnet18 must be one of IMAGENET1K_V1"):
        smp.FPN("backbone-resnet18", encoder_weights="IMAGENET21K")


@pytest.mark.parametrize("asked", [None, "imagenet"])
def test_a_registered_configs_own_weights_are_the_default(
    asked: str | None, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    host.register_encoder("mine", BackboneConfig(name="resnet18", norm="bn", weights=str(weights)))
    state = smp.Unet("mine", encoder_weights=asked).encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in torch.load(weights, weights_only=True).items())


@pytest.mark.parametrize(
    ("name", "default"), [("resnet50", "IMAGENET1K_V2"), ("resnet18", "IMAGENET1K_V1"), ("timm/resnet18", "default")]
)
def test_imagenet_means_the_librarys_default(name: str, default: str) -> None:
    assert host.default_weights(BackboneConfig(name=name)) == default


def test_imagenet_is_refused_where_nobody_publishes_any() -> None:
    with pytest.raises(ValueError, match="encoder_weights must be None, or name weights for my_own"):
        host.default_weights(BackboneConfig(name="my_own"))


def test_smps_own_weights_still_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo_id: str, *args: object, **kwargs: object) -> str:
        asked.append(repo_id)
        raise FileNotFoundError

    theirs, _ = host._answer_for_the_hub(download, lambda path: path)
    monkeypatch.setattr(smp.encoders, "hf_hub_download", theirs)
    with pytest.raises(FileNotFoundError):
        smp.Unet("resnet18")
    assert asked == ["smp-hub/resnet18.imagenet"]


def test_preprocessing_is_that_of_the_weights(weights: Path) -> None:
    settings = smp.encoders.get_preprocessing_params("backbone-resnet18", pretrained=str(weights))
    assert settings == {
        "input_space": "RGB",
        "input_range": [0.0, 1.0],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


@pytest.mark.parametrize("name", ["timm/resnet18d", "timm/convnext_atto", "timm/mobilenetv3_small_050"])
@pytest.mark.parametrize("architecture", ["Unet", "FPN", "UPerNet"])
def test_any_backbone_becomes_an_encoder(name: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    host.register_encoder("other", BackboneConfig(name=name, norm="bn"))
    model = getattr(smp, architecture)("other", encoder_weights=None, in_channels=4, classes=2)
    model(torch.randn(2, 4, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert model.predict(torch.randn(1, 4, 64, 64)).shape == (1, 2, 64, 64)


def test_a_network_without_stride_2_gives_no_channels_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    host.register_encoder("other", BackboneConfig(name="timm/convnext_atto"))
    encoder = smp.encoders.get_encoder("other", weights=None)
    assert encoder.out_channels == [3, 0, 40, 80, 160, 320]
    assert [tuple(m.shape) for m in encoder(torch.randn(1, 3, 64, 96))[:2]] == [(1, 3, 64, 96), (1, 0, 32, 48)]


REFUSED = [
    ("resnet50", {}, "'resnet50' is registered already"),
    ("backbone-resnet50", {"norm": "gn"}, "'backbone-resnet50' is registered already, with another network"),
    ("tu-mine", {}, "must not begin with tu- or timm-"),
    ("mine", {"output_stride": 16}, "output_stride must be left at 32"),
    ("mine", {"out_features": ("c5",)}, "out_features must be left at"),
    ("mine", {"num_classes": 3}, "num_classes must be left at None"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_register_encoder_refuses(name: str, settings: dict[str, object], message: str) -> None:
    before = dict(smp.encoders.encoders)
    with pytest.raises(ValueError, match=message):
        host.register_encoder(name, BackboneConfig.model_validate({"name": "resnet50", **settings}))
    assert smp.encoders.encoders == before


def test_registering_the_same_twice_changes_nothing() -> None:
    host.register_encoder("backbone-resnet18", BackboneConfig(name="resnet18", norm="bn"))
    assert smp.encoders.get_encoder("backbone-resnet18", weights=None).out_channels[-1] == 512


def test_channels_the_encoder_was_not_registered_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    host.register_encoder("spectral", BackboneConfig(name="resnet18", norm="bn", in_channels=5))
    assert smp.Unet("spectral", encoder_weights=None, in_channels=5)(torch.randn(2, 5, 32, 32)).shape[1] == 1
    with pytest.raises(ValueError, match="in_channels must be 5, for which the encoder is registered, got 3"):
        smp.Unet("spectral", encoder_weights=None)


def moved_by_a_step(model: nn.Module) -> set[str]:
    before = copy.deepcopy(model.encoder.state_dict())  # type: ignore[union-attr]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    after = model.encoder.state_dict()  # type: ignore[union-attr]
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def test_smps_freeze_encoder_and_our_report_agree() -> None:
    model = smp.Unet("backbone-resnet18", encoder_weights=None)
    model.freeze_encoder()
    assert all(report.frozen for report in freeze_report(model.encoder).values())
    assert moved_by_a_step(model) == set()
    model.unfreeze_encoder()
    assert not any(report.frozen for report in freeze_report(model.encoder).values())
    assert "layer4.1.bn2.running_mean" in moved_by_a_step(model)


def test_scripts_find_the_stages_of_an_encoder_where_smps_have_them() -> None:
    encoder = smp.Unet("backbone-resnet18", encoder_weights=None).encoder
    assert encoder.layer4[-1] is encoder.network.layer4[-1]
    with pytest.raises(AttributeError, match="layer5"):
        _ = encoder.layer5
    assert [name for name, _ in encoder.named_children()] == ["network"]


def test_freeze_stages_takes_the_encoder() -> None:
    model = smp.Unet("backbone-resnet18", encoder_weights=None)
    freeze_stages(model.encoder, 2)
    assert [report.frozen for report in freeze_report(model.encoder).values()] == [True, True, False, False, False]
    assert {key.split(".")[0] for key in moved_by_a_step(model)} == {"layer2", "layer3", "layer4"}
    freeze_stages(model.encoder, 0)
    assert "conv1.weight" in moved_by_a_step(model)


def test_unfreeze_encoder_promises_no_gradient_to_norms_that_are_built_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    host.register_encoder("mine", BackboneConfig(name="resnet18"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*frozen at random weights")
        model = smp.Unet("mine", encoder_weights=None)
    model.freeze_encoder(), model.unfreeze_encoder(), model.train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.encoder.modules())


def test_freezing_at_random_weights_warns_once_it_is_known(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    host.register_encoder("mine", BackboneConfig(name="resnet18", norm="bn", freeze_at=2))
    fresh = smp.Unet("mine", encoder_weights=None).train()
    with pytest.warns(UserWarning, match="the first 2 stages are frozen"):
        fresh(torch.randn(2, 3, 64, 64))
    encoder = smp.Unet("mine", encoder_weights=str(weights)).encoder  # warnings are errors here
    assert [report.frozen for report in freeze_report(encoder).values()] == [True, True, False, False, False]


@pytest.mark.parametrize("architecture", ["Unet", "DeepLabV3Plus"])
def test_a_saved_model_comes_back_in_another_process(architecture: str, tmp_path: Path) -> None:
    model = getattr(smp, architecture)("backbone-resnet18", encoder_weights=None, classes=3).eval()
    randomise_norms(model)
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    torch.save((images, model(images)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, backbone.hosts.smp, segmentation_models_pytorch as smp\n"
        "images, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.allclose(smp.from_pretrained(sys.argv[1]).eval()(images), expected, atol=1e-5)"
    )
    path = {"PYTHONPATH": f"{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["encoder_name"] == "backbone-resnet18"


@pytest.mark.parametrize("architecture", ["Unet", "DeepLabV3Plus", "FPN"])
def test_the_whole_segmenter_is_optimised_for_inference(architecture: str) -> None:
    _, ours, images = pair(architecture, "resnet18")
    model, images = ours.float(), images.float()
    fast = optimize_for_inference(model)
    assert fast.optimization.folded >= 20  # type: ignore[union-attr, operator]
    with torch.no_grad():
        assert relative_error(fast(images), model(images)) < 1e-4


@pytest.mark.parametrize("architecture", ["Unet", "FPN", "DeepLabV3"])
@torch.no_grad()
def test_the_encoder_computes_in_bfloat16_and_the_decoder_in_float(architecture: str) -> None:
    model = getattr(smp, architecture)("backbone-resnet18", encoder_weights=None, classes=3).eval()
    randomise_norms(model)
    fast: Any = optimize_for_inference(model, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in fast.encoder.parameters()} == {torch.bfloat16}
    others = (fast.decoder, fast.segmentation_head)
    assert {parameter.dtype for part in others for parameter in part.parameters()} == {torch.float32}
    assert (fast.optimization.dtype, fast.optimization.folded >= 20) == (torch.bfloat16, True)
    images = torch.randn(1, 3, 64, 64)
    masks = fast(images)
    assert masks.dtype == torch.float32
    assert 1e-5 < relative_error(masks, model(images)) < 5e-2


@pytest.mark.filterwarnings("ignore:8-bit convolutions do not run here:UserWarning")
@pytest.mark.parametrize("architecture", ["Unet", "FPN", "DeepLabV3"])
@torch.no_grad()
def test_the_encoder_computes_in_8_bits_and_the_decoder_in_float(architecture: str) -> None:
    model = getattr(smp, architecture)("backbone-resnet18", encoder_weights=None, classes=3).eval()
    randomise_norms(model)
    images = torch.randn(2, 3, 64, 64)
    fast: Any = optimize_for_inference(model, dtype=torch.int8, calibration=[images])
    assert {choice.dtype for choice in fast.optimization.int8} == {torch.int8}
    assert len(fast.optimization.int8) == 20
    masks, expected = fast(images), model(images)
    assert masks.dtype == torch.float32
    assert 1e-4 < (masks - expected).norm() / expected.norm() < 0.1
    assert [each.shape for each in fast.encoder(images)] == [each.shape for each in model.encoder(images)]


@pytest.mark.filterwarnings("ignore:cuda_graphs=True needs a CUDA device")
@torch.no_grad()
def test_the_encoder_is_what_cuda_graphs_replay() -> None:
    model, images = smp.Unet("backbone-resnet18", encoder_weights=None).eval(), torch.randn(1, 3, 64, 64)
    fast: Any = optimize_for_inference(model, cuda_graphs=True)
    assert isinstance(fast.encoder, GraphedExtractor)
    assert relative_error(fast(images), model(images)) < 1e-4
    assert fast.predict(images).shape == (1, 1, 64, 64)


def test_dpt_is_refused_by_smp_itself() -> None:
    with pytest.raises(ValueError, match="tu-"):
        smp.DPT("backbone-resnet18", encoder_weights=None)


def test_the_code_of_its_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    monkeypatch.chdir(tmp_path)
    page: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "smp.md").read_text(), flags=re.S):
        exec(block, page)
    assert page["masks"].shape == (1, 19, 64, 64)  # type: ignore[attr-defined]
