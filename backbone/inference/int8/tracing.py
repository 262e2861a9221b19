"""A network as a list of steps: convolutions with their residual and activation, pools, and whatever else it calls."""

import functools
import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Final, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from backbone.engine.calls import has_hook, is_plain
from backbone.engine.folded import FoldedConv2d
from backbone.engine.int8 import Activation, max_pool
from backbone.features import Backbone
from backbone.inference.folding import constants_of, fold, remainder_of
from backbone.inference.int8.kernel import SameConv2d, output_size

_INPLACE_NAMES: Final = ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow")
_ADDITIONS: Final = (operator.add, operator.iadd, torch.add)
_IN_PLACE: Final = (operator.setitem, *(each for name, each in vars(operator).items() if name in _INPLACE_NAMES))
_ACTIVATIONS: Final[dict[type[nn.Module], Activation]] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: Final[dict[object, Activation]] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_LEVELS_ABOVE: Final = "torchvision.ops.feature_pyramid_network.ExtraFPNBlock"
_SAME_CONV: Final = "timm.layers.conv2d_same.Conv2dSame"
_DROPS: Final = (nn.Dropout, nn.Dropout2d)
_DROPS_OF_TIMM: Final = ("DropPath", "DropBlock2d")


@dataclass(frozen=True, slots=True)
class Conv:
    """``act(conv(x) + residual)``.

    Attributes:
        out: Name of the result.
        x: Name of the input.
        residual: Name of what is added, if anything is.
        act: What follows.
        path: The convolution's path in the network, and its number among several calls of it.
        module: The convolution.
        addition: Name of the sum alone, if there is one.
    """

    out: str
    x: str
    residual: str | None
    act: Activation
    path: str
    module: FoldedConv2d
    addition: str | None = None

    def reads(self) -> list[str]:
        """Return the names of the values it takes."""
        return [self.x] if self.residual is None else [self.x, self.residual]


@dataclass(frozen=True, slots=True)
class Value:
    """Stands for a value among the arguments of a call, and in what a network returns."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """Anything else: computed in floats, as it is written.

    Attributes:
        out: Name of the result.
        target: A module, a function, the name of a method, or the path of a parameter.
        args: Its arguments; of a method the first is its owner, of a parameter the only one.
        kwargs: Those by name.
        kind: Which of these ``target`` is, as torch.fx calls it.
    """

    out: str
    target: Any
    args: Any
    kwargs: Any
    kind: str

    def reads(self) -> list[str]:
        """Return the names of the values it takes."""
        return names_in((self.args, self.kwargs))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle functions of torch by name: some are closures."""
        name = next((name for name, each in vars(F).items() if each is self.target), None)
        target = self.target if name is None else _Functional(name)
        return _call, (self.out, target, self.args, self.kwargs, self.kind)

    def run(self, value_of: Callable[[str], Any]) -> Any:  # noqa: ANN401
        """Return what it computes of the values of other nodes."""
        args, kwargs = filled(self.args, value_of), filled(self.kwargs, value_of)
        if self.kind == "get_attr":
            return functools.reduce(getattr, self.target.split("."), args[0])
        if self.kind == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Functional:
    """Stands in a pickle for a function of ``torch.nn.functional``."""

    name: str


def _call(out: str, target: Any, args: Any, kwargs: Any, kind: str) -> Call:  # noqa: ANN401
    return Call(out, getattr(F, target.name) if isinstance(target, _Functional) else target, args, kwargs, kind)


@dataclass(frozen=True, slots=True)
class Selection:
    """Gives numbers of ``x`` as they are: maxima of windows, nearest neighbours, a slice. Codes can go through it.

    Attributes:
        call: What computes it, of floats.
        x: Name of the value whose numbers it gives; others that it takes are sizes.
    """

    call: Call
    x: str

    @property
    def out(self) -> str:
        """Name of the result."""
        return self.call.out

    @property
    def is_view(self) -> bool:
        """Whether the result may lie in the memory of ``x``."""
        return self.call.target is operator.getitem

    def reads(self) -> list[str]:
        """Return the names of the values it takes."""
        return self.call.reads()

    def run_on_codes(self, codes: Tensor, value_of: Callable[[str], Any]) -> Tensor:
        """Return what it gives of ``codes`` (N, C, H, W)."""
        module = self.call.target
        if isinstance(module, nn.MaxPool2d):
            return max_pool(codes, module.kernel_size, module.stride, module.padding)  # type: ignore[arg-type]
        selected: Tensor = self.call.run(lambda name: codes if name == self.x else value_of(name))
        return selected.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of what a convolution makes of ``x``, before it has done so: a pyramid enlarges the level above to it.

    Attributes:
        out: Name of the result.
        x: Name of the convolution's input.
        module: The convolution.
    """

    out: str
    x: str
    module: FoldedConv2d

    def reads(self) -> list[str]:
        """Return the names of the values it takes."""
        return [self.x]

    def run(self, x: Tensor) -> torch.Size:
        """Return it, for an input (N, C_in, H, W) of floats or codes."""
        return torch.Size((len(x), self.module.out_channels, *output_size(self.module, x)))


def filled(template: Any, value_of: Callable[[str], Any]) -> Any:  # noqa: ANN401
    """Return ``template``, containers of any depth, with every ``Value`` replaced by what ``value_of`` returns."""
    if isinstance(template, Value):
        return value_of(template.name)
    if isinstance(template, dict):
        return {name: filled(each, value_of) for name, each in template.items()}
    if isinstance(template, list | tuple):
        return type(template)([filled(each, value_of) for each in template])
    if isinstance(template, slice):
        return slice(*(filled(each, value_of) for each in (template.start, template.stop, template.step)))
    return template


def names_in(template: Any) -> list[str]:  # noqa: ANN401
    """Return the names of the values in ``template``."""
    names: list[str] = []
    filled(template, names.append)
    return names


def _template(argument: Any) -> Any:  # noqa: ANN401
    """Return an argument of a node of torch.fx in Python's own containers, with names for nodes."""
    if isinstance(argument, fx.Node):
        return Value(argument.name)
    if isinstance(argument, dict):
        return {name: _template(each) for name, each in argument.items()}
    if isinstance(argument, list | tuple):
        return (tuple if isinstance(argument, tuple) else list)(map(_template, argument))
    if isinstance(argument, slice):
        return slice(*map(_template, (argument.start, argument.stop, argument.step)))
    return argument


Step: TypeAlias = Conv | Selection | Shape | Call


@dataclass(frozen=True, slots=True)
class Network:
    """What a traced method computes.

    Attributes:
        images: Name of its input.
        steps: In order.
        result: What it returns: names in the containers of the network's own.
        fingerprint: A digest of all this; of two networks with the same one, values of a name are the same.
    """

    images: str
    steps: tuple[Step, ...]
    result: Any
    fingerprint: str

    def convs(self) -> list[Conv]:
        """Return the convolutions."""
        return [step for step in self.steps if isinstance(step, Conv)]


class _Tracer(fx.Tracer):
    """Looks into modules that hold a convolution of an inference copy; others are called."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is called as it is."""
        if any(_full_name(cls) == _LEVELS_ABOVE for cls in type(m).__mro__):  # takes and returns lists
            return False
        return isinstance(m, nn.Conv2d) or not any(
            isinstance(each, FoldedConv2d) or _is_same_conv(each) for each in m.modules()
        )


def trace(root: Backbone, apart: frozenset[str] = frozenset()) -> Network:
    """Return what ``root`` computes, convolutions with what follows them.

    Args:
        root: A backbone of an inference copy, in eval mode.
        apart: Names of sums that are computed by themselves, since their sides differ in shape.

    Raises:
        ValueError: If its ``forward`` depends on more than its modules, such as an image's size or values.
    """
    graph = _graph(root)
    absorbed: set[fx.Node] = set()
    convs: dict[fx.Node, Conv] = {}  # by the last node of each
    called: dict[str, int] = {}
    for node in graph.nodes:
        module = _module(root, node)
        if isinstance(module, FoldedConv2d) and len(node.args) == 1 and not node.kwargs:
            number = called[str(node.target)] = called.get(str(node.target), 0) + 1
            path = str(node.target) if number == 1 else f"{node.target}:{number}"
            last, act, addition, residual = _follow(root, node, absorbed, apart)
            convs[last] = Conv(last.name, node.args[0].name, residual, act, path, module, addition)
            absorbed.add(node)
    steps: list[Step] = []
    images, result = "", None
    for node in graph.nodes:
        if node in convs:
            steps.append(convs[node])
        elif node.op == "placeholder":
            images = images or node.name
        elif node.op == "output":
            result = _template(node.args[0])
        elif node not in absorbed:
            steps.append(_other(root, node))
    text = repr([_told(step) for step in steps]) + repr(result)
    return Network(images, tuple(steps), result, hashlib.sha256(text.encode()).hexdigest()[:16])


def fold_by_flow(root: Backbone, keep_weights: bool) -> int:
    """Fold each batch norm that takes a convolution's output, and nothing else does, in place; return how many.

    It finds those that no registered pair names.
    """
    graph, folded = _graph(root), 0
    targets = [node.target for node in graph.nodes]
    for node in graph.nodes:
        conv, users = _module(root, node), list(node.users)
        if _is_same_conv(conv):
            conv = SameConv2d(conv, conv.weight, _bias(conv), keep_weight=keep_weights)
            root.set_submodule(node.target, conv)
        norm = _module(root, users[0]) if len(users) == 1 else None
        if not isinstance(conv, FoldedConv2d) or norm is None or has_hook(conv) or has_hook(norm):
            continue
        constants = constants_of(norm)
        if constants is None or targets.count(node.target) > 1 or targets.count(users[0].target) > 1:
            continue
        into = fold(conv, constants, keep_weights)
        into.__class__ = type(conv)  # pads as before
        root.set_submodule(node.target, into)
        root.set_submodule(users[0].target, remainder_of(norm))
        folded += 1
    return folded


def _is_same_conv(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is timm's convolution that pads as TensorFlow does, with plain weights and no hooks."""
    if module is None or _full_name(type(module)) != _SAME_CONV:
        return False
    return not has_hook(module) and all(map(is_plain, module.parameters()))


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _graph(root: Backbone) -> fx.Graph:
    """Return the graph of ``root`` without layers that pass on what they get."""
    try:
        graph = _Tracer(root.traced_method).trace(root)
    except Exception as error:  # whatever a foreign forward may raise at a proxy
        raise ValueError(
            f"dtype=torch.int8 needs a network whose forward is the same for all images, got {type(root).__name__}: "
            f"{' '.join(str(error).split())[:200]}; use dtype=torch.bfloat16"
        ) from None
    for node in list(graph.nodes):
        module = _module(root, node)
        if module is not None and _is_idle(module):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        conv = _module(root, node.args[0]) if _asks_for_shape(node) else None
        if isinstance(conv, FoldedConv2d) and len(node.args[0].args) == 1:
            with graph.inserting_before(node.args[0]):
                shape = graph.call_function(_shape_after, (node.args[0].args[0], node.args[0].target))
            node.replace_all_uses_with(shape)
    for node in reversed(list(graph.nodes)):  # a size that was looked at, and the like
        if not node.users and node.op in ("call_module", "call_function", "get_attr") and not _writes(root, node):
            graph.erase_node(node)
    return graph


def _follow(
    root: nn.Module, conv: fx.Node, absorbed: set[fx.Node], apart: frozenset[str]
) -> tuple[fx.Node, Activation, str | None, str | None]:
    """Return the last node that the kernel of ``conv`` can take along, its activation, its sum and what that adds."""
    last, addition, residual = conv, None, None
    act: Activation = "none"
    while act == "none" and len(last.users) == 1:
        (user,) = last.users
        if user in absorbed:
            break
        following = _activation(root, user)
        if residual is None and following is None and _is_addition(user) and user.name not in apart:
            (other,) = set(user.all_input_nodes) - {last}
            if _writes(root, user) and user.args[0] is other and len(other.users) > 1:
                break
            addition, residual = user.name, other.name
        elif following is not None and (residual is None or following == "relu"):
            act = following
        else:
            break
        absorbed.add(user)
        last = user
    return last, act, addition, residual


def _is_addition(node: fx.Node) -> bool:
    """Whether ``node`` adds two different values."""
    is_sum = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    nodes = [each for each in node.args if isinstance(each, fx.Node)]
    return is_sum and not node.kwargs and len(nodes) == len(node.args) == len(set(nodes)) == 2  # noqa: PLR2004


def _activation(root: nn.Module, node: fx.Node) -> Activation | None:
    module = _module(root, node)
    if module is not None:
        return None if has_hook(module) else _ACTIVATIONS.get(type(module))
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu"
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _other(root: nn.Module, node: fx.Node) -> Step:
    """Return the step of a node that belongs to no convolution."""
    module, inputs = _module(root, node), node.all_input_nodes
    if node.target is _shape_after:
        return Shape(node.name, inputs[0].name, root.get_submodule(node.args[1]))  # type: ignore[arg-type]
    if _writes(root, node) and len(inputs[0].users) > 1:
        raise ValueError(
            f"dtype=torch.int8 needs values that no other step overwrites, got {node.name}, which changes "
            f"{inputs[0]} in place for others to see; use dtype=torch.bfloat16"
        )
    args = (root,) if node.op == "get_attr" else _template(node.args)
    call = Call(node.name, node.target if module is None else module, args, _template(node.kwargs), node.op)
    return Selection(call, inputs[0].name) if _selects(node, module) else call


def _asks_for_shape(node: fx.Node) -> bool:
    return node.target is getattr and str(node.args[1]) == "shape"


def _shape_after(x: Tensor, path: str) -> torch.Size:
    """Stands in a graph for the shape of what the convolution at ``path`` makes of ``x``; a ``Shape`` computes it."""
    raise NotImplementedError


def _selects(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether ``node`` gives numbers of its first input as they are, and codes of four dimensions can go through."""
    if module is not None:
        return _is_pool(module) and len(node.all_input_nodes) == len(node.args) == 1
    if node.target is F.interpolate:
        mode = node.kwargs.get("mode", "nearest")
        return len(node.args) == 1 and mode in ("nearest", "nearest-exact")
    if node.target is operator.getitem and isinstance(node.args[1], tuple):
        return all(isinstance(each, slice | EllipsisType) for each in node.args[1])
    return False


def _is_pool(module: nn.Module) -> TypeGuard[nn.MaxPool2d]:
    """Whether codes can go through ``module``: square windows that lie next to each other in pixels."""
    if type(module) is not nn.MaxPool2d or has_hook(module):
        return False
    sides = (module.kernel_size, module.stride, module.padding)
    is_dense = module.dilation == 1 and not module.ceil_mode and not module.return_indices
    return bool(is_dense) and all(type(side) is int for side in sides)


def _writes(root: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` changes its first input in place."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        is_named_so = name.endswith("_") and not name.endswith("__")
        return is_named_so or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
    return bool(getattr(_module(root, node), "inplace", False))


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None  # type: ignore[arg-type]


def _is_idle(module: nn.Module) -> bool:
    is_off = type(module) in _DROPS or type(module).__name__ in _DROPS_OF_TIMM
    return (type(module) is nn.Identity or (is_off and not module.training)) and not has_hook(module)


def _told(step: Step) -> object:
    """Return what tells a step from others, without the numbers in it."""
    if isinstance(step, Conv):
        conv = step.module
        return (
            step.out,
            step.x,
            step.residual,
            step.act,
            step.path,
            tuple(conv.geometry),
            conv.in_channels,
            conv.out_channels,
        )
    if isinstance(step, Shape):
        return (step.out, step.x, tuple(step.module.geometry), step.module.kernel_size)
    if isinstance(step, Selection):
        module: Any = step.call.target
        if isinstance(module, nn.MaxPool2d):
            return (step.out, step.x, module.kernel_size, module.stride, module.padding)
        return _told(step.call)
    target = step.target
    name = type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", target)
    return (step.out, name, "" if step.kind == "get_attr" else repr(step.args), repr(step.kwargs))
