"""Where in a model the weights of a backbone go."""

from torch import nn

from backbone.features import Backbone, find_backbone
from backbone.providers.resnet.blocks import BasicBlock, Bottleneck

_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


class _Parts(Backbone):
    """The modules of one of our ResNets, taken out of it, as the backbone they were."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        children = dict(parts.named_children())
        for name in _PARTS:
            if name in children:
                self.add_module(name, children[name])
        layers = [name for name in _PARTS if name.startswith("layer") and name in children]
        self.stage_modules = {"stem": ("conv1", "bn1")} | {f"c{int(name[-1]) + 1}": (name,) for name in layers}
        unbuilt = [f"{name}." for name in _PARTS if name not in children]
        self.unbuilt_prefixes = (*unbuilt, "fc.")


def backbone_within(model: nn.Module) -> Backbone:
    """Return the backbone in ``model``, or what stands for it where another library took its modules out of it.

    torchvision's IntermediateLayerGetter does so, and with it every BackboneWithFPN: the modules are ours, shared, and
    the backbone around them is gone.

    Raises:
        ValueError: If there is none, or more than one.
    """
    if not any(isinstance(module, Backbone) for module in model.modules()):
        taken_out = [module for module in model.modules() if _holds_parts(module)]
        if len(taken_out) == 1:
            return _Parts(taken_out[0])
    return find_backbone(model)


def _holds_parts(module: nn.Module) -> bool:
    """Whether the children of ``module`` are those of our ResNets, from the stem on."""
    children = dict(module.named_children())
    first = children.get("layer1")
    return (
        {"conv1", "bn1"} <= children.keys()
        and isinstance(first, nn.Sequential)
        and (len(first) > 0 and all(isinstance(block, BasicBlock | Bottleneck) for block in first))
    )
