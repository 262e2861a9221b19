"""Light DeepLab backbones: timm dilates MobileNetV3 and its kin only where it builds them for feature maps alone."""

import pytest
import torch
from conftest import build, relative_error

timm = pytest.importorskip("timm", reason="timm is an extra")

LIGHT = ("mobilenetv3_small_050", "lcnet_050", "mobilenetv4_conv_small_050", "tf_mobilenetv3_small_minimal_100")


@pytest.mark.parametrize("model", LIGHT)
@pytest.mark.parametrize("output_stride", [16, 8])
def test_equals_timms_own_dilated_feature_extractor(model: str, output_stride: int) -> None:
    ours = build(f"timm/{model}", output_stride=output_stride).eval()
    theirs = timm.create_model(model, features_only=True, output_stride=output_stride).eval()
    theirs.load_state_dict({key.removeprefix("network."): value for key, value in ours.state_dict().items()})
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        features, expected = ours(images), theirs(images)[1:]
    assert [spec.stride for spec in ours.feature_specs.values()] == [min(s, output_stride) for s in (4, 8, 16, 32)]
    for feature, wanted in zip(features.values(), expected, strict=True):
        assert relative_error(feature, wanted) <= 1e-5


def test_weights_of_the_undilated_network_load_and_dilate() -> None:
    plain = timm.create_model("mobilenetv3_small_050")
    dilated = build("timm/mobilenetv3_small_050", output_stride=8)
    state, _ = dilated.adapt_weights(plain.state_dict())  # type: ignore[misc]
    dilated.load_state_dict({k: v for k, v in state.items() if not k.startswith(dilated.unbuilt_prefixes)})
    block = "blocks.4.0.conv_pw.weight"
    assert torch.equal(dilated.state_dict()[f"network.{block}"], plain.state_dict()[block])
    strides = {m.stride for m in dilated.get_submodule("network.blocks.5").modules() if hasattr(m, "stride")}
    assert strides == {(1, 1)}


def test_what_timm_cannot_dilate_at_all_is_still_refused() -> None:
    with pytest.raises(ValueError, match="output_stride must be 32 for timm/swin_tiny_patch4_window7_224"):
        build("timm/swin_tiny_patch4_window7_224", output_stride=16)
