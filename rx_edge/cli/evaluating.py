"""`rx-edge evaluate`."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from rx_edge.atomic import replacing
from rx_edge.cli.common import (
    LanguageChoice,
    Unverified,
    VisionChoice,
    progress,
    require_train,
    say,
)
from rx_edge.config import EvaluateConfig, GenerateConfig, UncertainPolicy
from rx_edge.errors import UsageError

if TYPE_CHECKING:
    from rx_edge.evaluate.evaluate import Evaluation

POLICIES: tuple[UncertainPolicy, ...] = get_args(UncertainPolicy)
PACKAGES = ("torch", "transformers", "peft", "pycocoevalcap", "radeval")  # beside the engines'


def evaluate(
    systems: Annotated[
        list[Path], typer.Argument(help="a run or a bundle; two are compared: second minus first")
    ],
    data: Annotated[
        Path, typer.Option("--data", help="pairs.jsonl, or a known corpus's directory")
    ],
    reader: Annotated[
        str | None, typer.Option("--reader", help="of the corpus; default: by its layout")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="test or val")] = "test",
    protocol: Annotated[
        str,
        typer.Option("--protocol", help="plain, study-findings, r2gen, r2gen-mimic, rexrank"),
    ] = "study-findings",
    uncertain: Annotated[
        str, typer.Option("--uncertain", help=f"labels: {', '.join(POLICIES)}")
    ] = EvaluateConfig().uncertain,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="studies to score")] = None,
    train_limit: Annotated[
        int, typer.Option("--train-limit", min=1, help="training studies for baselines")
    ] = EvaluateConfig().train_limit,
    resamples: Annotated[
        int, typer.Option("--resamples", min=100, help="of the intervals and of the test")
    ] = EvaluateConfig().resamples,
    radeval: Annotated[
        list[str] | None,
        typer.Option("--radeval", help="chexbert, radgraph, radcliq, green; repeatable"),
    ] = None,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="of each draft, for both systems")
    ] = GenerateConfig().max_new_tokens,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads")] = None,
    out: Annotated[
        Path | None, typer.Option("--json", help="file for the result; - is standard output")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="page; holds report texts")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="every study; holds texts")] = None,
    allow_unverified: Unverified = False,
) -> None:
    """Metrics with intervals and baselines; with RUN BUNDLE, what deployment costs."""
    from rx_edge.evaluate.evaluate import Request
    from rx_edge.evaluate.evaluate import evaluate as run_evaluation
    from rx_edge.evaluate.systems import Settings, kind
    from rx_edge_bench.environment import environment

    policy = _policy(uncertain)
    _check(data, [out, html, csv])
    if "run" in map(kind, systems):
        require_train()
    settings = Settings(max_new_tokens, threads, vision, llm, allow_unverified)
    request = Request(
        data=data,
        split=split,
        protocol=protocol,
        policy=policy,
        limit=limit,
        train_limit=train_limit,
        resamples=resamples,
        radeval=tuple(radeval or ()),
        reader=_reader(reader),
    )
    with progress() as bars:
        found = run_evaluation(systems, request, settings, bars)
    found.result["settings"] = {"max_new_tokens": max_new_tokens, "threads": threads}
    found.result["environment"] = {**environment(), "evaluation_packages": _versions()}
    _deliver(found, out, html, csv)


def _check(data: Path, files: list[Path | None]) -> None:
    """Before anything is loaded: a wrong path should not cost an evaluation."""
    if not data.exists():
        raise UsageError(f"--data {str(data)!r} does not exist; name a pairs.jsonl")
    for file in files:
        if file is not None and not file.resolve().parent.is_dir():
            raise UsageError(f"{str(file)!r} cannot be written: its directory does not exist")


def _reader(name: str | None) -> str | None:
    from rx_edge.train.data import READERS

    if name is not None and name not in READERS:
        raise UsageError(f"--reader is {name!r}; valid: {', '.join(READERS)}")
    return name


def _policy(name: str) -> UncertainPolicy:
    for policy in POLICIES:
        if policy == name:
            return policy
    raise UsageError(f"--uncertain is {name!r}; valid: {', '.join(POLICIES)}")


def _deliver(found: Evaluation, out: Path | None, html: Path | None, csv: Path | None) -> None:
    from rich.console import Console

    from rx_edge.display import evaluation_tables
    from rx_edge.evaluate.files import csv_text, page

    text = json.dumps(found.result, indent=1, allow_nan=False) + "\n"
    for file, content in (
        (html, page(found) if html else ""),
        (csv, csv_text(found.rows) if csv else ""),
        (out, text),
    ):
        if file is not None and str(file) != "-":
            with replacing(file) as part:
                part.write_text(content, encoding="utf-8")
            say(f"written: {file}")
    if out is not None and str(out) == "-":
        typer.echo(text, nl=False)
    elif out is None:
        for table in evaluation_tables(found.result):
            Console().print(table)
    for name, reason in found.result["missing"].items():
        say(f"missing: {name}: {reason}")
    if not found.result.get("comparison", {"same_encoder": True})["same_encoder"]:
        say("note: the two were not trained as one model: this is no loss from deployment")


def _versions() -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out
