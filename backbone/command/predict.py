"""``backbone predict``: what a trained detector finds on photos."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from backbone.command.extract import FAILURES
from backbone.command.extraction import read_image
from backbone.command.photos import name_results, refuse_overwriting
from backbone.command.terminal import import_training, make_writable, one_line, print_note, progress_bar, torch_device
from backbone.console import Device, errors, print_error, readable_errors
from backbone.recipe import DetectorConfig
from backbone.shipped import find_recipe
from backbone.weights.writing import write_atomically


def predict_command(
    images: Annotated[list[Path], typer.Option("--images", help="Photos, or folders of photos.")],
    weights: Annotated[Path, typer.Option(help="model.pth (or last.ckpt) of a run.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if need be.")],
    more_images: Annotated[list[Path] | None, typer.Argument(metavar="[PATHS]...", help="More photos.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The detector's recipe; by default the one that the weights carry.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Take the folders within folders, too.")] = False,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Least score of what is written and drawn.")] = 0.5,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write OUT/predictions.json only.")] = False,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
) -> None:
    """Write what is found on photos as OUT/predictions.json, in COCO's format, and draw it as OUT/<stem>.png.

    Boxes, masks and keypoints carry a score; a segmenter's classes are one region for each class of a photo.
    """
    with readable_errors():
        stems = name_results([*images, *(more_images or [])], recursive=recursive)
        if not no_picture:
            refuse_overwriting(list(stems), [_picture_path(out, stem) for stem in stems.values()])
        target = torch_device(device)
        import_training()
        predictor, predictions = _load(weights, config, target)
        make_writable(out)
    num_failures = 0
    with progress_bar("predict") as bar:
        for photo in bar.track(list(stems)):
            picture = None if no_picture else _picture_path(out, stems[photo])
            try:
                _predict(photo, predictor, predictions, min_score, picture)
            except FAILURES as error:
                num_failures += 1
                print_error(one_line(error, photo))
            else:
                if picture is not None:
                    print(picture)
    with readable_errors(OSError):
        file = out / "predictions.json"
        _write_json(predictions.content, file)
    print(file)
    if num_failures:
        errors.print(f"{num_failures} of {len(stems)} images failed", soft_wrap=True)
        raise typer.Exit(1)


def _write_json(content: dict[str, Any], path: Path) -> None:
    def write(draft: Path) -> None:
        draft.write_text(json.dumps(content, indent=1) + "\n")

    write_atomically(path, write)


def _load(weights: Path, config: Path | None, device: torch.device) -> tuple[Any, Any]:
    """Return the predictor, and where its predictions are collected."""
    from backbone.training.facts import read_run, rebuild_detector, recipe_of
    from backbone.training.module import load_detector_state
    from backbone.training.prediction import CocoPredictions, Predictor

    _, facts = read_run(weights)
    recipe = recipe_of(None if config is None else find_recipe(config), facts, weights)
    if recipe.backbone.in_channels != 3:  # noqa: PLR2004
        raise ValueError(f"the images are read as RGB: in_channels must be 3, got {recipe.backbone.in_channels}")
    if facts is None:
        print_note(f"{weights} carries no names of classes; they are numbered")
    detector = _fresh(recipe) if facts is None else rebuild_detector(recipe, facts)
    load_detector_state(detector, weights)
    return Predictor(detector, recipe, device), CocoPredictions(facts, recipe.num_classes)


def _predict(photo: Path, predictor: Any, predictions: Any, min_score: float, picture: Path | None) -> None:  # noqa: ANN401
    """Add what is found on one photo, and draw it; a photo whose picture fails is not added either."""
    from backbone.training.pictures import draw
    from backbone.training.prediction import above

    image = torch.from_numpy(np.array(read_image(photo))).permute(2, 0, 1).float() / 255
    found = above(predictor(image), min_score)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        drawn = Image.fromarray(draw(image, found, predictions.names, min_score=min_score).permute(1, 2, 0).numpy())
        write_atomically(picture, lambda draft: drawn.save(draft, format="png"))
    predictions.add(str(photo), (image.shape[1], image.shape[2]), found)


def _picture_path(out: Path, stem: Path) -> Path:
    return (out / stem).with_name(f"{stem.name}.png")


def _fresh(recipe: DetectorConfig) -> torch.nn.Module:
    """Build the detector for weights to come."""
    import warnings

    from backbone.hosts.torchvision import build_detector

    bare = recipe.backbone.model_copy(update={"weights": None, "stem_channels_from": None})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*frozen at random weights")
        return build_detector(recipe.model_copy(update={"backbone": bare}))
