"""The files beside the mmproj with which stock programs run a bundle: README, scripts, Modelfile.

The prompt is the trap. A stock program puts its own chat template around what is typed, and
versions differ in whether the picture comes before or after the text and in the newline between
them (llama.cpp pull requests 23467 and 19595). So the whole trained prompt is in the template, and
the user sends the picture alone: nothing is left to differ. `draft.sh` sends the prompt literally.

Where the prompt has an {indication} slot, the templates state none, and `draft.sh` takes one.

llama-server, llama-mtmd-cli, Ollama and LM Studio were never run by us, and the README says so.
What is checked at export goes through libmtmd, llama.cpp's library (`mmproj_check.py`).

Does not cover: writing model files, starting anything, verification on the hospital's machine.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from rx_edge.atomic import replacing
from rx_edge.config import DRAFT_BANNER, GenerateConfig, ImageRecipe, PromptConfig
from rx_edge.errors import ExportError
from rx_edge.optional import require
from rx_edge.prompting import INDICATION, MAX_INDICATION_TOKENS, filled, takes_indication
from rx_edge_export.libmtmd import MARKER

DIRECTORY = "stock"
_PROBE = "\x02content\x03"  # a text that no template holds


@dataclass(frozen=True)
class Names:
    """File names inside the bundle, and the model's name for Ollama."""

    llm: str
    mmproj: str
    name: str


def write(
    bundle: Path,
    names: Names,
    prompt: PromptConfig,
    image: ImageRecipe,
    generate: GenerateConfig,
    *,
    own_template: str,
) -> tuple[str, ...]:
    """Write `stock/` into the bundle.

    Args:
        own_template: chat template inside the language file (`libmtmd.Stock.chat_template`).

    Returns:
        The files, relative to the bundle.

    Raises:
        ExportError: the prompt cannot be written in one of the files.
    """
    directory = bundle / DIRECTORY
    directory.mkdir(exist_ok=True)
    chat = chat_template(prompt)
    if render(chat, MARKER) != literal(prompt):
        raise ExportError("the chat template does not render prompt.template; report this as a bug")
    files = {
        "README.md": _readme(names, prompt, image, generate, own_template),
        "run-llama-server.sh": _server(names, generate),
        "draft.sh": _draft(prompt, generate),
        "Modelfile": _modelfile(names, prompt, generate),
        "chat-template.jinja": chat,
    }
    for name, text in files.items():
        with replacing(directory / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
        if name.endswith(".sh"):
            (directory / name).chmod(0o755)
    return tuple(f"{DIRECTORY}/{name}" for name in files)


def literal(prompt: PromptConfig) -> str:
    """The prompt as stock llama.cpp wants it: the marker in the image slot, no indication.

    The wrapper <img>...</img> is not in it: libmtmd adds it.
    """
    return filled(prompt).replace("{image}", MARKER)


def chat_template(prompt: PromptConfig) -> str:
    """A Jinja template that renders the trained prompt around the last message, the picture."""
    head, tail = (json.dumps(part, ensure_ascii=False) for part in _sides(prompt))
    return (
        "{%- for message in messages -%}{%- if loop.last -%}"
        f"{{{{- {head} + message['content'] + {tail} -}}}}"
        "{%- endif -%}{%- endfor -%}"
    )


def own_template_fits(template: str, prompt: PromptConfig) -> bool:
    """Whether the language file's own chat template can render the trained prompt at all.

    It does if the prompt begins and ends as the template does around a single user message.
    """
    if not template:
        return False
    head, found, tail = render(template, _PROBE).partition(_PROBE)
    text = filled(prompt)
    if not found or not text.startswith(head) or not text.endswith(tail):
        return False
    return "{image}" in text[len(head) : len(text) - len(tail)]


def render(template: str, content: str) -> str:
    """A chat template rendered for one user message, as engines do it.

    Raises:
        ExportError: the template is broken or needs what engines give it and we do not.
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra="export")
    sandbox = require("jinja2.sandbox", extra="export")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        text: str = environment.from_string(template).render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True,
            bos_token="", eos_token="",
        )  # fmt: skip
    except (jinja2.TemplateError, TypeError) as error:
        raise ExportError(
            f"the language model's chat template cannot be rendered: {error}"
        ) from error
    return text


def _sides(prompt: PromptConfig) -> tuple[str, str]:
    head, _, tail = filled(prompt).partition("{image}")
    return head, tail


def _comment() -> str:
    return f"# {DRAFT_BANNER}\n"


def _server(names: Names, generate: GenerateConfig) -> str:
    return (
        "#!/bin/sh\n"
        f"{_comment()}"
        "# Serves this bundle's model with stock llama.cpp, on this machine only.\n"
        "# Further arguments are passed on, e.g. --port 8081 or -ngl 99.\n"
        "set -eu\n"
        'cd "$(dirname "$0")/.."\n'
        "# servers since April 2026 draw a random marker otherwise (llama.cpp 21962)\n"
        f"LLAMA_MEDIA_MARKER={shlex.quote(MARKER)}\n"
        "export LLAMA_MEDIA_MARKER\n"
        f"exec llama-server -m {shlex.quote(names.llm)} --mmproj {shlex.quote(names.mmproj)} \\\n"
        f"  -c {generate.n_ctx} -np 1 --host 127.0.0.1 --temp 0 -n {generate.max_new_tokens} \\\n"
        f'  --jinja --chat-template-file {DIRECTORY}/chat-template.jinja "$@"\n'
    )


def _draft(prompt: PromptConfig, generate: GenerateConfig) -> str:
    picture, slot = "@PNG@", "@INDICATION@"
    text = prompt.template.replace("{image}", MARKER).replace(INDICATION, slot)
    body = json.dumps(
        {
            "prompt": {"prompt_string": text, "multimodal_data": [picture]},
            "n_predict": generate.max_new_tokens,
            "temperature": 0,
            "cache_prompt": False,
            "stop": [prompt.end_of_report],
        }
    )
    before, _, after = body.partition(picture)
    start, found, rest = before.partition(slot)
    usage, asked = _indication_lines(prompt, rest) if found else ("", "")
    return (
        "#!/bin/sh\n"
        f"{_comment()}"
        "# draft.sh PICTURE.png [URL]: asks a running run-llama-server.sh for a draft, as JSON.\n"
        "# The picture is the one that `rx-edge prepare` writes, nothing else.\n"
        f"{usage}"
        "set -eu\n"
        f"before={shlex.quote(start)}\n"
        f"{asked}"
        f"after={shlex.quote(after)}\n"
        'printf \'%s%s%s\' "$before" "$(base64 < "$1" | tr -d \'\\n\')" "$after" |\n'
        '  curl -sS -H "Content-Type: application/json" --data-binary @- \\\n'
        '    "${2:-http://127.0.0.1:8080}/completion"\n'
    )


def _indication_lines(prompt: PromptConfig, rest: str) -> tuple[str, str]:
    """How `draft.sh` is given an indication, and the lines that put it into the JSON, escaped."""
    usage = "# INDICATION in the environment says why the study was asked for, in plain words.\n"
    asked = (
        "indication=${INDICATION:-}\n"
        f'[ -n "$indication" ] || indication={shlex.quote(prompt.no_indication)}\n'
        "indication=$(printf '%s' \"$indication\" | tr '[:cntrl:]' ' ' |\n"
        "  sed 's/[\\\\\"]/\\\\&/g')\n"
        f"before=$before$indication{shlex.quote(rest)}\n"
    )
    return usage, asked


def _modelfile(names: Names, prompt: PromptConfig, generate: GenerateConfig) -> str:
    head, tail = _sides(prompt)
    if any(sign in head + tail for sign in ('"""', "{{", "}}")) or '"' in prompt.end_of_report:
        raise ExportError(
            'prompt.template or prompt.end_of_report holds \'"""\', \'"\', "{{" or "}}", which an '
            "Ollama Modelfile cannot quote; train with another text"
        )
    return (
        f"{_comment()}"
        "# Send the picture alone, without text: the prompt is in the template.\n"
        f"FROM ../{names.llm}\n"
        f"FROM ../{names.mmproj}\n"
        f'TEMPLATE """{head}{{{{ .Prompt }}}}{tail}"""\n'
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1.0\n"  # 1.1 by default: it changes greedy drafts
        f"PARAMETER num_ctx {generate.n_ctx}\n"
        f"PARAMETER num_predict {generate.max_new_tokens}\n"
        f'PARAMETER stop "{prompt.end_of_report}"\n'
    )


def _own_template(template: str, prompt: PromptConfig) -> str:
    if not template:
        return "has no chat template of its own: without ours, chat endpoints guess one"
    if own_template_fits(template, prompt):
        return "has a chat template that renders the prompt only if picture and text come in order"
    return "has a chat template that does **not** render the prompt this model was trained with"


def _readme(
    names: Names,
    prompt: PromptConfig,
    image: ImageRecipe,
    generate: GenerateConfig,
    own_template: str,
) -> str:
    own = _own_template(own_template, prompt)
    indication = _INDICATION.format(
        none=json.dumps(prompt.no_indication, ensure_ascii=False), most=MAX_INDICATION_TOKENS
    )
    return _README.format(
        banner=DRAFT_BANNER,
        llm=names.llm,
        mmproj=names.mmproj,
        llm_quoted=shlex.quote(names.llm),
        mmproj_quoted=shlex.quote(names.mmproj),
        name=shlex.quote(names.name),
        size=image.size,
        own=own,
        n_ctx=generate.n_ctx,
        tokens=generate.max_new_tokens,
        marker=MARKER,
        end=prompt.end_of_report,
        prompt=json.dumps(literal(prompt), ensure_ascii=False),
        indication=indication if takes_indication(prompt) else "",
    )


_README = """\
# This model in stock llama.cpp, Ollama, LM Studio

**{banner}**

`{llm}` and `{mmproj}` are plain GGUF files; the bundle's other language GGUFs fit as well.
A stock program

- **verifies nothing**: not the files, not that they belong together, not this machine's arithmetic;
- **reads no DICOM** and judges no picture: it drafts a chest report of anything;
- **adds no banner**: put the sentence above next to every text.

Use `rx-edge report` for anything but trying out.

## The picture

Give it exactly the {size} x {size} 8-bit grey PNG that this writes (display polarity, black
padding). Stock programs resize with other filters, and a PNG of the original is another input.

    rx-edge prepare STUDY.dcm --bundle . --out study.png

## The prompt

    {prompt}

`{marker}` is the picture; libmtmd puts `<img>` and `</img>` around it. The language model
{own}.
So always give `chat-template.jinja`, which holds the whole prompt, and send **the picture alone,
without text**. Temperature 0, no repeat penalty, stop at `{end}`.{indication}

## llama.cpp

    stock/run-llama-server.sh
    stock/draft.sh study.png

`draft.sh` sends the prompt literally to `/completion`. Once, without a server:

    llama-mtmd-cli -m {llm_quoted} --mmproj {mmproj_quoted} --image study.png -p '{marker}' \\
      --jinja --chat-template-file stock/chat-template.jinja --temp 0 -c {n_ctx} -n {tokens}

## Ollama

    ollama create {name} -f stock/Modelfile
    ollama run {name} ./study.png

Versions of Ollama differ in whether they take a separate mmproj, and of this type; an answer that
does not change with the picture means that it was ignored.

## LM Studio

Put both files into one folder below its models folder. Paste `chat-template.jinja` as the
prompt template, set temperature 0 and repeat penalty off, attach the picture, send no text.

## What was checked, and what was not

At export, through libmtmd, the library of llama.cpp's own programs: the soft prompt of every
canary picture against the trained model, and the token ids around it. Not run: llama-server,
llama-mtmd-cli, Ollama, LM Studio. llama-server's options were read in its documentation (November
2026), those of the others were not checked.
"""

_INDICATION = """

## The indication

This model also reads why the study was asked for. {none} stands in its place where nobody says,
as in `chat-template.jinja` and in the Modelfile. `draft.sh` takes another text:

    INDICATION='Cough and fever.' stock/draft.sh study.png

At most {most} tokens on one line, in plain words: `rx-edge report` cuts a longer one and refuses
control tokens, a stock program does neither."""
