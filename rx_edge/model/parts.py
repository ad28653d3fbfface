"""What a run may have trained, and where its `final/` keeps it.

Does not cover: the tensors themselves (`report_model.py`); nothing here needs torch.
"""

from __future__ import annotations

from rx_edge.config import TrainRecipe

# from the third on only where a stage trains them
PARTS = {
    "projector": "projector.safetensors",
    "adapter": "adapter/adapter_model.safetensors",
    "vision": "vision.safetensors",
    "vision_adapter": "vision_adapter.safetensors",
    "language": "language.safetensors",
}
# what a stage trains -> its part
_OPTIONAL = {"vision": "vision", "vision-lora": "vision_adapter", "lm": "language"}


def trained_parts(recipe: TrainRecipe) -> tuple[str, ...]:
    """The keys of `PARTS` whose tensors a run of `recipe` saves.

    A part that is not among them is found again by name: it has nothing but its base weights.
    """
    trains = {name for stage in recipe.stages for name in stage.trains}
    return "projector", "adapter", *(part for name, part in _OPTIONAL.items() if name in trains)
