"""What weights expect beyond their names: stride, pixels, eps, dilation, channels; and what a contradiction is told."""

import json
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from conftest import build, relative_error
from foreign import IMAGES
from safetensors.torch import save_file
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from backbone import Backbone, BackboneConfig, Preprocessing, load_weights
from backbone.weights.formats.mmdetection import RGB_255
from backbone.weights.metadata import BGR_255, Metadata

V1 = "stride_in_1x1: true"


def caffe2_file(folder: Path, name: str = "resnet50") -> Path:
    state = foreign.folded(foreign.torchvision_network(name)).state_dict()
    return foreign.write_pickle(foreign.caffe2_names(state), folder / "weights.pkl")


def with_header(folder: Path, **facts: Any) -> Path:
    """Write a file of ours that says something of its training."""
    header = Metadata("a test", known=True, **facts).to_json()
    state = foreign.torchvision_network("resnet50").state_dict()
    save_file(state, folder / "x.safetensors", {"backbone_metadata": header})
    return folder / "x.safetensors"


def load_50(path: Path, **settings: Any) -> Backbone:
    model = build("resnet50", **settings)
    load_weights(model, path, name="resnet50")
    return model


def test_v1_weights_assumed_in_a_v15_network_warn_with_the_line_to_change(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="stride_in_1x1|BGR") as caught:
        load_50(caffe2_file(tmp_path))
    message = str(caught[0].message)
    assert V1 in message
    assert "this network has stride_in_1x1: false" in message
    assert message.endswith("set stride_in_1x1: true, or ignore this if you know better")


def test_v1_weights_known_in_a_v15_network_are_refused_with_the_line_to_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this network has stride_in_1x1: false.*: set stride_in_1x1: true"):
        load_50(with_header(tmp_path, stride_in_1x1=True))


def test_v1_weights_in_a_v1_network_say_nothing(tmp_path: Path) -> None:
    load_50(with_header(tmp_path, stride_in_1x1=True), stride_in_1x1=True)


def test_bgr_weights_warn_an_rgb_pipeline_of_both_values_and_the_line(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="BGR") as caught:
        load_50(caffe2_file(tmp_path), stride_in_1x1=True)
    assert [
        word in str(caught[0].message)
        for word in (
            "BGR, 0 to 255, mean (103.53, 116.28, 123.675)",
            "expected RGB, 0 to 1",
            "stem_channels_from: [2, 1, 0]",
        )
    ] == [True] * 3


def test_bgr_weights_set_the_preprocessing_they_expect(tmp_path: Path) -> None:
    model = build(weights=caffe2_file(tmp_path, "resnet18"), stem_channels_from=[0, 1, 2])
    assert model.preprocessing == BGR_255


def test_bgr_weights_take_rgb_images_through_a_reversed_stem(tmp_path: Path) -> None:
    path = caffe2_file(tmp_path, "resnet18")
    bgr = build(weights=path, stem_channels_from=[0, 1, 2]).eval()
    rgb = build(weights=path, stem_channels_from=[2, 1, 0]).eval()
    with torch.inference_mode():
        assert relative_error(rgb(IMAGES)["c5"], bgr(IMAGES.flip(1))["c5"]) <= 1e-5
    assert (rgb.preprocessing.channel_order, rgb.preprocessing.mean) == ("rgb", BGR_255.mean[::-1])


MM_CONFIGS: dict[str, tuple[str, Preprocessing]] = {
    "caffe": (
        "backbone=dict(type='ResNet', style='caffe'), img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], "
        "std=[1.0, 1.0, 1.0], to_rgb=False)",
        BGR_255,
    ),
    "pytorch": (
        "data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True), "
        "backbone=dict(type='ResNet', style='pytorch')",
        RGB_255,
    ),
}


@pytest.mark.parametrize("style", MM_CONFIGS)
def test_mmdetections_config_decides_stride_and_pixels(tmp_path: Path, style: str) -> None:
    config, pixels = MM_CONFIGS[style]
    body = foreign.under("backbone.", foreign.without_classifier(foreign.torchvision_network("resnet50").state_dict()))
    torch.save({"meta": {"mmdet_version": "3.3.0", "config": config}, "state_dict": body}, tmp_path / "x.pth")
    model = build("resnet50", stride_in_1x1=style == "caffe")
    model.preprocessing = pixels
    report = load_weights(model, tmp_path / "x.pth", name="resnet50")
    assert (report.metadata.known, model.preprocessing) == (True, pixels)
    with pytest.raises(ValueError, match="set stride_in_1x1"):
        load_50(tmp_path / "x.pth", stride_in_1x1=style != "caffe")


@pytest.mark.parametrize("trained", [True, False])
def test_known_dilation_convention_must_be_the_networks(tmp_path: Path, trained: bool) -> None:
    path = with_header(tmp_path, dilate_first_block=trained)
    load_50(path, output_stride=16, dilate_first_block=trained)
    load_50(path)  # not dilated: nothing to contradict
    with pytest.raises(ValueError, match=f"set dilate_first_block: {str(trained).lower()}"):
        load_50(path, output_stride=16, dilate_first_block=not trained)


def test_refused_contradiction_leaves_every_byte_as_it_was(tmp_path: Path) -> None:
    model = build("resnet50")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="set stride_in_1x1"):
        load_weights(model, with_header(tmp_path, stride_in_1x1=True), name="resnet50")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_known_eps_gives_the_features_it_was_trained_to(tmp_path: Path, norm: str) -> None:
    theirs = foreign.torchvision_network("resnet50")
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.3
    header = Metadata("a test", known=True, eps=0.3).to_json()
    save_file(theirs.state_dict(), tmp_path / "x.safetensors", {"backbone_metadata": header})
    model = load_50(tmp_path / "x.safetensors", norm=norm).eval()
    with torch.inference_mode():
        assert relative_error(model(IMAGES)["c5"], foreign.torchvision_features(theirs)[-1]) <= 1e-5


def test_torchvisions_first_detectors_get_the_eps_0_they_were_trained_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    state = foreign.under(
        "backbone.body.", foreign.without_classifier(foreign.torchvision_network("resnet50").state_dict())
    )
    torch.save({**state, **foreign.HEAD}, tmp_path / "fasterrcnn.pth")
    monkeypatch.setattr(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.value, "url", (tmp_path / "fasterrcnn.pth").as_uri())
    model = build("resnet50", norm="frozen_bn")
    report = load_weights(model, "FasterRCNN_ResNet50_FPN_Weights.COCO_V1", name="resnet50")
    assert {module.eps for module in model.modules() if hasattr(module, "running_var")} == {0.0}
    assert report.adapted == ["eps of 53 norms from 1e-05 to 0.0"]


def test_detector_of_unknown_origin_is_told_that_its_eps_may_be_0(tmp_path: Path) -> None:
    state = foreign.under("backbone.body.", foreign.without_classifier(foreign.torchvision_network().state_dict()))
    torch.save(state, tmp_path / "x.pth")
    report = load_weights(build(), tmp_path / "x.pth", name="resnet18")
    assert "COCO_V1 needs eps 0" in str(report)


def test_copy_of_a_first_detectors_file_is_known_by_its_name(tmp_path: Path) -> None:
    state = foreign.under("backbone.body.", foreign.without_classifier(foreign.torchvision_network().state_dict()))
    torch.save(state, tmp_path / Path(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url).name)
    model = build(weights=next(tmp_path.iterdir()))
    assert {module.eps for module in model.modules() if hasattr(module, "running_var")} == {0.0}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"origin": 3}', "[" * 5000, '{"origin": "x", "known": true}']
)
def test_header_that_is_not_ours_is_refused(tmp_path: Path, text: str) -> None:
    save_file(foreign.torchvision_network().state_dict(), tmp_path / "x.safetensors", {"backbone_metadata": text})
    with pytest.raises(ValueError, match=r"x\.safetensors: its 'backbone_metadata' header must be what"):
        load_weights(build(), tmp_path / "x.safetensors", name="resnet18")


@pytest.mark.parametrize("pixels", [BGR_255, None, Preprocessing(), Preprocessing(interpolation="bicubic")])
def test_metadata_survives_its_json(pixels: Preprocessing | None) -> None:
    metadata = Metadata("a test", True, pixels, True, 1e-3, False)
    assert Metadata.from_json(metadata.to_json()) == metadata
    assert json.loads(metadata.to_json())["eps"] == 1e-3


# Stems for other channels.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("stem") / "x.pth"
    torch.save(foreign.torchvision_network().state_dict(), path)
    return path


def c5(images: torch.Tensor, path: Path, **settings: Any) -> torch.Tensor:
    model = build(weights=path, in_channels=images.shape[1], **settings).eval()
    with torch.inference_mode():
        features: dict[str, torch.Tensor] = model(images)
    return features["c5"]


def test_one_channel_gives_the_features_of_grey_as_rgb(checkpoint: Path) -> None:
    grey = IMAGES[:, :1]
    assert relative_error(c5(grey, checkpoint), c5(grey.expand(-1, 3, -1, -1), checkpoint)) <= 1e-5


@pytest.mark.parametrize("times", [2, 3])
def test_repeated_rgb_gives_the_features_of_rgb(checkpoint: Path, times: int) -> None:
    assert relative_error(c5(IMAGES.repeat(1, times, 1, 1), checkpoint), c5(IMAGES, checkpoint)) <= 1e-5


@pytest.mark.parametrize("channels", [2, 4, 5, 7])
def test_other_numbers_of_channels_repeat_and_rescale(checkpoint: Path, channels: int) -> None:
    weight = build(weights=checkpoint).state_dict()["conv1.weight"]
    adapted = build(weights=checkpoint, in_channels=channels).state_dict()["conv1.weight"]
    expected = torch.stack([weight[:, index % 3] * 3 / channels for index in range(channels)], dim=1)
    assert torch.allclose(adapted, expected, atol=1e-7)


EXACT_MAPPINGS: dict[str, tuple[list[int | None], list[int | None]]] = {
    # stem_channels_from, and for each input channel the RGB channel fed to it (None: noise)
    "reversed": ([2, 1, 0], [2, 1, 0]),
    "one shown twice": ([0, 1, 2, 0], [0, 1, 2, 0]),
    "depth after RGB": ([0, 1, 2, None], [0, 1, 2, None]),
    "depth before BGR": ([None, 2, 1, 0], [None, 2, 1, 0]),
}


@pytest.mark.parametrize("name", EXACT_MAPPINGS)
def test_chosen_mapping_gives_the_features_of_rgb(checkpoint: Path, name: str) -> None:
    mapping, fed = EXACT_MAPPINGS[name]
    images = torch.stack([torch.rand(1, 64, 64) if index is None else IMAGES[:, index] for index in fed], dim=1)
    ours = c5(images, checkpoint, stem_channels_from=mapping)
    assert relative_error(ours, c5(IMAGES, checkpoint)) <= 1e-5


@pytest.mark.parametrize("mapping", [[0, 1, 3], [0, 1], [0, 1, 2, 0], []])
def test_mapping_that_does_not_fit_is_refused(checkpoint: Path, mapping: list[int]) -> None:
    with pytest.raises(ValueError, match="stem_channels_from"):
        build(weights=checkpoint, stem_channels_from=mapping)


def test_mapping_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stem_channels_from .*with weights: null"):
        BackboneConfig(name="resnet18", stem_channels_from=(0, 1, 2))


def test_grey_weights_do_not_stretch_to_rgb(tmp_path: Path) -> None:
    torch.save(build(in_channels=1).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=r"conv1\.weight \(64, 1, 7, 7\) for \(64, 3, 7, 7\)"):
        build(weights=tmp_path / "grey.pth")


def test_adapted_channels_bring_their_mean_and_std(checkpoint: Path) -> None:
    one, four = (build(weights=checkpoint, in_channels=channels).preprocessing for channels in (1, 4))
    assert one.mean == pytest.approx([sum(Preprocessing().mean) / 3])
    assert four.std == (*Preprocessing().std, Preprocessing().std[0])


def test_report_names_the_adapted_stem(checkpoint: Path) -> None:
    report = load_weights(build(in_channels=1), checkpoint, name="resnet18")
    assert report.reshaped == ["conv1.weight"]
    assert report.adapted == ["conv1.weight: input channels stand for pre-trained channels [[0, 1, 2]]"]


def test_eps_of_earlier_weights_does_not_linger(checkpoint: Path) -> None:
    model = build()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.0  # as the first detectors' weights leave it
    load_weights(model, checkpoint, name="resnet18")
    assert {module.eps for module in model.modules() if hasattr(module, "running_var")} == {1e-5}
