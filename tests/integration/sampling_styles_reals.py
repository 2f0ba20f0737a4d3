"""Samplers of vectors of numbers, in many users' styles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from tests.integration.sampling_style import style
from tests.integration.sampling_style_models import (
    MADE,
    STEPS,
    Mixture,
    StepNet,
    WithSample,
)

ORDER = [5, 3, 1, 0, 2, 4, 11, 10, 9, 6, 7, 8]


@style(lambda: (MADE(), 5))
def made_logp(model: Any, n: Any) -> Any:
    """A running log-probability beside the array."""
    x, logp = torch.zeros(n, STEPS), torch.zeros(n)
    for i in range(STEPS):
        mu, ls = model(x)[:, i].unbind(-1)
        eps = torch.randn(n)
        x[:, i] = mu + ls.exp() * eps
        logp = logp - 0.5 * eps**2 - ls
    return x, logp


@style(lambda: (MADE(), 5))
def made_distribution_logp(model: Any, n: Any) -> Any:
    x, logp = torch.zeros(n, STEPS), torch.zeros(n)
    for i in range(STEPS):
        mu, ls = model(x)[:, i].unbind(-1)
        d = torch.distributions.Normal(mu, ls.exp())
        v = d.sample()
        x[:, i] = v
        logp += d.log_prob(v)
    return x, logp


@style(lambda: (MADE(), 5))
def list_of_params(model: Any, n: Any) -> Any:
    x, mus = torch.zeros(n, STEPS), []
    for i in range(STEPS):
        mu, ls = model(x)[:, i].unbind(-1)
        mus.append(mu)
        x[:, i] = mu + ls.exp() * torch.randn(n)
    return x, torch.stack(mus, 1)


@style(lambda: (MADE(order=ORDER), 5, ORDER))
def permuted(model: Any, n: Any, order: Any) -> Any:
    x = torch.zeros(n, STEPS)
    for i in order:
        mu, ls = model(x)[:, i].unbind(-1)
        x[:, i] = torch.normal(mu, ls.exp())
    return x


@style(lambda: (MADE(cond=3), torch.randn(5, 3)))
def conditional(model: Any, c: Any) -> Any:
    n = len(c)
    x = torch.zeros(n, STEPS)
    for i in range(STEPS):
        out = model(x, c)
        x[:, i] = out[:, i, 0] + out[:, i, 1].exp() * torch.randn(n)
    return x


@style(lambda: (StepNet(), 5))
def time_embedding_head(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        h = model.made(x)[:, t]
        e = model.time(torch.full((n,), t))
        p = h + model.head(e)
        x[:, t] = p[:, 0] + p[:, 1].exp() * torch.randn(n)
    return x


@style(lambda: (MADE(cond=4), nn.Embedding(STEPS, 4), 5), refused="no network serves all steps")
def time_embedding_network(model: Any, emb: Any, n: Any) -> Any:
    """The step index enters the network: not one function for all steps."""
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        out = model(x, emb(torch.full((n,), t, dtype=torch.long)))
        x[:, t] = out[:, t, 0] + out[:, t, 1].exp() * torch.randn(n)
    return x


@style(lambda: (MADE(), 5))
def list_stack_pad(model: Any, n: Any) -> Any:
    cols: list[torch.Tensor] = []
    for i in range(STEPS):
        x = torch.stack(cols + [torch.zeros(n)] * (STEPS - len(cols)), 1)
        mu, ls = model(x)[:, i].unbind(-1)
        cols.append(mu + ls.exp() * torch.randn(n))
    return torch.stack(cols, 1)


@style(lambda: (MADE(), 5))
def list_cat_pad(model: Any, n: Any) -> Any:
    cols: list[torch.Tensor] = []
    for i in range(STEPS):
        x = torch.cat([*cols, torch.zeros(n, STEPS - len(cols))], 1)
        mu, ls = model(x)[:, i].unbind(-1)
        cols.append((mu + ls.exp() * torch.randn(n)).unsqueeze(1))
    return torch.cat(cols, 1)


@style(lambda: (MADE(), 5))
def functional_where(model: Any, n: Any) -> Any:
    """No in-place write: x = where(arange == t, value, x)."""
    x = torch.zeros(n, STEPS)
    pos = torch.arange(STEPS)
    for t in range(STEPS):
        mu, ls = model(x).unbind(-1)
        new = mu + ls.exp() * torch.randn(n, 1)
        x = torch.where(pos == t, new, x)
    return x


@style(lambda: (MADE(), 5))
def where_full_noise(model: Any, n: Any) -> Any:
    """The whole sample drawn, one column kept by a mask."""
    x = torch.zeros(n, STEPS)
    noise = torch.randn(n, STEPS)
    for t in range(STEPS):
        mu, ls = model(x).unbind(-1)
        y = mu + ls.exp() * noise
        x[:, t] = y[:, t]
    return x


@style(lambda: (MADE(), 5))
def scatter(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        mu, ls = model(x)[:, t].unbind(-1)
        idx = torch.full((n, 1), t)
        x = x.scatter(1, idx, (mu + ls.exp() * torch.randn(n)).unsqueeze(1))
    return x


@style(lambda: (MADE(), 5))
def index_copy(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        mu, ls = model(x)[:, t].unbind(-1)
        x.index_copy_(1, torch.tensor([t]), (mu + ls.exp() * torch.randn(n)).unsqueeze(1))
    return x


@style(lambda: (WithSample(), 5))
def method_of_module(model: Any, n: Any) -> Any:
    return model.sample(n)


@style(lambda: (MADE(), 5))
def rejection_clamp(model: Any, n: Any) -> Any:
    x = torch.empty(n, STEPS).fill_(-1)
    for t in range(STEPS):
        out = model(x)
        x[:, t].copy_((out[:, t, 0] + torch.randn(n)).clamp_(-1, 1))
    return x


@style(lambda: (MADE(), 5))
def two_samples(model: Any, n: Any) -> Any:
    out = []
    for _ in range(2):
        x = torch.zeros(n, STEPS)
        for t in range(STEPS):
            mu, ls = model(x)[:, t].unbind(-1)
            x[:, t] = mu + ls.exp() * torch.randn(n)
        out.append(x)
    return torch.cat(out)


@style(lambda: (Mixture(), 5))
def mixture_logistics(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        pi, mu, ls = model.made(x)[:, t].chunk(3, -1)
        k = torch.distributions.Categorical(logits=pi).sample().unsqueeze(-1)
        m, s = mu.gather(1, k)[:, 0], ls.gather(1, k)[:, 0].clamp(min=-5)
        u = torch.empty(n).uniform_(1e-5, 1 - 1e-5)
        x[:, t] = (m + s.exp() * (torch.log(u) - torch.log1p(-u))).clamp(-1, 1)
    return x


@style(lambda: (MADE(), 5))
def mixture_same_family(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        mu, ls = model(x)[:, t].unbind(-1)
        d = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=torch.stack([mu, ls], -1)),
            torch.distributions.Normal(torch.stack([mu, -mu], -1), torch.ones(n, 2)),
        )
        x[:, t] = d.sample()
    return x


@style(lambda: (MADE(), 5))
def pad_stack(model: Any, n: Any) -> Any:
    cols: list[torch.Tensor] = []
    for t in range(STEPS):
        x = F.pad(torch.stack(cols, 1), (0, STEPS - t)) if cols else torch.zeros(n, STEPS)
        mu, ls = model(x)[:, t].unbind(-1)
        cols.append(mu + ls.exp() * torch.randn(n))
    return torch.stack(cols, 1)


@style(lambda: (MADE(), 5))
def pad_cat(model: Any, n: Any) -> Any:
    x = torch.zeros(n, 0)
    for t in range(STEPS):
        mu, ls = model(F.pad(x, (0, STEPS - t)))[:, t].unbind(-1)
        x = torch.cat([x, (mu + ls.exp() * torch.randn(n))[:, None]], 1)
    return x


@style(lambda: (MADE(), 5))
def while_loop(model: Any, n: Any) -> Any:
    x, t = torch.zeros(n, STEPS), 0
    while t < STEPS:
        mu, ls = model(x)[:, t].unbind(-1)
        x[:, t] = mu + ls.exp() * torch.randn(n)
        t += 1
    return x


@style(lambda: (MADE(), 5), refused="depends on itself")
def loop_in_blocks(model: Any, n: Any) -> Any:
    """Two positions a step from one network evaluation is not autoregressive in the first sense, but well defined."""
    x = torch.zeros(n, STEPS)
    for t in range(0, STEPS, 2):
        out = model(x)
        x[:, t : t + 2] = out[:, t : t + 2, 0] + out[:, t : t + 2, 1].exp() * torch.randn(n, 2)
    return x


@style(lambda: (MADE(), 5))
def clone_each(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        x = x.clone()
        mu, ls = model(x)[:, t].unbind(-1)
        x[:, t] = mu + ls.exp() * torch.randn(n)
    return x


@style(lambda: (MADE(), 5))
def antithetic(model: Any, n: Any) -> Any:
    x = torch.zeros(2 * n, STEPS)
    for t in range(STEPS):
        mu, ls = model(x)[:, t].unbind(-1)
        e = torch.randn(n)
        x[:, t] = mu + ls.exp() * torch.cat([e, -e])
    return x


@style(lambda: (MADE().eval(), 5), refused="an output of the loop")
def state_that_sees_everything(model: Any, n: Any) -> Any:
    """What a step hands on rests on positions that are not written yet, as they are then."""
    x, seen = torch.zeros(n, STEPS), torch.zeros(n)
    for t in range(STEPS):
        out = model(x)
        x[:, t] = out[:, t, 0] + seen + torch.randn(n)
        seen = out[..., 0].sum(1).tanh()
    return x


@style(lambda: (MADE(), 5))
def state_of_what_is_written(model: Any, n: Any) -> Any:
    """What a step hands on rests on the network's output for the step, and on what it has just written."""
    x, running = torch.zeros(n, STEPS), torch.zeros(n)
    for t in range(STEPS):
        mean, scale = model(x)[:, t].unbind(-1)
        x[:, t] = mean + running.round() + scale.exp() * torch.randn(n)
        running = 0.5 * running + x[:, t].sign()
    return x, running
