"""The examples' data: handwritten digits and photograph patches, from files inside scikit-learn.

Nothing is downloaded. Every function gives the same tensors in every process, for equal arguments (and, where it says so,
an equal random state).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor


def digits(size: int = 28) -> Tensor:
    """The 1,797 handwritten digits, enlarged bilinearly from 8x8.

    Args:
        size: the height and the width of the enlarged images.

    Returns:
        float32 (1797, size, size) in [0, 1].
    """
    images = torch.from_numpy(load_digits().images).float() / 16
    return F.interpolate(images.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False).squeeze(1)


def strokes(size: int = 28) -> Tensor:
    """The digits with their contrast raised about mid-grey: strokes of full ink with soft edges about one pixel wide.

    So they resemble MNIST, where bilinear enlargement alone leaves every pixel close to its neighbours' extrapolation.
    """
    return ((digits(size) - 0.5) * 8 + 0.5).clamp(0, 1)


def labels() -> Tensor:
    """The digits' classes: int64 (1797,) in 0..9, in the order of `digits`."""
    return torch.from_numpy(load_digits().target).long()


def dequantised(images: Tensor, levels: int = 17) -> Tensor:
    """Spread each grey level over its interval: (x (levels - 1) + u) / levels with u uniform in [0, 1).

    A density model needs this: without noise a pixel that never varies has an unbounded density. 17 is the number of grey
    levels of the digits' own scans. The noise comes from torch's default generator.

    Args:
        images: any shape, values in [0, 1].
        levels: the number of intervals that [0, 1] is cut into.

    Returns:
        The shape of `images`, values in [0, 1).
    """
    return (images * (levels - 1) + torch.rand_like(images)) / levels


def signed(images: Tensor, levels: int = 256) -> Tensor:
    """Values in [0, 1] rounded to `levels` grey levels, on the scale [-1, 1]."""
    return (images * (levels - 1)).round() / (levels - 1) * 2 - 1


def tokens(images: Tensor, levels: int = 16) -> Tensor:
    """Values in [0, 1] as grey-level numbers: int64 in 0 .. levels - 1."""
    return (images * (levels - 1)).round().long()


def photograph_patches(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Colour patches cut at random places from scikit-learn's two sample photographs.

    Args:
        count: the number of patches.
        size: the height and the width of a patch.
        seed: of the places.

    Returns:
        float32 (count, 3, size, size) in [0, 1].
    """
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(photographs.shape[0], (count,), generator=generator).tolist()
    tops = torch.randint(photographs.shape[2] - size + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(photographs.shape[3] - size + 1, (count,), generator=generator).tolist()
    places = zip(chosen, tops, lefts, strict=True)
    patches = [photographs[p, :, top : top + size, left : left + size] for p, top, left in places]
    return torch.stack(patches).float() / 255
