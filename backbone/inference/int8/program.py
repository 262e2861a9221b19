"""The steps of a network, each told what it gets and gives: codes of 8 bits or floats, and which of the two are there.

A value may be wanted in both forms. Codes are made where floats come from, and floats where codes do, once, as soon as
the value is there; what nobody needs any more is let go, and a sum takes the memory of a residual that ends with it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from backbone.engine.calls import is_autocast, is_traced
from backbone.engine.finite import is_finite
from backbone.engine.folded import FoldedConv2d
from backbone.engine.int8 import ACTIVATIONS, Activation, Codes, Means, decode, encode
from backbone.inference.int8.kernel import Int8Conv2d, Kernel
from backbone.inference.int8.tracing import Call, Conv, Network, Selection, Shape, filled, names_in

Form: TypeAlias = Literal["codes", "floats"]
Place: TypeAlias = tuple[str, Form]
Values: TypeAlias = dict[Place, Any]
_Run: TypeAlias = Callable[[Values, bool], Any]


class Program:
    """A network in 8 bits, ready to run.

    Args:
        network: What it computes.
        codes: What codes of each value stand for.
        means: Of each value that a convolution takes.
        in_int8: Paths of the convolutions that compute in 8 bits.
    """

    def __init__(
        self, network: Network, codes: Mapping[str, Codes], means: Mapping[str, Means], in_int8: frozenset[str]
    ) -> None:
        self._network, self._codes, self._means, self._in_int8 = network, codes, means, in_int8
        self._wanted = self._wants()
        self.kernels: list[Kernel] = []
        self._lines: list[tuple[Place, _Run, list[Place]]] = []
        self._there: set[Place] = set()
        self._reads: list[list[Place]] = []
        self._write()
        self._let_go()

    def run(self, images: Tensor, *, kernels: bool) -> Any:  # noqa: ANN401
        """Images (N, C, H, W) -> what the network returns.

        Args:
            images: Floats.
            kernels: Whether oneDNN's kernels run, rather than the same arithmetic by torch.
        """
        values: Values = {(self._network.images, "floats"): images}
        with torch.no_grad():
            if is_autocast(images):
                with torch.autocast(images.device.type, enabled=False):
                    self._run(values, kernels)
            else:
                self._run(values, kernels)
        return filled(self._network.result, lambda name: values[name, "floats"])

    def _run(self, values: Values, kernels: bool) -> None:
        for kernel in self.kernels:
            kernel.refresh()
        for place, compute, gone in self._lines:
            values[place] = compute(values, kernels)
            for each in gone:
                del values[each]

    def _wants(self) -> dict[str, set[Form]]:
        """Return in which forms each value is read, from the last step to the first."""
        wanted: dict[str, set[Form]] = {}

        def want(name: str, form: Form) -> None:
            wanted.setdefault(name, set()).add(form)

        for name in names_in(self._network.result):
            want(name, "floats")
        for step in reversed(self._network.steps):
            if isinstance(step, Conv):
                form: Form = "codes" if step.path in self._in_int8 else "floats"
                want(step.x, form)
                if step.residual is not None:
                    want(step.residual, form)
            elif not isinstance(step, Shape):
                # a selection takes codes where they are wanted: nothing is lost, and they are a quarter of the bytes
                is_of_codes = isinstance(step, Selection) and "codes" in wanted.get(step.out, ())
                for name in step.reads():
                    want(name, "codes" if is_of_codes and name == step.x else "floats")  # type: ignore[union-attr]
        for step in self._network.steps:
            if isinstance(step, Shape) and step.x not in wanted:
                want(step.x, "floats")
        return wanted

    def _write(self) -> None:
        """Write a line for each value and form."""
        self._have(self._network.images, "floats")
        for step in self._network.steps:
            if isinstance(step, Conv) and step.path in self._in_int8:
                self._conv(step)
            elif isinstance(step, Shape):
                place: Place = (step.x, "codes" if "codes" in self._wanted[step.x] else "floats")
                self._line(step.out, "floats", [place], _shape(step, place))
            elif isinstance(step, Selection) and "codes" in self._wanted.get(step.out, ()):
                reads: list[Place] = [(name, "codes" if name == step.x else "floats") for name in step.reads()]
                self._line(step.out, "codes", reads, _selected(step))
            else:
                self._line(step.out, "floats", [(name, "floats") for name in step.reads()], _in_floats(step))

    def _conv(self, step: Conv) -> None:
        wants_codes = "codes" in self._wanted.get(step.out, ())
        gives_codes = wants_codes or step.residual is not None
        of_out = self._codes[step.out] if gives_codes else None
        of_residual = None if step.residual is None else self._codes[step.residual]
        assert isinstance(step.module, Int8Conv2d)
        kernel = Kernel(step.module, self._codes[step.x], step.act, of_out, of_residual, self._means[step.x])
        self.kernels.append(kernel)
        reads: list[Place] = [(step.x, "codes")]
        if step.residual is not None:
            reads.append((step.residual, "codes"))
        self._line(step.out, "codes" if gives_codes else "floats", reads, _Convolution(kernel, reads))

    def _line(self, name: str, form: Form, reads: list[Place], compute: _Run) -> None:
        self._lines.append(((name, form), compute, []))
        self._reads.append(reads)
        self._have(name, form)

    def _have(self, name: str, form: Form) -> None:
        """Note that a value is there, and make its other form where that one is wanted."""
        self._there.add((name, form))
        other: Form = "floats" if form == "codes" else "codes"
        if other in self._wanted.get(name, ()) and (name, other) not in self._there:
            codes, place = self._codes[name], (name, form)
            convert = encode if other == "codes" else decode
            self._line(name, other, [place], lambda values, _: convert(values[place], codes))

    def _let_go(self) -> None:
        """Let each value go after the last line that reads it, and reuse the memory of residuals that go."""
        kept = set(names_in(self._network.result))
        last: dict[Place, int] = {}
        for number, ((place, _, _), reads) in enumerate(zip(self._lines, self._reads, strict=True)):
            last[place] = number
            for each in reads:
                last[each] = number
        for place, number in last.items():
            name, form = place
            if form == "codes" or name not in kept:
                self._lines[number][2].append(place)
        slices = [step for step in self._network.steps if isinstance(step, Selection) and step.is_view]
        shared = {name for step in slices for name in (step.x, step.out)}  # memory that has two names
        for number, (_, compute, _) in enumerate(self._lines):
            if isinstance(compute, _Convolution) and len(compute.reads) > 1:
                x, residual = compute.reads
                compute.reuses = last[residual] == number and residual != x and residual[0] not in shared


class _Convolution:
    """A convolution in 8 bits as a line of a program."""

    def __init__(self, kernel: Kernel, reads: list[Place]) -> None:
        self.kernel, self.reads, self.reuses = kernel, reads, False
        self._x, self._residual = reads[0], reads[1] if len(reads) > 1 else None

    def __call__(self, values: Values, kernels: bool) -> Tensor:
        residual = None if self._residual is None else values[self._residual]
        return self.kernel(values[self._x], residual, self.reuses, kernels)


def _selected(step: Selection) -> _Run:
    return lambda values, _: step.run_on_codes(values[step.x, "codes"], lambda name: values[name, "floats"])


def _shape(step: Shape, place: Place) -> _Run:
    return lambda values, _: step.run(values[place])


def _in_floats(step: Conv | Selection | Call) -> _Run:
    if not isinstance(step, Conv):
        call = step.call if isinstance(step, Selection) else step
        return lambda values, _: call.run(lambda name: values[name, "floats"])
    return lambda values, _: in_floats(
        step, values[step.x, "floats"], None if step.residual is None else values[step.residual, "floats"]
    )


def in_floats(step: Conv, x: Tensor, residual: Tensor | None) -> Tensor:
    """Return what ``step`` computes, in floats."""
    conv, act = step.module, step.act
    is_ours = type(conv) is FoldedConv2d and not is_traced(x) and conv.takes(x)
    if is_ours and is_finite(x, residual) and conv.is_finite():  # the kernel's ReLU hides NaN
        out = conv.fused(x, residual if act in ("none", "relu") else None, relu=act == "relu")
        return out if act in ("none", "relu") else after(out, residual, act)
    return after(conv(x), residual, act)


def after(out: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
    """Return what follows a convolution."""
    return ACTIVATIONS[act](out if residual is None else out + residual)
