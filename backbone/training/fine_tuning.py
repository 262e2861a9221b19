"""A detector that starts from another one's weights, also where it has other classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from backbone.hosts.torchvision import from_torchvision_names
from backbone.recipe import DetectorConfig
from backbone.training.facts import adopt_facts, read_run

BACKGROUND: Final = 0
_MAX_SHOWN: Final = 8
_ROWS_OF_A_CLASS: Final = {
    "box_predictor.cls_score": 1,
    "box_predictor.bbox_pred": 4,
    "mask_predictor.mask_fcn_logits": 1,
    "classification_head.cls_logits": 1,
    "classifier.4": 1,  # of a segmenter, and of its auxiliary classifier
}
"""Layers of torchvision's heads whose outputs are classes: how many rows in a row belong to one."""


@dataclass
class StartReport:
    """What a detector took over from a checkpoint.

    Attributes:
        source: The checkpoint.
        num_classes: Of the detector, the background among them.
        whole: Number of tensors taken over as they are.
        classes: For each tensor of a head with other classes: how many of them were taken over.
        fresh: Tensors that stay as they were initialised, with the reason.
        unused: Tensors of the checkpoint that the detector has no place for.
    """

    source: Path
    num_classes: int
    whole: int = 0
    classes: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"started from {self.source}: {self.whole} tensors taken over"]
        lines += [f"  {name}: {what}" for name, what in self.classes.items()]
        for what, names in (("fresh", self.fresh), ("not used", self.unused)):
            more = f", ... ({len(names)} in all)" if len(names) > _MAX_SHOWN else ""
            lines += [f"  {what}: {', '.join(names[:_MAX_SHOWN])}{more}"] if names else []
        return "\n".join(lines)


def start_from(detector: nn.Module, path: Path, config: DetectorConfig, class_names: Mapping[int, str]) -> StartReport:
    """Load model.pth or last.ckpt of a run, or the weights of torchvision's own detector, as far as they fit.

    A head with other classes takes over the background and the classes that both have, by name; where the file tells
    no names, those of the same number. Everything else that does not fit stays fresh and is reported.

    Args:
        detector: As ``build_detector`` made it; changed in place.
        path: The checkpoint.
        config: The recipe that the detector was built from.
        class_names: Of the detector, by label.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or nothing of it fits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"start_from must be an existing file, got {str(path)!r}; check the path")
    state, facts = read_run(path)
    state = from_torchvision_names(state)
    num_classes = config.num_classes
    if facts is not None:
        adopt_facts(detector, config, facts)
    sources = _sources(class_names, facts.class_names if facts else None, num_classes)
    report, own = StartReport(path, num_classes), detector.state_dict()
    for name, mine in own.items():
        theirs = state.get(name)
        rows = next((n for layer, n in _ROWS_OF_A_CLASS.items() if name.rpartition(".")[0].endswith(layer)), 0)
        if not isinstance(theirs, Tensor):
            report.fresh.append(f"{name} (absent there)")
        elif rows and theirs.shape[1:] == mine.shape[1:]:
            _copy_classes(name, mine, theirs, rows, sources, report)
        elif theirs.shape == mine.shape:
            _copy(mine, theirs)
            report.whole += 1
        else:
            report.fresh.append(f"{name} ({_shape(theirs)} there, {_shape(mine)} here)")
    report.unused = [name for name in state if name not in own]
    if not report.whole:
        raise ValueError(
            f"start_from: nothing of {path} fits this detector; give model.pth of a run of the same detector on the "
            f"same backbone, or that run's backbone.pth as the backbone's `weights`"
        )
    return report


def _sources(names: Mapping[int, str], old_names: Mapping[int, str] | None, num_classes: int) -> dict[int, int]:
    """Return for each of our labels the old label of the same class; the background's is the same."""
    if old_names is None or dict(old_names) == dict(names):
        return {label: label for label in range(num_classes)}
    old_labels = {name: label for label, name in old_names.items()}
    same = {label: old_labels[name] for label, name in names.items() if name in old_labels}
    return {BACKGROUND: BACKGROUND, **same}


def _copy_classes(
    name: str, mine: Tensor, theirs: Tensor, rows: int, sources: Mapping[int, int], report: StartReport
) -> None:
    """Copy the rows of the classes that both have; there may be several groups of classes, one for each anchor."""
    num_groups = mine.shape[0] // (rows * report.num_classes)
    if theirs.shape[0] % (rows * num_groups):
        report.fresh.append(f"{name} ({_shape(theirs)} there, {_shape(mine)} here)")
        return
    ours, others = (each.view(num_groups, -1, rows, *each.shape[1:]) for each in (mine, theirs))
    pairs = {new: old for new, old in sources.items() if old < others.shape[1]}
    for new, old in pairs.items():
        _copy(ours[:, new], others[:, old])
    if len(pairs) == report.num_classes:
        report.whole += 1
    else:
        report.classes[name] = f"{len(pairs)} of {report.num_classes} classes taken over, the others fresh"


def _copy(mine: Tensor, theirs: Tensor) -> None:
    with torch.no_grad():
        mine.copy_(theirs)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"
