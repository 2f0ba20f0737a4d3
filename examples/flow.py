"""zuko's masked autoregressive flow, unmodified, trained on the digits, and its own inverse.

The inverse runs the hyper-network D times, once a dimension; it is a fixed-point loop without a stopping test.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import zuko
from digits import dequantised, digits
from training import fit
from weights import pretrained

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Images of `size` x `size` pixels; a flow of `transforms` autoregressive steps with hidden layers of `hidden`."""

    size: int = 28
    hidden: tuple[int, ...] = (1024, 1024)
    transforms: int = 1

    @property
    def name(self) -> str:
        """What the cached weights are called."""
        return f"maf_{self.size}_{self.transforms}x{'x'.join(map(str, self.hidden))}"


LARGE = Settings()
SMALL = Settings(size=14, hidden=(256, 256))


def untrained(settings: Settings) -> zuko.flows.MAF:
    """The flow as it is before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zuko.flows.MAF(settings.size**2, transforms=settings.transforms, hidden_features=settings.hidden)


def train(
    flow: zuko.flows.MAF, images: Tensor, *, steps: int = 200, batch: int = 64, rate: float = 1e-3, seed: int = 0
) -> list[float]:
    """Train on images (N, size, size) in [0, 1]; the losses, in nats per dimension."""

    def loss(x: Tensor) -> Tensor:
        density: Tensor = flow().log_prob(2 * dequantised(x) - 1)
        return -density.mean() / x.shape[1]

    return fit(flow, loss, images.flatten(1), steps=steps, batch=batch, rate=rate, seed=seed)


def digits_flow(settings: Settings = LARGE) -> zuko.flows.MAF:
    """The flow trained on the digits; its first use trains it, for some seconds."""
    return pretrained(settings.name, untrained(settings), lambda flow: train(flow, digits(settings.size)))


@torch.no_grad()
def invert(flow: zuko.flows.MAF, z: Tensor) -> Tensor:
    """Images from noise: zuko's own inverse, (B, D) -> (B, D), D passes of the hyper-network."""
    x: Tensor = flow().transform.inv(z)
    return x


def main() -> None:
    """Invert the flow ordinarily and compiled; print the times."""
    from compare import compare

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="14x14 digits, hidden 2 x 256")
    arguments = parser.parse_args()
    settings = SMALL if arguments.small else LARGE
    flow = digits_flow(settings)
    z = torch.randn(arguments.batch, settings.size**2, generator=torch.Generator().manual_seed(0))
    compare(f"zuko MAF inverse, D = {z.shape[1]}, batch {arguments.batch}", invert, flow, z)


if __name__ == "__main__":
    main()
