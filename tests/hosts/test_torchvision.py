"""torchvision's own detectors, with the same weights, must find the same and learn the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomise_norms, relative_error, saved_mebibytes
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, detection, resnet50, segmentation
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from backbone import (
    BackboneConfig,
    FrozenBatchNorm2d,
    Preprocessing,
    build_backbone,
    freeze_report,
    freeze_stages,
    optimize_for_inference,
)
from backbone.hosts.torchvision import (
    as_torchvision,
    build_detector,
    from_torchvision_names,
    load_torchvision_state,
    to_torchvision_names,
    unit_statistics,
)
from backbone.pyramid import FeaturePyramid
from backbone.recipe import DetectorConfig

NUM_CLASSES = 5
IMAGE_SIZES = ((128, 160), (144, 120))
MIN_SIZE = 128
RELATIVE_ERROR = 1e-4

DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn": detection.fasterrcnn_resnet50_fpn,
    "mask_rcnn": detection.maskrcnn_resnet50_fpn,
    "keypoint_rcnn": detection.keypointrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "fcos": detection.fcos_resnet50_fpn,
}
SEGMENTERS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": segmentation.deeplabv3_resnet50,
    "fcn": segmentation.fcn_resnet50,
}
TRAINABLE_PARAMETERS = {  # torchvision's, for trainable_layers 0 to 5
    "faster_rcnn": [30, 40, 59, 72, 82, 83],
    "retinanet": [36, 46, 65, 78, 88, 89],
    "mask_rcnn": [42, 52, 71, 84, 94, 95],
    "keypoint_rcnn": [48, 58, 77, 90, 100, 101],
}


def build(detector: str, *, backbone: dict[str, Any] | None = None, **settings: object) -> nn.Module:
    config = {"detector": detector, "num_classes": NUM_CLASSES, "min_size": MIN_SIZE, **settings}
    return build_detector(
        DetectorConfig.model_validate({**config, "backbone": {"name": "resnet50", **(backbone or {})}})
    )


@pytest.fixture(scope="module")
def imagenet_state() -> dict[str, Tensor]:
    """Stands for trained weights: norms as uneven as trained ones, and residual branches as tame."""
    torch.manual_seed(0)
    network = resnet50(weights=None)
    randomise_norms(network)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                if name.endswith("bn3"):
                    module.weight.mul_(0.3)
    return network.state_dict()  # type: ignore[no-any-return]


@pytest.fixture
def pretrained(imagenet_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision find its ImageNet weights without a network."""
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda *_args, **_kwargs: imagenet_state)


def pair(detector: str) -> tuple[nn.Module, nn.Module]:
    """Return torchvision's own detector and ours with its weights, as they come by default: three stages train."""
    theirs = DETECTORS[detector](
        weights=None,
        weights_backbone=ResNet50_Weights.IMAGENET1K_V1,
        num_classes=NUM_CLASSES,
        trainable_backbone_layers=3,
        min_size=MIN_SIZE,
    )
    ours = build(detector, backbone={"norm": "frozen_bn", "freeze_at": 2})
    _make_sure_of_itself(theirs)
    load_torchvision_state(ours, theirs.state_dict())
    for model in (theirs, ours):
        _let_through(model)
    return theirs, ours


def _make_sure_of_itself(detector: nn.Module) -> None:
    """Spread the scores of a random head, which would lie so close that rounding decides their order."""
    for name, module in detector.named_modules():
        if name.endswith(("cls_logits", "cls_score", "bbox_ctrness", "kps_score_lowres", "mask_fcn_logits")):
            with torch.no_grad():
                module.get_parameter("weight").normal_(0, 0.05)


def _let_through(detector: Any) -> None:
    """Few proposals, for speed, and every detection, for a head that has learnt nothing."""
    detector.score_thresh = 0.0
    if hasattr(detector, "rpn"):
        detector.rpn._post_nms_top_n = {"training": 50, "testing": 50}
        detector.roi_heads.score_thresh = 0.0
        detector.roi_heads.detections_per_img = 12
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 4  # one of them an object
    else:
        detector.detections_per_img = 50


def images_and_targets(detector: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, *size) for size in IMAGE_SIZES]
    targets = []
    for height, width in IMAGE_SIZES:
        corner, extent = torch.rand(3, 2) * 60, torch.rand(3, 2) * 50 + 10
        target = {"boxes": torch.cat([corner, corner + extent], 1), "labels": torch.tensor([1, 2, 4])}
        if detector == "mask_rcnn":
            target["masks"] = (torch.rand(3, height, width) > 0.5).to(torch.uint8)
        if detector == "keypoint_rcnn":
            points = corner[:, None] + torch.rand(3, 17, 2) * extent[:, None]
            target["keypoints"] = torch.cat([points, torch.ones(3, 17, 1)], 2)
        targets.append(target)
    return images, targets


@pytest.mark.usefixtures("pretrained")
@pytest.mark.parametrize("detector", DETECTORS)
def test_detections_equal_torchvisions_own(detector: str) -> None:
    theirs, ours = (model.eval() for model in pair(detector))
    images, _ = images_and_targets(detector)
    with torch.no_grad():
        for expected, actual in zip(theirs(images), ours(images), strict=True):
            assert len(expected["boxes"]) > 10
            assert torch.equal(actual["labels"], expected["labels"])
            for name, value in expected.items():
                if name != "labels":
                    assert relative_error(actual[name], value) < RELATIVE_ERROR, name


@pytest.mark.usefixtures("pretrained")
def test_retinanet_with_norms_in_its_heads_equals_torchvisions_v2() -> None:
    theirs = detection.retinanet_resnet50_fpn_v2(
        weights=None,
        weights_backbone=ResNet50_Weights.IMAGENET1K_V1,
        num_classes=NUM_CLASSES,
        trainable_backbone_layers=5,
        min_size=MIN_SIZE,
    ).eval()
    ours = build("retinanet", backbone={"norm": "bn"}, pyramid={"p6_from": "c5"}, head_norm="gn").eval()
    _make_sure_of_itself(theirs)
    load_torchvision_state(ours, theirs.state_dict())
    for model in (theirs, ours):
        _let_through(model)
    images, _ = images_and_targets("retinanet")
    with torch.no_grad():
        for expected, actual in zip(theirs(images), ours(images), strict=True):
            assert len(expected["boxes"]) > 10
            assert torch.equal(actual["labels"], expected["labels"])
            assert relative_error(actual["boxes"], expected["boxes"]) < RELATIVE_ERROR
            assert relative_error(actual["scores"], expected["scores"]) < RELATIVE_ERROR


@pytest.mark.usefixtures("pretrained")
@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_and_gradients_equal_torchvisions_own(detector: str) -> None:
    # In double precision no rounding can decide which of two equally good proposals is sampled.
    theirs, ours = (model.double().train() for model in pair(detector))
    images, targets = images_and_targets(detector)
    images = [image.double() for image in images]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    losses, gradients = [], []
    for model in (theirs, ours):
        torch.manual_seed(1)  # the samplers' order
        loss = model(images, copy.deepcopy(targets))
        sum(loss.values()).backward()
        losses.append({name: value.detach() for name, value in loss.items()})
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert losses[0].keys() == losses[1].keys()
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in losses[0].items():
        assert relative_error(losses[1][name], value) < RELATIVE_ERROR, name
    for name, value in gradients[0].items():
        if value.abs().max() > 1e-12:  # the bias before a softmax over places has no gradient but rounding
            assert relative_error(gradients[1][name], value) < RELATIVE_ERROR, name


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_segmentation_equals_torchvisions_own_in_output_loss_and_gradient(segmenter: str) -> None:
    theirs = SEGMENTERS[segmenter](weights=None, weights_backbone=None, num_classes=NUM_CLASSES, aux_loss=True)
    ours = build(segmenter, backbone={"norm": "bn"}, aux_classifier=True)
    load_torchvision_state(ours, theirs.state_dict())
    images = torch.rand(2, 3, 65, 97)
    with torch.no_grad():
        expected, actual = theirs.eval()(images), ours.eval()(images)
    assert actual.keys() == expected.keys() == {"out", "aux"}
    for name in expected:
        assert relative_error(actual[name], expected[name]) < RELATIVE_ERROR
    gradients = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(1)  # dropout
        output = model(images)
        (output["out"].square().mean() + 0.5 * output["aux"].square().mean()).backward()
        gradients.append(
            from_torchvision_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert relative_error(gradients[1][name], value) < RELATIVE_ERROR, name


@pytest.mark.usefixtures("pretrained")
@pytest.mark.parametrize("detector", DETECTORS)
def test_state_dict_has_torchvisions_own_names(detector: str) -> None:
    theirs, ours = pair(detector)
    counters = {key for key in ours.state_dict() if key.endswith("num_batches_tracked")}
    assert ours.state_dict().keys() - counters == theirs.state_dict().keys()


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_segmenters_state_returns_to_torchvision_strictly(segmenter: str) -> None:
    with torch.device("meta"):
        theirs = SEGMENTERS[segmenter](weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
        ours = build(segmenter, backbone={"norm": "bn"})
    theirs.load_state_dict(to_torchvision_names(ours.state_dict()), assign=True)


@pytest.mark.parametrize("trainable_layers", range(6))
@pytest.mark.parametrize("detector", TRAINABLE_PARAMETERS)
def test_as_many_parameters_train_as_in_torchvision(detector: str, trainable_layers: int) -> None:
    with torch.device("meta"):
        model = build(detector, backbone={"freeze_at": 5 - trainable_layers})
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert trainable == TRAINABLE_PARAMETERS[detector][trainable_layers]


def test_frozen_norm_eps_of_coco_v1_weights_can_be_set() -> None:
    model = build("faster_rcnn", backbone={"name": "resnet18"})
    load_torchvision_state(model, model.state_dict(), frozen_norm_eps=0.0)
    assert {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)} == {0.0}


def test_as_torchvision_fits_torchvisions_default_heads() -> None:
    body = build_backbone(BackboneConfig(name="resnet18", norm="bn"))
    detector = FasterRCNN(as_torchvision(FeaturePyramid(body, extra_levels="maxpool")), num_classes=3, min_size=64)
    assert list(detector.backbone(torch.rand(1, 3, 64, 64))) == ["0", "1", "2", "3", "pool"]
    assert len(detector.eval()([torch.rand(3, 64, 80)])) == 1


def test_as_torchvision_shares_the_modules_it_is_given() -> None:
    body = build_backbone(BackboneConfig(name="resnet18", norm="bn"))
    detector_backbone = as_torchvision(FeaturePyramid(body))
    freeze_stages(detector_backbone, 2)
    assert freeze_report(body)["c2"].frozen
    assert not freeze_report(body)["c3"].frozen


def test_maps_of_different_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="same channels on every level, got c2, c3, c4, c5 with 64, 128, 256, 512"):
        as_torchvision(build_backbone(BackboneConfig(name="resnet18", norm="bn")))


SINGLE_MAP = {
    "C4, linear head": {"pyramid": None, "backbone": {"out_features": ["c4"]}},
    "C4, C5 as head": {"pyramid": None, "box_head": "c5"},
    "dilated C5": {"pyramid": None, "backbone": {"output_stride": 16}},
    "C5 at stride 8": {"pyramid": None, "backbone": {"output_stride": 8}},
    "pyramid on dilated C5": {"backbone": {"output_stride": 16}},
    "pyramid from C3 on": {"backbone": {"out_features": ["c3", "c4", "c5"]}},
    "pyramid without more levels": {"pyramid": {"extra_levels": "none", "out_channels": 64}},
    "four channels": {"backbone": {"in_channels": 4}},
    "one channel": {"backbone": {"in_channels": 1}},
}


@pytest.mark.parametrize("settings", SINGLE_MAP.values(), ids=SINGLE_MAP)
def test_faster_rcnn_trains_and_detects_on(settings: dict[str, Any]) -> None:
    backbone = {"name": "resnet18", "norm": "bn", **settings.get("backbone", {})}
    model = build("faster_rcnn", **{**settings, "min_size": 96, "backbone": backbone})
    _let_through(model)
    images = [torch.rand(backbone.get("in_channels", 3), 91, 70)]
    losses = model(images, [{"boxes": torch.tensor([[8.0, 8, 60, 50]]), "labels": torch.tensor([1])}])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())  # type: ignore[union-attr]
    detections = model.eval()(images)[0]
    assert detections["boxes"].shape[1:] == (4,)


def test_poolers_use_one_map_for_each_stride() -> None:
    model: Any = build("mask_rcnn", backbone={"name": "resnet18", "output_stride": 16})
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pooler.featmap_names == ["0", "1", "3"]  # p4 and p5 both have stride 16; p5 has seen more


def test_anchors_double_from_level_to_level_even_where_strides_do_not() -> None:
    model: Any = build("faster_rcnn", backbone={"name": "resnet18", "output_stride": 16})
    assert [sizes[0] for sizes in model.rpn.anchor_generator.sizes] == [32, 64, 128, 256, 512]


@pytest.mark.parametrize(("output_stride", "rates"), [(16, [6, 12, 18]), (8, [12, 24, 36])])
def test_deeplab_steps_the_same_image_distance_at_any_stride(output_stride: int, rates: list[int]) -> None:
    model: Any = build("deeplabv3", backbone={"name": "resnet18", "output_stride": output_stride})
    convolutions = [branch[0] for branch in list(model.classifier[0].convs)[1:4]]
    assert [convolution.dilation[0] for convolution in convolutions] == rates
    assert model.eval()(torch.rand(1, 3, 49, 65))["out"].shape == (1, NUM_CLASSES, 49, 65)


def test_image_statistics_follow_the_weights() -> None:
    caffe = Preprocessing((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "bgr", (0.0, 255.0))
    mean, std = unit_statistics(caffe, 3)
    image = torch.rand(3, 4, 4)
    expected = image.flip(0) * 255 - torch.tensor(caffe.mean)[:, None, None]
    actual = (image.flip(0) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert relative_error(actual, expected) < 1e-5


def test_images_are_turned_to_bgr_for_weights_that_expect_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def caffe_weights(config: BackboneConfig) -> Any:
        model = build_backbone(config)
        model.preprocessing = Preprocessing((0.0, 0.5, 1.0), (1.0, 1.0, 1.0), "bgr")
        return model

    monkeypatch.setattr("backbone.hosts.torchvision.detectors.build_backbone", caffe_weights)
    model: Any = build("faster_rcnn", backbone={"name": "resnet18"})
    image = torch.rand(3, 4, 4)
    assert torch.equal(model.transform.normalize(image), torch.stack([image[2], image[1] - 0.5, image[0] - 1]))


def test_image_statistics_of_the_recipe_come_first() -> None:
    model: Any = build("fcos", backbone={"name": "resnet18"}, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    image = torch.rand(3, 4, 4)
    assert torch.equal(model.transform.normalize(image), image)


def test_c5_head_needs_c5_to_train() -> None:
    with pytest.raises(ValueError, match="must be 0 to 4 with box_head"):
        build("faster_rcnn", pyramid=None, box_head="c5", backbone={"name": "resnet18", "freeze_at": 5})


@pytest.mark.parametrize("freeze_at", [0, 2])
def test_backbone_and_pyramid_stay_in_bf16_under_autocast(freeze_at: int) -> None:
    model: Any = build("faster_rcnn", backbone={"name": "resnet18", "freeze_at": freeze_at})
    with torch.autocast("cpu", torch.bfloat16):
        images = torch.rand(1, 3, 64, 64)
        body, levels = model.backbone.body(images), model.backbone(images)
    assert {feature.dtype for feature in (*body.values(), *levels.values())} == {torch.bfloat16}


@pytest.mark.usefixtures("pretrained")
def test_half_as_much_is_saved_for_backward_under_autocast_as_torchvision_saves() -> None:
    theirs = resnet_fpn_backbone(
        backbone_name="resnet50", weights=ResNet50_Weights.IMAGENET1K_V1, trainable_layers=3
    ).train()
    ours: Any = build("faster_rcnn", backbone={"norm": "frozen_bn", "freeze_at": 2}).train()
    images = torch.rand(1, 3, 512, 512)
    saved = {}
    for name, model in (("torchvision", theirs), ("ours", ours.backbone)):
        saved[name, "fp32"] = saved_mebibytes(model, images)
        with torch.autocast("cpu", torch.bfloat16):
            saved[name, "bf16"] = saved_mebibytes(model, images)
    print(saved)
    assert saved["ours", "bf16"] < 0.55 * saved["ours", "fp32"]
    assert saved["ours", "bf16"] < 0.55 * saved["torchvision", "bf16"]


def test_detector_is_optimised_for_inference_whole() -> None:
    model = build("faster_rcnn", backbone={"name": "resnet18", "norm": "bn"}).eval()
    images = [torch.rand(3, 96, 96)]
    fast = optimize_for_inference(model)
    with torch.no_grad():
        expected, actual = model(images)[0], fast(images)[0]
    assert relative_error(actual["scores"], expected["scores"]) < RELATIVE_ERROR
