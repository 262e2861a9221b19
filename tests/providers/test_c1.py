"""c1: what the stem makes before its max-pool, at stride 2."""

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torchvision.models import resnet18, resnet50

from backbone import freeze_report, freeze_stages
from backbone.command.description import describe
from backbone.hosts.torchvision import TorchvisionBackbone

ALL = ("c1", "c2", "c3", "c4", "c5")
WITH_C1 = ("resnet18", "timm/resnet18d", "timm/regnetx_002", "timm/mobilenetv3_small_050", "timm/efficientnet_b0")


@pytest.mark.parametrize("name", WITH_C1)
@pytest.mark.parametrize("out_features", [ALL, ("c1",), ("c1", "c3")], ids="+".join)
def test_c1_is_the_finest_of_the_features_and_has_its_spec(name: str, out_features: tuple[str, ...]) -> None:
    model = build(name, out_features=out_features).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 65, 97))
    assert list(features) == list(model.feature_specs) == list(out_features)
    assert features["c1"].shape == (1, model.feature_specs["c1"].channels, 33, 49)
    assert model.feature_specs["c1"].stride == 2


@pytest.mark.parametrize("constructor", [resnet18, resnet50])
@pytest.mark.parametrize("training", [False, True])
def test_c1_equals_torchvisions_stem_before_its_pool(constructor: type, training: bool) -> None:
    theirs = constructor()
    randomise_norms(theirs)
    model = build(constructor.__name__, out_features=ALL)
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    model.load_state_dict(state)
    model.train(training), theirs.train(training)
    images = torch.randn(2, 3, 64, 64)
    expected = theirs.relu(theirs.bn1(theirs.conv1(images)))
    assert relative_error(model(images)["c1"], expected) < 1e-6


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18d", "timm/mobilenetv3_small_050"])
@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_the_other_features_and_stages_are_the_same_with_and_without_c1(name: str, norm: str) -> None:
    plain, with_c1 = build(name, norm=norm).eval(), build(name, norm=norm, out_features=ALL).eval()
    randomise_norms(plain)
    with_c1.load_state_dict(plain.state_dict())
    assert {k: tuple(v) for k, v in with_c1.stage_modules.items()} == {
        k: tuple(v) for k, v in plain.stage_modules.items()
    }
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, features = plain(images), with_c1(images)
    assert all(relative_error(features[level], expected[level]) < 1e-6 for level in expected)


def test_a_gradient_of_c1_alone_reaches_the_stem_alone() -> None:
    model = build("resnet18", out_features=("c1", "c2"))
    model(torch.randn(1, 3, 32, 32))["c1"].square().mean().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"conv1.weight", "bn1.weight", "bn1.bias"}


def test_c1_is_still_when_the_stem_is_frozen() -> None:
    model = build("resnet18", out_features=("c1", "c2"))
    freeze_stages(model, 1)
    assert freeze_report(model)["stem"].frozen
    before = model(images := torch.randn(2, 3, 32, 32))["c1"]
    assert not before.requires_grad
    features = model.train()(images)
    features["c2"].square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(model(images)["c1"], before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm/convnext_atto", "its finest map is at stride 4; remove c1"),
        ("timm/vit_tiny_patch16_224", "its maps are all at stride 16, and the pyramid on them starts at c2"),
    ],
)
def test_c1_is_refused_with_the_reason_where_there_is_none(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(name, out_features=ALL)


def test_describe_shows_the_stem_at_stride_2() -> None:
    stem = describe(build("resnet18", out_features=("c1", "c2")), (64, 96)).stages[0]
    assert (stem.name, stem.channels, stem.stride, stem.size) == ("stem", 64, 2, (32, 48))


def test_only_the_stem_is_built_for_c1_alone() -> None:
    assert list(build("resnet18", out_features=("c1",)).stages) == ["stem"]


def test_hosts_pass_c1_on() -> None:
    model = build("resnet18", out_features=("c1", "c2"))
    hosted = TorchvisionBackbone(model, {"c1": "fine", "c2": "coarse"}).eval()
    assert hosted(torch.randn(1, 3, 32, 32))["fine"].shape == (1, 64, 16, 16)
