"""Tiny models with random weights, saved as real Hugging Face directories.

They have every part of the real ones (grouped-query attention, tied embeddings, special
tokens, CLS token, layer scale), take milliseconds, and are the same bytes for the same seed.
Weights are far larger than a usual initialisation, so that a fault changes the logits clearly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

IMAGE_SIZE = 56  # pixels: 4 x 4 patches, 2 x 2 soft tokens after pixel shuffle
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

SENTENCES = (
    "The heart size is normal. The mediastinal and hilar contours are unremarkable.",
    "Lungs are clear without focal consolidation, pleural effusion or pneumothorax.",
    "There is a moderate left pleural effusion with adjacent atelectasis.",
    "An endotracheal tube terminates 4 cm above the carina.",
    "Mild cardiomegaly; no acute osseous abnormality is identified in 2024.",
    "user\nWrite the findings of this chest radiograph.\n<img></img>\nassistant\n",
)


def tiny_llama_dir(path: Path, *, seed: int = 0, tied: bool = True, **config: Any) -> Path:
    """A Llama of 2 layers, width 64, 4 heads and 2 KV heads, with its tokenizer.

    Args:
        config: overrides of `LlamaConfig`.
    """
    tokenizer = _bpe_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    model = _seeded(LlamaForCausalLM, LlamaConfig(**settings | config), seed)
    model.save_pretrained(path)
    _save_tokenizer(tokenizer, path)
    return path


def tiny_gpt2_dir(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A GPT-2 of 2 layers, width 64 and 4 heads, with the tokenizer of `tiny_llama_dir`."""
    tokenizer = _bpe_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "n_positions": 1024,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    model = _seeded(GPT2LMHeadModel, GPT2Config(**settings | config), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a fresh model: a lost one would not be noticed
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(path)
    _save_tokenizer(tokenizer, path)
    return path


def sentencepiece_files(path: Path) -> Path:
    """tokenizer.model, and tokenizer.json as transformers converts it; 384 pieces."""
    import sentencepiece

    path.mkdir(parents=True)
    with (path / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20),
            model_writer=model,
            vocab_size=384,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            pad_id=-1,
            minloglevel=2,
        )
    (path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}', "utf-8"
    )
    AutoTokenizer.from_pretrained(path).save_pretrained(path)
    (path / "config.json").unlink()
    return path


def tiny_openllama_dir(path: Path) -> Path:
    """A `tiny_llama_dir` with a SentencePiece tokenizer (`</s>` ends, `<s>` begins)."""
    tiny_llama_dir(path)
    for file in sentencepiece_files(path / "spm").iterdir():
        file.replace(path / file.name)
    return path


def tiny_vit_dir(path: Path, *, seed: int = 0) -> Path:
    """A DINOv2 of 2 layers and width 32 for 56-pixel images in patches of 14."""
    config = Dinov2Config(
        image_size=IMAGE_SIZE,
        patch_size=14,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        initializer_range=0.2,
    )
    _seeded(Dinov2Model, config, seed).save_pretrained(path)
    return path


TOWERS = ("clip", "dinov2", "siglip", "swin", "vit")


def tiny_tower_dir(path: Path, family: str, *, seed: int = 0, **config: Any) -> Path:
    """A vision tower of `family`, width 32, for 56-pixel images; CLIP and SigLIP with both towers.

    Swin's two stages end in 7 x 7 features, the others' patches of 14 in 4 x 4.
    """
    if family == "dinov2":
        return tiny_vit_dir(path, seed=seed)
    vit: dict[str, Any] = {
        "image_size": IMAGE_SIZE, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, **config,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "clip":
        both: Any = CLIPConfig(text_config=text, vision_config={**vit, "initializer_factor": 2.0})
        model = _seeded(CLIPModel, both, seed)
    elif family == "siglip":
        model = _seeded(SiglipModel, SiglipConfig(text_config=text, vision_config=vit), seed)
    elif family == "swin":
        settings: dict[str, Any] = {
            "image_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 16, "depths": (2, 2),
            "num_heads": (2, 2), "window_size": 7, "initializer_range": 0.2, **config,
        }  # fmt: skip
        model = _seeded(SwinModel, SwinConfig(**settings), seed)
    else:
        model = _seeded(ViTModel, ViTConfig(**vit, initializer_range=0.2), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "position" in name:  # zero in a fresh Swin: a lost one would not be noticed
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(path)
    return path


def _save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    ).save_pretrained(path)


def _bpe_tokenizer() -> Tokenizer:
    """Byte-level BPE over SENTENCES, with SmolLM2's pre-tokenizer and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _seeded(cls: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not disturbed
        torch.manual_seed(seed)
        return cls(config).eval()
