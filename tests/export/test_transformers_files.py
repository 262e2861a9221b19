"""transformers' detectors on our backbones as files: predictions only, and what cannot be checked is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backbone.export import export_model

transformers = pytest.importorskip("transformers", reason="pip install 'backbone[transformers]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'backbone[export]'")
pytest.importorskip("onnxscript", reason="pip install 'backbone[export]'")

SMALL = {"num_queries": 20, "d_model": 32, "num_labels": 4, "decoder_layers": 1}


def body(**settings: Any) -> Any:
    from backbone.hosts.transformers import TransformersBackboneConfig

    return TransformersBackboneConfig(backbone={"name": "resnet18", "norm": "frozen_bn"}, **settings)


def test_detr_gives_logits_and_boxes_at_sizes_that_the_export_never_saw(tmp_path: Path) -> None:
    small = {"encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.DetrConfig(backbone_config=body(), **SMALL, **small, **heads)
    model = transformers.DetrForObjectDetection(config).eval()
    report = export_model(model, tmp_path / "detr.onnx")
    assert report.outputs == ("logits", "pred_boxes")
    session = onnxruntime.InferenceSession(tmp_path / "detr.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 130, 97)
    with torch.no_grad():
        expected = model(images)
    for name, actual in zip(report.outputs, session.run(list(report.outputs), {"images": images.numpy()}), strict=True):
        assert np.abs(actual - expected[name].numpy()).max() < 1e-4 * expected[name].abs().max()


def test_queries_in_the_order_of_their_scores_cannot_be_compared_and_are_refused(tmp_path: Path) -> None:
    maps = {"encoder_in_channels": [128, 256, 512], "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
    config = transformers.RTDetrConfig(
        backbone_config=body(out_features=["stage2", "stage3", "stage4"]), **SMALL, **maps
    )
    model = transformers.RTDetrForObjectDetection(config).eval()
    with pytest.raises(ValueError, match="takes its queries by rank") as caught:
        export_model(model, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
