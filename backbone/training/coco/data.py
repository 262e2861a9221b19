"""COCO-format images and targets as torchvision's detectors take them, in an order that the seed alone decides.

Nothing here keeps state: which images make a batch and how each is augmented follow from seed, epoch, step and rank, so
that a resumed run sees what the interrupted one would have seen.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, VisionDataset, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from backbone.images import UnreadableImageError, read_image
from backbone.recipe import SEGMENTERS, DetectorConfig
from backbone.training.coco.annotations import NEEDS_KEYPOINTS, NEEDS_MASKS, Annotations
from backbone.training.scale_jitter import jitter_scale

Target: TypeAlias = dict[str, Any]
Batch: TypeAlias = tuple[list[Tensor], list[Target]]

IGNORED = 255
"""Class of the pixels that a segmenter's loss and measure leave out: padding, and crowds."""


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) of 0 to 1 with their targets.

    A detector's target has boxes, labels and, where it learns from them, masks and keypoints; a segmenter's has the
    class of each pixel, as ``classes`` (H, W). Both have image_id and file_name. Crowds are for evaluation only; a
    segmenter, which could not tell their pixels from background, ignores these.

    Args:
        annotations: The cleaned split.
        config: The recipe, which tells what to load.
        train: Whether to augment: a horizontal flip, large-scale jitter, of a segmenter's sizes one at random.
    """

    def __init__(self, annotations: Annotations, config: DetectorConfig, *, train: bool) -> None:
        self.config, self.train = config, train
        self.coco = as_coco(annotations.content)
        dataset = _Cleaned(annotations)
        self.training_coco, self.ids = dataset.coco, dataset.ids
        keys = ["image_id", "boxes", "labels", *(["masks"] if config.detector in NEEDS_MASKS else [])]
        self.images = wrap_dataset_for_transforms_v2(dataset, target_keys=keys)
        self.labels = annotations.labels
        self.flipped_keypoints = mirrored(annotations.keypoint_names or [""] * config.num_keypoints)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        """Return the image for (epoch, index); the epoch decides the augmentation."""
        epoch, index = key
        file_name = self.coco.imgs[self.ids[index]]["file_name"]
        try:
            image, target = self.images[index]
        except UnreadableImageError as error:
            raise UnreadableImageError(
                f"{file_name} cannot be read ({error.reason}); mend it or remove it from the annotations"
            ) from None
        image, target = v2.functional.to_image(image), self._complete(target, v2.functional.get_size(image))
        chance = np.random.default_rng([self.config.train.seed, epoch, index])
        if self.train and chance.random() < self.config.train.horizontal_flip:
            image, target = self._flip(image, target)
        image, target = v2.ClampBoundingBoxes()(image, target)
        if self.train and self.config.train.scale_jitter is not None:
            side = self.config.min_size[0]
            image, target = jitter_scale(image, target, chance, self.config.train.scale_jitter, side)
        if self.config.detector in SEGMENTERS:
            side = int(chance.choice(self.config.min_size)) if self.train else self.config.min_size[-1]
            size = resized(v2.functional.get_size(image), side, self.config.max_size)
            image, target = v2.Resize(size, antialias=True)(image, target)
            target = {"classes": class_map(target["masks"], target["labels"], target["crowds"])}
        image = v2.functional.to_dtype(image, torch.float32, scale=True).as_subclass(torch.Tensor)
        plain = {name: value.as_subclass(torch.Tensor) for name, value in target.items()}
        return image, {**plain, "image_id": self.ids[index], "file_name": file_name}

    def _complete(self, target: Target, size: Sequence[int]) -> Target:
        """Add what an image without annotations lacks, the detector's labels, and keypoints."""
        annotations = self.training_coco.imgToAnns[target["image_id"]]
        if not annotations:
            target["boxes"] = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(size))
            if self.config.detector in NEEDS_MASKS:
                target["masks"] = tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8))
        target["labels"] = torch.tensor([self.labels[each["category_id"]] for each in annotations], dtype=torch.int64)
        if self.config.detector in NEEDS_KEYPOINTS:
            keypoints = torch.tensor([each["keypoints"] for each in annotations], dtype=torch.float32)
            target["keypoints"] = keypoints.reshape(len(annotations), self.config.num_keypoints, 3)
        if self.config.detector in SEGMENTERS:
            target["crowds"] = self._crowds(target["image_id"], size)
        del target["image_id"]
        return target

    def _crowds(self, image_id: int, size: Sequence[int]) -> tv_tensors.Mask:
        """Return where crowds are, (1, H, W)."""
        crowds = [self.coco.annToRLE(each) for each in self.coco.imgToAnns[image_id] if each["iscrowd"]]
        if not crowds:
            return tv_tensors.Mask(torch.zeros(1, *size, dtype=torch.uint8))
        return tv_tensors.Mask(torch.from_numpy(rle.decode(rle.merge(crowds)))[None])

    def _flip(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        keypoints = target.pop("keypoints", None)
        image, target = v2.RandomHorizontalFlip(p=1.0)(image, target)
        if keypoints is not None:
            flipped = keypoints[:, self.flipped_keypoints]
            seen = flipped[..., 2] > 0
            flipped[..., 0] = torch.where(seen, image.shape[-1] - 1 - flipped[..., 0], flipped[..., 0])
            target["keypoints"] = flipped
        return image, target


class _Cleaned(CocoDetection):  # type: ignore[misc]
    """torchvision's data set of what is left in a split, without its crowds."""

    def __init__(self, annotations: Annotations) -> None:
        VisionDataset.__init__(self, annotations.folder)  # CocoDetection's own would read the file once more
        content = annotations.content
        self.coco = as_coco({**content, "annotations": [a for a in content["annotations"] if not a["iscrowd"]]})
        self.ids = sorted(self.coco.imgs)
        self.folder = annotations.folder

    def _load_image(self, id: int) -> Image.Image:
        return read_image(self.folder / self.coco.imgs[id]["file_name"])


def as_coco(content: dict[str, Any]) -> COCO:
    """Return pycocotools' view of the content of an annotation file."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it reports that it builds an index
        coco.createIndex()
    return coco


def resized(size: Sequence[int], shorter: int, longer: int) -> list[int]:
    """Return the height and width whose shorter side is ``shorter`` pixels, and whose longer is at most ``longer``."""
    factor = min(shorter / min(size), longer / max(size))
    return [max(1, round(side * factor)) for side in size]


def mirrored(names: Sequence[str]) -> list[int]:
    """Return the order of keypoints in a mirrored image: ``left_eye`` takes the place of ``right_eye``."""
    swaps = {"left": "right", "right": "left"}
    swapped = [
        next((name.replace(side, other) for side, other in swaps.items() if side in name), name) for name in names
    ]
    return [names.index(other) if other and other in names else index for index, other in enumerate(swapped)]


def class_map(masks: Tensor, labels: Tensor, crowds: Tensor | None = None) -> Tensor:
    """Masks (N, H, W) -> class of each pixel (H, W), 0 for the background; a smaller object lies over a larger one.

    Pixels of ``crowds`` (M, H, W) that belong to no object are ``IGNORED``.
    """
    classes = torch.zeros(masks.shape[1:], dtype=torch.int64)
    if crowds is not None:
        classes[crowds.bool().any(0)] = IGNORED
    for number in masks.sum((1, 2)).argsort(descending=True, stable=True).tolist():
        classes[masks[number].bool()] = labels[number]
    return classes


class EpochSampler(Sampler[tuple[int, int]]):
    """Indices of one rank with the epoch they are drawn for, so that worker processes know it too.

    Args:
        dataset: What to draw from.
        rank: Number of this process.
        world_size: Processes in all.
        seed: Of the order; None keeps the data set's order and gives every image exactly once.
    """

    def __init__(self, dataset: CocoImages, *, rank: int, world_size: int, seed: int | None) -> None:
        self.epoch, self.indices = 0, range(rank, len(dataset), world_size)
        self.shuffled: DistributedSampler[int] | None = None
        if seed is not None:
            everything = cast(Dataset[int], range(len(dataset)))
            self.shuffled = DistributedSampler(everything, world_size, rank, shuffle=True, seed=seed, drop_last=True)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning does."""
        self.epoch = epoch
        if self.shuffled is not None:
            self.shuffled.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in (self.indices if self.shuffled is None else self.shuffled))

    def __len__(self) -> int:
        return len(self.indices if self.shuffled is None else self.shuffled)


def make_loader(dataset: CocoImages, *, rank: int = 0, world_size: int = 1) -> DataLoader[tuple[Tensor, Target]]:
    """Return batches for one rank: shuffled and whole ones for training, one image each for evaluation.

    Raises:
        ValueError: If there are fewer training images than one step of all processes takes, or fewer images to
            evaluate than processes.
    """
    train = dataset.config.train
    if dataset.train and len(dataset) < train.batch_size * world_size:
        raise ValueError(
            f"batch_size must be at most {len(dataset) // world_size}, for {len(dataset)} training images on "
            f"{world_size} processes; got {train.batch_size}"
        )
    if len(dataset) < world_size:
        raise ValueError(
            f"every process must have an image to evaluate, got {len(dataset)} images for {world_size} processes; "
            f"take fewer devices or nodes, or more images"
        )
    return DataLoader(
        dataset,
        batch_size=train.batch_size if dataset.train else 1,
        sampler=EpochSampler(dataset, rank=rank, world_size=world_size, seed=train.seed if dataset.train else None),
        num_workers=train.num_workers,
        persistent_workers=train.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=dataset.train,
        collate_fn=as_lists,
    )


def as_lists(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Images of several sizes stay a list; torchvision's detectors pad them themselves."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def padded(images: Sequence[Tensor], value: float) -> Tensor:
    """Stack (..., H, W) tensors, padded at the lower right to the largest height and width."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    stacked = images[0].new_full((len(images), *images[0].shape[:-2], height, width), value)
    for place, image in zip(stacked, images, strict=True):
        place[..., : image.shape[-2], : image.shape[-1]] = image
    return stacked
