"""EfficientNet under EfficientNet-PyTorch's names: the same features there, in SMP, in timm and here, both ways."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import build, randomise_norms, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backbone import Backbone, convert_weights, inspect_weights, load_weights
from backbone.weights.formats import efficientnet_pytorch as names

PARITY = 1e-5
LITE0, B0 = "timm/tf_efficientnet_lite0", "timm/tf_efficientnet_b0"
ALL = [*(f"lite{n}" for n in range(5)), *(f"b{n}" for n in range(8))]
IMAGES = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def meta_state(name: str, **settings: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        state: dict[str, Tensor] = timm.create_model(f"tf_efficientnet_{name}", **settings).state_dict()
    return state


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def own_network(name: str) -> Any:
    """Return EfficientNet-PyTorch's network with random weights; it has the parts of Lite, though not the name."""
    theirs = pytest.importorskip("efficientnet_pytorch", reason="pip install efficientnet-pytorch")
    from efficientnet_pytorch.utils import get_model_params

    blocks, settings = get_model_params("efficientnet-b0", {"image_size": None, "drop_connect_rate": 0.0})
    if name == LITE0:
        blocks = [block._replace(se_ratio=None) for block in blocks]
    model = theirs.EfficientNet(blocks, settings)
    if name == LITE0:
        for module in list(model.modules()):
            if hasattr(module, "_swish"):
                module._swish = nn.ReLU6()
    randomise_norms(model)
    return model.eval()


@torch.inference_mode()
def assert_same(model: Backbone, theirs: list[Tensor]) -> None:
    ours = list(model.eval()(IMAGES).values())
    assert [relative_error(a, b) <= PARITY for a, b in zip(ours, theirs, strict=True)] == [True] * 4


@torch.inference_mode()
def endpoints(model: Any) -> list[Tensor]:
    return [model.extract_endpoints(IMAGES)[f"reduction_{n}"] for n in (2, 3, 4, 5)]


@pytest.mark.parametrize("name", [LITE0, B0])
def test_its_weights_give_its_features(tmp_path: Path, name: str) -> None:
    theirs = own_network(name)
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "x.pth")
    model = build(name)
    report = load_weights(model, tmp_path / "x.pth", name=name)
    assert (report.format, report.prefix) == ("efficientnet_pytorch", "state_dict.module.")
    assert_same(model, endpoints(theirs))


@pytest.mark.parametrize("name", [LITE0, B0])
def test_our_weights_give_our_features_there(tmp_path: Path, name: str) -> None:
    theirs = own_network(name)
    source = timm.create_model(name.removeprefix("timm/")).eval()
    randomise_norms(source)
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    convert_weights(tmp_path / "timm.safetensors", tmp_path / "x.pth", "efficientnet_pytorch")
    theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    model = build(name)
    load_weights(model, tmp_path / "timm.safetensors", name=name)
    assert_same(model, endpoints(theirs))


@torch.inference_mode()
def block_outputs(encoder: Any) -> list[Tensor]:
    """Return what the last block of each stride gives; of stride 16 SMP's decoders take an earlier one."""
    found: dict[int, Tensor] = {}
    for number in (2, 4, 10, 15):
        encoder._blocks[number].register_forward_hook(lambda *call, number=number: found.update({number: call[2]}))
    encoder(IMAGES)
    return list(found.values())


def test_smps_encoder_agrees_both_ways(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install segmentation-models-pytorch")
    theirs = smp.Unet("efficientnet-b0", encoder_weights=None).eval()
    randomise_norms(theirs)
    torch.save(theirs.state_dict(), tmp_path / "unet.pth")
    model = build(B0)
    report = load_weights(model, tmp_path / "unet.pth", name=B0)
    assert report.prefix == "encoder."
    assert any(reason.endswith("decoder") for reason in report.dropped)
    assert_same(model, block_outputs(theirs.encoder))
    convert_weights(tmp_path / "unet.pth", tmp_path / "encoder.pth", "efficientnet_pytorch")
    other = smp.encoders.get_encoder("efficientnet-b0", weights=None).eval()
    other.load_state_dict(torch.load(tmp_path / "encoder.pth", weights_only=True))
    assert_same(model, block_outputs(other))


@pytest.mark.parametrize("name", ALL)
def test_names_go_there_and_back_for_every_size(name: str) -> None:
    state = meta_state(name)
    assert names.variant(state) == name
    theirs = names.from_timm(state)
    assert shapes(names.to_timm(theirs)) == shapes(state)
    assert all(names.EFFICIENTNET_PYTORCH.scheme.to_ours(key) for key in theirs)


@pytest.mark.parametrize("name", ["b0", "b3", "b7"])
def test_names_are_those_of_the_library(name: str) -> None:
    library = pytest.importorskip("efficientnet_pytorch", reason="pip install efficientnet-pytorch")
    with torch.device("meta"):
        theirs = library.EfficientNet.from_name(f"efficientnet-{name}").state_dict()
    assert shapes(names.from_timm(meta_state(name))) == shapes(theirs)


def test_network_of_no_known_size_is_described_and_not_converted(tmp_path: Path) -> None:
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("blocks.4.2")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"no EfficientNet of this family: depths \(1, 2, 2, 3, 2, 4, 1\)"):
        convert_weights(tmp_path / "x.pth", tmp_path / "y.pth", "efficientnet_pytorch")
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize(("to", "words"), [("torchvision", "efficientnet_pytorch, timm, got torchvision")])
def test_efficientnet_is_not_written_for_libraries_of_resnets(tmp_path: Path, to: str, words: str) -> None:
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words):
        convert_weights(tmp_path / "x.pth", tmp_path / "y.pth", to)


def test_backbone_of_ours_is_converted_without_the_head(tmp_path: Path) -> None:
    torch.save(build(LITE0).state_dict(), tmp_path / "x.pth")
    convert_weights(tmp_path / "x.pth", tmp_path / "y.safetensors", "efficientnet_pytorch")
    state = load_file(tmp_path / "y.safetensors")
    assert not any(key.startswith(("_conv_head", "_fc")) for key in state)
    load_weights(build(LITE0), tmp_path / "y.safetensors", name=LITE0)


@pytest.fixture
def lite0_file(tmp_path: Path) -> Path:
    torch.save(names.from_timm(timm.create_model("tf_efficientnet_lite0").state_dict()), tmp_path / "lite0.pth")
    return tmp_path / "lite0.pth"


def test_convention_travels_with_the_weights(tmp_path: Path, lite0_file: Path) -> None:
    before = inspect_weights(lite0_file)
    assert (before.format, before.network) == ("efficientnet_pytorch", LITE0)
    told = " ".join(before.training)
    assert all(words in told for words in ("mean (0.5, 0.5, 0.5)", "eps 0.001", "padding 'same'"))
    convert_weights(lite0_file, tmp_path / "x.safetensors", "timm")
    after = inspect_weights(tmp_path / "x.safetensors")
    assert (after.network, after.training) == (LITE0, before.training)


@pytest.mark.parametrize(("file", "mean"), [("efficientnet-b0-355c32eb.pth", 0.485), ("adv-efficientnet-b0.pth", 0.5)])
def test_pixels_of_b0_depend_on_how_it_was_trained(tmp_path: Path, file: str, mean: float) -> None:
    torch.save(names.from_timm(timm.create_model("tf_efficientnet_b0").state_dict()), tmp_path / file)
    model = build(B0)
    load_weights(model, tmp_path / file, name=B0)
    assert model.preprocessing.mean[0] == mean


def test_pixels_follow_the_number_of_channels(lite0_file: Path) -> None:
    model = build(LITE0, in_channels=1)
    load_weights(model, lite0_file, name=LITE0)
    assert model.preprocessing.mean == (0.5,)


def test_network_that_pads_otherwise_is_told(lite0_file: Path) -> None:
    model = build("timm/efficientnet_lite0")
    with pytest.warns(UserWarning, match=f"padding 'same'.* take {LITE0}"):
        load_weights(model, lite0_file, name="timm/efficientnet_lite0")
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "timm/tf_efficientnet_b0", "timm/convnext_atto"])
def test_other_network_gets_counts_of_both_sides_and_a_remedy(lite0_file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"missing.*unexpected.*Choose the n") as caught:
        load_weights(build(name), lite0_file, name=name)
    assert LITE0 in str(caught.value)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load(tmp_path: Path, dtype: torch.dtype) -> None:
    state = names.from_timm(timm.create_model("tf_efficientnet_lite0").state_dict())
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "x.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(build(LITE0), tmp_path / "x.pth", name=LITE0)
