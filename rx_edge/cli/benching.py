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
    progress,
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
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", help="study or directory, repeatable; default: the first canary"),
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
    image: Images = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="timed rounds: 10; 3 in a block or per lever")
    ] = None,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    no_drafts: NoDrafts = False,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="switch off one lever of speed after the other")
    ] = False,
    lever: Annotated[
        list[str] | None, typer.Option("--lever", help="with --ablate: only this one; repeatable")
    ] = None,
    without: Annotated[
        str | None, typer.Option("--without", help="with --ablate: this artefact as well")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="so many fresh processes, for `compare`")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write a page with plots")] = None,
    out: Out = None,
) -> None:
    """Time the whole path, image file to final text."""
    if blocks is not None:
        _deliver(_blocks(bundle, image, repeats, vision, llm, no_drafts, blocks), out)
        return
    if ablate:
        if no_drafts or vision:
            raise UsageError("--ablate switches levers off itself; no --no-drafts, no --vision")
        result = _ablated(bundle, image, repeats, llm, lever, without)
    else:
        result = _timed(bundle, image, repeats, vision, llm, no_drafts)
    if html is not None:
        from rx_edge_bench.latency_page import page

        html.write_text(page(result), encoding="utf-8")
        say(f"written: {html}")
    _deliver(result, out)


def _timed(
    bundle: Path, image: list[Path] | None, repeats: int | None, vision: str | None,
    llm: str | None, no_drafts: bool,
) -> dict[str, Any]:  # fmt: skip
    from rx_edge.runtime.session import open_session
    from rx_edge_bench.block import first_canary
    from rx_edge_bench.latency import measure

    runtime, rounds = RuntimeConfig(drafts=not no_drafts), 10 if repeats is None else repeats
    with open_session(bundle, vision=vision, language=llm, runtime=runtime) as session, \
            progress() as bars:  # fmt: skip
        studies = studies_of(image) or [first_canary(session)]
        of = rounds * len(studies)
        return measure(session, studies, repeats=rounds, tick=lambda n: bars("drafting", n, of, ""))


def _ablated(
    bundle: Path, image: list[Path] | None, repeats: int | None, llm: str | None,
    lever: list[str] | None, without: str | None,
) -> dict[str, Any]:  # fmt: skip
    from rx_edge.bundle import open_bundle
    from rx_edge_bench.levers import OFF, measure

    opened = open_bundle(bundle)
    studies = studies_of(image) or [opened.path(opened.manifest.canaries[0])]
    with progress() as bars:
        return measure(
            bundle,
            studies,
            repeats=3 if repeats is None else repeats,
            language=llm,
            off=lever or OFF,
            without=without,
            tick=lambda done, of: bars("studies", done, of, ""),
        )


def _blocks(
    bundle: Path, image: list[Path] | None, repeats: int | None, vision: str | None,
    llm: str | None, no_drafts: bool, blocks: int,
) -> dict[str, Any]:  # fmt: skip
    from rx_edge_bench import interleaved

    if image and len(image) > 1:
        raise UsageError("--blocks times one study; give --image once")
    both: dict[str, Any] = {"repeats": repeats, "vision": vision, "llm": llm}
    both["image"] = image[0] if image else None
    both["off"] = "drafts" if no_drafts else None
    side = interleaved.Side(bundle, options=_options(both))
    return interleaved.measure_blocks(side, blocks, tick=_tick)


def studies_of(paths: list[Path] | None) -> list[Path]:
    """Files as they are; directories as the files below them."""
    from rx_edge.runtime.worklist_store import studies_below

    found: list[Path] = []
    for path in paths or ():
        found += studies_below(path) if path.is_dir() else [path]
    return found


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
    a = None
    if against or setting_a or setting_b:
        a = _with(_reference(bundle, against), (*shared, *(setting_a or ())))
    path = baseline or gating.default_baseline()
    compared = not update_baseline and (baseline is not None or path.is_file())
    result = gating.gate(
        _with(interleaved.Side(bundle), (*shared, *(setting_b or ()))),
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


def peers(
    bundle: BundleArgument,
    run: Annotated[
        Path | None, typer.Option("--run", help="the bundle's training run, for transformers")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", help="study or directory of them; repeatable; default: canaries"),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(
            "--reports",
            help="pairs.jsonl or its directory, instead of --images: every engine writes the "
            "reference report of each held-out study, not its own draft",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="most studies of --reports")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="turns of every study")] = 3,
    llm: LanguageChoice = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="default: the bundle's")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="of every engine; default: the bundle's")
    ] = None,
    out: Out = None,
) -> None:
    """Other engines beside ours: the same weights, images and prompt, taking turns."""
    from rx_edge_bench.peers import measure
    from rx_edge_bench.peers_table import table

    result = measure(
        bundle,
        images or (),
        run=run,
        reports=reports,
        limit=limit,
        repeats=repeats,
        language=llm,
        max_new_tokens=max_new_tokens,
        threads=threads,
        tick=lambda what, done, of: say(f"{what}: {done}/{of}"),
    )
    say(table(result))
    _deliver(result, out)


def _reference(bundle: Path, against: Path | None) -> Side:
    from rx_edge_bench.interleaved import reference

    side, reason = reference(bundle, against)
    say(f"side A: {reason}; side B: {bundle}")
    return side


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
