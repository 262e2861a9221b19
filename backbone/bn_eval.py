"""Batch norm with fixed statistics and trained weight and bias: what fine-tuning recipes mean by ``norm_eval``."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EvalBatchNorm2d(nn.Module):
    """Batch norm that always normalises by its running statistics; ``weight`` and ``bias`` train.

    It gives the outputs and gradients of nn.BatchNorm2d in evaluation mode, and has its parameters, buffers and
    state-dict keys. ``train()`` cannot move it, and being no BatchNorm2d, neither can a converter of batch norms.

    Args:
        num_features: Number of channels.
        eps: Added to the variance, as in nn.BatchNorm2d.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum, self.affine, self.track_running_stats = 0.1, True, True  # nn.BatchNorm2d's
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, ...), of any number of dimensions -> the same shape and dtype, also under autocast."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what scale and shift are computed from, besides ``eps``; the first two train."""
        return self.weight, self.bias, self.running_mean, self.running_var

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return (C,), (C,) with ``output = input * scale + shift``, in float32 or better, and with gradients."""
        dtype = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.to(dtype) * torch.rsqrt(self.running_var.to(dtype) + self.eps)
        return scale, torch.addcmul(self.bias.to(dtype), self.running_mean.to(dtype), scale, value=-1)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode; children, such as an activation, follow ``mode``."""
        super().train(mode)
        self.training = False
        return self

    def extra_repr(self) -> str:
        """Show what print(model) needs to tell one norm from another."""
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        # Libraries whose frozen norms do not count batches (torchvision, detectron2) leave the counter out.
        state_dict = {f"{prefix}num_batches_tracked": uncounted(self), **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)


def uncounted(norm: nn.Module) -> Tensor:
    """Return the number of batches that ``norm`` keeps where a state dict has none; from the meta device it is 0."""
    counter: Tensor = norm.num_batches_tracked  # type: ignore[assignment]
    return torch.zeros_like(counter, device="cpu") if counter.is_meta else counter


_eval_forms: dict[type[nn.Module], type[EvalBatchNorm2d]] = {
    nn.BatchNorm1d: EvalBatchNorm2d,
    nn.BatchNorm2d: EvalBatchNorm2d,
    nn.SyncBatchNorm: EvalBatchNorm2d,
}


def register_eval_form(norm: type[nn.Module], form: type[EvalBatchNorm2d]) -> None:
    """Let ``fix_statistics`` turn layers of class ``norm``, a batch norm that computes something more, into a ``form``.

    The layer keeps its children, such as an activation. The form's ``forward`` must equal the layer's in evaluation
    mode.
    """
    _eval_forms[norm] = form


def fix_statistics(module: nn.Module) -> nn.Module:
    """Turn every batch norm in ``module`` into an EvalBatchNorm2d, in place; modules and parameters stay the same.

    Raises:
        ValueError: If a batch norm has no running statistics, no affine parameters, or is of a class that computes
            something more. Nothing is touched then.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if type(norm) not in _eval_forms or norm.bias is None or not norm.track_running_stats:
            raise ValueError(
                f"norm must not be bn_eval for a network with {norm!r}: it needs a BatchNorm2d with running statistics "
                f"and affine parameters; choose bn"
            )
    for norm in norms:
        norm.__class__ = _eval_forms[type(norm)]  # type: ignore[assignment]
        norm.training = False
    return module
