"""Vision tower + pooling + projector -> an `internvl` mmproj GGUF, the file stock llama.cpp reads.

That type computes what our default model is: a ViT with a CLS token (DINOv2's layer scale
included), its last layer norm, CLS dropped, pixel shuffle, LayerNorm, Linear-GELU-Linear, and
the literal text <img>...</img> around it. Anything else is refused by name, because a file that
nearly fits loads just as well and drafts nonsense. Every tensor of the encoder is accounted for.
The same encoder gives the same bytes.

llama.cpp computes GELU by its tanh approximation (or `quick_gelu`) from a float16 table, trained
towers exactly: tiny models of every variant end up 4e-4 (relative) from torch, so what the
approximation adds does not show. `mmproj_check.py` measures each export.

Does not cover: checking the file (`mmproj_check.py`), the files around it (`stock_files.py`),
towers without a CLS token or with register tokens, quantisation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import gguf
import numpy as np
import torch
from torch import nn

from rx_edge.atomic import replacing
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.errors import ExportError
from rx_edge.types import FloatArray
from rx_edge_export.libmtmd import MARKER

IMAGE_BEGIN, IMAGE_END = "<img>", "</img>"  # libmtmd puts exactly these around an internvl image
PROJECTOR_EPS = 1e-5  # fixed in llama.cpp for the projector's layer norm

_FAMILIES = ("dinov2", "vit")
# hidden_act -> `clip.use_gelu`. Exact and tanh GELU are the same to llama.cpp.
_GELU = {
    "gelu": True, "gelu_new": True, "gelu_pytorch_tanh": True, "gelu_fast": True,
    "quick_gelu": False,
}  # fmt: skip
# names in transformers 5, and in 4 where they differ
_BLOCK = {
    "attention.q_proj": "attn_q", "attention.attention.query": "attn_q",
    "attention.k_proj": "attn_k", "attention.attention.key": "attn_k",
    "attention.v_proj": "attn_v", "attention.attention.value": "attn_v",
    "attention.o_proj": "attn_out", "attention.output.dense": "attn_out",
    "mlp.fc1": "ffn_up", "intermediate.dense": "ffn_up",
    "mlp.fc2": "ffn_down", "output.dense": "ffn_down",
    "norm1": "ln1", "layernorm_before": "ln1",
    "norm2": "ln2", "layernorm_after": "ln2",
    "layer_scale1": "ls1", "layer_scale2": "ls2",
}  # fmt: skip
_OUTSIDE = {
    "embeddings.cls_token": "v.class_embd",
    "embeddings.position_embeddings": "v.position_embd.weight",
    "embeddings.patch_embeddings.projection.weight": "v.patch_embd.weight",
    "embeddings.patch_embeddings.projection.bias": "v.patch_embd.bias",
    "layernorm.weight": "v.post_ln.weight",
    "layernorm.bias": "v.post_ln.bias",
}
_UNUSED = {"embeddings.mask_token"}  # DINOv2's pre-training only: no image reaches it
_IN_BLOCK = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias|lambda1)")
# float32 in an f16 file as well: small, and added to or convolved with float32 numbers
_WIDE = {"v.class_embd", "v.position_embd.weight", "v.patch_embd.weight"}


@dataclass(frozen=True)
class _Tensor:
    target: str
    source: torch.Tensor

    @property
    def array(self) -> FloatArray:
        """The numbers as the file holds them; a view of the model's memory where it can be."""
        array: FloatArray = self.source.detach().cpu().float().numpy()
        if self.target == "v.class_embd":
            return array.reshape(-1)
        if self.target == "v.position_embd.weight":
            # llama.cpp appends CLS after the patches: (1, 1 + G*G, C) -> (G*G + 1, C), CLS last
            return np.roll(array[0], -1, axis=0)
        return array


def write(
    encoder: nn.Module,
    image: ImageRecipe,
    prompt: PromptConfig,
    out: Path,
    *,
    name: str,
    pairing: str = "",
    dtype: Literal["f32", "f16"] = "f32",
) -> dict[str, Any]:
    """Write a trained `SoftPromptEncoder` (`.vision`, `.projector`) for stock llama.cpp.

    Args:
        image: size and normalisation, which the engine applies to an 8-bit image by itself.
        prompt: only checked: its wrapper must be the one that the engine writes.
        name: shown by engines as the model's name.
        pairing: `rx_edge.bundle.pairing_hash`, or "". Stock engines do not look at it.
        dtype: "f16" halves the matrices; all else stays float32.

    Returns:
        {"bytes", "tensor_types": {type: count}, "soft_tokens": N, "width": D, "activation"}.

    Raises:
        ExportError: `internvl` does not compute this model. `out` is then left as it was.
    """
    if dtype not in ("f32", "f16"):
        raise ExportError(f"dtype is {dtype!r}; valid: 'f32', 'f16'")
    vision, projector = cast(Any, encoder.vision), cast(Any, encoder.projector)
    config = vision.encoder.config
    _check_prompt(prompt)
    _check_tower(vision, config, image)
    _check_projector(projector, vision)
    tensors = [*_tower_tensors(vision.encoder), *_projector_tensors(projector)]
    _check_complete(tensors, config)
    with replacing(out) as part:
        writer = gguf.GGUFWriter(part, "clip")
        try:
            _add_metadata(writer, config, projector, image, name, dtype)
            if pairing:
                writer.add_string(PAIRING_KEY, pairing)
            types = _write_tensors(writer, tensors, dtype)
        finally:
            writer.close()
    return {
        "bytes": out.stat().st_size,
        "tensor_types": types,
        "soft_tokens": int(projector.tokens),
        "width": int(projector.net[-1].out_features),
        "activation": str(config.hidden_act),
    }


def _check_prompt(prompt: PromptConfig) -> None:
    found = (prompt.image_begin, prompt.image_end)
    if found != (IMAGE_BEGIN, IMAGE_END):
        raise ExportError(
            f"the model was trained with {found[0]!r} and {found[1]!r} around the image, but stock "
            f"llama.cpp writes {IMAGE_BEGIN!r} and {IMAGE_END!r}; train with prompt.image_begin = "
            f'"{IMAGE_BEGIN}", prompt.image_end = "{IMAGE_END}", or export without the mmproj'
        )
    if MARKER in prompt.template:
        raise ExportError(
            f"prompt.template holds {MARKER!r}, which stock llama.cpp replaces by an image; "
            "train with another text"
        )


def _check_tower(vision: Any, config: Any, image: ImageRecipe) -> None:
    family = config.model_type
    if family not in _FAMILIES:
        registers = "register" in family or hasattr(config, "num_register_tokens")
        why = "register tokens have no place in it" if registers else "it computes another tower"
        near = "dinov2" if "dino" in family else "vit"
        raise ExportError(
            f"the vision tower is a {family!r}, but the mmproj type 'internvl' covers "
            f"{' and '.join(map(repr, _FAMILIES))} ({why}); use a {near!r} tower"
        )
    if vision.layer != -1:
        raise ExportError(
            f"the model takes layer {vision.layer} of the vision tower, without the final layer "
            "norm that the mmproj type 'internvl' always computes; train with vision_layer = -1"
        )
    if getattr(config, "use_swiglu_ffn", False):
        raise ExportError(
            "the vision tower has a SwiGLU MLP, which the mmproj type 'internvl' does not compute; "
            "use a DINOv2 with a plain MLP (small, base or large; only giant has SwiGLU)"
        )
    if config.hidden_act not in _GELU:
        raise ExportError(
            f"the vision tower's activation is {config.hidden_act!r}, which the mmproj type "
            f"'internvl' does not compute; use one of {', '.join(map(repr, _GELU))}"
        )
    if config.num_channels != 3:
        raise ExportError(f"the vision tower takes {config.num_channels} channels; mmproj takes 3")
    trained = vision.grid * config.patch_size
    if image.size != trained:
        raise ExportError(
            f"image.size is {image.size}, but the encoder was loaded for {trained} pixels "
            f"({vision.grid} patches of {config.patch_size}); use image.size = {trained}"
        )
    numbers = (*image.mean, *image.std)
    if not np.isfinite(numbers).all() or min(image.std) <= 0:
        raise ExportError(f"image.mean {image.mean} and image.std {image.std}: finite, std > 0")
    positions = vision.encoder.embeddings.position_embeddings.shape[1]
    if positions != 1 + vision.grid**2:
        raise ExportError(
            f"the position embedding has {positions} rows; 1 CLS + {vision.grid}x{vision.grid} "
            "patches are expected: load the tower with rx_edge.model.vision.load_vision"
        )


def _check_projector(projector: Any, vision: Any) -> None:
    if not projector.shuffle:
        raise ExportError(
            f"the model's pooling is {projector.pooling!r}, but the mmproj type 'internvl' always "
            'joins patches; train with pooling = "pixel-shuffle-2x2", -3x3 or -4x4, or export '
            "without the mmproj"
        )
    kinds = [type(layer) for layer in projector.net]
    if kinds != [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]:
        raise ExportError(
            f"the model's projector is {' - '.join(k.__name__ for k in kinds)}, but the mmproj "
            "type 'internvl' is LayerNorm - Linear - GELU - Linear; train with "
            'projector = "layernorm-mlp", or export without the mmproj'
        )
    eps = projector.net[0].eps
    if eps != PROJECTOR_EPS:
        raise ExportError(
            f"the projector's layer norm has eps {eps}, but llama.cpp always uses {PROJECTOR_EPS}; "
            "train with torch's default"
        )
    inner = projector.net[0].normalized_shape[0]
    joined = projector.shuffle**2
    if (inner, projector.grid) != (joined * vision.width, vision.grid):
        raise ExportError(
            f"the projector takes {inner} numbers on a grid of {projector.grid}, the vision tower "
            f"gives {joined} x {vision.width} on {vision.grid}: they belong to different models"
        )


def _tower_tensors(tower: nn.Module) -> Iterator[_Tensor]:
    for source, tensor in tower.state_dict().items():
        if source in _UNUSED:
            continue
        target = _OUTSIDE.get(source)
        block = _IN_BLOCK.fullmatch(source)
        if block and block[2] in _BLOCK:
            part = "weight" if block[3] == "lambda1" else block[3]
            target = f"v.blk.{block[1]}.{_BLOCK[block[2]]}.{part}"
        if target is None:
            raise ExportError(
                f"the vision tower's tensor {source!r} {tuple(tensor.shape)} has no place in the "
                "mmproj type 'internvl'; leaving it out would change the model: use a plain "
                "'dinov2' or 'vit' tower, or export without the mmproj"
            )
        yield _Tensor(target, tensor)


def _projector_tensors(projector: Any) -> Iterator[_Tensor]:
    for source, tensor in projector.net.state_dict().items():  # "0.weight" ... "3.bias"
        yield _Tensor(f"mm.model.mlp.{source}", tensor)


def _check_complete(tensors: list[_Tensor], config: Any) -> None:
    """llama.cpp skips a missing bias, norm or layer scale without a word."""
    found = Counter(t.target for t in tensors)
    linear = ["attn_out", "ffn_up", "ffn_down", "ln1", "ln2"]
    linear += ["attn_q", "attn_k", "attn_v"] if config.qkv_bias else []
    wanted = set(_OUTSIDE.values())
    for i in range(config.num_hidden_layers):
        wanted |= {f"v.blk.{i}.{part}.{kind}" for part in linear for kind in ("weight", "bias")}
        wanted |= {f"v.blk.{i}.attn_{part}.weight" for part in "qkv"}
        if config.model_type == "dinov2":
            wanted |= {f"v.blk.{i}.{part}.weight" for part in ("ls1", "ls2")}
    wanted |= {f"mm.model.mlp.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    odd = {t for t, n in found.items() if n > 1} | (wanted ^ set(found))
    if odd:
        raise ExportError(
            f"{len(odd)} tensor(s) of the encoder are missing, doubled or unexpected, "
            f"e.g. {min(odd)!r} of {config.num_hidden_layers} layers: the configuration is of "
            "another model than the weights"
        )


def _add_metadata(
    writer: Any, config: Any, projector: Any, image: ImageRecipe, name: str, dtype: str
) -> None:
    kind = gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_file_type(kind)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "internvl")
    writer.add_bool("clip.use_gelu", _GELU[config.hidden_act])
    hidden = getattr(config, "intermediate_size", 0)
    numbers = {
        "image_size": image.size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": hidden or int(config.hidden_size * config.mlp_ratio),
        "block_count": config.num_hidden_layers,
        "projection_dim": projector.net[-1].out_features,
        "attention.head_count": config.num_attention_heads,
        "projector.scale_factor": projector.shuffle,
        # one tile: the square is encoded as it is, without llama.cpp's tiling of large images
        "preproc_min_tiles": 1,
        "preproc_max_tiles": 1,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", int(value))
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", config.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", list(image.mean))
    writer.add_array("clip.vision.image_std", list(image.std))


def _write_tensors(writer: Any, tensors: list[_Tensor], dtype: str) -> dict[str, int]:
    """Announce all tensors, then stream them in the same order: memory stays near one tensor."""
    kinds = []
    for tensor in tensors:
        shape = tensor.array.shape
        wide = dtype == "f32" or len(shape) == 1 or tensor.target in _WIDE
        kind: np.dtype[Any] = np.dtype(np.float32 if wide else np.float16)
        writer.add_tensor_info(tensor.target, shape, kind, int(np.prod(shape)) * kind.itemsize)
        kinds.append(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(tensors, kinds, strict=True):
        with np.errstate(over="ignore"):  # reported just below
            array = np.ascontiguousarray(tensor.array, dtype=kind)
        if not np.isfinite(array).all():
            raise ExportError(f"{tensor.target} holds NaN, infinity or numbers beyond {kind}")
        writer.write_tensor_data(array)
    counts = Counter({"float32": "F32", "float16": "F16"}[k.name] for k in kinds)
    return dict(sorted(counts.items()))
