"""`rx-edge data check` and `rx-edge data preview`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_type_hints

import typer

from rx_edge.atomic import replacing
from rx_edge.cli.common import JsonFlag, fail, print_json, progress, say
from rx_edge.config import CorpusConfig, ImageRecipe, TrainRecipe
from rx_edge.config_io import load_toml
from rx_edge.errors import UsageError

if TYPE_CHECKING:
    from rx_edge.train.data.checking import Check

Spec = Annotated[
    Path, typer.Argument(metavar="SPEC", help="a corpus, or a recipe .toml: all of its corpora")
]
Reader = Annotated[
    str | None, typer.Option("--reader", help="of the corpus; default: by its layout")
]
Section = Annotated[str | None, typer.Option("--section", help="findings, impression or both")]
Images = Annotated[
    Path | None, typer.Option("--image-folder", help="images, where not in their usual place")
]
SplitFile = Annotated[
    Path | None, typer.Option("--split-file", help="JSON of study ids per split (Open-i, Kaggle)")
]
Views = Annotated[str | None, typer.Option("--views", help="frontal, all or frontal+lateral")]


def check(
    spec: Spec,
    reader: Reader = None,
    section: Section = None,
    views: Views = None,
    image_folder: Images = None,
    split_file: SplitFile = None,
    images: Annotated[bool, typer.Option("--images", help="open every image")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave out unreadable images, counted")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Count what training would see; exit 1 when it would refuse (no text, no patient ids)."""
    from rx_edge.train.data import checking

    corpora, _ = _corpora(spec, reader, section, views, image_folder, split_file)
    with progress() as bars:
        found = [
            checking.check(
                name,
                replace(config, skip_bad=config.skip_bad or skip_bad),
                images=images,
                progress=bars,
            )
            for name, config in corpora.items()
        ]
    problems = [f"{one.name}: {problem}" for one in found for problem in one.problems]
    if as_json:
        print_json({"ok": not problems, "corpora": {one.name: one.to_json() for one in found}})
    else:
        for one in found:
            _print(one)
    if problems:
        fail("; ".join(problems), 1)


def preview(
    spec: Spec,
    out: Annotated[Path, typer.Option("--out", help="HTML file; it may hold patient data")],
    count: Annotated[int, typer.Option("--count", min=1, help="samples")] = 12,
    seed: Annotated[int, typer.Option("--seed", help="which samples")] = 0,
    reader: Reader = None,
    section: Section = None,
    views: Views = None,
    image_folder: Images = None,
    split_file: SplitFile = None,
) -> None:
    """One HTML page of samples: target text, and the image exactly as the model sees it."""
    from rx_edge.train.data import load
    from rx_edge.train.data.preview import page

    corpora, recipe = _corpora(spec, reader, section, views, image_folder, split_file)
    found = {name: load(name, config) for name, config in corpora.items()}
    html = page(found, recipe, count=count, seed=seed)
    with replacing(out) as part:
        part.write_text(html, encoding="utf-8")
    out.chmod(0o600)  # for whoever asked, and nobody else
    say(f"written: {out}; it may hold patient data")


def _corpora(
    spec: Path,
    reader: str | None,
    section: str | None,
    views: str | None,
    image_folder: Path | None,
    split_file: Path | None,
) -> tuple[dict[str, CorpusConfig], ImageRecipe]:
    """What to read, and how its images are prepared."""
    changes: dict[str, Any] = {
        "section": _one_of("section", section),
        "views": _one_of("views", views),
        "images": None if image_folder is None else str(image_folder),
        "split_file": None if split_file is None else str(split_file),
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if spec.suffix == ".toml":
        if reader is not None:
            raise UsageError("--reader is for a corpus; the recipe names its readers itself")
        recipe = load_toml(spec, TrainRecipe)
        if not recipe.data:
            raise UsageError(f"{str(spec)!r} has no [data.NAME] table")
        corpora = {name: replace(config, **changes) for name, config in recipe.data.items()}
        return corpora, recipe.image
    if not spec.exists():
        raise UsageError(f"{str(spec)!r} does not exist; name a corpus or a recipe .toml")
    from rx_edge.train.data import guess

    name = cast(Any, _one_of("reader", reader) or guess(spec))
    return {name: CorpusConfig(reader=name, path=str(spec), **changes)}, ImageRecipe()


def _one_of(field: str, value: str | None) -> str | None:
    valid = get_args(get_type_hints(CorpusConfig)[field])
    if value is not None and value not in valid:
        raise UsageError(f"--{field} {value!r}; valid: {', '.join(valid)}")
    return value


def _print(found: Check) -> None:
    """Tables for people, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.name} ({found.reader}, {found.section}, {found.views})")
    columns = ("split", "samples", "studies", "patients", "with image", "lateral", "indication")
    for column in columns:
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in found.splits.items():
        table.add_row(split, *(str(figure) for figure in asdict(counts).values()))
    console = Console(soft_wrap=True)
    console.print(table)
    for line in _lines(found):
        console.print(line, highlight=False, markup=False)


def _lines(found: Check) -> list[str]:
    words = found.words
    lines = [
        "sections found: " + (_listed(found.sections) or "this corpus has none"),
        "dropped: " + (_listed(found.dropped) or "nothing"),
        f"missing images: {found.missing_images}",
        f"duplicate reports: {found.duplicates} ({found.duplicate_share:.1%}); "
        f"held-out reports that are also in train: {found.held_out_in_train}",
        f"patients in more than one split: {found.shared_patients}",
        f"words per report: {words.minimum} | {words.lower_quartile:g} {words.median:g} "
        f"{words.upper_quartile:g} | {words.maximum} (minimum | quartiles | maximum)",
        f"vocabulary: {words.vocabulary} words; without text: {found.empty_share:.1%} of studies",
    ]
    if found.images_opened:
        left = "left out" if found.skipped else "not left out"
        lines.append(
            f"images opened: {found.images_opened}; unreadable: {len(found.unreadable)}"
            + (f" ({left})" if found.unreadable else "")
        )
        lines += [f"  study {study}: {why}" for study, why in found.unreadable.items()]
    return lines


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
