"""What an 8-bit weight was made from, and whether that has changed since."""

from typing import NamedTuple, Self

from torch import Tensor


class Source(NamedTuple):
    """A weight and a bias as they were.

    Attributes:
        weight: None where the layer holds its weight in 8 bits alone.
        bias: None where there is none.
        values: Where they lie and how often they were written.
        held: Their memory, so that no other tensor can come to lie there.
    """

    weight: Tensor | None
    bias: Tensor | None
    values: tuple[object, ...]
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: Tensor | None, bias: Tensor | None) -> Self:
        """Remember them as they are now."""
        held = tuple(each.detach() for each in (weight, bias) if each is not None)
        return cls(weight, bias, _values(weight, bias), held)

    def is_still(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether a layer's weight and bias are these, and unchanged."""
        return self.weight is weight and self.bias is bias and self.values == _values(weight, bias)


def _values(weight: Tensor | None, bias: Tensor | None) -> tuple[object, ...]:
    """Where the tensors lie and how often they were written; something new at every call where nobody counts that."""
    tensors = [each for each in (weight, bias) if each is not None]
    if any(each.requires_grad or each.is_inference() for each in tensors):
        return (object(),)
    return tuple((each.data_ptr(), each._version) for each in tensors)
