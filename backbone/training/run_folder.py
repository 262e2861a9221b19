"""The folder of a training run: what it holds, and whether another recipe may go on with it."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from backbone.recipe import DetectorConfig
from backbone.training.callbacks import load_checkpoint
from backbone.training.facts import RUN_KEY, RunFacts

CHECKPOINT: Final = "last"
MAY_CHANGE: Final = ("train.", "min_size", "max_size", "backbone.freeze_at", "backbone.checkpoint_stages")
"""Settings that the recipe may have changed in when a run goes on."""
MUST_STAY: Final = ("train.optimizer", "train.ema_decay")
"""Of these, the ones whose state would not fit."""


class RunFolder:
    """The folder of one training run.

    Args:
        out: The folder.
        config: The recipe.
        resume: Whether to go on with the run that is there.
        is_first_process: The others find the run that the first one has just begun.

    Attributes:
        checkpoint: Of the last finished epoch, when the run goes on from one.
        facts: What is needed to go on from it beside the recipe; None where it is one of old.
        changes: One line for each setting of the recipe that is not as it was.

    Raises:
        ValueError: If there is a run and ``resume`` is false, or none and it is true, the checkpoint is damaged, or
            the recipe describes another detector.
    """

    def __init__(self, out: Path, config: DetectorConfig, *, resume: bool, is_first_process: bool = True) -> None:
        self.out, self.recipe, last = out, out / "recipe.yaml", out / f"{CHECKPOINT}.ckpt"
        held = self.recipe.exists() or last.exists()
        if held and not resume and is_first_process:
            raise ValueError(f"--out {out} already holds a run; go on with it by --resume, or choose another folder")
        if resume and not held:
            raise ValueError(f"--resume needs a run in --out, and {out} holds none; check the path, or drop --resume")
        self.checkpoint = last if resume and last.exists() else None
        self.facts: RunFacts | None = None
        self.changes = self._changes(config) if self.checkpoint else []

    def _changes(self, config: DetectorConfig) -> list[str]:
        assert self.checkpoint is not None
        content = load_checkpoint(self.checkpoint)
        if "recipe" not in content:
            raise ValueError(f"{self.checkpoint}: has no recipe, so it is of no run of ours; choose another --out")
        if isinstance(content.get(RUN_KEY), str):
            self.facts = RunFacts.from_json(content[RUN_KEY])
        before, now = dict(_flat(content["recipe"])), dict(_flat(config.model_dump(mode="json")))
        changed = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
        lines = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed}
        fixed = [key for key in changed if not key.startswith(MAY_CHANGE) or key in MUST_STAY]
        if fixed:
            raise ValueError(
                f"--resume goes on with the same detector and optimizer, but the recipe changed in "
                f"{'; '.join(lines[key] for key in fixed)}. Undo that, or train into another --out; `weights: "
                f"{self.out}/backbone.pth`, written at the end of a run, starts from its backbone"
            )
        return list(lines.values())

    def begin(self, config_file: Path, console: Console) -> None:
        """Say from where the run goes on and what changed, and keep the recipe."""
        if self.checkpoint:
            console.print(f"going on from {self.checkpoint}", soft_wrap=True)
            for line in self.changes:
                console.print(f"  changed: {line}", soft_wrap=True)
        elif self.recipe.exists():
            console.print(f"{self.out} has no finished epoch; starting from the beginning", soft_wrap=True)
        self.out.mkdir(parents=True, exist_ok=True)
        if config_file.resolve() != self.recipe.resolve():
            shutil.copyfile(config_file, self.recipe)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a recipe with its dotted key."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value
