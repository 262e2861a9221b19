"""Checkpoints that transformers itself writes, in every layout, with our backbone and as weights of our backbones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("scipy", reason="transformers' losses match boxes by scipy")
pytest.importorskip("timm", reason="DETR's published backbones are timm's")

from transformers_detectors import DETECTORS, RESNET_18, Detector, images  # noqa: E402

from backbone import convert_weights, inspect_weights, load_weights  # noqa: E402
from backbone.hosts.torchvision import build_detector  # noqa: E402
from backbone.hosts.transformers import TransformersBackboneConfig  # noqa: E402

PARITY = 1e-5
RESNET_PATHS = {
    "mask2former": "model.pixel_level_module.encoder.",
    "maskformer": "model.pixel_level_module.encoder.",
    "upernet": "backbone.",
}
TIMM_PATHS = {
    "detr": "model.backbone.conv_encoder.model.",
    "conditional_detr": "model.backbone.conv_encoder.model.",
    "deformable_detr": "model.backbone.conv_encoder.model.",
    "table_transformer": "model.backbone.conv_encoder.model.",
    "dab_detr": "model.backbone.conv_encoder.model._backbone.",
}
"""Where on disk each keeps its backbone; those of timm are what facebook/detr-resnet-50 and its kin hold."""


def theirs(name: str) -> tuple[Detector, Any]:
    detector = DETECTORS[name]
    if name in TIMM_PATHS:
        indices = [int(feature[-1]) for feature in detector.features]
        body = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=indices, use_pretrained_backbone=False)
    else:
        body = transformers.ResNetConfig(**RESNET_18, out_features=detector.features)
    model = detector.make(body)
    randomise_norms(model)
    return detector, model.eval()


def ours(detector: Detector) -> Any:
    keys = {"name": "resnet18", "norm": detector.norm}
    return detector.make_config(TransformersBackboneConfig(keys, out_features=detector.features))


@torch.no_grad()
def answers(model: Any) -> list[Tensor]:
    """Return all outputs in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        return [value for value in model.double().eval()(images()).to_tuple() if isinstance(value, Tensor)]
    finally:
        torch.set_default_dtype(torch.float32)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(relative_error(a, b) < PARITY for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", TIMM_PATHS)
def test_a_published_detector_loads_strictly_and_answers_the_same(name: str, tmp_path: Path) -> None:
    detector, model = theirs(name)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    assert f"{TIMM_PATHS[name]}layer1.0.conv1.weight" in keys
    loaded, told = detector.model_class.from_pretrained(tmp_path, config=ours(detector), output_loading_info=True)
    assert {reason: keys for reason, keys in told.items() if keys} == {}
    assert same(answers(loaded), answers(model))


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_the_layout_that_is_in_memory_loads_as_well(name: str, tmp_path: Path) -> None:
    detector, model = theirs(name)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.backbone.model.conv1.weight" in load_file(tmp_path / "model.safetensors")
    loaded = detector.model_class.from_pretrained(tmp_path, config=ours(detector))
    assert same(answers(loaded), answers(model))


def test_what_was_loaded_from_a_published_file_is_saved_under_our_names(tmp_path: Path) -> None:
    detector, model = theirs("detr")
    model.save_pretrained(tmp_path / "theirs")
    loaded = detector.model_class.from_pretrained(tmp_path / "theirs", config=ours(detector))
    loaded.save_pretrained(tmp_path / "ours")
    again, told = detector.model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {reason: keys for reason, keys in told.items() if keys} == {}
    assert same(answers(again), answers(model))


@pytest.mark.parametrize("name", [*TIMM_PATHS, *RESNET_PATHS])
def test_a_detectors_file_serves_as_weights_of_a_backbone(name: str, tmp_path: Path) -> None:
    _, model = theirs(name)
    model.save_pretrained(tmp_path)
    network = build()
    report = load_weights(network, tmp_path / "model.safetensors", name="resnet18")
    assert report.prefix == {**TIMM_PATHS, **RESNET_PATHS}[name]
    assert report.format == ("transformers DETR" if name in TIMM_PATHS else "transformers")
    body = transformers.ResNetBackbone(transformers.ResNetConfig(**RESNET_18, out_features=["stage1", "stage4"])).eval()
    convert_weights(tmp_path / "model.safetensors", tmp_path / "back.safetensors", "transformers")
    told = body.load_state_dict(load_file(tmp_path / "back.safetensors"), strict=False)
    assert told.unexpected_keys == []
    assert all(key.endswith("num_batches_tracked") for key in told.missing_keys)  # DETR's frozen norms count no batches
    features = network.eval()(images())
    assert same([features["c2"], features["c5"]], list(body(images()).feature_maps))


@pytest.mark.filterwarnings("ignore:.*frozen at random weights")
def test_a_detectors_file_serves_a_torchvision_detector(tmp_path: Path) -> None:
    _, model = theirs("detr")
    model.save_pretrained(tmp_path)
    weights = str(tmp_path / "model.safetensors")
    settings: dict[str, Any] = {"name": "resnet18", "weights": weights}
    detector = build_detector(retinanet(settings))
    expected = load_file(tmp_path / "model.safetensors")["model.backbone.conv_encoder.model.layer3.0.conv2.weight"]
    assert any(torch.equal(value, expected) for key, value in detector.state_dict().items() if "layer3.0.conv2" in key)


def retinanet(backbone: dict[str, Any]) -> Any:
    from backbone.recipe import DetectorConfig

    return DetectorConfig.model_validate({"detector": "retinanet", "backbone": backbone, "num_classes": 3})


@pytest.mark.parametrize(
    ("do_normalize", "mean"), [(False, (0.0, 0.0, 0.0)), (True, (0.5, 0.4, 0.3)), (None, (0.485, 0.456, 0.406))]
)
def test_the_image_processor_beside_a_file_tells_what_its_images_are(
    do_normalize: bool | None, mean: tuple[float, ...], tmp_path: Path
) -> None:
    _, model = theirs("detr")
    model.save_pretrained(tmp_path)
    if do_normalize is not None:
        text = f'{{"do_normalize": {str(do_normalize).lower()}, "image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]}}'
        (tmp_path / "preprocessor_config.json").write_text(text)
    network = build()
    load_weights(network, tmp_path / "model.safetensors", name="resnet18")
    assert network.preprocessing.mean == mean


RT_DETRS: dict[str, tuple[str, dict[str, Any]]] = {
    "r18vd": ("resnet18vd", RESNET_18),
    "r50vd": ("resnet50d", {}),
}
"""Our names of RT-DETR's backbones; r34vd is resnet34vd, r101vd resnet101d."""


@pytest.mark.parametrize("kind", RT_DETRS)
def test_a_published_rt_detr_loads_strictly_and_answers_the_same(kind: str, tmp_path: Path) -> None:
    name, settings = RT_DETRS[kind]
    detector = DETECTORS["rt_detr"]
    body = transformers.RTDetrResNetConfig(**settings, out_features=detector.features)
    widths = {"encoder_in_channels": list(body.hidden_sizes[1:])}
    config = detector.make_config(body)
    config.update(widths)
    model = detector.model_class(config).eval()
    randomise_norms(model)
    model.save_pretrained(tmp_path)
    hosted = detector.make_config(TransformersBackboneConfig(name, out_features=detector.features))
    hosted.update(widths)
    loaded, told = detector.model_class.from_pretrained(tmp_path, config=hosted, output_loading_info=True)
    assert {reason: keys for reason, keys in told.items() if keys} == {}
    network = build(name)
    report = load_weights(network, tmp_path / "model.safetensors", name=name)
    assert (report.format, report.prefix) == ("transformers RT-DETR", "model.backbone.model.")
    assert inspect_weights(tmp_path / "model.safetensors").network == name
    convert_weights(tmp_path / "model.safetensors", tmp_path / "back.safetensors", "transformers")
    alone = transformers.RTDetrResNetBackbone(body).eval()
    assert alone.load_state_dict(load_file(tmp_path / "back.safetensors"), strict=False).unexpected_keys == []
    features = network.eval()(images())
    assert same([features["c3"], features["c4"], features["c5"]], list(alone(images()).feature_maps))
    assert same(answers(loaded), answers(model))


def test_rt_detrs_names_are_those_of_timms_resnet_d(tmp_path: Path) -> None:
    """Every key of RTDetrResNet has a name in timm's ResNet-D, and nothing is left over on either side."""
    import timm

    from backbone.weights.formats.transformers import RT_DETR_NAMES

    for depths, layer, widths, name in (
        ([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048], "resnet50d"),
        ([3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048], "resnet101d"),
    ):
        with torch.device("meta"):
            config = transformers.RTDetrResNetConfig(depths=depths, layer_type=layer, hidden_sizes=widths)
            keys = set(transformers.RTDetrResNetBackbone(config).state_dict())
            expected = {key for key in timm.create_model(name).state_dict() if not key.startswith("fc.")}
        assert {RT_DETR_NAMES.to_ours(key) for key in keys} == expected
        assert {RT_DETR_NAMES.to_theirs(key) for key in expected} == keys


def test_a_file_of_rt_detr_is_recognised_and_its_images_are_not_normalised(tmp_path: Path) -> None:
    config = transformers.RTDetrResNetConfig(**RESNET_18)
    with torch.device("meta"):
        keys = transformers.RTDetrResNetBackbone(config).state_dict()
    state = {f"model.backbone.model.{key}": torch.ones(value.shape, dtype=value.dtype) for key, value in keys.items()}
    save_file({**state, "model.encoder.lateral_convs.0.conv.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    told = inspect_weights(tmp_path / "x.safetensors")
    assert (told.format, told.prefix, told.unexplained) == ("transformers RT-DETR", "model.backbone.model.", [])
    assert any("mean (0, 0, 0), std (1, 1, 1)" in line for line in told.training)
