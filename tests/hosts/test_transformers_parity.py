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

PARITY = 1e-5
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


def gradients(model: Any, detector: Detector) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss of one training step, and its gradients: the library's own, or the mean square of the outputs."""
    torch.manual_seed(1)
    if detector.in_single:
        outputs = model.train()(images(), **inputs(detector)).to_tuple()
        loss: Any = sum(value.square().mean() for value in outputs if isinstance(value, Tensor) and value.requires_grad)
    else:
        loss = model.train()(images(), **detector.labels()).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def inputs(detector: Detector) -> dict[str, Any]:
    return {key: value for key, value in detector.labels().items() if key.endswith("_inputs")}


def in_our_names(given: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    names = PublishedNames()
    names.scope_prefix, names.base_model_prefix = path, ""
    return {names.rename_source_key(name)[0]: value for name, value in sorted(given.items())}


@pytest.mark.parametrize("name", DETECTORS)
def test_outputs_loss_and_gradients_equal_those_with_the_librarys_resnet(name: str, tmp_path: Path) -> None:
    detector = DETECTORS[name]
    theirs, ours = pair(detector, tmp_path)
    path = next(path for path, module in ours.named_modules() if module is find_backbone(ours))
    theirs.get_submodule(path).requires_grad_(True)  # DETR and its kin freeze all of what is called a ResNet
    with torch.no_grad():
        expected, outputs = (model.eval()(images(), **inputs(detector)).to_tuple() for model in (theirs, ours))
    pairs = zip(outputs, expected, strict=True)
    assert max(relative_error(*maps) for maps in pairs if isinstance(maps[0], Tensor)) < PARITY
    (their_loss, given), (our_loss, found) = gradients(theirs, detector), gradients(ours, detector)
    assert relative_error(our_loss, their_loss) < PARITY
    wanted = in_our_names(given, path)
    extra = found.keys() - wanted.keys()  # from_pretrained makes constants of a decoder trainable
    assert (wanted.keys() - found.keys(), {key for key in extra if key.startswith(path)}) == (set(), set())
    assert f"{path}.network.conv1.weight" in wanted
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for key, gradient in wanted.items():
        unit = max(float(gradient.abs().max()), NOTHING * largest / PARITY)
        assert float((found[key] - gradient).abs().max()) < PARITY * unit, key


@pytest.mark.parametrize("name", [name for name, detector in DETECTORS.items() if detector.in_single])
def test_losses_in_single_precision_are_equal(name: str, tmp_path: Path) -> None:
    detector = DETECTORS[name]
    theirs, ours = pair(detector, tmp_path)
    torch.set_default_dtype(torch.float32)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        losses.append(model.float().train()(images(), **detector.labels()).loss)
    assert relative_error(*losses) < PARITY
