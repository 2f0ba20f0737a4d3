"""Samplers of tokens, in many users' styles."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from tests.integration.sampling_style import style
from tests.integration.sampling_style_models import GPT, STEPS, WaveNet


@style(lambda: (GPT(), 3))
def gpt_buffer_multinomial(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    for t in range(STEPS):
        logits = model(x)[:, t] / 0.8
        x[:, t + 1] = torch.multinomial(F.softmax(logits, -1), 1)[:, 0]
    return x[:, 1:]


@style(lambda: (GPT(), 3))
def gpt_topk(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    for t in range(STEPS):
        logits = model(x)[:, t, :]
        v, _ = torch.topk(logits, 3)
        logits[logits < v[:, [-1]]] = -float("inf")
        probs = F.softmax(logits, dim=-1)
        x[:, t + 1] = torch.multinomial(probs, num_samples=1).squeeze(1)
    return x


@style(lambda: (GPT(), 3))
def gpt_nucleus(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    for t in range(STEPS):
        logits = model(x)[:, t, :]
        s, idx = torch.sort(logits, descending=True)
        cum = s.softmax(-1).cumsum(-1)
        remove = cum > 0.9
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        logits = logits.masked_fill(remove.scatter(1, idx, remove), float("-inf"))
        x[:, t + 1] = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    return x


@style(lambda: (GPT(mode="manual"), 3))
def gpt_greedy(model: Any, n: Any) -> Any:
    x = torch.arange(n).remainder(7)[:, None].repeat(1, STEPS + 1)
    for t in range(STEPS):
        x[:, t + 1] = model(x)[:, t].argmax(-1)
    return x


@style(lambda: (GPT(), 3))
def gpt_gumbel(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    for t in range(STEPS):
        logits = model(x)[:, t]
        g = -torch.log(-torch.log(torch.rand_like(logits)))
        x[:, t + 1] = (logits + g).argmax(-1)
    return x


@style(lambda: (GPT(), 3))
def gpt_categorical_logp(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    logps = []
    for t in range(STEPS):
        d = torch.distributions.Categorical(logits=model(x)[:, t])
        a = d.sample()
        logps.append(d.log_prob(a))
        x[:, t + 1] = a
    return x, torch.stack(logps).sum(0)


@style(lambda: (WaveNet(), 3))
def wavenet_onehot(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS, dtype=torch.long)
    for t in range(STEPS):
        oh = F.one_hot(x, model.q).float().transpose(1, 2)
        p = model(oh)[:, :, t].softmax(1)
        x[:, t] = torch.multinomial(p, 1)[:, 0]
    return x


@style(lambda: (WaveNet(), 3))
def wavenet_onehot_array(model: Any, n: Any) -> Any:
    x = torch.zeros(n, model.q, STEPS)
    for t in range(STEPS):
        p = model(x)[:, :, t].softmax(1)
        k = torch.distributions.Categorical(p).sample()
        x[:, :, t] = F.one_hot(k, model.q).float()
    return x


@style(lambda: (GPT(), 3))
def last_token_state(model: Any, n: Any) -> Any:
    """A last-token variable beside the array, used to forbid repetition."""
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    last = x[:, 0]
    for t in range(STEPS):
        logits = model(x)[:, t]
        logits = logits.scatter(1, last[:, None], -float("inf"))
        last = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        x[:, t + 1] = last
    return x


@style(lambda: (GPT(), 3))
def counter_and_finished(model: Any, n: Any) -> Any:
    """Finished flags: after token 0 is drawn, pad."""
    x = torch.full((n, STEPS + 1), 3, dtype=torch.long)
    done = torch.zeros(n, dtype=torch.bool)
    count = torch.zeros(n, dtype=torch.long)
    for t in range(STEPS):
        tok = torch.multinomial(model(x)[:, t].softmax(-1), 1)[:, 0]
        tok = torch.where(done, torch.full_like(tok, 6), tok)
        x[:, t + 1] = tok
        done = done | (tok == 0)
        count = count + (~done).long()
    return x, count


@style(lambda: (GPT(), 3))
def early_break(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    for t in range(STEPS):
        x[:, t + 1] = torch.multinomial(model(x)[:, t].softmax(-1), 1)[:, 0]
        if (x[:, t + 1] == 99).all():
            break
    return x


@style(lambda: (GPT(), torch.randint(0, 7, (3, 4))))
def prompt(model: Any, prompt: Any) -> Any:
    n, p = prompt.shape
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    x[:, :p] = prompt
    for t in range(p, STEPS + 1):
        x[:, t] = torch.multinomial(model(x)[:, t - 1].softmax(-1), 1).squeeze(-1)
    return x


@style(lambda: (GPT(), 3))
def classifier_free_guidance(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    for t in range(STEPS):
        both = model(torch.cat([x, torch.where(torch.arange(STEPS + 1) == 0, 5, x)]))[:, t]
        c, u = both.chunk(2)
        x[:, t + 1] = torch.multinomial((u + 2.0 * (c - u)).softmax(-1), 1)[:, 0]
    return x


@style(lambda: (GPT(), 3))
def index_put_arange(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS, dtype=torch.long)
    rows = torch.arange(n)
    for t in range(STEPS - 1):
        p = model(x)[rows, t].softmax(-1)
        x[rows, t + 1] = torch.multinomial(p, 1).squeeze(1)
    return x


@style(lambda: (GPT(), torch.randint(0, 7, (3, STEPS + 1)), torch.tensor([2, 4, 6])))
def ragged_prompts(model: Any, prompt: Any, lengths: Any) -> Any:
    """Each sample keeps its own prompt; positions beyond are drawn."""
    x = prompt.clone()
    for t in range(1, STEPS + 1):
        new = torch.multinomial(model(x)[:, t - 1].softmax(-1), 1).squeeze(1)
        x[:, t] = torch.where(t < lengths, prompt[:, t], new)
    return x


@style(lambda: (GPT(), 3))
def min_p_and_eos(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    alive = torch.ones(n, dtype=torch.bool)
    lengths = torch.zeros(n, dtype=torch.long)
    for t in range(STEPS):
        p = model(x)[:, t].softmax(-1)
        p = torch.where(p < 0.1 * p.amax(-1, keepdim=True), torch.zeros_like(p), p)
        p = p / p.sum(-1, keepdim=True)
        tok = torch.distributions.Categorical(probs=p).sample()
        x[:, t + 1] = tok * alive
        alive &= tok != 0
        lengths += alive
    return x, lengths


@style(lambda: (GPT(), 3))
def score_and_entropy_lists(model: Any, n: Any) -> Any:
    x = torch.zeros(n, STEPS + 1, dtype=torch.long)
    ents, chosen = [], []
    for t in range(STEPS):
        logp = model(x)[:, t].log_softmax(-1)
        ents.append(-(logp.exp() * logp).sum(-1))
        tok = torch.multinomial(logp.exp(), 1)
        chosen.append(logp.gather(1, tok)[:, 0])
        x[:, t + 1] = tok[:, 0]
    return x, torch.stack(ents, 1), torch.stack(chosen, 1).sum(1)
