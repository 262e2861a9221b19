"""What several test files share: networks with random statistics, and the error measure of every parity test."""

from pathlib import Path

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


SLOW = {
    "engine/test_compile.py",
    "engine/test_operation.py::test_500_random_sequences_of_mixed_use_equal_the_unfused_reference",
    "engine/test_torch_internals.py",
    "export/test_export_parts.py::test_fixed_shapes_find_what_torchvision_finds",
    "export/test_export_parts.py::test_a_network_that_pads_its_images_is_traced_for_sizes_that_need_it_and_for_those_that_do_not",
    "export/test_files.py",
    "export/test_padding.py::test_networks_that_pad_within_are_traced_for_any_size_in_sizes_that_stay_short",
    "export/test_int8_files.py",
    "export/test_transformers_files.py",
    "extraction/test_hostile.py::test_a_file_that_ends_its_process_costs_itself_alone",
    "extraction/test_hostile.py::test_what_takes_too_long_is_given_up",
    "extraction/test_ray_engine.py",
    "extraction/test_write_features.py::test_memory_does_not_grow_with_the_number_of_photos",
    "extraction/test_write_features.py::test_killed_at_any_point_it_goes_on_to_the_same_bytes",
    "hosts/test_matrix.py",
    "hosts/test_smp.py::test_dilates_as_smp_does",
    "hosts/test_smp.py::test_outputs_and_gradients_equal_those_on_smps_own_encoder",
    "hosts/test_torchvision.py::test_losses_and_gradients_equal_torchvisions_own",
    "hosts/test_transformers_parity.py",
    "hosts/test_transformers_published.py",
    "inference/test_int8.py::test_features_are_those_of_floats",
    "inference/test_int8.py::test_without_plain_weights_a_copy_holds_a_quarter",
    "providers/test_timm.py::test_model_keeps_the_whole_contract",
    "providers/test_timm_fused.py::test_pickled_and_compiled_models_give_the_same",
    "test_docs.py",
    "tools/test_benchmark.py",
    "tools/test_benchmark_transformers.py::test_a_small_run_times_all_that_agree",
    "training/test_malformed_data.py",
    "training/test_run_endings.py",
    "training/test_train.py::test_killed_run_goes_on_to_the_same_bytes",
    "training/test_train.py::test_other_heads_train_and_are_measured",
    "training/test_train.py::test_two_processes_learn_what_one_learns_from_the_doubled_batch",
    "weights/test_inspect.py::test_500_megabytes_load_into_little_more_than_the_file_itself",
    "weights/test_sources.py::test_killed_conversion_leaves_the_old_file_or_the_new_one",
}
"""Tests of seconds each, by file or function: ``make test`` leaves them to ``make test-slow``, and CI runs both."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow."""
    here = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(here).as_posix()
        function = item.nodeid.rpartition("::")[2].partition("[")[0]
        if {file, f"{file}::{function}"} & SLOW:
            item.add_marker("slow")
