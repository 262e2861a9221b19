"""Each private name of torch taken away or broken: the network and its inference copy still give the right numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backbone.engine import torch_internals

ROOT = Path(__file__).parents[2]
NAMES = [name for path in torch_internals.PATHS.values() for name in path.names]
# torch itself cannot do without these on the way of a plain network
NEEDED_BY_TORCH = {
    "autograd.forward_ad",
    "utils._python_dispatch.TorchDispatchMode",
    "nn.modules.module._has_any_global_hook",
    "_C._get_tracing_state",
    "_C._are_functorch_transforms_active",
}
DELETABLE = [name for name in NAMES if name not in NEEDED_BY_TORCH]
PROGRAM = """
import json, os, sys, warnings
import torch, torchvision
from torch import nn
torch.set_num_threads(1)

def check(name, how):
    owner_path, _, attribute = name.rpartition(".")
    owner = torch
    for part in owner_path.split(".") if owner_path else ():
        owner = getattr(owner, part)
    def raises(*args, **kwargs):
        raise RuntimeError("broken on purpose")
    def lies(*args, **kwargs):
        return torch.zeros(1) if "conv" in name or "pointwise" in name or "backward" in name else 0
    if how == "deleted":
        if owner in (torch.ops.mkldnn, torch.ops.onednn, torch.ops.aten):
            class Without:
                def __getattr__(self, key):
                    if key == attribute:
                        raise AttributeError(key)
                    return getattr(owner, key)
            setattr(torch.ops, owner_path.rpartition(".")[2], Without())
        else:
            delattr(owner, attribute)
    elif how != "harmless":
        setattr(owner, attribute, raises if how == "raises" else lies)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import backbone
        from backbone import build_backbone, BackboneConfig, engine_report, optimize_for_inference
        torch.manual_seed(0)
        model = build_backbone(BackboneConfig(name="resnet18", out_features=["c2"])).eval()
        theirs = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
        for key, value in theirs.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5)
        theirs.load_state_dict({**theirs.state_dict(), **{k: v for k, v in model.state_dict().items() if v.ndim == 4}})
        model.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in model.state_dict()})
        images = torch.randn(1, 3, 32, 32)
        expected = nn.Sequential(*list(theirs.children())[:5])(images)
        fast, errors = optimize_for_inference(model), []
        with torch.no_grad():
            for network in (model, fast, fast, fast):
                errors.append((network(images)["c2"] - expected).abs().max().item())
        ours, reference = model(images)["c2"], nn.Sequential(*list(theirs.children())[:5])(images)
        ours.square().mean().backward(); reference.square().mean().backward()
        errors.append((model.conv1.weight.grad - theirs.conv1.weight.grad).abs().max().item())
        off = [reason for reason in engine_report().paths.values() if reason != "on"]
    said = [str(w.message) for w in caught if "engine's" in str(w.message) and attribute in str(w.message)]
    return dict(errors=errors, scale=expected.abs().max().item(), off=off, said=said)

for name, how in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    child = os.fork()  # nothing has run yet: one process for each case, none of which imports torch anew
    if child == 0:
        try:
            result = check(name, how)
        except BaseException as error:
            result = dict(failed=repr(error))
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        print(stream.read())
    os.waitpid(child, 0)
"""


def broken(cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, object]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {case: json.loads(line) for case, line in zip(cases, done.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize("how", ["deleted", "raises", "lies"])
def test_without_a_private_name_the_numbers_are_right_and_its_path_is_off(how: str) -> None:
    cases = [(name, how) for name in (DELETABLE if how == "deleted" else NAMES) if name not in NEEDED_BY_TORCH]
    for (name, _), result in broken(cases).items():
        errors, scale = result.get("errors"), result.get("scale")
        assert isinstance(errors, list), (name, result)
        assert isinstance(scale, float)
        assert max(errors) <= 1e-4 * scale, (name, result)
        if name.startswith("ops.onednn") and "VNNI" in str(result["off"]):
            continue  # silently off on this CPU
        if not name.startswith("cudnn"):  # tried where there is a device
            assert result["off"], (name, result)
            assert len(result["said"]) == 1, (name, result)  # type: ignore[arg-type]


def test_with_every_name_in_place_every_path_is_on() -> None:
    (result,) = broken([("version.git_version", "harmless")]).values()
    assert [reason for reason in result["off"] if "this CPU has no VNNI" not in reason] == []  # type: ignore[attr-defined]
