"""The exponential moving average of the weights, which is measured and kept in place of the last step's."""

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights(WeightAveraging):
    """Lightning's averaging of parameters and buffers after every step, with a decay.

    Validation runs on the average; after training the model holds it. Checkpoints keep both, so that a resumed run goes
    on bit for bit. What does not move, such as a frozen stage, keeps its bytes: the average moves by a fraction of the
    difference, rather than being the sum of two products that round.

    Args:
        decay: Share of the average that stays at each step, such as 0.999.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
