"""What is asked of an extraction: everything that decides the numbers, and nothing that does not."""

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field

from backbone.config import StrictModel, did_you_mean, rule

Pool: TypeAlias = Literal["none", "avg", "gem"]
DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]

AUTO_PIXELS: Final = {"cpu": 5 * 2**18, "cuda": 2**23}
"""Pixels of a batch that ``auto`` aims at; 4 and 27 images of 480 x 640."""
AUTO_IMAGES: Final = 256
"""Images of a batch that ``auto`` takes at most."""
MAX_PIXELS: Final = 2**22
"""Pixels of an image, as the network sees it, that are computed unless told otherwise."""

_POSITIVE = "must be a whole number of 1 or more"


class Request(StrictModel):
    """What to compute of each image.

    Raises:
        SettingsError: (a ValueError) For a key or value that is not known.
    """

    pool: Annotated[Pool, rule("must be none, avg or gem")] = Field(
        default="none", description="One vector a level, by average or generalised mean (p = 3); none keeps the maps."
    )
    levels: Annotated[tuple[str, ...] | None, rule("must be names of feature maps, such as c5")] = Field(
        default=None, description="Feature maps to keep; null keeps what the network returns."
    )
    dtype: Annotated[DtypeName, rule("must be float32, bfloat16 or float16")] = Field(
        default="float32", description="What the network computes in."
    )
    store: Annotated[DtypeName | None, rule("must be null, float32, bfloat16 or float16")] = Field(
        default=None, description="What is returned; by default maps as computed, and pooled vectors in float32."
    )
    batch: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], rule(f"{_POSITIVE}, or auto")] = Field(
        default="auto", description="Images of one size that are computed together."
    )
    shorter_side: Annotated[Annotated[int, Field(ge=1)] | None, rule(_POSITIVE)] = Field(
        default=None, description="Resize to this shorter side, in pixels."
    )
    max_size: Annotated[Annotated[int, Field(ge=1)] | None, rule(_POSITIVE)] = Field(
        default=None, description="Longer side at most, in pixels."
    )
    multiple_of: Annotated[int, Field(ge=1), rule(_POSITIVE)] = Field(
        default=1,
        description="Resize both sides to the nearest multiple of this, in pixels: photos of nearly one size then "
        "share a batch.",
    )
    max_pixels: Annotated[int, Field(ge=1), rule(_POSITIVE)] = Field(
        default=MAX_PIXELS, description="A larger image, after resizing, is not computed and says so."
    )

    @property
    def stored_dtype(self) -> DtypeName:
        """The dtype of what is returned."""
        return self.store or (self.dtype if self.pool == "none" else "float32")

    def images_at_once(self, height: int, width: int, device: str) -> int:
        """Return how many images of this size, in pixels, make a batch on a ``device`` such as cpu."""
        if isinstance(self.batch, int):
            return self.batch
        pixels = AUTO_PIXELS.get(device, AUTO_PIXELS["cuda"])
        return max(1, min(AUTO_IMAGES, pixels // (height * width)))

    def levels_of(self, known: list[str]) -> list[str]:
        """Return the levels to keep, out of those that a network returns.

        Raises:
            ValueError: If it does not return one.
        """
        if self.levels is None:
            return known
        for level in self.levels:
            if level not in known:
                raise ValueError(
                    f"unknown level {level!r}{did_you_mean(level, known)} the network returns {', '.join(known)}"
                )
        return [level for level in known if level in self.levels]
