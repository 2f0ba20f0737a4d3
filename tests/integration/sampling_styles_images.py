"""Samplers of images, in many users' styles."""

from __future__ import annotations

from typing import Any

import torch

from tests.integration.sampling_style import style
from tests.integration.sampling_style_models import RGB, ChannelMADE, PixelCNN


@style(lambda: (PixelCNN(), 2))
def pixelcnn_raster(model: Any, n: Any) -> Any:
    img = torch.zeros(n, 1, 5, 5)
    for i in range(5):
        for j in range(5):
            p = model(img)[:, :, i, j].softmax(1)
            img[:, 0, i, j] = torch.multinomial(p, 1).squeeze(-1).float() / 3
    return img


@style(lambda: (RGB(), 2))
def rgb_channels_in_step(model: Any, n: Any) -> Any:
    x = torch.zeros(n, 3, 4, 4)
    for i in range(4):
        for j in range(4):
            h = model.net(x)[:, :, i, j]
            for c in range(3):
                p = model.heads[c](torch.cat([h, x[:, :c, i, j]], 1))
                x[:, c, i, j] = torch.tanh(p[:, 0] + p[:, 1].exp() * torch.randn(n))
    return x


@style(lambda: (ChannelMADE(), 2))
def rgb_three_loops(model: Any, n: Any) -> Any:
    x = torch.zeros(n, 3, 3, 3)
    for i in range(3):
        for j in range(3):
            for c in range(3):
                mu, ls = model(x)[:, i, j, c].unbind(-1)
                x[:, c, i, j] = mu + ls.exp() * torch.randn(n)
    return x


@style(lambda: (PixelCNN(), torch.rand(2, 1, 5, 5)))
def inpaint_lower_half(model: Any, img: Any) -> Any:
    x = img.clone()
    x[:, :, 2:] = 0
    for i in range(2, 5):
        for j in range(5):
            p = model(x)[:, :, i, j].softmax(1)
            x[:, 0, i, j] = torch.multinomial(p, 1)[:, 0] / 3
    return x


@style(lambda: (PixelCNN(), torch.rand(2, 1, 5, 5), torch.rand(1, 1, 5, 5) > 0.4))
def inpaint_mask_where(model: Any, img: Any, known: Any) -> Any:
    """Every position is visited; a mask decides whether it is kept."""
    x = torch.where(known, img, torch.zeros(()))
    for i in range(5):
        for j in range(5):
            p = model(x)[:, :, i, j].softmax(1)
            new = torch.multinomial(p, 1)[:, 0] / 3
            x[:, 0, i, j] = torch.where(known[:, 0, i, j], img[:, 0, i, j], new)
    return x


@style(lambda: (PixelCNN(), torch.rand(2, 1, 5, 5), torch.rand(5, 5) > 0.4))
def inpaint_python_if(model: Any, img: Any, known: Any) -> Any:
    x = img * known
    for i in range(5):
        for j in range(5):
            if known[i, j]:
                continue
            p = model(x)[:, :, i, j].softmax(1)
            x[:, 0, i, j] = torch.multinomial(p, 1)[:, 0] / 3
    return x


@style(lambda: (PixelCNN(norm=True).train(), 3), refused="batch_norm")
def batchnorm_train(model: Any, n: Any) -> Any:
    img = torch.zeros(n, 1, 5, 5)
    for i in range(5):
        for j in range(5):
            img[:, 0, i, j] = torch.multinomial(model(img)[:, :, i, j].softmax(1), 1)[:, 0].float() / 3
    return img


@style(lambda: (PixelCNN(), 2))
def snapshots(model: Any, n: Any) -> Any:
    img = torch.zeros(n, 1, 4, 4)
    frames = []
    for i in range(4):
        for j in range(4):
            img[:, 0, i, j] = torch.multinomial(model(img)[:, :, i, j].softmax(1), 1)[:, 0].float() / 3
        frames.append(img.clone())
    return img, torch.stack(frames)


@style(lambda: (PixelCNN(), 2))
def flat_index(model: Any, n: Any) -> Any:
    img = torch.zeros(n, 1, 5, 5)
    flat = img.view(n, -1)
    for k in range(25):
        i, j = divmod(k, 5)
        p = model(img)[:, :, i, j].softmax(1)
        flat[:, k] = torch.multinomial(p, 1)[:, 0].float() / 3
    return img


@style(lambda: (PixelCNN(rewrites=True), 2))
def weight_data_masked(model: Any, n: Any) -> Any:
    """Each layer multiplies its mask into its weights whenever it is called."""
    img = torch.zeros(n, 1, 5, 5)
    for i in range(5):
        for j in range(5):
            p = model(img)[:, :, i, j].softmax(1)
            img[:, :, i, j] = torch.multinomial(p, 1).float() / 3
    return img
