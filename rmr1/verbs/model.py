"""What every verb that loads a model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rmr1.prompts import Part, Prompt, PromptStyle, load_prompt
from rmr1.verbs.arguments import Verb

if TYPE_CHECKING:
    from rmr1.engine.launch import Launch
    from rmr1.judge import Judge


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
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of weights and compute; auto: bfloat16 on a GPU, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )

    @property
    def template(self) -> Prompt:
        """The judge's prompt; ValueError where it has no such part."""
        return load_prompt(self.prompt_style, tuple(self.prompt_without))

    def where(self, place: Launch | None = None) -> tuple[str, str]:
        """(device, dtype) of the model, for rank `place` of a job."""
        from rmr1.models import resolve_device

        device = resolve_device(self.device, place)
        if self.dtype != "auto":
            return device, self.dtype
        return device, "bfloat16" if device.startswith("cuda") else "float32"

    def judge(self, place: Launch | None = None) -> Judge:
        """The model as a judge, on the GPU of rank `place` of a job."""
        from rmr1.judge import Judge
        from rmr1.models import resolve_model

        device, dtype = self.where(place)
        return Judge(
            resolve_model(self.model),
            style=self.template,
            dtype=dtype,
            device=device,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
