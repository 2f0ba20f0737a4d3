"""The feedforward experiment of Song et al. (arXiv 2002.03629, section 5.2): evaluating a DenseNet-201 at batch 1.

Its unknowns are the outputs of the 98 dense layers. Every layer has another number of inputs and weights of its own, so no
two of them are instances of one equation, and evaluating all at once is 98 different convolutions a sweep. The paper's 2.13
is the number of sweeps times the slowest layer against the sum of the layers, as if all ran at the same time; nothing ran.
fxjacobi finds no loop in it, and runs the network as it is.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from torch import Tensor, nn

LAYERS = (6, 12, 48, 32)  # DenseNet-201 (Huang et al., arXiv 1608.06993, table 1)


class DenseLayer(nn.Module):
    """(B, C, H, W) -> (B, growth, H, W): norm, relu and a 1x1 convolution, norm, relu and a 3x3 convolution."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The new feature maps."""
        y: Tensor = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return y


class DenseNet(nn.Module):
    """Images (B, 3, H, W) -> class scores (B, classes)."""

    def __init__(self, layers: tuple[int, ...] = LAYERS, growth: int = 32, classes: int = 1000) -> None:
        super().__init__()
        width = 2 * growth
        self.start = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for place, count in enumerate(layers):
            self.blocks.append(nn.ModuleList(DenseLayer(width + k * growth, growth) for k in range(count)))
            width += count * growth
            if place + 1 < len(layers):
                half = width // 2
                self.transitions.append(
                    nn.Sequential(
                        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2)
                    )
                )
                width = half
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        x = self.start(x)
        for place, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleList)
            for layer in block:
                x = torch.cat([x, layer(x)], dim=1)
            if place < len(self.transitions):
                x = self.transitions[place](x)
        scores: Tensor = self.head(F.relu(self.norm(x)).mean((2, 3)))
        return scores


def network(layers: tuple[int, ...] = LAYERS, growth: int = 32) -> DenseNet:
    """The network with its first weights, the same in every process, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseNet(layers, growth).eval()


def main() -> None:
    """Evaluate one image both ways; print the plan and the times."""
    from compare import compare

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    image = torch.randn(1, 3, arguments.size, arguments.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compare("DenseNet-201, batch 1", network(), image)


if __name__ == "__main__":
    main()
