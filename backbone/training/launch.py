"""Where training and evaluation run, and how they tell what a user can mend."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from rich.progress import track

from backbone.console import Device, console, errors
from backbone.recipe import DetectorConfig


def tracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Go through a sequence with a progress bar, where there is a terminal to show it."""
    return track(items, title, console=errors, transient=True, disable=not errors.is_terminal)


def require_possible(config: DetectorConfig, device: str) -> None:
    """Refuse what this machine or these programs cannot honour.

    Raises:
        ValueError: If there is something.
    """
    if device == Device.CUDA and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; use --device cpu or auto")
    if config.train.precision == "16-mixed" and accelerator_of(device) == "cpu":
        raise ValueError("precision 16-mixed needs a CUDA device; use bf16-mixed or 32-true")
    if config.backbone.in_channels != 3:
        raise ValueError(f"the images are read as RGB: in_channels must be 3, got {config.backbone.in_channels}")


def accelerator_of(device: str) -> str:
    """Return Lightning's name for the device."""
    return "gpu" if device != Device.CPU and torch.cuda.is_available() else "cpu"


def common_settings(config: DetectorConfig, device: str) -> dict[str, Any]:
    """Return the settings of Lightning's trainer that training and evaluation share; quieten what it has to say."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what it found of hardware, and its tips
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    return {
        "accelerator": accelerator_of(device),
        "precision": config.train.precision,
        "use_distributed_sampler": False,  # ours gives each image once, and tells its epoch
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": console.is_terminal,
    }


_NOISE: Final = (
    ".*does not have many workers",  # num_workers is the recipe's
    ".*GPU available but not used",  # --device cpu says so
    ".*directory .* exists and is not empty",  # it holds the recipe
    ".*in eval mode at the start of training",  # the frozen stages are
    ".*dirpath has changed",  # a run's folder may be moved
    ".*treespec, LeafSpec.* is deprecated",  # Lightning's own affair
)
