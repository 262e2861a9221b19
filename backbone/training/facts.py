"""What trained weights need beside their tensors, so that a finished run stands alone: it travels in their metadata."""

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from backbone.features import Backbone, Preprocessing
from backbone.hosts.torchvision import build_detector, expect_images, unit_statistics
from backbone.recipe import DetectorConfig, load_detector_config
from backbone.training.callbacks import load_checkpoint
from backbone.weights.metadata import HEADER_KEY, Metadata

RUN_KEY: Final = "backbone_run"
"""Where model.pth and last.ckpt carry these facts, as JSON."""
_DETECTOR_PREFIX: Final = "detector."  # of the parameters in Lightning's checkpoints


@dataclass(frozen=True)
class RunFacts:
    """Of one training run.

    Attributes:
        class_names: By label.
        labels: Label of each category id of the training annotations.
        fingerprints: SHA-256 of each split's annotation file, in hexadecimal.
        preprocessing: What the backbone expects of an image, from the weights it started with.
        eps: Of each batch norm of the detector, by the module's name.
        recipe: The recipe's settings.
    """

    class_names: dict[int, str]
    labels: dict[int, int]
    fingerprints: dict[str, str]
    preprocessing: Preprocessing
    eps: dict[str, float]
    recipe: dict[str, Any]

    def to_json(self) -> str:
        """Return it for a file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunFacts":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: If it is anything else.
        """
        try:
            fields = json.loads(text)
            pixels = fields.pop("preprocessing")
            pixels |= {key: tuple(pixels[key]) for key in ("mean", "std", "value_range")}
            for key in ("class_names", "labels"):
                fields[key] = {int(number): value for number, value in fields[key].items()}
            return cls(**fields, preprocessing=Preprocessing(**pixels))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise ValueError(
                f"its {RUN_KEY!r} metadata must be what training writes, got {str(text)[:80]!r}; train again"
            ) from None


def facts_of(
    detector: nn.Module,
    config: DetectorConfig,
    class_names: Mapping[int, str],
    labels: Mapping[int, int],
    fingerprints: Mapping[str, str],
) -> RunFacts:
    """Return the facts of a detector in training."""
    body = next(module for module in detector.modules() if isinstance(module, Backbone))
    recipe = config.model_dump(mode="json")
    return RunFacts(
        dict(class_names), dict(labels), dict(fingerprints), body.preprocessing, _eps_by_name(detector), recipe
    )


def recipe_of(config: Path | None, facts: RunFacts | None, weights: Path) -> DetectorConfig:
    """Return the recipe in the file ``config``, or else the one that the weights carry.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file breaks a rule, or neither is there.
    """
    if config is not None:
        return load_detector_config(config)
    if facts is None:
        raise ValueError(f"{weights}: carries no recipe; give the detector's by --config")
    settings = copy.deepcopy(facts.recipe)
    if schedule := settings["train"]["freeze_schedule"]:  # JSON knows no numbers as keys
        settings["train"]["freeze_schedule"] = {int(epoch): freeze_at for epoch, freeze_at in schedule.items()}
    return DetectorConfig.model_validate(settings)


def rebuild_detector(config: DetectorConfig, facts: RunFacts) -> nn.Module:
    """Return the detector of a run, for its trained state to be loaded: without the weights that it started from.

    Raises:
        ValueError: If a setting cannot be honoured.
    """
    fresh = config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": None})})
    detector = build_detector(fresh)
    adopt_facts(detector, config, facts)
    return detector


def adopt_facts(detector: nn.Module, config: DetectorConfig, facts: RunFacts) -> None:
    """Let a detector expect the images, and its norms have the eps, that a run's weights were trained with."""
    expect_images(detector, config, facts.preprocessing)
    for name, norm in detector.named_modules():
        if name in facts.eps and hasattr(norm, "running_var"):
            norm.eps = facts.eps[name]


def metadata_of(body: Backbone, config: DetectorConfig) -> Metadata:
    """Return what the weights of a run's backbone were trained on, as `weights:` of another recipe takes it."""
    pixels = body.preprocessing
    if config.image_mean or config.image_std:
        mean, std = unit_statistics(pixels, config.backbone.in_channels)
        pixels = Preprocessing(config.image_mean or mean, config.image_std or std, pixels.channel_order, (0.0, 1.0))
    eps = {module.eps for module in body.modules() if hasattr(module, "running_var")}
    return Metadata(
        "the run of `backbone train` that wrote it",
        known=True,
        preprocessing=pixels,
        stride_in_1x1=config.backbone.stride_in_1x1,
        eps=eps.pop() if len(eps) == 1 else None,  # type: ignore[arg-type]
        dilate_first_block=config.backbone.dilate_first_block if config.backbone.output_stride < 32 else None,
        network=config.backbone.name,
    )


def with_facts(state: Mapping[str, Tensor], facts: RunFacts, known: Metadata) -> dict[str, Tensor]:
    """Return a detector's state with the facts in its metadata, where ``torch.load`` and ``inspect`` find them."""
    made = OrderedDict(state)
    made._metadata = OrderedDict({HEADER_KEY: known.to_json(), RUN_KEY: facts.to_json()})  # type: ignore[attr-defined]
    return made


def read_run(path: Path) -> tuple[dict[str, Tensor], RunFacts | None]:
    """Return the detector's state that a run wrote, model.pth or last.ckpt, and its facts; None in files of old.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or the weights of something else than a detector.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--weights must be an existing file, got {str(path)!r}; check the path")
    content = load_checkpoint(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a state dict, got {type(content).__name__}; give model.pth of a run")
    told = getattr(content, "_metadata", None)
    text = told.get(RUN_KEY) if isinstance(told, Mapping) else None
    if isinstance(content.get("state_dict"), dict):
        text, state = content.get(RUN_KEY), content["state_dict"]
        content = {
            name.removeprefix(_DETECTOR_PREFIX): value
            for name, value in state.items()
            if isinstance(name, str) and name.startswith(_DETECTOR_PREFIX)
        }
        if not content:
            raise ValueError(f"{path}: is a checkpoint of Lightning, and of no run of ours; give model.pth of a run")
    elif isinstance(told, Mapping) and HEADER_KEY in told and not any(n.startswith("backbone.") for n in content):
        raise ValueError(
            f"{path}: is a backbone without its detector; give model.pth beside it, or start a run from it by "
            f"`weights: {path}` in the recipe"
        )
    try:
        return content, RunFacts.from_json(text) if isinstance(text, str) else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _eps_by_name(detector: nn.Module) -> dict[str, float]:
    norms = {name: module for name, module in detector.named_modules() if hasattr(module, "running_var")}
    return {name: float(norm.eps) for name, norm in norms.items()}
