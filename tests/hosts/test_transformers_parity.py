"""transformers with our ResNet, loaded from a checkpoint with its own: outputs, loss and gradients are equal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_norms, relative_error
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("scipy", reason="transformers' losses match boxes by scipy")

from transformers_detectors import DETECTORS, RESNET_18, Detector, images  # noqa: E402

from backbone.hosts.transformers import TransformersBackboneConfig, find_backbone  # noqa: E402
from backbone.hosts.transformers.published import PublishedNames  # noqa: E402

PARITY = {torch.float64: 1e-5, torch.float32: 1e-3}
NOTHING = 1e-9  # of the largest gradient: what is smaller is rounding


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(detector: Detector, folder: Path) -> tuple[Any, Any]:
    """Return the detector with transformers' own ResNet-18, and with ours, loaded from the file of the first."""
    theirs = detector.make(transformers.ResNetConfig(**RESNET_18, out_features=detector.features))
    randomise_norms(theirs)
    theirs.save_pretrained(folder)
    body = TransformersBackboneConfig({"name": "resnet18", "norm": detector.norm}, out_features=detector.features)
    ours, told = detector.model_class.from_pretrained(
        folder, config=detector.make_config(body), output_loading_info=True
    )
    assert {reason: keys for reason, keys in told.items() if keys} == {}
    return theirs, ours


def step(model: Any, detector: Detector) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of one training step."""
    torch.set_default_dtype(detector.loss_dtype)
    model.to(detector.loss_dtype).train()
    torch.manual_seed(1)
    loss = model(images(), **detector.labels()).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_our_names(gradients: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    names = PublishedNames()
    names.scope_prefix, names.base_model_prefix = path, ""
    return {names.rename_source_key(name)[0]: value for name, value in sorted(gradients.items())}


@pytest.mark.parametrize("name", DETECTORS)
def test_outputs_loss_and_gradients_equal_those_with_the_librarys_resnet(name: str, tmp_path: Path) -> None:
    detector = DETECTORS[name]
    theirs, ours = pair(detector, tmp_path)
    path = next(path for path, module in ours.named_modules() if module is find_backbone(ours))
    theirs.get_submodule(path).requires_grad_(True)  # DETR and its kin freeze all of what is called a ResNet
    with torch.no_grad():
        inputs = {key: value for key, value in detector.labels().items() if key.endswith("_inputs")}
        outputs = zip(
            theirs.eval()(images(), **inputs).to_tuple(), ours.eval()(images(), **inputs).to_tuple(), strict=True
        )
        assert max(relative_error(b, a) for a, b in outputs if isinstance(a, Tensor)) < PARITY[torch.float64]
    (their_loss, their_gradients), (our_loss, our_gradients) = step(theirs, detector), step(ours, detector)
    bound = PARITY[detector.loss_dtype]
    assert relative_error(our_loss, their_loss) < bound
    expected = in_our_names(their_gradients, path)
    extra = our_gradients.keys() - expected.keys()  # from_pretrained makes constants of the decoder trainable
    assert (expected.keys() - our_gradients.keys(), {key for key in extra if key.startswith(path)}) == (set(), set())
    assert f"{path}.network.conv1.weight" in expected
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        unit = max(float(gradient.abs().max()), NOTHING * largest / bound)
        assert float((our_gradients[key] - gradient).abs().max()) < bound * unit, key
