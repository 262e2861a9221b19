"""What happened to every key of a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backbone.weights.metadata import Metadata

SHOWN_KEYS = 8


@dataclass(frozen=True)
class LoadReport:
    """One load, explained; ``print`` it.

    Attributes:
        source: Where the weights came from.
        format: The library whose names they have.
        why: By what that was recognised.
        prefix: What was stripped from every key of the network, its wrappers included.
        loaded: Keys of the network that were filled.
        missing: Keys of the network that the file lacks and may lack: ``num_batches_tracked``.
        dropped: Keys of the file that were left out, by the reason.
        reshaped: Keys whose shape was adapted.
        adapted: Everything that was changed or added, in words.
        metadata: How the weights were trained: known, or assumed.
        initial: Keys of the network that no published weights have, because this package added these parts; they keep
            the values they had, random ones in a fresh network.
    """

    source: str
    format: str
    why: str
    prefix: str
    loaded: Sequence[str]
    missing: Sequence[str]
    dropped: Mapping[str, Sequence[str]]
    reshaped: Sequence[str]
    adapted: Sequence[str]
    metadata: Metadata
    initial: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format} ({self.why})"]
        lines += [f"prefix stripped: {self.prefix}"] if self.prefix else []
        lines += [f"{listed('loaded', self.loaded, 0)}; {listed('missing', self.missing, 2)}"]
        if self.initial:
            parts = ", ".join(dict.fromkeys(key.partition(".")[0] for key in self.initial))
            lines.append(
                f"not in the weights, left as it was (random when fresh): {parts}, {len(self.initial)} tensors"
            )
        lines += [f"dropped, {reason}: {len(keys)}" for reason, keys in self.dropped.items()]
        lines += [f"adapted: {sentence}" for sentence in self.adapted]
        return "\n  ".join([*lines, *self.metadata.lines()])


def listed(title: str, keys: Sequence[str], shown: int = SHOWN_KEYS) -> str:
    """Return the number of keys and the first of them: ``2 missing (fc.weight, fc.bias)``."""
    names = ", ".join(keys[:shown]) + (", ..." if len(keys) > shown else "")
    return f"{len(keys)} {title}" + (f" ({names})" if keys and shown else "")
