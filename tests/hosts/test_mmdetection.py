# ruff: noqa: E402 - mmdet imports only where something stands in for what mmcv compiles
"""mmdetection's detectors on our backbones equal those on its own ResNet; its arguments mean what they mean there.

mmcv compiles on few machines; these run on mmcv-lite, in an environment of their own (docs/mmdetection.md says how).
"""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_norms, relative_error
from torch import Tensor, nn

mmdet: Any = pytest.importorskip("mmdet", reason="mmdet is in an environment of its own: docs/mmdetection.md")

import mmdetection_stand_in

mmdetection_stand_in.stand_in()
import numpy as np
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import PolygonMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint
from mmengine.structures import InstanceData

from backbone import freeze_report, freeze_stages, optimize_for_inference
from backbone.hosts.mmdetection import PluginBackbone

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
BASES = {
    "retinanet": "_base_/models/retinanet_r50_fpn.py",
    "fcos-caffe": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "faster-rcnn": "_base_/models/faster-rcnn_r50_fpn.py",
    "faster-rcnn-caffe": "faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py",
    "faster-rcnn-caffe-dc5": "_base_/models/faster-rcnn_r50-caffe-dc5.py",
    "cascade-rcnn": "_base_/models/cascade-rcnn_r50_fpn.py",
    "mask-rcnn": "_base_/models/mask-rcnn_r50_fpn.py",
}
HEIGHT, WIDTH = 64, 96
RESNET: dict[str, Any] = {"type": "ResNet", "depth": 50, "norm_cfg": {"type": "BN", "requires_grad": True}}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint"),  # mmdet leaves use_reentrant to torch
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),  # mmdet does not name the indexing
    pytest.mark.filterwarnings("ignore:.*numpy.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _default_scope() -> None:
    init_default_scope("mmdet")


def base(name: str) -> Any:
    model = Config.fromfile(CONFIGS / BASES[name]).model
    model.backbone.init_cfg = None  # nothing is fetched
    mmdetection_stand_in.with_torchvisions_roi_align(model)
    make_small(model)
    return model


def make_small(settings: Any) -> None:
    """Fewer proposals, a narrow box head, and boxes of any score; the same for both detectors of a pair."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            small = {"fc_out_channels": 32, "nms_pre": 100, "max_per_img": 20, "score_thr": 0.0}
            if key in small:
                settings[key] = small[key]
            elif key == "num" and settings.get("type") == "RandomSampler":
                settings[key] = 32
            make_small(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            make_small(value)


def build(**settings: Any) -> Any:
    return MODELS.build({"type": "PluginBackbone", **settings})


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Return the detector of a base config on mmdet's ResNet, and the same on ours with the same weights."""
    settings = base(name)
    theirs = MODELS.build(copy.deepcopy(settings))
    settings.backbone.type = "PluginBackbone"
    ours = MODELS.build(settings)
    randomise_norms(theirs.backbone)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch() -> tuple[Tensor, list[DetDataSample]]:
    samples = []
    for corner in (8, 20):
        sample = DetDataSample()
        shape = (HEIGHT, WIDTH)
        sample.set_metainfo(
            {
                "img_shape": shape,
                "ori_shape": shape,
                "pad_shape": shape,
                "batch_input_shape": shape,
                "scale_factor": (1.0, 1.0),
            }
        )
        box = [corner, corner, corner + 32, corner + 28]
        x0, y0, x1, y1 = box
        outline = [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([box], dtype=torch.float32),
            labels=torch.tensor([3]),
            masks=PolygonMasks([outline], HEIGHT, WIDTH),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return torch.randn(2, 3, HEIGHT, WIDTH), samples


def losses(model: nn.Module, images: Tensor, samples: list[DetDataSample]) -> dict[str, Tensor]:
    torch.manual_seed(1)  # proposals and boxes are sampled
    found = model.train()(images, copy.deepcopy(samples), mode="loss")
    return {
        key: torch.stack(value).sum() if isinstance(value, list) else value.sum()
        for key, value in found.items()
        if "loss" in key
    }


@pytest.mark.parametrize("name", BASES)
def test_losses_gradients_and_predictions_equal_those_on_mmdets_own_resnet(name: str) -> None:
    theirs, ours = pair(name)
    images, samples = batch()
    expected, actual = losses(theirs, images, samples), losses(ours, images, samples)
    assert list(actual) == list(expected)
    for key, loss in expected.items():
        assert torch.allclose(actual[key], loss, rtol=1e-4, atol=1e-6), key
    for found in (expected, actual):
        torch.stack(list(found.values())).sum().backward()  # type: ignore[no-untyped-call]
    wanted = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    given: dict[str, Any] = {
        key.replace("backbone.network.", "backbone."): p.grad for key, p in ours.named_parameters()
    }
    assert set(wanted) == {key for key, grad in given.items() if grad is not None}
    first = next(key for key in wanted if key.startswith("backbone."))
    assert relative_error(given[first], wanted[first]) < 1e-3
    for model in (theirs, ours):
        model.eval()
    with torch.no_grad():
        their_boxes = theirs(images, copy.deepcopy(samples), mode="predict")
        our_boxes = ours(images, copy.deepcopy(samples), mode="predict")
    for a, b in zip(their_boxes, our_boxes, strict=True):
        assert len(a.pred_instances) > 0
        assert torch.equal(a.pred_instances.labels, b.pred_instances.labels)
        assert torch.allclose(a.pred_instances.bboxes, b.pred_instances.bboxes, atol=1e-2)
        assert torch.allclose(a.pred_instances.scores, b.pred_instances.scores, atol=1e-4)


NETWORKS: list[dict[str, Any]] = [
    {"depth": 18},
    {"depth": 50},
    {"depth": 50, "style": "caffe", "norm_cfg": {"type": "BN", "requires_grad": False}},
    {"depth": 50, "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
    {"depth": 50, "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
    {"depth": 50, "strides": (1, 2, 2, 1)},
    {"depth": 50, "dilations": (1, 1, 1, 3)},
    {"depth": 50, "num_stages": 3, "strides": (1, 2, 1), "dilations": (1, 1, 2), "out_indices": (0, 1, 2)},
    {"depth": 18, "num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (2,)},
    {"depth": 18, "out_indices": (0, 2)},
    {"depth": 18, "norm_eval": False},
    {"depth": 18, "norm_cfg": {"type": "GN", "num_groups": 32}},
    {"depth": 18, "in_channels": 4},
    {"depth": 50, "with_cp": True},
    {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4},
]


@pytest.mark.parametrize("settings", NETWORKS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_maps_equal_mmdets_with_the_same_arguments(settings: dict[str, Any], training: bool) -> None:
    theirs = MODELS.build({**RESNET, **settings})
    ours = build(**{key: value for key, value in settings.items() if key != "type"})
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs.train(training), ours.train(training)
    images = torch.randn(2, settings.get("in_channels", 3), 64, 64)
    expected, actual = theirs(images), ours(images)
    assert isinstance(actual, tuple)
    assert [relative_error(a, b) < 1e-5 for a, b in zip(actual, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("norm_eval", [True, False])
@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 2, 3, 4])
def test_frozen_stages_freezes_what_it_freezes_there(frozen_stages: int, norm_eval: bool) -> None:
    theirs = MODELS.build({**RESNET, "depth": 18, "frozen_stages": frozen_stages, "norm_eval": norm_eval})
    ours = build(depth=18, frozen_stages=frozen_stages, norm_eval=norm_eval)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    moved = []
    for model in (theirs, ours):
        before = copy.deepcopy(model.state_dict())
        model.train()
        loss = torch.stack([map_.square().mean() for map_ in model(images)]).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        moved.append({key for key, value in model.state_dict().items() if not torch.equal(value, before[key])})
    assert moved[1] == moved[0]
    assert sum(report.frozen for report in freeze_report(ours).values()) == frozen_stages + 1


def test_scripts_find_the_stages_where_mmdets_are() -> None:
    ours = build(depth=18)
    assert ours.layer1 is ours.network.layer1


def test_freeze_stages_takes_it() -> None:
    ours = build(depth=18, frozen_stages=1)
    freeze_stages(ours, 0)
    assert all(parameter.requires_grad for parameter in ours.parameters())


TRANSLATED: list[tuple[dict[str, Any], dict[str, object]]] = [
    ({"depth": 50}, {"name": "resnet50", "norm": "bn_eval", "freeze_at": 0}),
    ({"name": "resnet50", "frozen_stages": 1}, {"freeze_at": 2}),
    ({"name": "resnet50", "freeze_at": 2}, {"freeze_at": 2}),
    ({"depth": 50, "out_indices": (3, 1)}, {"out_features": ("c3", "c5")}),
    ({"depth": 50, "num_stages": 3}, {"out_features": ("c2", "c3", "c4")}),
    ({"name": "resnet50", "out_features": ["c1", "c5"]}, {"out_features": ("c1", "c5")}),
    ({"depth": 50, "style": "caffe"}, {"stride_in_1x1": True}),
    ({"depth": 50, "norm_eval": False}, {"norm": "bn"}),
    ({"depth": 50, "norm_cfg": {"type": "SyncBN"}, "norm_eval": False}, {"norm": "sync_bn"}),
    ({"depth": 50, "norm_cfg": {"type": "BN", "requires_grad": False}}, {"norm": "frozen_bn"}),
    ({"name": "resnet50", "norm": "frozen_bn"}, {"norm": "frozen_bn"}),
    ({"name": "resnet50", "output_stride": 16}, {"output_stride": 16, "dilate_first_block": True}),
    ({"depth": 50, "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}, {"output_stride": 16, "dilations": None}),
    ({"depth": 50, "dilations": (1, 1, 1, 3)}, {"output_stride": 32, "dilations": (1, 1, 1, 3)}),
    ({"name": "resnet50", "output_stride": 16, "multi_grid": (1, 2, 4)}, {"multi_grid": (1, 2, 4)}),
    ({"depth": 50, "with_cp": True, "num_stages": 3}, {"checkpoint_stages": ("c2", "c3", "c4")}),
    ({"depth": 50}, {"zero_init_residual": False}),
    ({"depth": 50, "norm_eval": False}, {"zero_init_residual": True}),
]


@pytest.mark.parametrize(("settings", "expected"), TRANSLATED, ids=str)
def test_each_argument_is_translated_and_shown(settings: dict[str, Any], expected: dict[str, object]) -> None:
    ours = build(**settings)
    assert {key: getattr(ours.config, key) for key in expected} == expected
    usual = {key: field.default for key, field in type(ours.config).model_fields.items()}
    for key, value in expected.items():
        assert key == "name" or value == usual[key] or f"{key}={value!r}" in repr(ours)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "name must say which backbone"),
    ({"depth": 26}, "depth must be 18, 34, 50, 101 or 152"),
    ({"name": "resnet50", "depth": 50}, "name and depth say the same thing"),
    ({"depth": 50, "freeze_at": 2, "frozen_stages": 1}, "freeze_at and frozen_stages say the same thing"),
    ({"depth": 50, "norm": "bn", "norm_eval": True}, "norm and norm_eval say the same thing"),
    ({"depth": 50, "frozen_stages": 5}, "frozen_stages must be -1"),
    ({"depth": 50, "out_indices": (4,)}, "out_indices must be 0 to num_stages - 1"),
    ({"depth": 50, "num_stages": 2, "out_indices": (2,)}, "out_indices must be 0 to num_stages - 1"),
    ({"depth": 50, "style": "tensorflow"}, "style must be pytorch"),
    ({"depth": 50, "norm_cfg": {"type": "IN"}}, "norm_cfg must have a type"),
    ({"depth": 50, "norm_cfg": {"type": "BN", "eps": 1e-3}}, "norm_cfg must have a type"),
    ({"depth": 50, "norm_cfg": {"type": "BN", "requires_grad": False}, "norm_eval": False}, "needs a batch norm"),
    ({"depth": 50, "strides": (1, 1, 2, 2)}, "strides must be"),
    ({"depth": 50, "strides": (1, 2, 2, 1), "output_stride": 16}, "strides and output_stride say the same thing"),
    ({"depth": 18, "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}, "the first convolution of its blocks alone"),
    (
        {"depth": 50, "weights": "a.pth", "init_cfg": {"type": "Pretrained", "checkpoint": "b.pth"}},
        "say the same thing",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PluginBackbone(**settings)


def test_init_cfg_of_type_pretrained_loads_when_weights_are_initialised(tmp_path: Path) -> None:
    theirs = MODELS.build({**RESNET, "depth": 18})
    randomise_norms(theirs)
    torch.save(theirs.state_dict(), tmp_path / "own.pth")
    ours = build(depth=18, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "own.pth")})
    assert not torch.equal(ours.state_dict()["conv1.weight"], theirs.conv1.weight)
    ours.init_weights()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    assert "init_cfg={'type': 'Pretrained'" in repr(ours)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_mmengines_addresses_load_strictly(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = MODELS.build({**RESNET, "depth": 18})
    randomise_norms(theirs)
    content = {"state_dict": {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}}
    content["state_dict"] |= {"head.fc.weight": torch.ones(2)} if prefix else {"fc.weight": torch.ones(2)}
    monkeypatch.setattr("mmengine.runner.CheckpointLoader.load_checkpoint", lambda *_, **__: content)
    cfg = {"type": "Pretrained", "checkpoint": "torchvision://resnet18"}
    ours = build(depth=18, init_cfg=cfg)
    ours.init_weights()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    with pytest.raises(ValueError, match="torchvision://resnet18: does not fit resnet34: missing"):
        build(depth=34, init_cfg=cfg).init_weights()


def test_init_weights_of_a_whole_detector_leaves_what_was_loaded(tmp_path: Path) -> None:
    source = MODELS.build({**RESNET, "depth": 50})
    randomise_norms(source)
    torch.save(source.state_dict(), tmp_path / "own.pth")
    settings = base("retinanet")
    settings.backbone.update(type="PluginBackbone", weights=str(tmp_path / "own.pth"))
    settings.backbone.pop("init_cfg")
    detector = MODELS.build(settings)
    detector.init_weights()
    detector.backbone.init_weights()
    state = detector.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())


def test_modules_of_another_library_are_not_initialised_anew() -> None:
    ours = build(name="timm/vit_tiny_patch16_224", norm="bn")
    before = copy.deepcopy(ours.state_dict())
    ours.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_other_init_cfgs_do_what_they_say() -> None:
    ours = build(depth=18, init_cfg={"type": "Constant", "layer": "Conv2d", "val": 0.5})
    ours.init_weights()
    assert float(ours.network.conv1.weight.detach().mean()) == 0.5


@pytest.mark.parametrize("direction", ["in", "out"])
def test_checkpoints_of_detectors_go_in_and_out(direction: str, tmp_path: Path) -> None:
    theirs, ours = pair("retinanet")
    source, target = (theirs, ours) if direction == "in" else (ours, theirs)
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    save_checkpoint({"state_dict": source.state_dict(), "meta": {}}, str(tmp_path / "detector.pth"))
    load_checkpoint(target, str(tmp_path / "detector.pth"), strict=True)
    state = target.state_dict()
    assert list(state) == list(source.state_dict())
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())


def test_runner_ema_hook_and_resume_work(tmp_path: Path) -> None:
    code = Path(__file__).with_name("mmdetection_run.py")
    environment = {
        "PYTHONPATH": f"{Path(__file__).parents[2]}",
        "OMP_NUM_THREADS": "1",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # mmengine 0.10 keeps its logs as objects in its checkpoints
    }
    done = subprocess.run(
        [sys.executable, code, tmp_path], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("resumed at 2, EMA apart from the weights: True")


def test_a_whole_detector_is_optimised_for_inference() -> None:
    _, ours = pair("retinanet")
    images, _ = batch()
    fast = optimize_for_inference(ours.eval())
    assert fast.optimization.folded >= 53  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for a, b in zip(fast.backbone(images), ours.backbone(images), strict=True):  # type: ignore[operator]
            assert relative_error(a, b) < 1e-4


@pytest.mark.filterwarnings("ignore:cuda_graphs=True needs a CUDA device")
@torch.no_grad()
def test_the_backbone_computes_in_bfloat16_and_neck_and_head_in_float() -> None:
    ours: Any = pair("retinanet")[1]
    images, samples = batch()
    fast: Any = optimize_for_inference(ours.eval(), dtype=torch.bfloat16, cuda_graphs=True)
    assert {parameter.dtype for parameter in fast.backbone.parameters()} == {torch.bfloat16}
    others = (fast.neck, fast.bbox_head)
    assert {parameter.dtype for part in others for parameter in part.parameters()} == {torch.float32}
    assert fast.optimization.dtype == torch.bfloat16
    for actual, expected in zip(fast.backbone(images), ours.backbone(images), strict=True):
        assert actual.dtype == torch.float32
        assert 1e-5 < relative_error(actual, expected) < 3e-2
    assert len(fast(images, samples, mode="predict")) == 2


@pytest.mark.parametrize("name", ["timm/convnext_atto", "timm/regnetx_002"])
def test_other_backbones_train_and_predict_in_a_detector(name: str) -> None:
    settings = base("retinanet")
    settings.backbone = {"type": "PluginBackbone", "name": name, "norm": "bn", "frozen_stages": 1}
    probe = MODELS.build(copy.deepcopy(settings.backbone))
    settings.neck.in_channels = [spec.channels for spec in probe.feature_specs.values()]
    model = MODELS.build(settings)
    images, samples = batch()
    torch.stack(list(losses(model, images, samples).values())).sum().backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None for p in model.backbone.parameters())
    with torch.no_grad():
        assert len(model.eval()(images, samples, mode="predict")) == 2


def test_the_code_of_its_page_runs() -> None:
    page: dict[str, Any] = {}
    text = (Path(__file__).parents[2] / "docs" / "mmdetection.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, page)
    assert page["model"] == {"backbone": {"type": "PluginBackbone"}}
    assert [map_.shape[1] for map_ in page["maps"]] == page["channels"]


def test_a_config_file_of_its_page_builds_a_detector(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "mmdetection.md").read_text()
    (tmp_path / "config.py").write_text(next(iter(re.findall(r"```python\n(.*?)```", text, flags=re.S))))
    settings = Config.fromfile(tmp_path / "config.py").model
    settings.backbone.init_cfg = None
    assert settings.backbone.type == "PluginBackbone"
    backbone = MODELS.build(settings).backbone
    assert (backbone.config.name, backbone.config.norm, backbone.config.freeze_at) == ("resnet50", "bn_eval", 2)
