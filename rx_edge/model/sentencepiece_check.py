"""Does tokenizer.json tokenise like the tokenizer.model it was converted from?

The conversion of SentencePiece models to fast tokenizers has been wrong before (OpenLLaMA's
authors warn of theirs), and a wrong one trains and runs without an error.

Does not cover: text that begins with a space, where the two differ by design.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from rx_edge.errors import ModelError
from rx_edge.optional import require

TEXTS = (
    "The heart size is normal. The lungs are clear.",
    "No focal consolidation,  pleural effusion or pneumothorax\n\nare seen.",
    "ET tube 4.5 cm above the carina; T12; 1,024; XXXX.",
    "cardiomégalie — œdème ≥ 3 µm",
    "<img></img>",
)


def check(model_dir: Path) -> None:
    """Compare every piece and the ids of `TEXTS`, where there is a tokenizer.model.

    Raises:
        ModelError: they differ; the first difference is named.
        MissingExtraError: sentencepiece is not installed.
    """
    file = model_dir / "tokenizer.model"
    if not file.is_file():
        return
    sentencepiece = require("sentencepiece", extra="export")
    try:
        original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{str(file)!r} cannot be read as a SentencePiece model") from error
    fast = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    for i in range(original.get_piece_size()):
        if fast.id_to_token(i) != original.id_to_piece(i):
            raise ModelError(
                f"tokenizer.json says that id {i} is {fast.id_to_token(i)!r}, tokenizer.model "
                f"{original.id_to_piece(i)!r}; convert tokenizer.model again"
            )
    for text in TEXTS:
        found = fast.encode(text, add_special_tokens=False).ids
        if found != original.encode(text):
            raise ModelError(
                f"tokenizer.json splits {text!r} differently from tokenizer.model; "
                "convert tokenizer.model again and train with the new file"
            )
