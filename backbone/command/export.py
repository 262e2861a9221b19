"""``backbone export``: from a name, a recipe or a training run to a file that serves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from torch import Tensor, nn

from backbone.console import readable_errors
from backbone.recipe import DetectorConfig, ExtraLevels

_FINISHED: Final = "model.pth"
_UNFINISHED: Final = "last.ckpt"
_RECIPE: Final = "recipe.yaml"
_OPSET: Final = 18
_SHORTER_SIDE: Final = 256  # of calibration photos in pixels, where the file takes any size


def export_command(
    model: Annotated[
        str | None, typer.Argument(metavar="NAME|CONFIG|RUN_FOLDER", help="Backbone, recipe (YAML) or training run.")
    ] = None,
    to: Annotated[
        str, typer.Option(metavar="RUNTIME", help="onnx, openvino, aoti, torch-export or executorch.")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write.")] = None,
    image_size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="H W", min=1, help="Image height and width in pixels.")
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Any image size, as without --image-size.")] = False,
    batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Images at a time.")] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Any number of images, as without --batch.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="What the network computes in: float32, float16, bfloat16 or int8.")
    ] = "float32",
    opset: Annotated[int, typer.Option(help="Of ONNX.")] = _OPSET,
    weights: Annotated[str | None, typer.Option(help="Weights name or checkpoint; overrides the recipe's.")] = None,
    pyramid: Annotated[
        ExtraLevels | None, typer.Option(help="Put a pyramid on a backbone, with these levels above p5.")
    ] = None,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Take uint8 RGB images and prepare them in the file.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Photos to find int8's scales with.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Triton model repository to write an entry into.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare an exported file with what it was exported from.")
    ] = None,
) -> None:
    """Write a backbone, detector or segmenter as a file for another runtime, checked before it is kept."""
    with readable_errors():
        _require_one(image_size, dynamic, "--image-size and --dynamic")
        _require_one(batch, dynamic_batch, "--batch and --dynamic-batch")
        _export(
            model,
            to,
            out,
            image_size,
            batch,
            dtype,
            opset,
            weights,
            pyramid,
            with_preprocessing,
            calibration,
            triton,
            check,
        )


def _require_one(fixed: object, is_free: bool, names: str) -> None:
    """Refuse a fixed value beside the option that says any."""
    if fixed is not None and is_free:
        raise ValueError(f"{names} say opposite things; keep one")


def _export(
    model: str | None,
    to: str,
    out: Path | None,
    image_size: tuple[int, int] | None,
    batch: int | None,
    dtype: str,
    opset: int,
    weights: str | None,
    pyramid: ExtraLevels | None,
    with_preprocessing: bool,
    calibration: Path | None,
    triton: Path | None,
    check: Path | None,
) -> None:
    from backbone.export import check_file, export_model
    from backbone.export.request import Request

    if check is not None:
        if model is not None or out is not None:
            raise ValueError("--check takes one file and exports nothing; leave the model and --out out")
        print(check_file(check))
        return
    if model is None or out is None:
        raise ValueError("give what to export and --out FILE, or --check FILE")
    settings = {
        "to": to,
        "image_size": image_size,
        "batch": batch,
        "dtype": dtype,
        "opset": opset,
        "with_preprocessing": with_preprocessing,
        "triton": triton,
    }
    Request(out, **settings)  # type: ignore[arg-type] # what cannot be is said before a model is built
    if (dtype == "int8") != (calibration is not None):
        raise ValueError(
            "--dtype int8 needs photos to find its scales with, --calibration FOLDER; give both or neither"
        )
    network, class_names = load_model(model, weights, pyramid)
    photos = _photos(calibration, image_size, batch, network, as_bytes=with_preprocessing) if calibration else ()
    report = export_model(network, out, class_names=class_names, calibration=photos, **settings)  # type: ignore[arg-type]
    print(report)


def load_model(
    source: str, weights: str | None = None, pyramid: ExtraLevels | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model that a name, a recipe or a training run describes, and its class names as far as known.

    Args:
        source: Registered name, recipe of the package or YAML file of a backbone or a detector, or the folder of a
            training run.
        weights: Of the backbone, in place of the recipe's.
        pyramid: Levels above the backbone's of a pyramid to put on a backbone; None for no pyramid.

    Raises:
        ValueError: If it is none of these, or a setting cannot be honoured.
        FileNotFoundError: If a file is missing.
    """
    from backbone.builder import build_backbone
    from backbone.command.describe import named
    from backbone.pyramid import FeaturePyramid

    path = Path(source)
    if path.is_dir():
        if weights is not None or pyramid is not None:
            raise ValueError("a training run has its own weights and pyramid; leave --weights and --pyramid out")
        return _load_run(path)
    config, _ = named(source)
    if isinstance(config, DetectorConfig):
        if pyramid is not None:
            raise ValueError("a detector's recipe says its pyramid itself; leave --pyramid out")
        return _build_detector(config, weights), ()
    config = config if weights is None else config.model_copy(update={"weights": weights})
    model = build_backbone(config)
    return (model if pyramid is None else FeaturePyramid(model, extra_levels=pyramid)), ()


def _build_detector(config: DetectorConfig, weights: str | None) -> nn.Module:
    from backbone.hosts.torchvision import build_detector

    if weights is not None:
        backbone = config.backbone.model_copy(update={"weights": weights})
        config = config.model_copy(update={"backbone": backbone})
    return build_detector(config)


def _load_run(folder: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the detector of a finished run, or of the last epoch of one that is not finished, and its class names."""
    from backbone.command.terminal import import_training, print_note

    file = next((folder / name for name in (_FINISHED, _UNFINISHED) if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"a training run's folder must hold {_FINISHED} or {_UNFINISHED}, got {folder}; check the path"
        )
    import_training()
    from backbone.training.facts import read_run, rebuild_detector, recipe_of
    from backbone.training.module import load_detector_state

    _, facts = read_run(file)
    if facts is None and not (folder / _RECIPE).is_file():
        raise FileNotFoundError(f"{file} carries no recipe: {_RECIPE} must be beside it; put it there")
    config = recipe_of(None if facts else folder / _RECIPE, facts, file)
    fresh = config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": None})})
    detector = _build_detector(fresh, None) if facts is None else rebuild_detector(config, facts)
    load_detector_state(detector, file)
    if file.name == _UNFINISHED:
        print_note(f"{folder} holds no {_FINISHED}, which a run writes at its end; exporting {file}, its last epoch")
    names = {} if facts is None else facts.class_names
    return detector, tuple(names.get(label, "") for label in range(max(names, default=-1) + 1))


class _Photos(Sequence[Tensor]):
    """Calibration photos as the file will take images, read one by one.

    Args:
        folder: Where they are.
        size: Height and width to resize them to; None for a shorter side of 256 pixels.
        batch: Images at a time; a photo is repeated so often.
        prepare: What is left to do to pixels of 0 to 255.

    Raises:
        ValueError: If there is none.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int] | None, batch: int, prepare: Callable[[Tensor], Tensor]
    ) -> None:
        from backbone.command.photos import find_images

        self._photos, self._size, self._batch, self._prepare = find_images([folder]), size, batch, prepare

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override] # one at a time
        import numpy as np
        import torch

        from backbone.command.extraction import read_image

        image = read_image(self._photos[index], shorter_side=None if self._size else _SHORTER_SIDE)
        if self._size is not None:
            image = image.resize(self._size[::-1])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return self._prepare(pixels).expand(self._batch, -1, -1, -1).contiguous()


def _photos(
    folder: Path, size: tuple[int, int] | None, batch: int | None, network: nn.Module, *, as_bytes: bool
) -> "_Photos":
    """Return the calibration photos as the file will take images."""
    from backbone.export.network import Prepare, preprocessing_of
    from backbone.features import Preprocessing

    prepare = Prepare(preprocessing_of(network) or Preprocessing(), 3, None)
    return _Photos(folder, size, batch or 1, (lambda pixels: pixels) if as_bytes else prepare)
