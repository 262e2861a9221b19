"""Checkpoints: what is read, what is refused, and that a refusal changes nothing."""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import ResNet18_Weights
from torchvision.transforms._presets import ImageClassification

from backbone import Backbone, BackboneConfig, Preprocessing, build_backbone, load_weights

State = dict[str, Tensor]
Saver = Callable[[State, Path], None]

# Stem and C2 of ResNet-18: 0.16 M parameters, all that strict loading needs to be seen at work.
SMALL = BackboneConfig(name="resnet18", norm="bn", out_features=("c2",))

FORMATS: dict[str, tuple[str, Saver]] = {
    "pth": (".pth", torch.save),
    "pt": (".pt", torch.save),
    "pth before torch 1.6": (".pth", partial(torch.save, _use_new_zipfile_serialization=False)),
    "safetensors": (".safetensors", save_file),
}
# Share of the file that is left.
TRUNCATIONS = [0.0, 0.001, 0.01, 0.5, 0.999]
NOT_STATE_DICTS: dict[str, tuple[Any, str]] = {
    "a tensor": (torch.ones(2), r"must hold a state dict \(parameter name -> tensor\), got Tensor"),
    "a list": ([torch.ones(2)], "must hold a state dict .*got list"),
    "numbers": ({"conv1.weight": 1.0}, "holds no network that is known here.*got 0 tensors"),
    "keys that are no names": ({1: torch.ones(2)}, r"holds no network that is known here.*got 1 tensors \(1\)"),
    "nothing": ({}, "holds no network that is known here.*got 0 tensors"),
}


class Payload:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def randomised(seed: int = 0, **settings: Any) -> State:
    """Return the state dict of the small network, every tensor drawn at random."""
    state = build_backbone(SMALL.model_copy(update=settings)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else torch.full_like(value, 7)
        for key, value in state.items()
    }


def same(backbone: Backbone, state: State) -> bool:
    own = backbone.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


@pytest.fixture
def network() -> Backbone:
    return build_backbone(SMALL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "resnet18.pth"
    torch.save(randomised(), path)
    return path


@pytest.mark.parametrize(("suffix", "save"), FORMATS.values(), ids=list(FORMATS))
def test_every_parameter_and_buffer_comes_from_the_file(
    network: Backbone, tmp_path: Path, suffix: str, save: Saver
) -> None:
    path = tmp_path / f"weights{suffix}"
    save(randomised(), path)
    load_weights(network, path, name="resnet18")
    assert same(network, randomised())


def test_build_backbone_loads_the_file(checkpoint: Path) -> None:
    assert same(build_backbone(SMALL.model_copy(update={"weights": str(checkpoint)})), randomised())


def test_weights_are_there_when_stages_freeze(checkpoint: Path) -> None:
    frozen = SMALL.model_copy(update={"weights": str(checkpoint), "freeze_at": 2})
    assert same(build_backbone(frozen), randomised())


def test_frozen_norms_take_a_batch_norm_checkpoint(checkpoint: Path) -> None:
    frozen = SMALL.model_copy(update={"weights": str(checkpoint), "norm": "frozen_bn"})
    assert same(build_backbone(frozen), randomised())


def test_weights_silence_the_warning_about_random_frozen_ones(checkpoint: Path) -> None:
    # warnings are errors here
    build_backbone(SMALL.model_copy(update={"weights": str(checkpoint), "norm": "frozen_bn", "freeze_at": 2}))


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_batch_counters_may_be_absent(tmp_path: Path, norm: str) -> None:
    state = {key: value for key, value in randomised().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    model = build_backbone(SMALL.model_copy(update={"weights": str(tmp_path / "old.pth"), "norm": norm}))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("key", ["fc.weight", "fc.bias", "layer3.0.conv1.weight", "layer4.1.bn2.bias"])
def test_parts_left_out_of_the_network_are_skipped(network: Backbone, tmp_path: Path, key: str) -> None:
    torch.save({**randomised(), key: torch.ones(1)}, tmp_path / "more.pth")
    load_weights(network, tmp_path / "more.pth", name="resnet18")
    assert same(network, randomised())


@pytest.mark.parametrize(
    "key", ["fc2.weight", "head.weight", "layer1.2.conv1.weight", "layer30.weight", "module.fc.bias"]
)
def test_key_of_no_known_part_is_refused_by_name(network: Backbone, tmp_path: Path, key: str) -> None:
    torch.save({**randomised(), key: torch.ones(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=rf"1 unexpected \({re.escape(key)}\)"):
        load_weights(network, tmp_path / "more.pth", name="resnet18")


def test_absent_key_is_refused_by_name(network: Backbone, tmp_path: Path) -> None:
    state = randomised()
    del state["layer1.0.bn1.running_var"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"less\.pth: .*1 missing \(layer1\.0\.bn1\.running_var\); 0 unexpected"):
        load_weights(network, tmp_path / "less.pth", name="resnet18")


def test_both_difference_sets_are_in_one_error(network: Backbone, tmp_path: Path) -> None:
    state = randomised()
    state["stem.weight"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match=r"1 missing \(conv1\.weight\); 1 unexpected \(stem\.weight\)"):
        load_weights(network, tmp_path / "renamed.pth", name="resnet18")


def test_other_shape_is_refused_with_both_shapes(network: Backbone, tmp_path: Path) -> None:
    torch.save(randomised(in_channels=1), tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=r"conv1\.weight \(64, 1, 7, 7\) for \(64, 3, 7, 7\)"):
        load_weights(network, tmp_path / "grey.pth", name="resnet18")


def test_checkpoint_of_a_deeper_network_is_refused(network: Backbone, tmp_path: Path) -> None:
    torch.save(randomised(name="resnet34"), tmp_path / "resnet34.pth")
    with pytest.raises(ValueError, match=r"resnet34\.pth: does not fit.*0 missing; 12 unexpected \(layer1\.2\."):
        load_weights(network, tmp_path / "resnet34.pth", name="resnet18")


def test_checkpoint_of_a_shallower_network_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    deeper = build_backbone(SMALL.model_copy(update={"name": "resnet34"}))
    with pytest.raises(ValueError, match=r"resnet18\.pth: does not fit.*10 missing \(layer1\.2\..*; 0 unexpected"):
        load_weights(deeper, checkpoint, name="resnet34")


def test_checkpoint_of_other_blocks_is_refused(network: Backbone, tmp_path: Path) -> None:
    torch.save(randomised(name="resnet50"), tmp_path / "resnet50.pth")
    with pytest.raises(ValueError, match=r"does not fit.*of another shape \(layer1\.0\.conv1\.weight"):
        load_weights(network, tmp_path / "resnet50.pth", name="resnet18")


def test_classifier_must_be_in_the_file_when_it_is_in_the_network(tmp_path: Path) -> None:
    whole = build_backbone(BackboneConfig(name="resnet18", norm="bn", num_classes=5))
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"2 missing \(fc\.weight, fc\.bias\)"):
        load_weights(whole, tmp_path / "headless.pth", name="resnet18")


@pytest.mark.parametrize("share", TRUNCATIONS)
@pytest.mark.parametrize(("suffix", "save"), FORMATS.values(), ids=list(FORMATS))
def test_truncated_checkpoint_is_refused_by_name(
    network: Backbone, tmp_path: Path, suffix: str, save: Saver, share: float
) -> None:
    path = tmp_path / f"cut{suffix}"
    save(randomised(), path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=f"cut{suffix}: "):
        load_weights(network, path, name="resnet18")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_checkpoint_is_told_so(network: Backbone, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    dict(FORMATS.values())[suffix](randomised(), path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="it may be truncated; fetch it again"):
        load_weights(network, path, name="resnet18")


@pytest.mark.parametrize("size", [600, 1000, 3000, 6000])
def test_old_checkpoint_cut_inside_its_pickle_is_refused_by_name(network: Backbone, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.pth"
    torch.save({f"layer{i}": torch.ones(4, 4) for i in range(60)}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r"cut\.pth: "):
        load_weights(network, path, name="resnet18")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_text_in_place_of_a_checkpoint_is_refused_by_name(network: Backbone, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("<html>404 not found</html>" * 20)
    with pytest.raises(ValueError, match=f"page{suffix}: "):
        load_weights(network, path, name="resnet18")


@pytest.mark.parametrize(("content", "received"), NOT_STATE_DICTS.values(), ids=list(NOT_STATE_DICTS))
def test_anything_but_a_state_dict_is_refused(network: Backbone, tmp_path: Path, content: Any, received: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"odd\.pth: {received}"):
        load_weights(network, tmp_path / "odd.pth", name="resnet18")


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_with_code_is_refused(network: Backbone, tmp_path: Path, new_format: bool) -> None:
    torch.save(
        {"conv1.weight": Payload(tmp_path / "ran")}, tmp_path / "x.pth", _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(ValueError, match=r"x\.pth: not a plain checkpoint of tensors; it was refused"):
        load_weights(network, tmp_path / "x.pth", name="resnet18")


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_not_run(network: Backbone, tmp_path: Path, new_format: bool) -> None:
    torch.save(
        {"conv1.weight": Payload(tmp_path / "ran")}, tmp_path / "x.pth", _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(ValueError, match="refused"):
        load_weights(network, tmp_path / "x.pth", name="resnet18")
    assert not (tmp_path / "ran").exists()


def test_that_code_would_have_run_in_an_unsafe_reader(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "x.pth")
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_tensor_larger_than_its_bytes_is_refused_unexpanded(network: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"bn1.running_var": torch.ones(1).expand(2**30)}, path)
    with pytest.raises(ValueError, match=r"bn1.running_var must store all its 4294967296 bytes, got 4;"):
        load_weights(network, path, name="resnet18")


def test_missing_file_is_named(network: Backbone, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_weights(network, tmp_path / "nowhere.pth", name="resnet18")


def test_folder_in_place_of_a_checkpoint_is_named(network: Backbone, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.pth"):
        load_weights(network, tmp_path / "folder.pth", name="resnet18")


def wrong_shape(path: Path) -> None:
    torch.save(randomised(1, in_channels=1), path)


def wrong_depth(path: Path) -> None:
    torch.save(randomised(1, name="resnet34"), path)


def without_data(path: Path) -> None:
    state = randomised(1)
    last = list(state)[-2]
    torch.save({**state, last: state[last].to("meta")}, path)


def cut(path: Path) -> None:
    torch.save(randomised(1), path)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [wrong_shape, wrong_depth, without_data, cut])
def test_refused_checkpoint_leaves_every_byte_as_it_was(
    network: Backbone, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    spoil(tmp_path / "bad.pth")
    with pytest.raises((ValueError, RuntimeError)):
        load_weights(network, tmp_path / "bad.pth", name="resnet18")
    assert same(network, before)


def test_loading_leaves_the_file_as_it_was(network: Backbone, checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    load_weights(network, checkpoint, name="resnet18")
    with torch.no_grad():  # a memory-mapped file must not follow the parameters
        for parameter in network.parameters():
            parameter.zero_()
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("source", ["IMAGENET1K_V3", "IMAGENET1K_V2", "imagenet1k_v1", "weights.onnx", ""])
def test_source_of_no_known_kind_is_told_the_choices(network: Backbone, source: str) -> None:
    rule = (
        f"weights of resnet18 must be one of IMAGENET1K_V1 or a path ending in .pth, .pt, .safetensors, .pkl, .ckpt, "
        f".bin, .tar, got '{source}'"
    )
    with pytest.raises(ValueError, match=re.escape(rule)):
        load_weights(network, source, name="resnet18")


def test_name_unknown_to_torchvision_is_told_that_it_has_no_weights(network: Backbone) -> None:
    with pytest.raises(ValueError, match="weights of my_net must be one of no torchvision names or a path"):
        load_weights(network, "IMAGENET1K_V1", name="my_net")


# torchvision's own download code, from a file:// address into a cache of the test's own.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def publish(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Put weights where torchvision will look for IMAGENET1K_V1 of resnet18; return the file's name."""

    def publish(content: Any, *, digest: str | None = None, mean: tuple[float, ...] = (0.1, 0.2, 0.3)) -> str:
        site = tmp_path / "site"
        site.mkdir()
        torch.save(content, site / "draft")
        digest = digest or hashlib.sha256((site / "draft").read_bytes()).hexdigest()[:8]
        file = (site / "draft").rename(site / f"resnet18-{digest}.pth")
        weights = ResNet18_Weights.IMAGENET1K_V1.value
        monkeypatch.setattr(weights, "url", file.as_uri())
        monkeypatch.setattr(
            weights, "transforms", partial(ImageClassification, crop_size=224, mean=mean, std=(4, 5, 6))
        )
        return file.name

    return publish


def test_torchvision_name_is_downloaded_and_loaded(network: Backbone, publish: Callable[..., str]) -> None:
    publish({**randomised(), "fc.weight": torch.ones(1)})
    load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert same(network, randomised())


@pytest.mark.parametrize("dilate_first_block", [True, False])
def test_classification_weights_fit_either_convention_of_dilation(
    publish: Callable[..., str], dilate_first_block: bool
) -> None:
    settings: dict[str, Any] = {"out_features": ("c5",), "output_stride": 16, "dilate_first_block": dilate_first_block}
    publish(randomised(**settings))
    network = build_backbone(SMALL.model_copy(update=settings))
    load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert same(network, randomised(**settings))


def test_download_stays_in_torchs_cache(network: Backbone, publish: Callable[..., str], cache: Path) -> None:
    name = publish(randomised())
    load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert [path.name for path in cache.iterdir()] == [name]


def test_cached_download_needs_no_network(network: Backbone, publish: Callable[..., str], tmp_path: Path) -> None:
    name = publish(randomised())
    load_weights(build_backbone(SMALL), "IMAGENET1K_V1", name="resnet18")
    (tmp_path / "site" / name).unlink()
    load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert same(network, randomised())


def test_download_shows_progress(
    network: Backbone, publish: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    publish(randomised())
    load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert "100%" in capfd.readouterr().err


def test_wrong_hash_is_refused(network: Backbone, publish: Callable[..., str]) -> None:
    publish(randomised(), digest="0" * 8)
    with pytest.raises(ValueError, match=r"(?i)IMAGENET1K_V1.*hash"):
        load_weights(network, "IMAGENET1K_V1", name="resnet18")


def test_download_of_a_wrong_hash_leaves_no_file(network: Backbone, publish: Callable[..., str], cache: Path) -> None:
    publish(randomised(), digest="0" * 8)
    with pytest.raises((ValueError, RuntimeError), match="hash"):
        load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert list(cache.iterdir()) == []


def test_code_in_a_downloaded_pickle_is_not_run(network: Backbone, publish: Callable[..., str], tmp_path: Path) -> None:
    publish({"conv1.weight": Payload(tmp_path / "ran")})
    with suppress(Exception):  # which error it is, is the next test's claim
        load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert not (tmp_path / "ran").exists()


def test_downloaded_pickle_with_code_is_refused(network: Backbone, publish: Callable[..., str], tmp_path: Path) -> None:
    publish({"conv1.weight": Payload(tmp_path / "ran")})
    with pytest.raises(ValueError, match="not a plain checkpoint of tensors"):
        load_weights(network, "IMAGENET1K_V1", name="resnet18")


def test_damaged_file_in_the_cache_is_refused_by_name(
    network: Backbone, publish: Callable[..., str], cache: Path
) -> None:
    name = publish(randomised())
    load_weights(build_backbone(SMALL), "IMAGENET1K_V1", name="resnet18")
    os.truncate(cache / name, 5000)
    with pytest.raises(ValueError, match=re.escape(name)):  # the one to delete
        load_weights(network, "IMAGENET1K_V1", name="resnet18")


def test_failed_download_names_the_weights(network: Backbone, publish: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "site" / publish(randomised())).unlink()
    with pytest.raises(OSError, match="IMAGENET1K_V1"):
        load_weights(network, "IMAGENET1K_V1", name="resnet18")


def test_preprocessing_travels_with_torchvision_weights(network: Backbone, publish: Callable[..., str]) -> None:
    publish(randomised())
    load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert network.preprocessing == Preprocessing(mean=(0.1, 0.2, 0.3), std=(4, 5, 6), channel_order="rgb")


def test_real_torchvision_weights_expect_imagenet_statistics(network: Backbone) -> None:
    transforms = ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert (Preprocessing().mean, Preprocessing().std) == (tuple(transforms.mean), tuple(transforms.std))


def test_preprocessing_of_earlier_weights_does_not_linger(
    network: Backbone, publish: Callable[..., str], checkpoint: Path
) -> None:
    publish(randomised())
    load_weights(network, "IMAGENET1K_V1", name="resnet18")
    load_weights(network, checkpoint, name="resnet18")
    assert network.preprocessing == Preprocessing()


def test_refused_weights_leave_the_preprocessing_as_it_was(network: Backbone, publish: Callable[..., str]) -> None:
    publish({"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(network, "IMAGENET1K_V1", name="resnet18")
    assert network.preprocessing == Preprocessing()
