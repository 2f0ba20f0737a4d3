"""The causal-rank analysis never claims less dependence than there is.

Networks of the rule set are drawn, recorded in float64, and every element of every intermediate value is compared
with brute force: change one written position at a time, run again, see what moved. The rank must be at least the latest
position that moved the element; a value claimed to be known must be that value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, given, note
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxjacobi.causal_rules.domain import Abstract, Value, constant, unknown
from fxjacobi.causal_rules.interpreter import interpret
from fxjacobi.causal_rules.registry import Context
from fxjacobi.graph import spec_of_value, stamp

if TYPE_CHECKING:
    from collections.abc import Sequence

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Drawn:
    """Constants of a drawn network: values, and whether the analysis knows them."""

    draw: Any
    values: list[torch.Tensor] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def random(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.draw(st.integers(0, 10_000)))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def mask(self, *shape: int) -> torch.Tensor:
        """0/1 entries: all ones, a triangle (whole or strict), or random."""
        kind = self.pick("ones", "lower", "strict", "random")
        full = torch.ones(shape, dtype=torch.float64)
        if kind == "ones" or len(shape) < 2:
            return full
        if kind == "random":
            return (self.random(*shape) > 0).double()
        return full.tril(0 if kind == "lower" else -1)

    def add(self, value: torch.Tensor, *, known: bool | None = None) -> int:
        self.values.append(value)
        self.known.append(self.draw(st.booleans()) if known is None else known)
        return len(self.values) - 1


def _layer(  # noqa: C901 - one option after another
    drawn: Drawn, shape: Sequence[int], constants: list[torch.Tensor]
) -> tuple[str, Layer]:
    """Draw one layer for a tensor of ``shape``; it reads ``constants`` by number when it runs."""
    dims = len(shape)
    pick, add = drawn.pick, drawn.add
    dim = drawn.draw(st.integers(-dims, dims - 1))
    size = shape[dim]

    def c(number: int) -> torch.Tensor:
        return constants[number]

    makers: dict[str, Callable[[], Layer]] = {}

    def option(name: str, *, when: bool = True) -> Callable[[Callable[[], Layer]], None]:
        def put(maker: Callable[[], Layer]) -> None:
            if when:
                makers[name] = maker

        return put

    @option("pointwise")
    def _() -> Layer:
        f = pick(torch.tanh, torch.relu, torch.sigmoid, functional.elu, functional.gelu, torch.neg)
        return lambda x: f(x) * 1.5 + 0.25

    @option("multiply by a mask")
    def _() -> Layer:
        m = add(drawn.mask(*shape))
        return lambda x: x * c(m)

    @option("where")
    def _() -> Layer:
        m, other = add(drawn.mask(*shape) > 0), add(drawn.random(*shape))
        return lambda x: torch.where(c(m), x.tanh(), c(other))

    @option("masked softmax")
    def _() -> Layer:
        mask = drawn.mask(*shape)
        mask.select(dim, 0).fill_(1)  # a row of nothing but -inf is NaN, which voids any proof at run time
        m = add(mask)
        how = pick("fill", "add")
        log = pick(True, False)

        def run(x: torch.Tensor) -> torch.Tensor:
            if how == "fill":
                x = x.masked_fill(c(m) == 0, -torch.inf)
            else:
                x = x + torch.zeros_like(x).masked_fill(c(m) == 0, -torch.inf)
            return x.log_softmax(dim).exp() if log else x.softmax(dim)

        return run

    @option("linear")
    def _() -> Layer:
        out = pick(2, 3, 4)
        w, m = add(drawn.random(out, shape[-1])), add(drawn.mask(out, shape[-1]))
        b = add(drawn.random(out))
        return lambda x: functional.linear(x, c(w) * c(m), c(b))

    @option("mix rows", when=dims >= 2)
    def _() -> Layer:
        a = add(drawn.random(shape[-2], shape[-2]) * drawn.mask(shape[-2], shape[-2]))
        return lambda x: c(a) @ x

    @option("attend", when=dims >= 2)
    def _() -> Layer:
        m = add(drawn.mask(shape[-2], shape[-2]).fill_diagonal_(1))

        def run(x: torch.Tensor) -> torch.Tensor:
            scores = (x @ x.transpose(-1, -2)).masked_fill(c(m) == 0, -torch.inf)
            return scores.softmax(-1).nan_to_num() @ x

        return run

    @option("einsum", when=dims == 3)
    def _() -> Layer:
        a = add(drawn.random(shape[1], shape[1]) * drawn.mask(shape[1], shape[1]))
        return lambda x: torch.einsum("btd,ut->bud", x, c(a))

    @option("fused attention", when=dims in (3, 4))
    def _() -> Layer:
        kind = pick("causal", "mask", "bool", "none")
        m = add(drawn.mask(shape[-2], shape[-2]))

        def run(x: torch.Tensor) -> torch.Tensor:
            x4 = x if x.dim() == 4 else x.unsqueeze(1)
            mask: torch.Tensor | None = None
            if kind == "mask":
                mask = torch.zeros_like(c(m)).masked_fill(c(m) == 0, -torch.inf)
            elif kind == "bool":
                mask = c(m) > 0
            y = functional.scaled_dot_product_attention(
                x4, x4 * 0.5, x4 + 1, attn_mask=mask, is_causal=kind == "causal"
            )
            return y if x.dim() == 4 else y.squeeze(1)

        return run

    @option("conv1d", when=dims == 3)
    def _() -> Layer:
        out, k, groups = pick(2, 4), pick(1, 2, 3), 2 if shape[1] % 2 == 0 and pick(True, False) else 1
        stride, dilation = pick(1, 2), pick(1, 2)
        w = add(drawn.random(out, shape[1] // groups, k) * drawn.mask(out, shape[1] // groups, k))
        pad = dilation * (k - 1)
        return lambda x: functional.conv1d(x, c(w), stride=stride, padding=pad, dilation=dilation, groups=groups)

    @option("conv2d", when=dims == 4)
    def _() -> Layer:
        out, k, groups = pick(2, 4), pick((1, 1), (2, 3), (3, 3)), 2 if shape[1] % 2 == 0 and pick(True, False) else 1
        w = add(drawn.random(out, shape[1] // groups, *k) * drawn.mask(out, shape[1] // groups, *k))
        stride = pick(1, 2)
        return lambda x: functional.conv2d(x, c(w), stride=stride, padding=(k[0] - 1, k[1] // 2), groups=groups)

    @option("transposed conv", when=dims in (3, 4))
    def _() -> Layer:
        groups = 2 if shape[1] % 2 == 0 and pick(True, False) else 1
        k, stride, dilation = pick(1, 2, 3), pick(1, 2), pick(1, 2)
        kernel = (k,) * (dims - 2)
        w = add(drawn.random(shape[1], 2, *kernel) * drawn.mask(shape[1], 2, *kernel))
        f = functional.conv_transpose1d if dims == 3 else functional.conv_transpose2d
        extra = stride - 1
        pad = pick(0, min(1, dilation * (k - 1)))
        return lambda x: f(x, c(w), None, stride, pad, extra, groups, dilation)

    @option("pool", when=dims in (3, 4) and min(shape[2:], default=0) >= 2)
    def _() -> Layer:
        f = {3: (functional.max_pool1d, functional.avg_pool1d), 4: (functional.max_pool2d, functional.avg_pool2d)}[dims]
        chosen, stride, pad = f[pick(0, 1)], pick(1, 2), pick(0, 1)
        return lambda x: chosen(x, 2, stride, pad)

    @option("pad")
    def _() -> Layer:
        amounts = [pick(0, 1, 2), pick(0, 1)] * min(dims, 2)
        return lambda x: functional.pad(x, amounts)

    @option("shift")
    def _() -> Layer:
        amount = pick(1, -1)
        return lambda x: torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, size - 1)], dim) if (
            amount > 0
        ) else x.roll(1, dim)  # fmt: skip

    @option("slice", when=size >= 2)
    def _() -> Layer:
        start, step = pick(0, 1), pick(1, 2)
        return lambda x: x.movedim(dim, 0)[start::step].movedim(0, dim)

    @option("reorder")
    def _() -> Layer:
        how = pick("flip", "transpose", "reshape", "repeat", "stack", "tril", "split")
        if how == "transpose":
            return lambda x: x.transpose(0, -1).contiguous()
        if how == "reshape":
            return lambda x: x.reshape(x.shape[0], -1)
        if how == "repeat":
            return lambda x: torch.cat([x, x.flip(dim)], dim)
        if how == "stack":
            return lambda x: torch.stack([x, x * 2], -1).flatten(-2)
        if how == "tril" and dims >= 2:
            return lambda x: x.tril(-1) + 0.5
        if how == "split":
            return lambda x: torch.cat(list(x.split(1, dim))[::-1], dim)
        return lambda x: x.flip(dim)

    @option("scan")
    def _() -> Layer:
        f = pick(torch.cumsum, torch.logcumsumexp, lambda x, d: x.cummax(d).values)
        return lambda x: f(x, dim) / 4

    @option("reduce")
    def _() -> Layer:
        f = pick(
            lambda x: x.sum(dim, keepdim=True), lambda x: x.amax(dim, keepdim=True), lambda x: x.mean(dim, keepdim=True),
            lambda x: x.logsumexp(dim, keepdim=True), lambda x: x.max(dim, keepdim=True).values,
            lambda x: x.argmax(dim, keepdim=True).double(), lambda x: x.std(dim, keepdim=True, correction=0),
        )  # fmt: skip
        return lambda x: x + f(x)

    @option("sort")
    def _() -> Layer:
        k = min(2, size)
        how = pick(lambda x: x.sort(dim).values, lambda x: x.topk(k, dim).values, lambda x: x.argsort(dim).double())
        chosen: Layer = how
        return chosen

    @option("layer norm")
    def _() -> Layer:
        return lambda x: functional.layer_norm(x, x.shape[-1:])

    @option("group norm", when=dims >= 3 and shape[1] % 2 == 0)
    def _() -> Layer:
        return lambda x: functional.group_norm(x, 2)

    @option("batch norm", when=dims >= 2 and shape[0] * shape[-1] > 2)
    def _() -> Layer:
        training = pick(True, False) and shape[0] > 1
        mean, var = add(torch.zeros(shape[1], dtype=torch.float64)), add(torch.ones(shape[1], dtype=torch.float64))
        if training:
            return lambda x: functional.batch_norm(x, None, None, training=True)
        return lambda x: functional.batch_norm(x, c(mean), c(var))

    @option("index", when=size >= 2)
    def _() -> Layer:
        index = add(
            torch.randint(0, size, (3,), generator=torch.Generator().manual_seed(drawn.draw(st.integers(0, 99))))
        )
        how = pick("index_select", "index", "gather", "put", "scatter")

        def run(x: torch.Tensor) -> torch.Tensor:
            i = c(index)
            moved = x.movedim(dim, 0)
            if how == "index_select":
                return x.index_select(dim, i)
            if how == "index":
                return moved[i].movedim(0, dim)
            if how == "gather":
                return moved.gather(0, i.view(-1, *[1] * (dims - 1)).expand(3, *moved.shape[1:])).movedim(0, dim)
            if how == "put":
                return moved.index_put((i,), moved[:1].tanh()).movedim(0, dim)
            j = i.view(-1, *[1] * (dims - 1)).expand(3, *moved.shape[1:])
            return moved.scatter(0, j, moved.gather(0, j).tanh()).movedim(0, dim)

        return run

    @option("embed")
    def _() -> Layer:
        table = add(drawn.random(5, 2))
        how = pick("embedding", "index", "one_hot", "bucketize")
        edges = torch.linspace(-1, 1, 4, dtype=torch.float64)
        e = add(edges, known=True)

        def run(x: torch.Tensor) -> torch.Tensor:
            tokens = (x.tanh() * 2 + 2.5).floor().long().clamp(0, 4)
            if how == "embedding":
                return functional.embedding(tokens, c(table)).flatten(-2)
            if how == "index":
                return c(table)[tokens].flatten(-2)
            if how == "bucketize":
                return torch.bucketize(x, c(e)).double() + x
            hot = torch.zeros(*x.shape, 5, dtype=torch.float64).scatter(-1, tokens.unsqueeze(-1), 1.0)
            return hot @ c(table)[:, :1].squeeze(-1)

        return run

    name = drawn.draw(st.sampled_from(sorted(makers)))
    return name, makers[name]()


@dataclass
class Program:
    module: fx.GraphModule
    start: torch.Tensor
    rank: torch.Tensor
    constants: list[torch.Tensor]
    known: list[bool]
    names: list[str]


@st.composite
def networks(draw: Any) -> Program:
    shape = draw(st.sampled_from([(2, 5), (2, 3, 2), (1, 2, 5), (1, 2, 3, 3), (3, 4)]))
    drawn = Drawn(draw)
    layers: list[Layer] = []
    constants: list[torch.Tensor] = drawn.values
    start = drawn.random(*shape)
    value = start
    for _ in range(draw(st.integers(1, 4))):
        if value.numel() > 200 or value.dim() == 0:
            break
        name, layer = _layer(drawn, value.shape, constants)
        drawn.names.append(name)
        value = layer(value)
        layers.append(layer)
    values = list(constants)

    def run(x: torch.Tensor, *given_constants: torch.Tensor) -> torch.Tensor:
        constants[:] = given_constants
        for layer in layers:
            x = layer(x)
        return x

    module = make_fx(run)(start, *values)

    class Stamp(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                stamp(n, spec_of_value(result))
            return result

    with torch.no_grad():
        Stamp(module).run(start, *values)
    # The batch is written together, as samplers do, or every element by itself; some positions are never written.
    positions = torch.arange(start[0].numel() if draw(st.booleans()) else start.numel())
    order = torch.tensor(draw(st.permutations(range(len(positions)))))
    rank = (
        order.reshape(start.shape)
        if len(positions) == start.numel()
        else order.reshape(1, *start.shape[1:]).expand_as(start)
    )
    unwritten = draw(st.integers(0, 2))
    rank = torch.where(rank < len(positions) - unwritten, rank, -1).to(torch.int32)
    return Program(module, start, rank, values, drawn.known, drawn.names)


class _Everything(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


def everything(program: Program, x: torch.Tensor) -> dict[fx.Node, Any]:
    interpreter = _Everything(program.module)
    with torch.no_grad():
        interpreter.run(x, *program.constants)
    return interpreter.found


def brute_force(program: Program, kills: set[fx.Node] | None) -> tuple[dict[fx.Node, Any], dict[fx.Node, torch.Tensor]]:
    """Return every node's value, and for each element the latest position that moves it."""
    base = everything(program, program.start)
    if kills is not None:
        assume(not _poisoned(base, kills))
    latest = {n: torch.full(v.shape, -1) for n, v in base.items() if isinstance(v, torch.Tensor)}
    for position in range(int(program.rank.max()) + 1):
        for amount in (0.7, -3.0):
            x = program.start + amount * (program.rank == position)
            found = everything(program, x)
            if kills is not None:
                assume(not _poisoned(found, kills))
            for n, value in found.items():
                if n in latest:
                    old = base[n]
                    moved = (
                        (value != old) & ~(value.isnan() & old.isnan()) if value.is_floating_point() else value != old
                    )
                    latest[n] = torch.where(moved, position, latest[n])
    return base, latest


def _poisoned(values: dict[fx.Node, Any], kills: set[fx.Node]) -> bool:
    """Whether the premise fails that the solver checks at run time."""
    results = [values[n][0] if isinstance(values[n], tuple) else values[n] for n in kills]
    return any(bool(result.isnan().any()) for result in results)


def analysed(program: Program) -> tuple[Context, dict[fx.Node, Value]]:
    small = program.rank
    context = Context(int(program.rank.max()))
    values: list[Value] = [Abstract(small)]
    for number, (value, known) in enumerate(zip(program.constants, program.known, strict=True)):
        values.append(constant(value, f"constant_{number}") if known else unknown(value.shape))
    return context, interpret(context, program.module, values)


@given(networks())
def test_ranks_are_never_too_low_and_known_values_are_right(program: Program) -> None:
    note(f"{program.names}, known: {program.known}\n{program.module.graph}")
    context, env = analysed(program)
    base, latest = brute_force(program, context.kills)
    assert not context.unknown_ops, context.unknown_ops
    for node, moved in latest.items():
        if node.op == "output":
            continue
        value = env[node]
        assert isinstance(value, Abstract), node
        assert value.shape == tuple(moved.shape), node
        assert bool((value.rank >= moved).all()), f"{node}: rank {value.rank.tolist()}, moved by {moved.tolist()}"
        if value.known is not None and value.value is not None:
            wrong = value.known & (value.value != base[node]) & ~(value.value.isnan() & base[node].isnan())
            assert not bool(wrong.any()), f"{node}: {value.value}, not {base[node]}"
            assert bool((value.rank[value.known] == -1).all()), node


@pytest.mark.parametrize("planted", ["convolution", "addmm", "_softmax", "slice"])
def test_an_unsound_rule_is_caught(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: with a rule that forgets a dependence, it does."""
    from fxjacobi.causal_rules import interpreter

    def forget(context: Context, node: fx.Node, args: Any, kwargs: Any) -> Value:
        result = original(context, node, args, kwargs)
        if planted in str(node.target) and isinstance(result, Abstract):
            return Abstract((result.rank - 1).clamp(min=-1))
        return result

    original = interpreter.evaluate
    torch.manual_seed(0)
    weight = torch.randn(1, 1, 3, dtype=torch.float64)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        head = torch.outer(torch.arange(1.0, 5.0, dtype=torch.float64), w.flatten().repeat(2)[:5])
        y = functional.conv1d(x[:, None], w, padding=1)[:, 0]
        return nn.functional.linear(y[:, 1:], head, head[:, 0]).softmax(-1)

    start = torch.randn(2, 6, dtype=torch.float64)
    module = make_fx(run)(start, weight)
    for node, value in everything(Program(module, start, torch.zeros(0), [weight], [True], []), start).items():
        if node.op != "output":
            stamp(node, spec_of_value(value))
    program = Program(module, start, torch.arange(6, dtype=torch.int32).expand(2, 6), [weight], [True], [])
    _, latest = brute_force(program, None)

    def sound() -> bool:
        _, env = analysed(program)
        found = {n: value for n, value in env.items() if isinstance(value, Abstract) and n in latest}
        return all(bool((value.rank >= latest[n]).all()) for n, value in found.items())

    assert sound()
    monkeypatch.setattr(interpreter, "evaluate", forget)
    assert not sound()
