"""Every format in: a checkpoint of the real library, or of its documented names, gives that library's own features."""

from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import torchvision
from conftest import build, randomise_norms, relative_error
from foreign import IMAGES, WRAPPED, Features, State
from safetensors.torch import save_file

from backbone import Backbone, LoadReport, Preprocessing, load_weights
from backbone.weights.metadata import BGR_255

PARITY = 1e-5


def features(model: Backbone) -> Features:
    with torch.inference_mode():
        return list(model.eval()(IMAGES).values())


def assert_same(ours: Features, theirs: Features) -> None:
    assert [relative_error(a, b) <= PARITY for a, b in zip(ours, theirs, strict=True)] == [True] * 4


@pytest.fixture(scope="module")
def bottleneck() -> tuple[State, Features]:
    """Return a ResNet-50 of torchvision's, and its C2 to C5."""
    torch.manual_seed(0)
    model = foreign.torchvision_network("resnet50")
    return model.state_dict(), foreign.torchvision_features(model)


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrapped_network_gives_the_features_of_its_library(
    bottleneck: tuple[State, Features], tmp_path: Path, wrapping: str
) -> None:
    state, expected = bottleneck
    make, form, prefix = WRAPPED[wrapping]
    torch.save(make(state), tmp_path / "x.pth")
    model = build("resnet50")
    model.preprocessing = BGR_255  # as a BGR pipeline would; what RGB ones are told is another test
    report = load_weights(model, tmp_path / "x.pth", name="resnet50")
    assert (report.format, report.prefix) == (form, prefix)
    assert_same(features(model), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_network_gives_torchvisions_features(tmp_path: Path, name: str) -> None:
    theirs = foreign.torchvision_network(name)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    assert_same(features(build(name, weights=tmp_path / "x.pth")), foreign.torchvision_features(theirs))


def test_torchvision_detector_gives_its_backbones_features(tmp_path: Path) -> None:
    theirs = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).eval()
    randomise_norms(theirs)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    model = build("resnet50")
    report = load_weights(model, tmp_path / "x.pth", name="resnet50")
    assert report.dropped["beside the network: head"]
    assert_same(features(model), foreign.torchvision_features(theirs.backbone.body))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_timm_network_gives_timms_features(tmp_path: Path, name: str) -> None:
    theirs = foreign.timm_network(name)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert_same(features(build(name, weights=tmp_path / "model.safetensors")), foreign.timm_features(theirs))


TRANSFORMERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "basic": ("resnet18", {"depths": [2, 2, 2, 2], "layer_type": "basic"}, False),
    "bottleneck": ("resnet50", {"depths": [3, 4, 6, 3], "layer_type": "bottleneck"}, False),
    "v1": (
        "resnet50",
        {"depths": [3, 4, 6, 3], "layer_type": "bottleneck", "downsample_in_bottleneck": True},
        True,
    ),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_network_gives_its_features(tmp_path: Path, kind: str) -> None:
    name, settings, stride_in_1x1 = TRANSFORMERS[kind]
    theirs = foreign.transformers_network(**settings)
    theirs.save_pretrained(tmp_path)
    model = build(name, stride_in_1x1=stride_in_1x1)
    report = load_weights(model, tmp_path / "model.safetensors", name=name)
    assert report.format == "transformers"
    assert_same(features(model), foreign.transformers_features(theirs))


def test_transformers_classifier_is_loaded_where_the_network_has_one(tmp_path: Path) -> None:
    theirs = foreign.transformers_network(depths=[2, 2, 2, 2], layer_type="basic")
    theirs.save_pretrained(tmp_path)
    model = build(num_classes=7, weights=tmp_path / "model.safetensors").eval()
    with torch.inference_mode():
        assert relative_error(model(IMAGES)["logits"], theirs(IMAGES).logits) <= PARITY


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_network_gives_its_features(tmp_path: Path, suffix: str, stride_in_1x1: bool) -> None:
    pytest.importorskip("detectron2.modeling.backbone.resnet", reason="installed from its own repository")
    theirs = foreign.detectron2_network(50, stride_in_1x1)
    if suffix == ".pth":
        torch.save({"model": foreign.under("backbone.bottom_up.", theirs.state_dict())}, tmp_path / "x.pth")
    else:
        arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
        foreign.write_pickle(
            {"model": arrays, "__author__": "someone", "matching_heuristics": True}, tmp_path / "x.pkl"
        )
    model = build("resnet50", stride_in_1x1=stride_in_1x1)
    model.preprocessing = BGR_255
    load_weights(model, tmp_path / f"x{suffix}", name="resnet50")
    assert_same(features(model), foreign.detectron2_features(theirs))


@pytest.mark.parametrize("wrapped", [True, False])
def test_caffe2_file_gives_the_features_of_the_folded_v1_network(tmp_path: Path, wrapped: bool) -> None:
    theirs = foreign.v1(foreign.folded(foreign.torchvision_network("resnet50")))
    blobs = foreign.caffe2_names(theirs.state_dict())
    foreign.write_pickle({"blobs": blobs} if wrapped else blobs, tmp_path / "R-50.pkl")
    model = build("resnet50", stride_in_1x1=True, norm="frozen_bn" if wrapped else "bn")
    model.preprocessing = BGR_255
    report = load_weights(model, tmp_path / "R-50.pkl", name="resnet50")
    assert (report.format, report.metadata.stride_in_1x1, report.metadata.preprocessing) == (
        "MSRA/Caffe2",
        True,
        BGR_255,
    )
    assert_same(features(model), foreign.torchvision_features(theirs))


def test_caffe2_basic_blocks_are_known_too(tmp_path: Path) -> None:
    theirs = foreign.folded(foreign.torchvision_network("resnet18"))
    foreign.write_pickle(foreign.caffe2_names(theirs.state_dict()), tmp_path / "R-18.pkl")
    model = build()
    model.preprocessing = BGR_255
    load_weights(model, tmp_path / "R-18.pkl", name="resnet18")
    assert_same(features(model), foreign.torchvision_features(theirs))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_read_from_every_protocol_of_pickle(tmp_path: Path, protocol: int) -> None:
    theirs = foreign.folded(foreign.torchvision_network("resnet18")).state_dict()
    state = {key: value for key, value in theirs.items() if key.startswith(("conv1", "bn1", "layer1"))}
    foreign.write_pickle(foreign.caffe2_names(state), tmp_path / "R-18.pkl", protocol)
    model = build(out_features=["c2"])
    model.preprocessing = BGR_255
    load_weights(model, tmp_path / "R-18.pkl", name="resnet18")
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if "num_batches" not in key)


def load_18(content: Any, path: Path, **settings: Any) -> tuple[Backbone, LoadReport]:
    torch.save(content, path / "x.pth")
    model = build(**settings)
    return model, load_weights(model, path / "x.pth", name="resnet18")


def test_report_accounts_for_every_key_of_the_file(tmp_path: Path) -> None:
    state = foreign.torchvision_network().state_dict()
    content = foreign.moco(state)
    _, report = load_18(content, tmp_path)
    tensors = [*content["state_dict"], "optimizer.state.0.exp_avg", "optimizer.param_groups", "epoch"]
    assert len(report.loaded) + sum(map(len, report.dropped.values())) == len(tensors)
    assert {reason: len(keys) for reason, keys in report.dropped.items()} == {
        "beside the network: encoder_k": 122,
        "projection head": 2,
        "beside the network: queue": 1,
        "beside the network: queue_ptr": 1,
        "beside the network: optimizer": 1,
        "not tensors: epoch": 1,
        "not tensors: optimizer": 1,
    }


def test_report_reads_as_text(tmp_path: Path) -> None:
    state = foreign.torchvision_network().state_dict()
    _, report = load_18({"model": state}, tmp_path, in_channels=1)
    assert str(report).splitlines()[1:] == [
        "  prefix stripped: model.",
        "  120 loaded; 0 missing",
        "  dropped, classifier: 2",
        "  adapted: conv1.weight: input channels stand for pre-trained channels [[0, 1, 2]]",
        "  stride in the 3x3 (v1.5) (assumed: torchvision's convention)",
        "  images RGB, 0 to 1, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225) "
        "(assumed: torchvision's convention)",
    ]


def test_two_networks_without_a_preference_are_refused(tmp_path: Path) -> None:
    state = foreign.torchvision_network().state_dict()
    with pytest.raises(ValueError, match=r"must hold one network, got one under each of 'net\.', 'network\.'"):
        load_18({"net": state, "network": state}, tmp_path)


def test_unknown_prefix_is_refused_by_name(tmp_path: Path) -> None:
    state = foreign.torchvision_network().state_dict()
    with pytest.raises(ValueError, match=r"holds no network that is known here.*mystery\.conv1\.weight"):
        load_18(foreign.under("mystery.", state), tmp_path)


@pytest.mark.parametrize("name", ["resnet50d", "seresnet50"])
def test_relative_of_another_shape_is_refused_by_its_extra_keys(tmp_path: Path, name: str) -> None:
    torch.save(foreign.timm_network(name).state_dict(), tmp_path / "x.pth")
    extra = {"resnet50d": r"conv1\.0\.weight", "seresnet50": r"layer1\.0\.se\.fc1\.weight"}[name]
    with pytest.raises(ValueError, match=rf"unexpected \(.*{extra}"):
        load_weights(build("resnet50"), tmp_path / "x.pth", name="resnet50")


def test_names_of_a_plugins_own_network_need_no_format(tmp_path: Path) -> None:
    class Plugin(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 4)

    ours, theirs = Plugin(), Plugin()
    torch.save({"state_dict": foreign.under("module.", theirs.state_dict())}, tmp_path / "x.pth")
    load_weights(ours, tmp_path / "x.pth", name="plugin")
    assert torch.equal(ours.patches.weight, theirs.patches.weight)
    assert ours.preprocessing == Preprocessing()


def test_a_path_is_no_name_that_the_networks_library_is_asked_for(tmp_path: Path) -> None:
    class Published(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 4)

        def named_weights(self, name: str) -> None:
            raise ValueError(f"publishes nothing as {name}")

    ours, theirs = Published(), Published()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    load_weights(ours, tmp_path / "x.pth", name="published")
    with pytest.raises(ValueError, match="publishes nothing as IMAGENET"):
        load_weights(ours, "IMAGENET", name="published")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_precision_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    state = foreign.torchvision_network().state_dict()
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    model, _ = load_18(state, tmp_path)
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"].float())


@pytest.mark.parametrize("key", ["backbone", "backbone.bodyguard", "backbone.body", "head"])
def test_tensor_beside_the_prefix_is_dropped_by_name(tmp_path: Path, key: str) -> None:
    state = foreign.under("backbone.body.", foreign.torchvision_network().state_dict())
    _, report = load_18({**state, key: torch.ones(1)}, tmp_path)
    assert report.dropped[f"beside the network: {key.rpartition('.')[2]}"] == [key]
