"""`rx-edge bench`: time a bundle, compare two results, and gate a change."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rx_edge.cli.common import (
    BundleArgument,
    Group,
    LanguageChoice,
    NoDrafts,
    VisionChoice,
    print_json,
    say,
)
from rx_edge.config import RuntimeConfig
from rx_edge.errors import UsageError

if TYPE_CHECKING:
    from rx_edge_bench.comparison import Comparison
    from rx_edge_bench.gate import Result
    from rx_edge_bench.interleaved import Side

EXIT_CODES = {"none": 0, "suspicious": 0, "regression": 4, "insufficient data": 5}

Image = Annotated[
    Path | None, typer.Option("--image", help="study to time; default: the first canary")
]
Out = Annotated[Path | None, typer.Option("--json", help="write the result here")]
Tolerance = Annotated[
    float | None, typer.Option("--tolerance", help="time allowed, e.g. 1.05 for 5 % more")
]
SETTING = "--NAME=VALUE for the block (--threads=1, --off=drafts) or NAME=VALUE (environment)"


class BenchGroup(Group):
    """`rx-edge bench BUNDLE` means `rx-edge bench run BUNDLE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


def run(
    bundle: BundleArgument,
    image: Image = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="timed runs: 10, or 3 in every block")
    ] = None,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    no_drafts: NoDrafts = False,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="so many fresh processes, for `compare`")
    ] = None,
    out: Out = None,
) -> None:
    """Time the whole path, image file to final text."""
    from rx_edge.runtime.session import open_session
    from rx_edge_bench import block, interleaved
    from rx_edge_bench.latency import measure

    if blocks is not None:
        both: dict[str, Any] = {"image": image, "repeats": repeats, "vision": vision, "llm": llm}
        both["off"] = "drafts" if no_drafts else None
        side = interleaved.Side(bundle, options=_options(both))
        _deliver(interleaved.measure_blocks(side, blocks, tick=_tick), out)
        return
    runtime = RuntimeConfig(drafts=not no_drafts)
    with open_session(bundle, vision=vision, language=llm, runtime=runtime) as session:
        study, of = image or block.first_canary(session), 10 if repeats is None else repeats
        result = measure(session, study, repeats=of, tick=lambda n: say(f"{n}/{of}"))
    _deliver(result, out)


def compare(
    a: Annotated[Path, typer.Argument(help="blocks of the reference, or a baseline")],
    b: Annotated[Path, typer.Argument(help="blocks of what is judged")],
    tolerance: Tolerance = None,
    force_machine: Annotated[
        bool,
        typer.Option("--force-machine", help="show figures of two machines, without a verdict"),
    ] = False,
    out: Out = None,
) -> None:
    """Compare two files of `bench run --blocks`. Exit 4: B is slower; 5: no verdict."""
    from rx_edge_bench import comparison
    from rx_edge_bench.statistics import TOLERANCE

    found = comparison.compare(
        comparison.read_blocks(a),
        comparison.read_blocks(b),
        tolerance=TOLERANCE if tolerance is None else tolerance,
        force_machine=force_machine,
    )
    _conclude(found, out)


def gate(
    bundle: BundleArgument,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="default: benchmarks/baselines/<this machine>.json"),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="side A of the timing: a bundle, source tree or python"),
    ] = None,
    image: Image = None,
    pairs: Annotated[int | None, typer.Option("--pairs", min=1, help="pairs of blocks")] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="of each block")] = None,
    tolerance: Tolerance = None,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help=f"both sides: {SETTING}")
    ] = None,
    setting_a: Annotated[list[str] | None, typer.Option("--set-a", help="side A only")] = None,
    setting_b: Annotated[list[str] | None, typer.Option("--set-b", help="side B only")] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="accept this result as the new baseline")
    ] = False,
    out: Out = None,
) -> None:
    """Work beside the baseline, time beside another version. Exit 4: regression; 5: no verdict."""
    from rx_edge_bench import gate as gating
    from rx_edge_bench import interleaved
    from rx_edge_bench.statistics import TOLERANCE

    both = {"image": image, "repeats": repeats, "vision": vision, "llm": llm}
    shared = (*_options(both), *(setting or ()))
    b = _with(interleaved.Side(bundle), (*shared, *(setting_b or ())))
    a = None
    if against or setting_a or setting_b:
        a, reason = interleaved.reference(bundle, against)
        say(f"side A: {reason}; side B: {bundle}")
        a = _with(a, (*shared, *(setting_a or ())))
    path = baseline or gating.default_baseline()
    compared = not update_baseline and (baseline is not None or path.is_file())
    result = gating.gate(
        b,
        baseline=gating.read_baseline(path) if compared else None,
        a=a,
        pairs=gating.PAIRS if pairs is None else pairs,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        tick=_tick,
    )
    if update_baseline:
        gating.write_baseline(path, result.counted, result.b)
        say(f"accepted as the baseline: {path}; commit it")
    _conclude(result, out, accepted=update_baseline)


def _conclude(result: Comparison | Result, out: Path | None, *, accepted: bool = False) -> None:
    """The table for people on stderr, the document where asked, and the exit code."""
    if not accepted:
        say(result.table())
    if out is not None:
        _deliver(result.to_json(), out)
    if not accepted and EXIT_CODES[result.verdict]:
        raise typer.Exit(EXIT_CODES[result.verdict])


def _deliver(result: dict[str, Any], out: Path | None) -> None:
    if out is None:
        print_json(result)
    else:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"written: {out}")


def _options(values: dict[str, Any]) -> tuple[str, ...]:
    """Arguments of `rx_edge_bench.block`."""
    return tuple(f"--{name}={value}" for name, value in values.items() if value is not None)


def _with(side: Side, settings: Iterable[str]) -> Side:
    """`--NAME=VALUE` goes to the block, `NAME=VALUE` into its environment."""
    options, variables = [], {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise UsageError(f"setting {setting!r} is not {SETTING}")
        if name.startswith("--"):
            options.append(setting)
        else:
            variables[name] = value
    return replace(side, options=tuple(options), environment=variables)


def _tick(side: str, number: int, of: int) -> None:
    say(f"block {number}/{of} ({side})")
