"""What can be said of a recipe before the first step, and is no error."""

from collections.abc import Mapping

from backbone.recipe import TrainConfig
from backbone.training.coco.annotations import Annotations
from backbone.training.facts import RunFacts
from backbone.training.parameter_groups import rate_factor


def data_notes(facts: RunFacts | None, splits: Mapping[str, Annotations]) -> list[str]:
    """Return a sentence for each annotation file that is not the one that a resumed run began with.

    Raises:
        ValueError: If the run learned other classes, or the same under other labels.
    """
    if facts is None:
        return []
    names = splits["train"].class_names
    if names != facts.class_names:
        before, now = (
            ", ".join(f"{label} {name}" for label, name in each.items()) for each in (facts.class_names, names)
        )
        raise ValueError(
            f"--resume goes on with the same classes, the run learned {before}, and the data has {now}; put back the "
            f"annotations, or train into another --out"
        )
    changed = [each.file for split, each in splits.items() if facts.fingerprints.get(split) != each.fingerprint]
    return [f"note: {file} is not as it was when the run began" for file in changed]


def warm_up_note(train: TrainConfig, steps_per_epoch: int) -> str | None:
    """Return a sentence where the warm-up is longer than the run, so that the learning rate is never reached."""
    steps = train.epochs * steps_per_epoch
    if train.warmup_steps < steps:
        return None
    reached = rate_factor(train.model_copy(update={"learning_rate_decay": "none"}), steps - 1, 0.0)
    return (
        f"note: warmup_steps {train.warmup_steps} is longer than the run of {steps} steps ({train.epochs} epochs of "
        f"{steps_per_epoch}): the learning rate never passes {reached:.2f} of {train.learning_rate:g}; lower "
        f"warmup_steps, or train for more epochs"
    )
