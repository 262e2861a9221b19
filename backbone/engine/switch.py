"""On or off: the engine's switch, for the whole process."""

import os
from types import TracebackType
from typing import Final

ENVIRONMENT: Final = "BACKBONE_ENGINE"
_state = {"on": os.environ.get(ENVIRONMENT, "1").strip().lower() not in ("0", "off", "false", "no")}


class engine_enabled:  # noqa: N801 (used like torch.no_grad)
    """Turn the engine on or off: ``with engine_enabled(False): ...``, or for good by the call alone.

    Off, every network runs as the plain PyTorch it is written in. It holds for all threads. ``BACKBONE_ENGINE=0`` in
    the environment starts with the engine off.

    Args:
        enabled: Whether the engine may stand in for modules.
    """

    def __init__(self, enabled: bool) -> None:
        self._before, self._enabled = _state["on"], enabled
        _state["on"] = enabled

    def __enter__(self) -> None:
        """Set the switch as the call has set it, the second time as well."""
        _state["on"] = self._enabled

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Set the switch as it was before the call."""
        _state["on"] = self._before


def is_on() -> bool:
    """Whether the switch is on."""
    return _state["on"]
