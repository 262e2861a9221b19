"""``backbone check-data``: everything that training would stumble over, before it does."""

from pathlib import Path
from typing import Annotated, Final

import typer

from backbone.command.terminal import import_training
from backbone.console import readable_errors, say
from backbone.shipped import find_recipe

SPLITS: Final = ("train", "val")


def check_data_command(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with train/, val/ and annotations/*.json.")],
    config: Annotated[Path | None, typer.Option(help="Recipe (file or the package's) that the data must fit.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if anything would be skipped.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for skipped.csv and a picture of each split; made if need be.")
    ] = None,
) -> None:
    """Check a COCO data set record by record: what is there, what would be skipped and why, how it looks.

    Without --config masks and keypoints are checked wherever there are some.
    """
    from backbone.training.launch import tracked  # training's libraries take seconds

    with readable_errors(ValueError, OSError, ImportError):
        import_training()
        from backbone.recipe import load_detector_config
        from backbone.training.coco.annotations import read_annotations, require_same_categories
        from backbone.training.coco.summary import save_skipped

        recipe = load_detector_config(find_recipe(config)) if config else None
        found = {split: read_annotations(data, split, recipe, track=tracked) for split in _splits_of(data)}
        for annotations in found.values():
            say(annotations.summary())
        require_same_categories(found)
        if out is None:
            say("--out DIR writes the whole list, skipped.csv, and a picture of each split")
        else:
            from backbone.training.coco.chart import save_chart

            if save_skipped({each.file: each.skipped for each in found.values()}, out / "skipped.csv"):
                say(str(out / "skipped.csv"))
            for split, annotations in found.items():
                save_chart(annotations, recipe, out / f"{split}.png")
                say(str(out / f"{split}.png"))
        num_skipped = sum(len(annotations.skipped) for annotations in found.values())
        if strict and num_skipped:
            raise ValueError(f"--strict refuses {num_skipped} records that would be skipped; the list above names them")


def _splits_of(data: Path) -> list[str]:
    """Return the splits that have both images and annotations; train, to name what is absent, if there is none."""
    files = {split: data / "annotations" / f"{split}.json" for split in SPLITS}
    return [split for split, file in files.items() if file.is_file() and (data / split).is_dir()] or [SPLITS[0]]
