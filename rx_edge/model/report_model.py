"""ReportModel = vision tower -> projector -> soft prompt -> causal LM. The fp32 reference.

What is trained is this class, and what is exported is compared with this class: float32, with
the adapter *not* merged. A finished run is a directory whose `final/` holds `projector.safetensors`
and `adapter/` (peft's own format), and `vision.safetensors` or `language.safetensors` where a stage
trained them; everything else is found again by name.

Does not cover: optimisation (`rx_edge.train`) and any deployed format (`rx_edge_export`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import nn

from rx_edge.config import TrainRecipe
from rx_edge.config_io import load_toml
from rx_edge.errors import ModelError
from rx_edge.model.language import load_language, tokenizer_file, with_lora
from rx_edge.model.parts import PARTS, trained_parts
from rx_edge.model.projector import Projector
from rx_edge.model.vision import add_lora, load_vision, merged
from rx_edge.prompting import PromptIds, load_tokenizer, prompt_ids

IGNORE = -100  # target id of positions that carry no loss


class SoftPromptEncoder(nn.Module):
    """Vision tower + projector: what is compiled to ONNX."""

    def __init__(self, vision: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float32 -> (B, N, D_lm) float32."""
        out: torch.Tensor = self.projector(self.vision(pixel_values))
        return out


class ReportModel(nn.Module):
    """The whole model for one recipe.

    Attributes:
        lm: the peft-wrapped causal LM; `adapter_off()` gives the base model's answers.
        prompt: token ids around the image slot of a study without an indication.
    """

    def __init__(self, recipe: TrainRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.vision = load_vision(recipe.model.vision, recipe.image.size, recipe.model.vision_layer)
        if "vision_adapter" in trained_parts(recipe):
            add_lora(self.vision, recipe.lora)
        language = load_language(recipe.model.language)
        self.tokenizer_path = tokenizer_file(recipe.model.language)
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        self.prompt: PromptIds = prompt_ids(recipe.prompt, self.tokenizer)
        self.projector = Projector(
            recipe.model,
            grid=self.vision.grid,
            width=self.vision.width,
            lm_width=int(language.config.hidden_size),
        )
        self.lm: Any = with_lora(language, recipe.lora)
        self.requires_grad_(False)

    @property
    def encoder(self) -> SoftPromptEncoder:
        """Vision tower + projector sharing this model's weights; a vision adapter is not merged."""
        return SoftPromptEncoder(self.vision, self.projector)

    @property
    def merged_encoder(self) -> SoftPromptEncoder:
        """What is deployed: `encoder` with its vision adapter, where there is one, merged."""
        return SoftPromptEncoder(merged(self.vision), self.projector)

    def embed(self, ids: list[int] | tuple[int, ...]) -> torch.Tensor:
        """Token ids (T,) -> embeddings (T, D_lm)."""
        table = self.lm.get_input_embeddings()
        out: torch.Tensor = table(torch.tensor(list(ids), dtype=torch.long))
        return out

    def prompt_for(self, indication: str) -> PromptIds:
        """Token ids around the image slot of a study with this (fitted) indication."""
        if not indication:
            return self.prompt
        return prompt_ids(self.recipe.prompt, self.tokenizer, indication)

    def prompt_embeddings(self, soft: torch.Tensor | None, indication: str = "") -> torch.Tensor:
        """Prompt around `soft` (N, D_lm), or around nothing for text-only -> (T, D_lm)."""
        middle = [] if soft is None else [soft]
        prompt = self.prompt_for(indication)
        return torch.cat([self.embed(prompt.before), *middle, self.embed(prompt.after)])

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the LM is the base LM."""
        with self.lm.disable_adapter():
            yield

    @torch.inference_mode()
    def teacher_forced(
        self, soft: torch.Tensor, ids: list[int], indication: str = ""
    ) -> torch.Tensor:
        """Logits (1 + len(ids), V) after the prompt and after each of `ids`."""
        embeds = self.prompt_embeddings(soft, indication)
        if ids:
            embeds = torch.cat([embeds, self.embed(ids)])
        out: torch.Tensor = self.lm(
            inputs_embeds=embeds[None], use_cache=False, logits_to_keep=len(ids) + 1
        ).logits[0]
        return out

    @torch.inference_mode()
    def greedy(self, soft: torch.Tensor, max_new_tokens: int, indication: str = "") -> list[int]:
        """Greedy token ids after the prompt, the end token excluded."""
        step = self.lm(
            inputs_embeds=self.prompt_embeddings(soft, indication)[None],
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            token = int(step.logits[0, -1].argmax())
            if token == self.prompt.end:
                break
            ids.append(token)
            step = self.lm(
                input_ids=torch.tensor([[token]]),
                past_key_values=step.past_key_values,
                use_cache=True,
            )
        return ids


Answer: TypeAlias = tuple[list[int], list[float]]


@torch.inference_mode()
def greedy_batch(
    model: ReportModel,
    soft: Sequence[torch.Tensor] | torch.Tensor,
    max_new_tokens: int,
    indications: Sequence[str] = (),
) -> list[Answer]:
    """`ReportModel.greedy` for several soft prompts (N, D_lm), those of equal length at once.

    Args:
        indications: one per soft prompt; empty = none has one.

    Returns:
        For each: token ids without the end token, and by how many logits each of them was
        preferred to the next best; the end token's margin comes last.
    """
    texts = indications or [""] * len(soft)
    prompts = [model.prompt_embeddings(row, text) for row, text in zip(soft, texts, strict=True)]
    alike: dict[int, list[int]] = {}  # prompts of one length need no padding, which would be seen
    for number, prompt in enumerate(prompts):
        alike.setdefault(len(prompt), []).append(number)
    out: dict[int, Answer] = {}
    for rows in alike.values():
        found = _greedy_rows(model, torch.stack([prompts[i] for i in rows]), max_new_tokens)
        out.update(zip(rows, found, strict=True))
    return [out[number] for number in range(len(prompts))]


def _greedy_rows(model: ReportModel, prompts: torch.Tensor, max_new_tokens: int) -> list[Answer]:
    step = model.lm(inputs_embeds=prompts, use_cache=True, logits_to_keep=1)
    out: list[Answer] = [([], []) for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        best = step.logits[:, -1].topk(2, dim=-1)
        for row in sorted(open_rows):
            ids, margins = out[row]
            token = int(best.indices[row, 0])
            margins.append(float(best.values[row, 0] - best.values[row, 1]))
            if token == model.prompt.end:
                open_rows.discard(row)
            else:
                ids.append(token)
        if not open_rows:
            break
        # finished rows go on in the batch; what they say is not kept
        tokens = best.indices[:, :1]  # (B, 1)
        step = model.lm(input_ids=tokens, past_key_values=step.past_key_values, use_cache=True)
    return out


def load_run(run: Path) -> ReportModel:
    """The model of a finished run, in eval mode, adapter attached and not merged.

    Raises:
        ModelError: `run` is not a finished run, or its tensors do not fit its recipe.
        ConfigError: its recipe.toml is wrong.
    """
    final = run / "final"
    for needed in (run / "recipe.toml", final / "projector.safetensors", final / "adapter"):
        if not needed.exists():
            raise ModelError(
                f"{str(run)!r} is not a finished training run: {needed.name} is missing"
            )
    model = ReportModel(load_toml(run / "recipe.toml", TrainRecipe))
    load_trained(model, final)
    return model.eval()


def part_state(model: ReportModel, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a part (a key of `PARTS`) by the names they are saved under.

    They are those of `model`: copying into them changes it. The language model's names are those of
    its base checkpoint, the adapter's are peft's.
    """
    if part == "adapter":
        return adapter_state(model.lm)
    if part == "language":
        return {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach()
            for name, parameter in model.lm.named_parameters()
            if ".lora_" not in name
        }
    if part == "projector":
        return dict(model.projector.state_dict())
    return {
        name.replace(".default.", ".").replace(".base_layer.", "."): tensor
        for name, tensor in model.vision.state_dict().items()
        if (".lora_" in name) == (part == "vision_adapter")
    }


def load_trained(model: ReportModel, final: Path) -> None:
    """Load all that was trained strictly; every tensor must be there and be used.

    Raises:
        ModelError: missing, unexpected or wrongly shaped tensors, or a file that the recipe does
            not train.
    """
    wanted = trained_parts(model.recipe)
    for part, file in PARTS.items():
        if (final / file).is_file() != (part in wanted):
            trained = "is missing" if part in wanted else "is there, but no stage trains it"
            raise ModelError(f"{part} does not fit the recipe: {str(final / file)!r} {trained}")
    for part in wanted:
        _copy_strict(part_state(model, part), load_file(final / PARTS[part]), part)


def adapter_state(lm: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that peft saves them by."""
    return {
        name.replace(".default.", "."): parameter.detach()
        for name, parameter in lm.named_parameters()
        if ".lora_" in name
    }


@torch.no_grad()
def _copy_strict(
    targets: dict[str, torch.Tensor], state: dict[str, torch.Tensor], what: str
) -> None:
    odd = sorted(targets.keys() ^ state.keys())
    if odd:
        raise ModelError(
            f"{what} does not fit the recipe: {odd[0]} is "
            f"{'missing' if odd[0] in targets else 'not expected'} (and {len(odd) - 1} more)"
        )
    for key, value in state.items():
        if targets[key].shape != value.shape:
            raise ModelError(
                f"{what} does not fit the recipe: {key} is {tuple(value.shape)}, "
                f"not {tuple(targets[key].shape)}"
            )
        targets[key].copy_(value)
