"""Keys of published checkpoints, as ``from_pretrained`` meets them, under our names."""

from typing import Final

from transformers.core_model_loading import PrefixChange, WeightRenaming

from backbone.weights.formats.torchvision import NAMES as TORCHVISION
from backbone.weights.formats.transformers import NAMES as RESNET
from backbone.weights.formats.transformers import RT_DETR_NAMES as RT_DETR
from backbone.weights.schemes import KeyScheme

NETWORK: Final = "network."
"""The module that holds the network in a TransformersBackbone."""

WRAPPERS: Final = ("_backbone.", "resnet.")
"""What may stand before a backbone's keys: transformers' holder of a timm model, and ResNetForImageClassification's."""

SCHEMES: Final[tuple[KeyScheme, ...]] = (TORCHVISION, RESNET, RT_DETR)


class PublishedNames(PrefixChange):
    """Renames a published backbone's keys while a model is loaded; what we save has our names.

    timm's and torchvision's names (DETR and its kin), those of transformers' ResNet (Mask2Former, MaskFormer) and
    RT-DETR's. A PrefixChange, for transformers does not revert those in models that were never loaded.

    Attributes:
        scheme: Whose names the checkpoint has, once a key told.
    """

    def __init__(self) -> None:
        super().__init__(prefix_to_remove="_backbone")
        self.scheme: KeyScheme | None = None

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the key's name in the model, and by what it was found; the key itself and None for others."""
        scope = f"{self.scope_prefix}." if self.scope_prefix else ""
        base = f"{self.base_model_prefix}." if self.base_model_prefix else ""
        for prefix in (base + scope, scope):
            if source_key.startswith(prefix):
                ours = self.our_name(source_key.removeprefix(prefix))
                return (source_key, None) if ours is None else (f"{prefix}{NETWORK}{ours}", source_key)
        return source_key, None

    def our_name(self, key: str) -> str | None:
        """Return the network's own name of a published backbone's ``key``; None if it is none.

        The first shortcut of a ResNet-D has the plain ResNet's name; keys come sorted, and the stem's, which come
        first, tell which one it is.
        """
        for wrapper in WRAPPERS:
            key = key.removeprefix(wrapper)
        known = SCHEMES if self.scheme is None else (self.scheme, *SCHEMES)
        for scheme in known:
            ours = scheme.to_ours(key)
            if ours:
                self.scheme = self.scheme or scheme
                return ours
        return None

    def was_used(self) -> bool:
        """Whether it is to be reverted when the model is saved: never."""
        return False

    def reverse_transform(self) -> WeightRenaming:
        """Return a renaming that matches nothing."""
        return WeightRenaming(r"^$", r"^$")
