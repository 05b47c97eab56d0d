"""Configuration of `rmr1 data build`: sources, filters, the split and the files to write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from rmr1.data import Kind
from rmr1.datasets.row_files import ENDINGS
from rmr1.datasets.sources import FormatName
from rmr1.prompts import Part, PromptStyle, load_prompt
from rmr1.section import Section

# No dots: a key of a source is overridden as --sources.NAME.key.
SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
_SAYS_KIND = ("pairs",)


class SourceConfig(Section):
    """One source: where its rows stand, how they are read, and which of them are taken."""

    path: str = Field("", description="a file (.jsonl, .json, .parquet) or a folder of them")
    hub: str = Field("", description="or a data set of the hub, owner/name, which is streamed")
    tasks: int = Field(0, ge=0, description="or so many embedded tasks")
    subset: str = Field("", description="hub: the data set's configuration, if it has several")
    split: str = Field("train", description="hub: the split")
    revision: str = Field("", description="hub: a commit or tag; empty: the newest")
    format: FormatName = Field("pairs", description="how the rows are laid out")
    kind: Kind | None = Field(None, description="chat or reasoning, where the rows do not say")
    keep: list[str] = Field([], description="take only rows whose column `source` is one of these")
    drop: list[str] = Field([], description="leave out rows whose column `source` is one of these")
    traces: bool = Field(
        True, description="take the rows' traces; without them pairs are placed anew"
    )
    limit: int | None = Field(None, ge=1, description="take the first so many rows, read no more")
    sample: int | None = Field(
        None, ge=1, description="draw so many of the pairs that pass the filters, by the seed"
    )
    expect: dict[str, int] = Field(
        {}, description="rows to find of each value of `source` before the filters (else: NAME)"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> SourceConfig:
        if (bool(self.path) + bool(self.hub) + bool(self.tasks)) != 1:
            raise ValueError("a source needs exactly one of path, hub and tasks")
        if not self.hub and (self.subset or self.revision or self.split != "train"):
            raise ValueError("subset, split and revision belong to hub; remove them or set hub")
        if self.keep and self.drop:
            raise ValueError("set keep or drop of a source, not both")
        own = self.tasks or self.format in _SAYS_KIND
        if own and self.kind:
            raise ValueError("the rows of format pairs and of tasks have a kind; remove the key")
        if not own and not self.kind:
            raise ValueError(f"rows of format {self.format} do not say their kind; set chat or"
                             " reasoning")  # fmt: skip
        return self


class FilterConfig(Section):
    """What is dropped besides empty and identical answers and repeated pairs."""

    stray_tokens: list[str] = Field(
        [], description="drop pairs with one of these texts in a turn or an answer: <im_start>"
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="drop pairs whose judge's prompt is longer, in either order"
    )
    model: str = Field("", description="whose tokenizer counts: a directory, pocket or smollm2")
    prompt_style: PromptStyle = Field("rubric", description="the prompt that is counted")
    prompt_without: list[Part] = Field([], description="parts that this prompt leaves out")
    near_duplicates: float | None = Field(
        None, gt=0, le=1, description="drop what is so similar to an earlier one; 0.8 is usual"
    )
    similar_by: Literal["pair", "conversation"] = Field(
        "pair", description="compare conversation and answers, or the conversation alone"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> FilterConfig:
        load_prompt(self.prompt_style, tuple(self.prompt_without))
        if bool(self.max_prompt_tokens) != bool(self.model):
            raise ValueError("set filters.max_prompt_tokens and filters.model together, or neither")
        if not all(self.stray_tokens):
            raise ValueError("filters.stray_tokens holds an empty text, which is in every answer")
        return self


class ContaminationConfig(Section):
    """Benchmarks whose prompts are kept out: files or folders, as published."""

    rewardbench: str = Field("", description="RewardBench's rows: a file or a folder")
    rm_bench: str = Field("", description="RM-Bench's folder")
    rmb: str = Field("", description="RMB's folder")
    overlap: float = Field(
        0.5, gt=0, le=1, description="share of common 13-word runs from which a prompt is dropped"
    )

    @property
    def paths(self) -> dict[str, str]:
        """Benchmark -> path, of those that are given."""
        every = {"rewardbench": self.rewardbench, "rm-bench": self.rm_bench, "rmb": self.rmb}
        return {name: path for name, path in every.items() if path}


class SplitConfig(Section):
    """The pairs to write traces for, and those for RL."""

    distill: int = Field(0, ge=0, description="draw so many pairs to distil from")
    distill_in_rl: bool = Field(
        False, description="have them in the RL set as well (for models that skip distillation)"
    )
    expect_rl: int | None = Field(None, ge=0, description="pairs to find in the RL set")


class OutputConfig(Section):
    """Files to write; the ending says whether JSONL or Parquet."""

    rl: str = Field("rl.jsonl", description="the RL set, .jsonl or .parquet")
    distill: str = Field("", description="the distillation set, .jsonl or .parquet")
    dropped: str = Field("", description="JSONL of what was dropped and why")
    report: str = Field("", description="JSON of all counts and of this configuration")

    @model_validator(mode="after")
    def _can_be_written(self) -> OutputConfig:
        if not self.rl:
            raise ValueError("output.rl must name a file")
        for key, path in (("rl", self.rl), ("distill", self.distill)):
            if path and Path(path).suffix not in (".jsonl", ".parquet"):
                raise ValueError(f"output.{key} must end in .jsonl or .parquet, got {path!r}")
        files = [Path(path).resolve() for path in self.paths]
        if len(set(files)) < len(files):
            raise ValueError("two keys of output name the same file")
        return self

    @property
    def paths(self) -> list[str]:
        """The files that are written."""
        return [path for path in (self.rl, self.distill, self.dropped, self.report) if path]


class BuildConfig(Section):
    """A training set from preference sets: filtered, placed, split."""

    name: str = Field("data", min_length=1, description="what the set is called in the report")
    seed: int = Field(0, ge=0, description="of the sides, the draws and the order")
    strict: bool = Field(
        False, description="a count that is not as expected is an error, not a warning"
    )
    bad_rows: Literal["stop", "drop"] = Field(
        "stop",
        description="at a row with other columns or types, or a line that is no JSON: stop, or drop"
        " and count it",
    )
    sources: dict[SourceName, SourceConfig] = Field(
        description="sections [sources.NAME]; the command line sets a key as --sources.NAME.key"
    )
    filters: FilterConfig = FilterConfig()
    contamination: ContaminationConfig = ContaminationConfig()
    split: SplitConfig = SplitConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _goes_together(self) -> BuildConfig:
        if not self.sources:
            raise ValueError("there is no source; write a section [sources.NAME]")
        if self.split.distill and not self.output.distill:
            raise ValueError("split.distill draws a set that output.distill does not name")
        inputs = {Path(source.path).resolve() for source in self.sources.values() if source.path}
        for path in map(Path, self.output.paths):
            if inputs & {path.resolve(), *path.resolve().parents} and path.suffix in ENDINGS:
                raise ValueError(f"{path} is an output and lies in a source; write it elsewhere")
        return self
