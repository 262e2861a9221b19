"""What of the engine is on, what is off and why, and what it keeps in memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from backbone.engine import cached, folded, switch, torch_internals


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The state of the engine in this process.

    Attributes:
        enabled: Whether the switch is on and the engine can tell what kind of call is going on.
        paths: ``on``, or ``off: <reason>``, for each way around torch's modules.
        cached_bytes: What is kept: ``folded`` with frozen norms (weights and constants), ``prepared`` with the
            convolutions of inference copies, beside their parameters.
    """

    enabled: bool
    paths: Mapping[str, str]
    cached_bytes: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"engine: {'on' if self.enabled else 'off'}"]
        lines += [f"  {title}: {state}" for title, state in self.paths.items()]
        lines += [f"  {what} weights: {size / 2**20:.1f} MiB" for what, size in self.cached_bytes.items()]
        return "\n".join(lines)


def engine_report() -> EngineReport:
    """Return what of the engine is on, what is off and why, and how many bytes it keeps."""
    paths = {title: "on" if path.is_on else f"off: {path.reason}" for title, path in torch_internals.PATHS.items()}
    return EngineReport(
        enabled=switch.is_on() and torch_internals.LOOKS_AT_CALLS,
        paths=paths,
        cached_bytes={"folded": cached.cached_bytes(), "prepared": folded.prepared_bytes()},
    )
