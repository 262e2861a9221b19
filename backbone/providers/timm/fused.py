"""timm's residual blocks and convolution-norm-activation units on the engine.

The classes are timm's own; their ``forward`` asks the engine first and is timm's otherwise. Parameters, names and
results stay what they were. What more a block has (attention, blurring, activations other than ReLU, drop layers at
work) stays with timm's ``forward``.
"""

from typing import Final

from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.mlp import Mlp
from timm.models import regnet, resnet
from torch import Tensor, nn

from backbone.engine import (
    Parts,
    conv_norm_act,
    has_hook,
    has_hook_within,
    mlp,
    register_block,
    register_mlp,
    register_pairs,
    register_sequence,
    residual_block,
    run_blocks,
)
from backbone.norm import thaw_norms


def fuse(network: nn.Module) -> None:
    """Let the stages, blocks and units in ``network`` that timm shares between families ask the engine."""
    for module in network.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        elif hasattr(type(module), "reparameterize"):
            module.__class__ = _thawing(type(module))
        elif type(module) is nn.Sequential:
            children = list(module)
            if any(type(child) in (resnet.BasicBlock, resnet.Bottleneck) for child in children):
                module.__class__ = FusedStage
            elif any(hasattr(child, "running_var") for child in children):
                module.__class__ = FusedLayers


class FusedBasicBlock(resnet.BasicBlock):
    """timm's BasicBlock: convolutions, norms, shortcut and ReLUs are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        out = residual_block(self, x)
        return super().forward(x) if out is None else out


class FusedBottleneck(resnet.Bottleneck):
    """timm's Bottleneck: convolutions, norms, shortcut and ReLUs are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        out = residual_block(self, x)
        return super().forward(x) if out is None else out


class FusedRegNetBottleneck(regnet.Bottleneck):
    """RegNet's bottleneck: the last convolution, its norm, the shortcut and the ReLU are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        last, shortcut = self.conv3, self.downsample
        if shortcut is None or has_hook(last) or not are_idle(last.aa, self.drop_path):
            return super().forward(x)
        features, residual = self.se(self.conv2(self.conv1(x))), shortcut(x)
        is_new = type(shortcut) is FusedConvNormAct and not has_hook_within(shortcut)  # nobody else has its output
        out = conv_norm_act(features, last.conv, last.bn, residual, self.act3, reuse_residual=is_new)
        return self.act3(self.conv3(features) + residual) if out is None else out


class FusedConvNormAct(ConvNormAct):
    """A convolution, its norm and its activation as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        out = conv_norm_act(x, self.conv, self.bn)  # the norm has the activation
        if out is None:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        return out if self.aa is None else self.aa(out)


class FusedMlp(Mlp):
    """The two linear layers of a transformer's or ConvNeXt's block in an int8 copy: one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), or features (N, C, H, W) where its layers are 1x1 convolutions."""
        out = mlp(x, self.fc1, self.act, self.fc2) if _is_chain(self) else None
        return super().forward(x) if out is None else out  # type: ignore[no-untyped-call]


class Thawing(nn.Module):
    """A module of timm whose branches add up to one convolution: it thaws its norms first, for timm sums BatchNorm2d.

    ``timm.utils.reparameterize_model`` calls it. Other than that the module is timm's own.
    """

    is_reparameterized = False

    def reparameterize(self) -> None:
        """Replace the branches by their sum, once."""
        if self.is_reparameterized:
            return
        if any(isinstance(module, nn.Conv2d) and type(module).__name__ == "FoldedConv2d" for module in self.modules()):
            raise ValueError(
                f"{type(self).__name__} must be reparameterised before optimize_for_inference folds its norms, got a "
                f"folded one; call timm.utils.reparameterize_model on the model itself"
            )
        thaw_norms(self)
        super().reparameterize()  # type: ignore[misc]
        self.is_reparameterized = True

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _restored, (type(self).__mro__[2],), self.__getstate__()  # type: ignore[no-untyped-call]


def _thawing(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls`` that is ``Thawing``, too."""
    if cls not in _thawing_classes:
        _thawing_classes[cls] = type(cls.__name__, (Thawing, cls), {})
    return _thawing_classes[cls]


_thawing_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _restored(cls: type[nn.Module]) -> nn.Module:
    """Make an empty module of the subclass, whose name no pickle could find."""
    return nn.Module.__new__(_thawing(cls))


class FusedStage(nn.Sequential):
    """The blocks of a ResNet's stage."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        return run_blocks(self, x)


class FusedRegStage(regnet.RegStage):
    """The blocks of a RegNet's stage."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        if self.grad_checkpointing:
            return super().forward(x)
        return run_blocks(self.children(), x)


class FusedLayers(nn.Sequential):
    """The layers of a shortcut or a stem: a convolution, norm and ReLU in a row are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        layers = list(self)
        while layers:
            conv, *following = layers
            act = following[1] if len(following) > 1 and type(following[1]) is nn.ReLU else None
            out = None
            if isinstance(conv, nn.Conv2d) and following:
                out = conv_norm_act(x, conv, following[0], act=act)
            num_done = 1 if out is None else 2 if act is None else 3
            x, layers = (conv(x) if out is None else out), layers[num_done:]
        return x


FUSED: Final[dict[type[nn.Module], type[nn.Module]]] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    regnet.Bottleneck: FusedRegNetBottleneck,
    regnet.RegStage: FusedRegStage,
    ConvNormAct: FusedConvNormAct,
}
"""timm's classes and what they become; of a Sequential its children decide."""


def are_idle(*modules: nn.Module | None) -> bool:
    """Whether these modules do nothing now, and nobody watches them."""
    return all(module is None or (is_idle(module) and not has_hook(module)) for module in modules)


_DROPS: Final = (DropPath, DropBlock2d, nn.Dropout)


def is_idle(module: nn.Module) -> bool:
    """Whether a drop layer passes on what it gets."""
    return type(module) is nn.Identity or (type(module) in _DROPS and not module.training)


_FORWARD_OF_MLP: Final = Mlp.forward  # a tool may put another in its place


def _is_chain(block: Mlp) -> bool:
    return Mlp.forward is _FORWARD_OF_MLP and are_idle(block.drop1, block.norm, block.drop2)


def _basic_parts(block: FusedBasicBlock) -> Parts | None:
    if not are_idle(block.drop_block, block.aa, block.se, block.drop_path):
        return None
    return Parts(((block.conv1, block.bn1), (block.conv2, block.bn2)), (block.act1, block.act2), block.downsample)


def _bottleneck_parts(block: FusedBottleneck) -> Parts | None:
    if not are_idle(block.drop_block, block.aa, block.se, block.drop_path):
        return None
    layers = (block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)
    return Parts(layers, (block.act1, block.act2, block.act3), block.downsample)


register_mlp(Mlp, FusedMlp, ("fc1", "act", "fc2"), _is_chain)
register_block(FusedBasicBlock, _basic_parts)
register_block(FusedBottleneck, _bottleneck_parts)
_BASIC: Final = (("conv1", "bn1"), ("conv2", "bn2"))
_BOTTLENECK: Final = (*_BASIC, ("conv3", "bn3"))
register_pairs(resnet.ResNet, ("conv1", "bn1"))
register_pairs(resnet.BasicBlock, *_BASIC)
register_pairs(FusedBasicBlock, *_BASIC)
register_pairs(resnet.Bottleneck, *_BOTTLENECK)
register_pairs(FusedBottleneck, *_BOTTLENECK)
register_pairs(ConvNormAct, ("conv", "bn"))
register_pairs(FusedConvNormAct, ("conv", "bn"))
register_sequence(FusedStage)
register_sequence(FusedLayers)
