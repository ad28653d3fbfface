"""`rx-edge study`: the measurements behind published figures, each as one JSON document."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from rx_edge.atomic import replacing
from rx_edge.cli.common import (
    BundleArgument,
    LanguageChoice,
    Unverified,
    VisionChoice,
    print_json,
    progress,
    require_export,
    require_train,
    say,
)
from rx_edge.errors import UsageError

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="file to write; default: standard output")
]
Run = Annotated[Path, typer.Argument(help="finished training run")]
Pairs = Annotated[Path, typer.Option("--pairs", help="pairs.jsonl or its directory")]
Threads = Annotated[int | None, typer.Option("--threads", min=0, help="CPU threads of the engines")]


def deployment_loss(
    run: Run,
    bundle: BundleArgument,
    pairs: Pairs,
    llm: Annotated[
        str, typer.Option("--llm", help="artefacts to compare with the run")
    ] = "gguf:Q8_0,gguf:Q4_K_M",
    vision: VisionChoice = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="held-out studies")] = None,
    threads: Threads = None,
    allow_unverified: Unverified = False,
    out: JsonFile = None,
) -> None:
    """What each metric loses between the trained model and its bundle, on held-out studies."""
    require_train()
    from rx_edge_bench.deployment_loss import measure

    with progress() as bars:
        result = measure(
            run,
            bundle,
            pairs,
            llm.split(","),
            vision=vision,
            limit=limit,
            threads=threads,
            allow_unverified=allow_unverified,
            progress=bars,
        )
    _deliver(result, out)


def imatrix(
    run: Run,
    pairs: Pairs,
    file_types: Annotated[
        str, typer.Option("--types", help="GGUF file types, separated by commas")
    ] = "Q4_K_M,IQ4_NL",
    fit: Annotated[int, typer.Option("--fit", min=1, help="studies the matrices come from")] = 32,
    check: Annotated[int, typer.Option("--check", min=1, help="studies compared on")] = 50,
    threads: Threads = None,
    out: JsonFile = None,
) -> None:
    """Importance matrices compared: none, from text alone, from soft prompts and text."""
    require_export()
    from rx_edge_bench.imatrix_comparison import measure

    with tempfile.TemporaryDirectory(prefix="rx-edge-imatrix-") as work, progress() as bars:
        result = measure(
            run,
            pairs,
            Path(work),
            file_types=file_types.split(","),
            fit=fit,
            check=check,
            threads=threads or 0,
            progress=bars,
        )
    _deliver(result, out)


def peers(
    bundle: BundleArgument,
    llm: Annotated[
        list[str] | None, typer.Option("--llm", help="GGUF artefact; may be repeated")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="text in the image's place; repeatable")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="tokens of each answer")
    ] = 32,
    threads: Threads = None,
    allow_unverified: Unverified = False,
    out: JsonFile = None,
) -> None:
    """Greedy text of other engines on the bundle's GGUF, beside ours (no image)."""
    from rx_edge_bench.peer_check import INSTRUCTIONS, SCHEMA, check

    checks = [
        check(
            bundle,
            name,
            prompt or INSTRUCTIONS,
            max_new_tokens=max_new_tokens,
            threads=threads,
            allow_unverified=allow_unverified,
        )
        for name in llm or ["gguf:F16"]
    ]
    _deliver(checks[0] if len(checks) == 1 else {"schema": SCHEMA, "checks": checks}, out)


def export_memory(
    tokenizer: Annotated[Path, typer.Argument(help="directory with a tokenizer.json")],
    layers: Annotated[
        tuple[int, int] | None, typer.Option("--layers", help="two numbers of layers, e.g. 2 4")
    ] = None,
    out: JsonFile = None,
) -> None:
    """Peak memory of merging, converting and quantising 7B geometry, per number of layers."""
    require_export()
    from rx_edge_bench.export_memory import COUNTS, measure

    with tempfile.TemporaryDirectory(prefix="rx-edge-") as work:
        result = measure(Path(work), tokenizer, layers=layers or COUNTS, progress=say)
    _deliver(result, out)


def gate_honesty(
    bundle: BundleArgument,
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="runs of the bundle beside itself")
    ] = 40,
    planted: Annotated[
        int, typer.Option("--planted", min=0, help="of these, with a slower third side")
    ] = 20,
    pairs: Annotated[
        int | None, typer.Option("--pairs", min=1, help="blocks a side; default: the gate's")
    ] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="of each block")] = None,
    threads: Threads = None,
    out: JsonFile = None,
) -> None:
    """How often the latency gate cries wolf, and how often it sleeps. A --json file goes on."""
    from rx_edge_bench.block import REPEATS
    from rx_edge_bench.gate import PAIRS
    from rx_edge_bench.gate_honesty import measure

    with progress() as bars:
        result = measure(
            bundle,
            runs=runs,
            planted=planted,
            pairs=PAIRS if pairs is None else pairs,
            repeats=REPEATS if repeats is None else repeats,
            options=() if threads is None else (f"--threads={threads}",),
            earlier=_earlier(out),
            keep=lambda found: None if out is None else _write(found, out),
            progress=bars,
        )
    _deliver(result, out)


def cold_start(
    bundle: BundleArgument,
    image: Annotated[Path, typer.Argument(help="study to draft")],
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="fresh processes of each kind")
    ] = 10,
    out: JsonFile = None,
) -> None:
    """From process start to first token, with warm and with dropped page cache."""
    from rx_edge_bench.cold_start import measure

    with progress() as bars:
        result = measure(
            bundle, image, repeats=repeats, tick=lambda n: bars("starting", n, repeats, "")
        )
    _deliver(result, out)


def attention(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(help="studies, or directories of studies")],
    llm: Annotated[str | None, typer.Option("--llm", help="GGUF artefact")] = None,
    out: JsonFile = None,
) -> None:
    """llama.cpp's fused attention on and off: speed, and whether a wider pass changes a token."""
    from rx_edge.cli.benching import studies_of
    from rx_edge.runtime.session import open_session
    from rx_edge_bench.attention import measure

    with open_session(bundle, language=llm) as session, progress() as bars:
        result = measure(
            session, studies_of(images), tick=lambda done, of: bars("studies", done, of, "")
        )
    _deliver(result, out)


def worklist(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(help="studies, or directories of studies")],
    slots: Annotated[
        list[int] | None,
        typer.Option("--slots", min=1, help="drafts of a worker; 1 = one by one; repeatable"),
    ] = None,
    vision: VisionChoice = None,
    llm: LanguageChoice = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="rounds")] = 3,
    out: JsonFile = None,
) -> None:
    """Many studies at once against one after the other: speed and text."""
    from rx_edge.cli.benching import studies_of
    from rx_edge_bench.worklist_study import SLOT_COUNTS, measure

    with progress() as bars:
        result = measure(
            bundle,
            studies_of(images),
            vision=vision,
            language=llm,
            slots=slots or SLOT_COUNTS,
            repeats=repeats,
            tick=lambda done, of: bars("rounds", done, of, ""),
        )
    _deliver(result, out)


def labels(
    reading: Annotated[Path, typer.Argument(help="labels read from reports: labels-iu100.json")],
    out: JsonFile = None,
) -> None:
    """The rule labels beside a reading of IU X-ray reports (`models fetch iu-reports`)."""
    from rx_edge.model.catalogue import fetched_dir
    from rx_edge_bench.label_agreement import measure

    _deliver(measure(reading, fetched_dir("iu-reports")), out)


def projection(
    tokens_per_pass: Annotated[
        float, typer.Option("--tokens-per-pass", min=1.0, help="with proposals; 1 = without")
    ] = 1.0,
    out: JsonFile = None,
) -> None:
    """What 7B would take at best on workstation cards: from bytes and operations, not measured."""
    require_export()
    from rx_edge_bench.projection import project

    _deliver(project(tokens_per_pass=tokens_per_pass), out)


def training(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe, or a TOML file")],
    stage: Annotated[str, typer.Option("--stage", help="stage with images")] = "stage2",
    steps: Annotated[int, typer.Option("--steps", min=2, help="of each block")] = 38,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="blocks of each side")] = 4,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a recipe key: key.sub=value")
    ] = None,
    out: JsonFile = None,
) -> None:
    """Our training step beside transformers' Trainer + peft: tokens per second, memory, losses."""
    require_train("accelerate")
    from rx_edge.config import TrainRecipe
    from rx_edge.config_io import load_toml, override
    from rx_edge.train.recipes import find
    from rx_edge_bench.training import measure

    effective = override(load_toml(find(recipe), TrainRecipe), overrides or (), where=recipe)
    with tempfile.TemporaryDirectory(prefix="rx-edge-training-") as work, progress() as bars:
        result = measure(effective, stage, Path(work), steps=steps, pairs=pairs, tick=bars)
    _deliver(result, out)


def stages(
    first: Annotated[str, typer.Argument(help="name of a shipped recipe, or a TOML file")],
    second: Annotated[str, typer.Argument(help="the control")],
    work: Annotated[Path, typer.Option("--work", help="directory of the runs; kept")],
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="default: 0, 1 and 2")] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", help="factor on the epochs in which the recipes differ")
    ] = 1.0,
    out: JsonFile = None,
) -> None:
    """Two recipes at equal optimiser steps, trained with several seeds: loss, study by study."""
    require_train("accelerate")
    from rx_edge.config import TrainRecipe
    from rx_edge.config_io import load_toml
    from rx_edge.train.recipes import find
    from rx_edge_bench.stage_comparison import compare

    recipes = [load_toml(find(name), TrainRecipe) for name in (first, second)]
    with progress() as bars:
        result = compare(recipes, seeds or (0, 1, 2), work, epochs=epochs, progress=bars)
    _deliver(result, out)


def _deliver(result: dict[str, Any], out: Path | None) -> None:
    if out is None:
        print_json(result)
        return
    _write(result, out)
    say(f"written: {out}")


def _write(result: dict[str, Any], out: Path) -> None:
    with replacing(out) as part:
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _earlier(out: Path | None) -> dict[str, Any] | None:
    """The study in `out` that is to be continued, if it is there."""
    if out is None or not out.exists():
        return None
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(out)!r} is no JSON document; name another file") from error
    return found if isinstance(found, dict) else {}
