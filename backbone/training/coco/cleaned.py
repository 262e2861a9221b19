"""One split of a data set as it is left when all that cannot be used is gone."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from backbone.recipe import SEGMENTERS
from backbone.training.coco.records import Skipped, Unusable
from backbone.training.coco.summary import summary_of

NEEDS_MASKS: Final = ("mask_rcnn", *SEGMENTERS)
NEEDS_KEYPOINTS: Final = ("keypoint_rcnn",)


@dataclass
class Annotations:
    """One split of a data set, cleaned.

    Attributes:
        folder: Where the images are.
        file: The annotation file.
        content: Images, annotations and categories without what was skipped. Ids are numbers, file names are found
            in ``folder``, sizes are the upright images' own; area and iscrowd are always there.
        skipped: One line for each image, annotation, category or part left out: which, and why.
        num_annotations: Annotations in the file, those of skipped images included.
        notes: What else there is to know before training, a line each.
        labels: The detector's class for each category's number, in the numbers' order; 0 is the background.
        fingerprint: SHA-256 of the file, in hexadecimal.
    """

    folder: Path
    file: Path
    content: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_annotations: int = 0
    labels: dict[int, int] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the categories by label, in the order of the category ids; no two are alike."""
        names = {category["id"]: str(category.get("name", category["id"])) for category in self.content["categories"]}
        return {label: names[number] for number, label in self.labels.items()}

    @property
    def keypoint_names(self) -> list[str]:
        """Names of the keypoints that the categories have; empty where the file tells none."""
        return next((list(c["keypoints"]) for c in self.content["categories"] if c.get("keypoints")), [])

    @property
    def num_objects(self) -> dict[str, int]:
        """Annotations of each class, by name."""
        counts = Counter(annotation["category_id"] for annotation in self.content["annotations"])
        return {name: counts[number] for number, name in zip(self.labels, self.class_names.values(), strict=True)}

    def summary(self) -> str:
        """Return what is there and what was skipped, with the first three lines of each reason."""
        return summary_of(self.file, self.content, self.num_objects, self.skipped, self.notes)

    def skip(self, record: str, why: Unusable) -> None:
        """Note what is left out."""
        self.skipped.append(Skipped(record, why))
