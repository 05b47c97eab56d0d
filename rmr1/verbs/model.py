"""What every verb that loads a model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from rmr1.prompts import Part, Prompt, PromptStyle, load_prompt
from rmr1.verbs.arguments import Verb

if TYPE_CHECKING:
    from rmr1.answers import LocalModel


class ModelVerb(Verb):
    """The arguments that say which model, with which prompt."""

    model: str = Field(description="Hugging Face directory, or `pocket`, `smollm2`")
    prompt_style: PromptStyle = Field(
        "rubric", description="the judge's prompt: rubric, reasoning, compact, or a .jinja file"
    )
    prompt_without: list[Part] = Field(
        [], description="parts of the chain of rubrics that the prompt leaves out"
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="cap of a judgment; unset: 1024, or half the model's positions"
    )
    seed: int = Field(0, ge=0, description="of placements, tasks and draws")

    @property
    def template(self) -> Prompt:
        """The judge's prompt; ValueError where it has no such part."""
        return load_prompt(self.prompt_style, tuple(self.prompt_without))

    def load(self, *, dtype: str = "float32", device: str = "cpu") -> tuple[LocalModel, int, int]:
        """The model, the longest prompt and the longest judgment."""
        from rmr1.answers import LocalModel
        from rmr1.engine.generator import Generator
        from rmr1.engine.weights import load_model
        from rmr1.judge import prompt_room
        from rmr1.models import load_tokenizer, resolve_model

        directory = resolve_model(self.model)
        tokenizer = load_tokenizer(directory)
        model = load_model(directory, dtype=dtype, device=device)
        positions = model.config.max_position_embeddings
        longest = self.max_new_tokens or min(1024, positions // 2)
        room = prompt_room(positions, longest)
        return LocalModel(Generator(model, tokenizer), tokenizer, room), room, longest
