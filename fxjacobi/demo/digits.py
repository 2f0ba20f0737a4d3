"""scikit-learn's handwritten digits (they come inside the package), enlarged from 8x8 to 28x28."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fxjacobi.demo.job import DemoError

__all__ = ["SIDE", "digits"]

SIDE = 28


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``(1797, 784)`` in [0, 1] and their classes, one-hot, ``(1797, 10)``.

    Raises:
        DemoError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as missing:
        raise DemoError("the demo needs scikit-learn: pip install 'fxjacobi[demo]'") from missing
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images.flatten(1), F.one_hot(torch.tensor(data.target), 10).to(torch.float32)
