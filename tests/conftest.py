"""What several test files share: networks with random statistics, and the error measure of every parity test."""

import pytest
import torch
from torch import Tensor, nn

from backbone import Backbone, BackboneConfig, build_backbone

torch.set_num_threads(1)  # the test processes share the cores; threads waiting for each other would be slower


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str = "resnet18", **settings: object) -> Backbone:
    """Build with trainable norms unless told otherwise."""
    return build_backbone(BackboneConfig.model_validate({"name": name, "norm": "bn", **settings}))


def randomise_norms(model: nn.Module) -> None:
    """Give every batch norm statistics and affine parameters as uneven as trained ones."""
    for module in model.modules():
        if hasattr(module, "running_var"):
            with torch.no_grad():
                module.weight.uniform_(0.3, 1.2)  # type: ignore[operator]
                module.bias.normal_(0, 0.2)  # type: ignore[operator]
                module.running_mean.normal_(0, 0.3)  # type: ignore[operator]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[operator]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def saved_mebibytes(model: nn.Module, images: Tensor) -> float:
    """Return the MiB that one forward pass keeps for backward, parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model(images)  # kept alive until all is counted: an address must not be used twice
    del features
    return sum(saved.values()) / 2**20
