"""A backbone, pyramid or detector in a folder: config.json and model.safetensors, as huggingface_hub names them.

config.json says what to build, and what the weights do not show: what is frozen, each norm's eps, the preprocessing.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Unpack

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backbone.builder import construct
from backbone.config import BackboneConfig
from backbone.features import Backbone, HubOptions, Preprocessing, find_backbone
from backbone.freeze import freeze_stages
from backbone.norm import FrozenBatchNorm2d, freeze_norms, thaw_norms
from backbone.providers.hub import require_reachable
from backbone.recipe import DetectorConfig
from backbone.stages import STAGE_NAMES
from backbone.weights.metadata import HEADER_KEY, Metadata
from backbone.weights.writing import write_atomically

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
_FORMAT: Final = "backbone 1"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write ``model`` into ``folder`` so that ``from_pretrained`` gives an equal one anywhere.

    Args:
        model: What ``build_backbone`` or ``build_detector`` returned, or a ``FeaturePyramid`` on a backbone.
        folder: Made if it is not there; its config.json and model.safetensors are replaced.

    Returns:
        The folder.

    Raises:
        ValueError: If ``model`` cannot be built from a config: it was made by hand, changed, or optimised.
        OSError: If the folder cannot be written.
    """
    request = _request(model)
    backbone = find_backbone(model)
    state = {"format": _FORMAT, **request, "preprocessing": _pixels(backbone), "state": _state(model, backbone)}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = _own_memory(model.state_dict())
    facts = Metadata("saved by save_pretrained", known=True, preprocessing=backbone.preprocessing)
    header = {"format": "pt", HEADER_KEY: facts.to_json()}
    write_atomically(target / WEIGHTS, lambda path: save_file(tensors, path, metadata=header))
    text = json.dumps(state, indent=2) + "\n"
    write_atomically(target / CONFIG, lambda path: _write(path, text))
    return target


def from_pretrained(source: str | os.PathLike[str], **options: Unpack[HubOptions]) -> nn.Module:
    """Return, in evaluation mode, what ``save_pretrained`` wrote: weights, freeze state and preprocessing as they were.

    Args:
        source: A folder, or an id on huggingface.co such as ``org/name``, which needs huggingface_hub.
        options: For an id: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Raises:
        FileNotFoundError: If the folder, or one of the two files in it, does not exist.
        OSError: If the download fails.
        ImportError: If an id is given and huggingface_hub is not installed.
        UnknownBackboneError: If no backbone is registered under the name, such as that of a plugin.
        ValueError: If the files are not what ``save_pretrained`` writes, or do not fit together.
    """
    config_file, weights_file = _files(source, options)
    saved = _read(config_file)
    model = _built(saved, config_file)
    try:
        with safe_open(weights_file, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(f"{weights_file}: cannot be read, it may be truncated; fetch it again. ({error})") from None
    own = model.state_dict(keep_vars=True)
    differing = sorted(own.keys() ^ tensors.keys()) + [
        k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape
    ]
    if differing:
        raise ValueError(
            f"{weights_file}: must fit the network of its {CONFIG}, got {len(differing)} tensors that differ, such as "
            f"{differing[0]}; keep the two files together as save_pretrained wrote them"
        )
    for key, tensor in own.items():
        if tensor.dtype != tensors[key].dtype:
            tensor.data = tensor.data.to(tensors[key].dtype)
    model.load_state_dict(tensors)
    backbone = find_backbone(model)
    if saved["preprocessing"] is not None:
        backbone.preprocessing = _read_pixels(saved["preprocessing"])
    _restore(model, backbone, saved["state"])
    return model.eval()


def _request(model: nn.Module) -> dict[str, Any]:
    """Return what to build, as JSON takes it."""
    if hasattr(model, "optimization"):
        raise ValueError("an optimised copy cannot be saved, got one; save the model that it was made from")
    config = getattr(model, "config", None)
    if isinstance(config, DetectorConfig):
        _require_plain_pyramid(model)
        _require_named(find_backbone(model))
        return {"kind": "detector", "config": config.model_dump(mode="json")}
    if not isinstance(model, Backbone):
        raise ValueError(
            f"save_pretrained takes a backbone, a FeaturePyramid or a detector of build_detector, got "
            f"{type(model).__name__}; build it so, or save the backbone inside: find_backbone(model)"
        )
    settings = getattr(model, "settings", None)
    if model.adopted is None:
        return {"kind": "backbone", "config": _require_named(model)}
    if settings is None or model.adopted.adopted is not None:
        raise ValueError(
            f"save_pretrained takes a backbone or a FeaturePyramid, got a {type(model).__name__} around one; save what "
            f"is inside"
        )
    if not isinstance(settings["norm"], str | None):
        raise ValueError(
            f"a pyramid's norm must be a name to be saved, got {settings['norm']!r}; give norm='gn' or alike"
        )
    return {"kind": "pyramid", "config": _require_named(model), "pyramid": dict(settings)}


def _require_named(backbone: Backbone) -> dict[str, Any]:
    if backbone.config is None:
        raise ValueError(
            f"a backbone must come from build_backbone to be saved, got a {type(backbone).__name__} made by hand; "
            f"register its constructor and build it by name"
        )
    return backbone.config.model_dump(mode="json")


def _require_plain_pyramid(detector: nn.Module) -> None:
    settings = getattr(getattr(detector, "backbone", None), "pyramid_settings", None)
    if settings is not None and (settings["norm"] is not None or settings["average"]):
        raise ValueError(
            "a detector's pyramid must have no norm and no average to be saved, got one with; save the FeaturePyramid"
        )


def _pixels(backbone: Backbone) -> dict[str, Any] | None:
    known = backbone.known_preprocessing
    return None if known is None else asdict(known)


def _read_pixels(fields: Mapping[str, Any]) -> Preprocessing:
    tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Preprocessing(**tuples)


def _state(model: nn.Module, backbone: Backbone) -> dict[str, Any]:
    """Return what neither config nor weights show."""
    norms = {path: module for path, module in model.named_modules() if hasattr(module, "running_var")}
    return {
        "frozen_stages": _frozen_stages(backbone),
        "frozen_norms": [path for path, norm in norms.items() if isinstance(norm, FrozenBatchNorm2d)],
        "eps": {path: float(norm.eps) for path, norm in norms.items()},
        "untrained": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }


def _frozen_stages(backbone: Backbone) -> int:
    """Return how many stages ``freeze_stages`` left frozen."""
    stages = backbone.stages
    frozen = [
        name
        for name in STAGE_NAMES
        if name in stages
        and all(getattr(module, "is_frozen", True) for module in _modules(backbone, name))
        and any(getattr(module, "is_frozen", False) for module in _modules(backbone, name))
    ]
    return max((STAGE_NAMES.index(name) + 1 for name in frozen), default=0)


def _modules(backbone: Backbone, stage: str) -> list[nn.Module]:
    return [backbone.get_submodule(path) for path in backbone.stage_modules[stage]]


def _restore(model: nn.Module, backbone: Backbone, state: Mapping[str, Any]) -> None:
    """Bring ``model`` into the state that ``_state`` described."""
    freeze_stages(backbone, state["frozen_stages"])
    frozen = set(state["frozen_norms"])
    for path, norm in list(model.named_modules()):
        if isinstance(norm, FrozenBatchNorm2d) and path not in frozen:
            _put(model, path, thaw_norms(norm))
        elif path in frozen and not isinstance(norm, FrozenBatchNorm2d):
            _put(model, path, freeze_norms(norm))
    for path, eps in state["eps"].items():
        model.get_submodule(path).eps = eps
    untrained = set(state["untrained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in untrained)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    if model.get_submodule(path) is not module:
        model.set_submodule(path, module)


def _own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, no two of them sharing memory, as safetensors wants them."""
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _built(saved: Mapping[str, Any], source: Path) -> nn.Module:
    """Return the network that ``saved`` asks for, without weights."""
    kind, config = saved["kind"], {**saved["config"]}
    if kind == "detector":
        from backbone.hosts.torchvision import build_detector

        config["backbone"] = _bare(config["backbone"])
        config["train"] = _without_json_keys(config["train"])
        detector = build_detector(DetectorConfig.model_validate(config))
        detector.config = DetectorConfig.model_validate({**saved["config"], "train": config["train"]})  # type: ignore[assignment]
        return detector
    model = construct(BackboneConfig.model_validate(_bare(config)))
    model.config = BackboneConfig.model_validate(config)
    if kind == "backbone":
        return model
    if kind == "pyramid":
        from backbone.pyramid import FeaturePyramid

        return FeaturePyramid(model, **saved["pyramid"])
    raise ValueError(f"{source}: its kind must be backbone, pyramid or detector, got {kind!r}")


def _bare(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a backbone's config without what comes from the files: weights and what adapts them, frozen stages."""
    return {**config, "weights": None, "stem_channels_from": None, "freeze_at": 0}


def _without_json_keys(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a training, epochs being numbers again: JSON has words for keys."""
    schedule = train.get("freeze_schedule")
    return {**train, "freeze_schedule": schedule and {int(epoch): value for epoch, value in schedule.items()}}


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        saved = None
    wanted = {"format", "kind", "config", "preprocessing", "state"}
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT or not wanted <= saved.keys():
        found = saved.get("format", saved.get("model_type", "no format")) if isinstance(saved, dict) else "no JSON"
        raise ValueError(
            f"{path}: must be what save_pretrained writes, format {_FORMAT!r}, got {found!r}; load other weights by "
            f"build_backbone(name, weights=...)"
        )
    return saved


def _files(source: str | os.PathLike[str], options: HubOptions) -> tuple[Path, Path]:
    """Return the paths of config and weights, fetched if need be."""
    folder, text = Path(source), os.fspath(source)
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} must hold {CONFIG} and {WEIGHTS} of save_pretrained, got no {name}")
        return folder / CONFIG, folder / WEIGHTS
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise FileNotFoundError(
            f"from_pretrained takes an existing folder or an id such as org/name, got {text!r}; check the path"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{text!r} is no folder, and an id on huggingface.co needs huggingface_hub: pip install 'backbone[hub]'",
            name="huggingface_hub",
        ) from None
    settings: dict[str, Any] = dict(options)
    if not options.get("local_files_only") and options.get("cache_dir") is None:
        require_reachable(text, [WEIGHTS], revision=options.get("revision"))
    try:
        config, weights = (Path(hf_hub_download(text, name, **settings)) for name in (CONFIG, WEIGHTS))
    except Exception as error:  # its own errors are of many kinds, HTTP clients' among them
        reason = " ".join(str(error).split())
        raise OSError(f"{text!r}: is no folder here, and cannot be downloaded: {reason}") from None
    return config, weights
