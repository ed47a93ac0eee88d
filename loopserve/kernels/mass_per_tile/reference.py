"""`mass_per_tile` in plain torch."""

from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.mass_per_tile import TileMass


def mass_per_tile(mass: Tensor, less: Tensor | None, *, start: int, tile_tokens: int) -> TileMass:
    """See the contract in `loopserve.kernels.mass_per_tile`."""
    front, back = (
        -start % tile_tokens,
        (start - mass.shape[2]) % tile_tokens,
    )  # that the oldest and the newest tile lack

    def summed(per_column: Tensor) -> Tensor:
        padded = pad(per_column, (front, back))
        return padded.view(*mass.shape[:2], -1, tile_tokens).sum(dim=3)

    whole = summed(mass)
    return TileMass(whole, whole if less is None else summed((mass - less[:, None]).clamp_(min=0.0)))
