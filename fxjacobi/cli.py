"""The command line: ``fxjacobi demo | explain | verify | bench``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

TARGET = "module:function, where function() returns (model, arguments), arguments being a tuple"


class _Refusal(Exception):  # noqa: N818 - a message for the person at the terminal, not an error of the program
    """What was asked for cannot be done; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a failed check, 2 for a request that makes no sense."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        status: int = options.run(options)
    except _Refusal as refusal:
        print(f"fxjacobi: {refusal}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    from fxjacobi import __version__

    parser = argparse.ArgumentParser(prog="fxjacobi", description="Solve sequential PyTorch computation in parallel.")
    parser.add_argument("--version", action="version", version=f"fxjacobi {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="invert an autoregressive flow of handwritten digits both ways")
    demo.add_argument("--out", type=Path, default=Path("fxjacobi-demo.png"), help="picture to write (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="a smaller network and less training")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", help="print the plan for a model")
    explain.add_argument("target", help=TARGET)
    explain.add_argument("--html", type=Path, help="also write the plan as a page")
    explain.set_defaults(run=_explain)

    verify = commands.add_parser("verify", help="compare both runs of a model element by element")
    verify.add_argument("target", help=TARGET)
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="measure both runs side by side")
    bench.add_argument("--only", nargs="+", metavar="NAME", help="only these benchmarks")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--threads", type=int, help="threads of torch (as it is)")
    bench.add_argument(
        "--quick", action="store_true", help="tiny sizes, where a benchmark has them, to see that it runs"
    )
    bench.add_argument("--rounds", type=int, default=5, help="rounds of timing, whose medians are shown (%(default)s)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements as JSON")
    bench.add_argument("--resume", action="store_true", help="keep what the JSON file holds, measure what it does not")
    bench.add_argument("--pictures", type=Path, metavar="FOLDER", help="also draw the measurements")
    bench.add_argument("--page", type=Path, metavar="FILE", help="also fill the tables of this page of Markdown")
    bench.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="measure nothing: draw and fill from these")
    bench.add_argument("--list", action="store_true", help="print the benchmarks' names and stop")
    bench.set_defaults(run=_bench)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from fxjacobi.demo import DemoError, run

    try:
        return 0 if run(options.out, quick=options.quick) else 1
    except DemoError as refusal:
        raise _Refusal(str(refusal)) from refusal


def _explain(options: argparse.Namespace) -> int:
    import fxjacobi

    model, arguments = _load(options.target)
    plan = fxjacobi.explain(model, *arguments)
    print(plan)
    if options.html is not None:
        try:
            plan.to_html(options.html)
        except OSError as error:
            raise _Refusal(f"--html: {error}") from error
        print(f"written to {options.html}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    import fxjacobi

    model, arguments = _load(options.target)
    try:
        found = fxjacobi.verify(model, *arguments)
    except fxjacobi.ExactnessError as difference:
        print(f"equal: no\n{difference}")
        return 1
    print(f"equal: yes ({found.tensors} tensors, {found.elements} elements)")
    return 0


def _bench(options: argparse.Namespace) -> int:
    import torch

    from fxjacobi.bench import DEVICE_SUITE, EVERYTHING, SUITE, Settings, run

    if options.list:
        for benchmark in EVERYTHING:
            print(f"{benchmark.name:29} {benchmark.summary}")
        return 0
    names = [benchmark.name for benchmark in EVERYTHING]
    unknown = [name for name in options.only or () if name not in names]
    if unknown:
        raise _Refusal(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise _Refusal("--device cuda: torch finds no CUDA device here")
    if options.threads is not None:
        if options.threads < 1:
            raise _Refusal(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    if options.rounds < 1:
        raise _Refusal(f"--rounds must be at least 1, not {options.rounds}")
    if options.resume and options.json is None:
        raise _Refusal("--resume needs --json FILE, which holds what was measured")
    if options.read and not (options.pictures or options.page):
        raise _Refusal("--read needs --pictures FOLDER or --page FILE: it measures nothing itself")
    usual = DEVICE_SUITE if options.device == "cuda" else SUITE
    chosen = [b for b in EVERYTHING if b.name in options.only] if options.only else list(usual)
    settings = Settings(device=torch.device(options.device), rounds=options.rounds, quick=options.quick)
    files: list[Path] = options.read or ([options.json] if options.json else [])
    if (options.pictures or options.page) and not files:
        raise _Refusal("--pictures and --page draw from a file: name it by --json or --read")
    try:
        if not options.read:
            run(chosen, settings, json_file=options.json, resume=options.resume)
        _show(files, options.pictures, options.page)
    except (ValueError, FileNotFoundError) as error:
        raise _Refusal(str(error)) from error
    return 0


def _show(files: Sequence[Path], pictures: Path | None, page: Path | None) -> None:
    """Draw and fill from what was measured."""
    from fxjacobi.bench import EVERYTHING
    from fxjacobi.bench.page import fill
    from fxjacobi.bench.pictures import draw
    from fxjacobi.bench.runner import read

    if pictures is not None:
        for file in files:
            facts, rows, _ = read(file)
            for drawn in draw(rows, pictures, where=f"{facts['device']}, {facts['threads']} threads"):
                print(f"drawn {drawn}")
    if page is not None:
        filled = fill(page, files, EVERYTHING)
        print(f"filled in {page}: {', '.join(filled) or 'nothing'}")


def _load(target: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Import ``module:function``, call it, and check that it returned a model and a tuple of arguments."""
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise _Refusal(f"{target!r} is not {TARGET}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not module_name.startswith(missing.name):
            raise  # the module is there; something that it imports is not
        raise _Refusal(f"there is no module {module_name!r}") from missing
    finally:
        sys.path.remove(str(Path.cwd()))
    function = getattr(module, name, None)
    if not callable(function):
        raise _Refusal(f"module {module_name!r} has no function {name!r}")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], tuple)):
        raise _Refusal(f"{target} returned {type(made).__name__}, not (model, tuple of arguments)")
    model, arguments = made
    return model, arguments
