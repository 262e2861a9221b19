"""Who takes part in tools/benchmark.py: our backbone and its peers.

A new peer is a function from a ``Case`` to a ``Contender``, added to ``PEERS``; where it cannot take part it raises
``NotHere`` with the reason.
"""

import contextlib
import dataclasses
import functools
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
import torch._inductor.config
from torch import Tensor, nn

from backbone import optimize_for_inference
from backbone.export.quantization import quantise
from benchmark.networks import (
    TIMM,
    Case,
    DeviceName,
    DtypeName,
    NotHere,
    Workload,
    calibration_of,
    detector,
    detectron2_network,
    images_of,
    import_peer,
    in_float32,
    our_network,
    timm_network,
    to_detectron2,
    torchvision_network,
    trainable_names,
)

Run: TypeAlias = Callable[[], list[Tensor]]


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name: Shown in the table.
        forward: Returns the features, or the boxes of a detector; prepares itself at the first call.
        step: What is timed: the same, or forward and backward.
        network: The module at work; None outside torch.
        parameters: The trainable parameters by their names in ``state_of``.
        first_call: Seconds of the first step, compilation included.
        error: Largest difference of a feature from the reference's in float32, in units of its largest value.
        mismatch: What else differs: in training the largest norm of a gradient's difference over the norm of that
            gradient, in a detector the fraction of detections that have no equal.
        memory: Bytes saved for backward (CPU) or allocated at the peak over what was there before (CUDA).
        held: Bytes that the contender keeps allocated between its steps (CUDA).
        times: Seconds per step, one per round.
    """

    name: str
    forward: Run
    step: Run
    network: nn.Module | None = None
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    first_call: float = 0.0
    error: float = 0.0
    mismatch: float = 0.0
    memory: int | None = None
    held: int | None = None
    times: list[float] = field(default_factory=list)

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None


def tensors_of(output: object) -> list[Tensor]:
    """The tensors of a library's output, finest first; of detections a row (image, label, score, box) each."""
    if isinstance(output, Mapping):
        return [tensor for tensor in output.values() if isinstance(tensor, Tensor)]
    assert isinstance(output, list | tuple)
    if output and isinstance(output[0], Mapping):
        images = (torch.full_like(found["scores"], number) for number, found in enumerate(output))
        heads = (torch.stack((n, d["labels"], d["scores"]), 1) for n, d in zip(images, output, strict=True))
        return [torch.cat([torch.cat((head, d["boxes"]), 1) for head, d in zip(heads, output, strict=True)])]
    return list(output)


def inference(
    case: Case,
    name: str,
    network: nn.Module | None,
    prepare: Callable[[], Callable[..., object]] | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Contender:
    """Make a contender that runs ``network``, or what ``prepare`` returns, without gradients."""
    images = images_of(case)
    arguments = list(images) if case.workload is Workload.DETECTOR else images
    prepared = functools.cache(prepare) if prepare else lambda: network

    def forward() -> list[Tensor]:
        call = prepared()
        assert call is not None
        with torch.inference_mode(), autocast():
            return tensors_of(call(arguments))

    return Contender(name, forward, forward, network)


def training(case: Case, name: str, network: nn.Module, call: Callable[..., object]) -> Contender:
    """Make a contender of forward and backward, from given gradients of the features; stem and C2 are frozen."""
    images = images_of(case)
    trainable = trainable_names(case.name, case.norm)
    names = {} if case.name.startswith(TIMM) else {to_detectron2(key): key for key in trainable}
    found = {key.removeprefix("network."): parameter for key, parameter in network.named_parameters()}
    parameters = {names.get(key, key): parameter for key, parameter in found.items()}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in trainable)

    def forward() -> list[Tensor]:
        with case.autocast():
            return tensors_of(call(images))

    def step() -> list[Tensor]:
        contender.clear()
        features = forward()
        trained = [feature for feature in features if feature.requires_grad]
        gradients = [gradient_of(feature.shape, feature.dtype, feature.device) for feature in trained]
        torch.autograd.backward(trained, gradients)
        return features

    contender = Contender(name, forward, step, network, {key: parameters[key] for key in trainable})
    return contender


@functools.cache
def gradient_of(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What arrives from a pyramid's convolutions: dense, channels_last. A loss here would be timed with the step.

    Of one sign: where gradients cancel, little is left to compare with those that a ReLU at zero switches.
    """
    gradient = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return gradient.to(device, dtype, memory_format=torch.channels_last)


def eager(case: Case, name: str, network: nn.Module, call: Callable[..., object] | None = None) -> Contender:
    """Make a contender of a network as it stands (or of ``call``, made of it), under autocast."""
    if case.is_train:
        return training(case, name, network, call or network)
    return inference(case, name, network, (lambda: call) if call else None, case.autocast)


def our_contender(case: Case) -> Contender:
    """Ours as it is meant to be used."""
    network = our_network(case)
    if case.is_train:
        return eager(case, "ours", network)
    start = time.perf_counter()
    optimized = _optimised(case, network)
    seconds = time.perf_counter() - start
    # A detector's heads follow autocast, as they do in torchvision's; bare features need none.
    autocast = case.autocast if case.workload is Workload.DETECTOR else contextlib.nullcontext
    contender = inference(case, "ours", optimized, autocast=autocast)
    contender.first_call = seconds
    return contender


def _optimised(case: Case, network: nn.Module) -> nn.Module:
    if case.is_int8:
        return optimize_for_inference(network, dtype=case.dtype, calibration=calibration_of(case))
    return optimize_for_inference(network, dtype=case.dtype if case.is_half else None)


def our_contender_in(name: DtypeName) -> Callable[[Case], Contender]:
    """Ours in another dtype, which int8 has to beat."""

    def peer(case: Case) -> Contender:
        contender = our_contender(dataclasses.replace(case, dtype_name=name))
        contender.name = f"ours {name}"
        return contender

    return peer


def our_graphed_contender(case: Case) -> Contender:
    """Ours with one CUDA graph per image shape."""
    graphed = optimize_for_inference(our_network(case), dtype=case.dtype if case.is_half else None, cuda_graphs=True)

    def prepare() -> Callable[..., object]:
        with torch.inference_mode():
            graphed(torch.zeros_like(images_of(case)))  # a graph that ignored its images would be found out
        return graphed

    return inference(case, "ours (CUDA graphs)", graphed, prepare)


def our_plain_contender(case: Case) -> Contender:
    """Ours for inference without ``optimize_for_inference``."""
    return eager(case, "ours (not optimised)", our_network(case))


def torchvision_peer(case: Case) -> Contender:
    """Torchvision as users run it; ``tuned_peer`` has it as they might."""
    network = detector(case) if case.workload is Workload.DETECTOR else torchvision_network(case)
    return eager(case, "torchvision", network)


def reference_contender(case: Case) -> Contender:
    """Who is right: torchvision, or timm about its own models."""
    return PEERS["timm"](case) if case.name.startswith(TIMM) else torchvision_peer(case)


def tuned_peer(name: str, build: Callable[[Case], nn.Module]) -> Callable[[Case], Contender]:
    """An eager library for inference as a user in the know runs it.

    In channels_last, on the CPU too, and with its weights cast once in place of autocast, which casts at every image.
    """

    def peer(case: Case) -> Contender:
        network = build(case).to(case.dtype).to(memory_format=torch.channels_last)

        def call(images: Tensor) -> object:
            return network(images.to(case.dtype, memory_format=torch.channels_last))

        return inference(case, f"{name}, tuned", network, lambda: call)

    return peer


def torchvision_float32_peer(case: Case) -> Contender:
    """Torchvision without autocast, which half precision on the CPU has to beat as well."""
    contender = torchvision_peer(in_float32(case))
    contender.name = "torchvision float32"
    return contender


def compiled_peer(case: Case) -> Contender:
    """Torchvision compiled: on CUDA with max-autotune, on the CPU with its weights as constants."""
    if case.workload is Workload.DETECTOR:
        raise NotHere("compiles backbones only: a detector's shapes change")
    network = torchvision_network(case)
    if case.device is DeviceName.CUDA:
        return eager(case, "torchvision-compile", network, torch.compile(network, mode="max-autotune", dynamic=False))
    compiled = torch.compile(network, dynamic=False)

    def call(images: Tensor) -> object:
        # as an option of compile() it does half its work
        with torch._inductor.config.patch(freezing=not case.is_train):
            return compiled(images)

    return eager(case, "torchvision-compile", network, call)


def library_peer(name: str, build: Callable[[Case], nn.Module]) -> Callable[[Case], Contender]:
    """Another library's backbone."""

    def peer(case: Case) -> Contender:
        if case.workload is Workload.DETECTOR:
            raise NotHere("its detectors are other networks")
        return eager(case, name, build(case))

    return peer


@functools.lru_cache(maxsize=1)
def onnx_of(case: Case) -> bytes:
    """Torchvision's network as ONNX."""
    import_peer("onnx")
    if case.workload is not Workload.INFER or case.device is not DeviceName.CPU:
        raise NotHere("takes part in inference on the CPU only")
    network, file = torchvision_network(case), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation: the new one needs onnxscript
        torch.onnx.export(
            network,
            (images_of(case),),
            file,  # type: ignore[arg-type]
            input_names=["images"],
            dynamo=False,
            opset_version=17,
        )
    return file.getvalue()


def onnxruntime_peer(case: Case) -> Contender:
    """ONNX Runtime on the CPU, in float32, or in int8 by its own static quantisation (QDQ)."""
    onnxruntime = import_peer("onnxruntime")
    if case.is_half:
        raise NotHere("its CPU convolutions are float32 or int8")
    model, images = onnx_of(case), images_of(case).numpy()
    if case.is_int8:
        model = quantised_by_onnxruntime(case, model)

    def prepare() -> Callable[..., object]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it disturbs the next contender
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        return lambda _: list(map(torch.from_numpy, session.run(None, feed)))

    return inference(case, "onnxruntime", None, prepare)


def quantised_by_onnxruntime(case: Case, model: bytes) -> bytes:
    """Return a graph in int8, prepared as ONNX Runtime's manual asks."""
    onnx, preparing = import_peer("onnx"), import_peer("onnxruntime.quantization.shape_inference")
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        before.write_bytes(model)
        preparing.quant_pre_process(str(before), str(after), skip_symbolic_shape=True)
        graph: bytes = quantise(onnx.load(after), calibration_of(case), Path(folder)).SerializeToString()
    return graph


def openvino_peer(case: Case) -> Contender:
    """OpenVINO on the CPU, in int8 by NNCF's post-training quantisation."""
    openvino = import_peer("openvino")
    if case.dtype == torch.float16:
        raise NotHere("its CPU plugin computes in float32, bfloat16 or int8")
    nncf = import_peer("nncf") if case.is_int8 else None
    model, images = onnx_of(case), images_of(case).numpy()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if case.is_half else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }

    def prepare() -> Callable[..., object]:
        core = openvino.Core()
        network = core.read_model(model)
        if nncf is not None:
            batches = calibration_of(case)
            data = nncf.Dataset(batches, lambda batch: batch.numpy())
            network = nncf.quantize(network, data, subset_size=len(batches))
        request = core.compile_model(network, "CPU", settings).create_infer_request()

        def call(_: object) -> list[Tensor]:
            results = request.infer([images], share_inputs=True, share_outputs=True)
            return [torch.from_numpy(value) for value in results.values()]

        return call

    return inference(case, "openvino", None, prepare)


PEERS: dict[str, Callable[[Case], Contender]] = {
    "torchvision": torchvision_peer,
    "torchvision-compile": compiled_peer,
    "timm": library_peer("timm", timm_network),
    "detectron2": library_peer("detectron2", detectron2_network),
    "onnxruntime": onnxruntime_peer,
    "openvino": openvino_peer,
}


IN_INT8 = ("onnxruntime", "openvino")
EAGER = {"torchvision": torchvision_network, "timm": timm_network, "detectron2": detectron2_network}


def builders_of(case: Case, peers: Sequence[str], compile_at: Sequence[int]) -> dict[str, Callable[[Case], Contender]]:
    """Who takes part, by name, ours first."""
    builders: dict[str, Callable[[Case], Contender]] = {"ours": our_contender}
    if case.is_int8:
        builders |= {f"ours {name}": our_contender_in(name) for name in (DtypeName.FLOAT32, DtypeName.BFLOAT16)}
        return builders | {name: PEERS[name] if name in IN_INT8 else without_int8 for name in peers}
    if not case.is_train:
        builders["ours (not optimised)"] = our_plain_contender
    if case.workload is Workload.INFER and case.device is DeviceName.CUDA:
        builders["ours (CUDA graphs)"] = our_graphed_contender
    if "torchvision" in peers and case.is_half and case.device is DeviceName.CPU and case.workload is Workload.INFER:
        builders["torchvision float32"] = torchvision_float32_peer
    for name in peers:
        builders[name] = PEERS[name]
        if name in EAGER and case.workload is Workload.INFER and (case.is_half or case.device is DeviceName.CPU):
            builders[f"{name}, tuned"] = tuned_peer(name, EAGER[name])
    if "torchvision-compile" in builders and compile_at and case.batch not in compile_at:
        builders["torchvision-compile"] = not_compiled
    return builders


def without_int8(case: Case) -> Contender:
    """Stand in for an eager library."""
    raise NotHere("has no int8 of its own that runs without another program")


def not_compiled(case: Case) -> Contender:
    """Stand in for the compiled peer at a batch that --compile-peers-at leaves out."""
    raise NotHere(f"not compiled at batch {case.batch}, see --compile-peers-at")
