"""What tools/benchmark.py measures: time, memory, and what the machine could do at most."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from backbone.command.timing import loops_for, time_loops
from backbone.command.timing import time_rounds as interleaved_rounds
from backbone.engine.int8 import Codes, convolve, has_int8, int8_weight, packed, simulate
from backbone.engine.kernels import Geometry
from benchmark.contenders import Contender
from benchmark.networks import Case, DeviceName


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or matrix product: operations and elements of its forward, passes of its backward."""

    flops: int
    elements: int
    residual: int
    backward_passes: int


@dataclass(frozen=True)
class Machine:
    """What the machine reaches at most: matrix products (FLOP/s) and copies (bytes read and written per second)."""

    rate: float
    bandwidth: float

    def roofline(self, layers: Sequence[Layer], itemsize: int) -> float:
        """The least seconds for ``layers``, each bound by arithmetic or by memory; norms and ReLUs cost nothing."""
        seconds = 0.0
        for layer in layers:
            for elements in [layer.elements + layer.residual] + [layer.elements] * layer.backward_passes:
                seconds += max(layer.flops / self.rate, elements * itemsize / self.bandwidth)
        return seconds


def count_layers(contender: Contender) -> list[Layer]:
    """Watch one forward pass of torchvision's network."""
    assert contender.network is not None
    modules = list(contender.network.modules())
    add_residual = {getattr(m, "conv3", m.conv2) for m in modules if isinstance(m, BasicBlock | Bottleneck)}
    layers: list[Layer] = []

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        (x,), weight = inputs, module.weight
        skipped = math.prod(module.stride) if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) else 1
        elements = x.numel() // skipped + weight.numel() + output.numel()
        residual = output.numel() if module in add_residual else 0
        passes = int(x.requires_grad) + int(weight.requires_grad) if output.requires_grad else 0
        layers.append(Layer(2 * output.numel() * weight[0].numel(), elements, residual, passes))

    hooks = [m.register_forward_hook(watch) for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]
    contender.forward()
    for hook in hooks:
        hook.remove()
    return layers


@functools.cache
def measure_machine(device: DeviceName, dtype: torch.dtype) -> Machine:
    """Time square matrix products of several sizes, and a copy too large for the caches.

    On the CPU the product also runs as a 1x1 convolution: torch takes another library for that, the faster one on some
    processors.
    """
    cuda = device is DeviceName.CUDA
    rate = _int8_rate() if dtype == torch.int8 else 0.0
    for size in () if rate else (4096, 8192, 16384) if cuda else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        products: list[Callable[[], object]] = [functools.partial(torch.mm, a, b, out=out)]
        if not cuda:
            pixels = a.view(1, size // 32, 32, size).permute(0, 3, 1, 2)  # channels_last
            products.append(functools.partial(torch.conv2d, pixels, b[:, :, None, None]))
        taken = min(measure(device, product) for product in products)
        rate = max(rate, 2 * size**3 / taken)
        if taken > 1:  # no kernel for this dtype: larger ones only take longer
            break
    source = torch.ones(2**31 if cuda else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Machine(rate, 2 * source.numel() / measure(device, lambda: target.copy_(source)))


def _int8_rate() -> float:
    """Operations per second of square products in 8 bits, as 1x1 convolutions; of their simulation without VNNI."""
    rate, codes, geometry = 0.0, Codes(0.02, 0), Geometry((1, 1), (0, 0), (1, 1), 1)
    for size in (512, 1024, 2048) if has_int8() else (512,):
        pixels = torch.randint(0, 256, (1, size // 32, 32, size), dtype=torch.uint8).permute(0, 3, 1, 2)
        weight = int8_weight(torch.randn(size, size, 1, 1), torch.zeros(size))
        if has_int8():
            weight = packed(weight, codes, geometry, pixels.shape)
        run = functools.partial(convolve if has_int8() else simulate, pixels, codes, weight, geometry, "relu", codes)
        rate = max(rate, 2 * size**3 / measure(DeviceName.CPU, run))
    return rate


def measure(device: DeviceName, run: Callable[[], object]) -> float:
    """The median of several timings, in seconds."""
    run()
    loops = loops_for(device, run)
    return float(np.median([time_loops(device, run, loops) for _ in range(7)]))


def synchronize(case: Case) -> None:
    """Wait until the device has done all it was given."""
    if case.device is DeviceName.CUDA:
        torch.cuda.synchronize()


def time_rounds(case: Case, contenders: Sequence[Contender], rounds: int, console: Console) -> None:
    """Time every contender once per round, in shuffled order."""
    steps = {contender.name: contender.step for contender in contenders}
    timed = interleaved_rounds(case.device, steps, rounds)
    for seconds in track(timed, str(case), total=rounds, console=console, transient=True):
        for contender in contenders:
            contender.times.append(seconds[contender.name])


def memory_of(case: Case, contender: Contender) -> int | None:
    """``Contender.memory``; None where it has no meaning."""
    contender.clear()
    if case.device is DeviceName.CUDA:
        synchronize(case)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step()
        synchronize(case)
        contender.clear()
        return torch.cuda.max_memory_allocated() - before
    return saved_bytes(contender) if case.is_train else None


def saved_bytes(contender: Contender) -> int:
    """Bytes that one forward pass saves for backward: whole storages, each once, without those of the parameters."""
    assert contender.network is not None
    weights = {parameter.untyped_storage().data_ptr() for parameter in contender.network.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = contender.forward()
    del outputs
    return sum(size for address, size in saved.items() if address not in weights)


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """The median over rounds of theirs / ours, and its 95% interval by bootstrap over rounds."""
    ratios = np.asarray(theirs) / np.asarray(ours)
    samples = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(samples, axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)
