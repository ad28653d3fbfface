"""The scripts and templates beside an mmproj: every one of them carries the trained prompt."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from rx_edge.config import DRAFT_BANNER, GenerateConfig, ImageRecipe, PromptConfig
from rx_edge.errors import ExportError
from rx_edge_export import stock_files
from rx_edge_export.stock_files import Names

PROMPT = PromptConfig()
WHOLE = PROMPT.template.replace("{image}", "<__media__>")
NAMES = Names("llm Q8's.gguf", "mmproj.gguf", "rx-edge-demo")  # a name that a shell would split
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_SYSTEM = "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}" + CHATML


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    root.mkdir()
    files = stock_files.write(
        root, NAMES, PROMPT, ImageRecipe(), GenerateConfig(), own_template=WITH_SYSTEM
    )
    assert sorted(files) == sorted(f"stock/{p.name}" for p in (root / "stock").iterdir())
    return root


def program(directory: Path, name: str, script: str) -> dict[str, str]:
    """A stand-in for a program, found first on PATH; returns the environment."""
    directory.mkdir()
    (directory / name).write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    (directory / name).chmod(0o755)
    return {**os.environ, "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}


def test_server_script(bundle: Path, tmp_path: Path) -> None:
    environment = program(
        tmp_path / "bin", "llama-server", 'echo "$LLAMA_MEDIA_MARKER"; pwd; printf "%s\\n" "$@"'
    )
    found = subprocess.run(
        [bundle / "stock" / "run-llama-server.sh", "--port", "8081"],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert found[:2] == ["<__media__>", str(bundle)]
    options = dict(zip(found[2::2], found[3::2], strict=False))
    assert options["-m"] == NAMES.llm
    assert options["--mmproj"] == NAMES.mmproj
    assert options["--host"] == "127.0.0.1"
    assert options["-c"] == "1024"
    template = found[found.index("--chat-template-file") + 1]
    assert (bundle / template).is_file()
    assert found[-2:] == ["--port", "8081"]


def test_draft_script_sends_the_literal_prompt(bundle: Path, tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "curl", f"cat > {tmp_path}/sent")
    picture = tmp_path / "a study.png"
    picture.write_bytes(bytes(range(256)) * 3)
    subprocess.run([bundle / "stock" / "draft.sh", picture], env=environment, check=True)
    sent = json.loads((tmp_path / "sent").read_text("utf-8"))
    assert sent["prompt"]["prompt_string"] == WHOLE
    (data,) = sent["prompt"]["multimodal_data"]
    assert base64.b64decode(data) == picture.read_bytes()
    assert (sent["temperature"], sent["n_predict"]) == (0, 160)
    assert sent["stop"] == ["<|im_end|>"]


ASKED = "Write.\n{image}\nIndication: {indication}<|im_end|>\n"
TOLD = PromptConfig(template=ASKED, no_indication="it's not stated")


@pytest.mark.parametrize(
    ("given", "sent_text"),
    [
        (None, "it's not stated"),
        ("", "it's not stated"),
        ("Cough & fever.", "Cough & fever."),
        ("a \"b\" \\ $(id) `x` %s 'c' é", "a \"b\" \\ $(id) `x` %s 'c' é"),
        ("two\nlines\tand a tab", "two lines and a tab"),
    ],
)
def test_draft_script_puts_an_indication_into_its_place(
    tmp_path: Path, given: str | None, sent_text: str
) -> None:
    generate = GenerateConfig()
    stock_files.write(tmp_path, NAMES, TOLD, ImageRecipe(), generate, own_template="")
    environment = program(tmp_path / "bin", "curl", f"cat > {tmp_path}/sent")
    environment |= {} if given is None else {"INDICATION": given}
    picture = tmp_path / "study.png"
    picture.write_bytes(b"png")
    subprocess.run([tmp_path / "stock" / "draft.sh", picture], env=environment, check=True)
    sent = json.loads((tmp_path / "sent").read_text("utf-8"))
    text = ASKED.replace("{image}", "<__media__>").replace("{indication}", sent_text)
    assert sent["prompt"]["prompt_string"] == text
    assert len(sent["prompt"]["multimodal_data"]) == 1


def test_every_other_file_states_no_indication(tmp_path: Path) -> None:
    stock_files.write(tmp_path, NAMES, TOLD, ImageRecipe(), GenerateConfig(), own_template="")
    whole = ASKED.replace("{indication}", TOLD.no_indication)
    chat = (tmp_path / "stock" / "chat-template.jinja").read_text("utf-8")
    assert stock_files.render(chat, "X") == whole.replace("{image}", "X")
    modelfile = (tmp_path / "stock" / "Modelfile").read_text("utf-8")
    assert whole.replace("{image}", "{{ .Prompt }}") in modelfile
    readme = (tmp_path / "stock" / "README.md").read_text("utf-8")
    assert json.dumps(whole.replace("{image}", "<__media__>")) in readme
    assert "At most 64 tokens" in readme
    assert '"it\'s not stated" stands in its place' in readme
    for path in (tmp_path / "stock").iterdir():
        assert "{indication}" not in path.read_text("utf-8")


def test_chat_template_renders_the_prompt_of_a_picture_alone(bundle: Path) -> None:
    template = (bundle / "stock" / "chat-template.jinja").read_text("utf-8")
    assert stock_files.render(template, "<__media__>") == WHOLE


@pytest.mark.parametrize(
    "template", ["{image}", "\n {image} \n", 'é "{image}" \\n {{% x %}}', "<s>{image}\n\n"]
)
def test_any_prompt_survives_the_chat_template(template: str) -> None:
    chat = stock_files.chat_template(PromptConfig(template=template))
    assert stock_files.render(chat, "X") == template.replace("{image}", "X")


def test_own_template_of_the_language_model() -> None:
    assert stock_files.own_template_fits(CHATML, PROMPT)
    assert not stock_files.own_template_fits(WITH_SYSTEM, PROMPT)
    assert not stock_files.own_template_fits("", PROMPT)
    assert not stock_files.own_template_fits("no content", PROMPT)
    with pytest.raises(ExportError, match="cannot be rendered"):
        stock_files.own_template_fits("{% if %}", PROMPT)


def test_modelfile(bundle: Path) -> None:
    text = (bundle / "stock" / "Modelfile").read_text("utf-8")
    assert re.findall(r"^FROM (.*)$", text, re.M) == [f"../{NAMES.llm}", f"../{NAMES.mmproj}"]
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert found is not None
    assert found[1].replace("{{ .Prompt }}", "{image}") == PROMPT.template
    assert "PARAMETER temperature 0\n" in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text


@pytest.mark.parametrize("template", ['"""{image}', "{{ x }}{image}"])
def test_a_prompt_that_a_modelfile_cannot_quote_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ExportError, match="Modelfile cannot quote"):
        stock_files.write(
            tmp_path, NAMES, PromptConfig(template=template), ImageRecipe(), GenerateConfig(),
            own_template="",
        )  # fmt: skip


def test_banner_is_in_everything_a_person_reads(bundle: Path) -> None:
    for name in ("README.md", "run-llama-server.sh", "draft.sh", "Modelfile"):
        assert DRAFT_BANNER in (bundle / "stock" / name).read_text("utf-8"), name


def test_readme(bundle: Path) -> None:
    text = (bundle / "stock" / "README.md").read_text("utf-8")
    for needed in (
        NAMES.llm, NAMES.mmproj, "224 x 224", "does **not** render the prompt", "verifies nothing",
        "reads no DICOM", "rx-edge prepare", "Not run: llama-server", json.dumps(WHOLE),
    ):  # fmt: skip
        assert needed in text, needed
    assert "ndication" not in text
    assert max(map(len, text.splitlines())) <= 200


def test_same_bytes_every_time(bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    for name in stock_files.write(
        again, NAMES, PROMPT, ImageRecipe(), GenerateConfig(), own_template=WITH_SYSTEM
    ):
        assert (again / name).read_bytes() == (bundle / name).read_bytes()
        assert (again / name).stat().st_mode & 0o777 == (0o755 if name.endswith(".sh") else 0o644)
