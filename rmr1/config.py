"""Configuration of the training stages: frozen, typed, validated when it is built.

One TOML file plus dotted overrides. Every error names the key, where it stands, and the reason.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from rmr1.engine.optim_config import OptimConfig, Recompute, ZeroConfig
from rmr1.grpo_config import (
    GrpoConfig,
    RewardConfig,
    RolloutConfig,
    refuse_more_minibatches,
)
from rmr1.prompts import Part, Prompt, PromptStyle, load_prompt
from rmr1.section import Section
from rmr1.trackers import TrackerName


class DataConfig(Section):
    """Where the training pairs come from: a JSONL file, or the embedded tasks."""

    path: str = Field("", description="JSONL or Parquet file of pairs; empty: the embedded tasks")
    tasks: int = Field(0, ge=0, description="how many embedded tasks to draw when no path is given")
    seed: int = Field(0, ge=0, description="seed of the drawn tasks and of the order of the pairs")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if bool(self.path) == bool(self.tasks):
            raise ValueError("set exactly one of data.path (a JSONL file) and data.tasks (a count)")
        return self


class RunConfig(Section):
    """What every training run has."""

    name: str = Field("run", min_length=1, description="the run writes runs/<name>/")
    runs_dir: str = Field("runs", description="the folder of all runs")
    model: str = Field(description="Hugging Face directory to start from, or `pocket`, `smollm2`")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights and compute")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    seed: int = Field(0, ge=0, description="of everything that is drawn during the run")
    prompt_style: PromptStyle = Field(
        "rubric", description="the judge's prompt: rubric, reasoning, compact, or a .jinja file"
    )
    prompt_without: list[Part] = Field(
        [], description="parts of the chain of rubrics that the prompt leaves out"
    )
    max_prompt_tokens: int = Field(
        4096, ge=1, description="longer prompts are dropped, counted and reported"
    )
    max_micro_tokens: int = Field(
        8192, ge=1, description="tokens in one forward; lower it when memory runs out"
    )
    recompute: Recompute = Field(
        "elementwise",
        description="what a backward pass computes anew instead of keeping it: elementwise saves a"
        " third of the activations and costs next to nothing; checkpointing saves more, mlp two"
        " thirds for a sixth more time, layer nearly all for a third",
    )
    recompute_layers: int | None = Field(
        None, ge=0, description="in so many layers, the first ones; unset: in all"
    )
    checkpoint_every: int = Field(10, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many checkpoints stay on the disk")
    log: list[TrackerName] = Field(
        [], description="show the figures in tensorboard, wandb too; pip install 'rmr1[log]'"
    )
    profile: int = Field(
        0, ge=0, description="trace so many steps after the first: trace-step-*.json in the run"
    )
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    zero: ZeroConfig = ZeroConfig()

    @model_validator(mode="after")
    def _prompt_has_these_parts(self) -> RunConfig:
        load_prompt(self.prompt_style, tuple(self.prompt_without))
        return self

    @property
    def prompt(self) -> Prompt:
        """The judge's prompt."""
        return load_prompt(self.prompt_style, tuple(self.prompt_without))

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.name


class SftConfig(RunConfig):
    """Stage 1, distillation: the negative log-likelihood of trace tokens."""

    batch_size: int = Field(128, ge=1, description="traces in one update")
    epochs: int = Field(1, ge=1, description="passes over the traces")
    max_length: int = Field(
        12288,
        ge=2,
        description="longer prompt + trace is dropped and counted, like what has no position",
    )


class RlvrConfig(RunConfig):
    """Stage 2: RL with verifiable rewards, +1 for the right verdict and -1 otherwise."""

    steps: int = Field(62, ge=1, description="rollout steps")
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> RlvrConfig:
        refuse_more_minibatches(self.rollout, self.grpo)
        if self.grpo.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"grpo.overlong_buffer = {self.grpo.overlong_buffer} is more than"
                f" rollout.max_new_tokens = {self.rollout.max_new_tokens}"
            )
        if self.reward.swap_consistency and (self.rollout.prompts % 2 or self.grpo.resample_rounds):
            raise ValueError(
                "reward.swap_consistency judges each pair in both orders, side by side:"
                f" rollout.prompts = {self.rollout.prompts} must be even and"
                f" grpo.resample_rounds = {self.grpo.resample_rounds} must be 0"
            )
        return self


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(
    kind: type[ConfigT], path: str | Path | None, overrides: dict[str, Any] | None = None
) -> ConfigT:
    """Read a TOML file, lay dotted overrides over it and validate the whole.

    `overrides` maps dotted keys to values ("grpo.beta" -> 0.0). Those may be texts, as a command
    line has nothing else; a value in the file must have its key's type. A section that is given in
    part keeps the other defaults of the stage. ValueError names the key, the file (or the command
    line) and the reason.
    """
    try:
        tree = {} if path is None else _read_toml(kind, path)
    except RecursionError:  # in tomllib, or where an error shows the value
        raise ValueError(
            f"{path}: nested too deep to be read; write [section] and key = value only"
        ) from None
    overridden = overrides or {}
    for dotted, value in overridden.items():
        _set(tree, dotted, value)
    try:
        return kind.model_validate(_with_defaults(kind, tree))
    except ValidationError as error:
        raise ValueError(_explain(error, kind, path, overridden)) from None


def _read_toml(kind: type[BaseModel], path: str | Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a TOML file") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, an endless number
        raise ValueError(f"{path}: no valid TOML ({error})") from error
    _refuse_other_types(kind, tree, path)
    return tree


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as one level: {"grpo": {"beta": 0}} is {"grpo.beta": 0}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(dotted(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _section(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section class of a key, or None where the key holds a value or is unknown."""
    field = kind.model_fields.get(name)
    annotation: Any = field.annotation if field is not None else None
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def named_sections(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The keys that hold sections by names of the user's choice (dict[str, Section])."""
    found = {}
    for name, field in kind.model_fields.items():
        parts = get_args(field.annotation) if get_origin(field.annotation) is dict else ()
        if parts and isinstance(parts[1], type) and issubclass(parts[1], BaseModel):
            found[name] = parts[1]
    return found


def _refuse_other_types(
    kind: type[BaseModel], tree: dict[str, Any], path: str | Path, prefix: str = ""
) -> None:
    """TOML has types, so a text is no number here, nor `true` a 1. Unknown keys are left alone."""
    for name, value in tree.items():
        section, named = _section(kind, name), named_sections(kind).get(name)
        if named is not None and isinstance(value, dict):
            for own, inner in value.items():
                _refuse_other_section(named, inner, path, f"{prefix}{name}.{own}")
        elif section is not None or named is not None:
            _refuse_other_section(section or named, value, path, f"{prefix}{name}")
        elif name in kind.model_fields:
            annotation: Any = kind.model_fields[name].annotation
            try:
                TypeAdapter(annotation).validate_python(value, strict=True)
            except ValidationError as error:
                raise ValueError(
                    f"{path}: key '{prefix}{name}': {error.errors()[0]['msg']}, got {value!r}"
                ) from None


def _refuse_other_section(kind: Any, value: Any, path: str | Path, key: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: key '{key}' is a section, got {value!r}")
    _refuse_other_types(kind, value, path, f"{key}.")


def _with_defaults(kind: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with every section that it gives in part filled up from the default of `kind`.

    Without this a stage whose default is RolloutConfig(samples=8) would fall back to the class's
    own 7 as soon as another key of the section is set. What that default leaves open stays open:
    `grpo.variant` decides it.
    """
    filled = dict(tree)
    for name, value in tree.items():
        section = _section(kind, name)
        if section is None or not isinstance(value, dict):
            continue
        default = kind.model_fields[name].default
        if isinstance(default, BaseModel):
            filled[name] = _laid_over(_given(default), value)
        else:
            filled[name] = _with_defaults(section, value)
    return filled


def _given(section: BaseModel) -> dict[str, Any]:
    """What was given to a section and to those inside it, without the defaults of their classes."""
    tree: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            tree[name] = _given(value)
        elif name in section.model_fields_set:
            tree[name] = value
    return tree


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both trees in one; where both have a value, that of `above`."""
    merged = {**below, **above}
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            merged[name] = _laid_over(below[name], value)
    return merged


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--{dotted}: {name} is a value, not a section")
    tree[leaf] = value


def _explain(
    error: ValidationError,
    kind: type[BaseModel],
    path: str | Path | None,
    overrides: dict[str, Any],
) -> str:
    """The first problem in one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = "command line" if path is None or key in overrides else str(path)
    if first["type"] == "extra_forbidden":
        known = ", ".join(_keys_beside(kind, first["loc"]))
        return f"{where}: unknown key {key!r}; known here are {known}"
    if first["type"] == "missing":
        section = _section(kind, key)
        options = [key] if section is None else [f"{key}.{name}" for name in section.model_fields]
        told = " or ".join(f"--{option}" for option in options)
        return f"{where}: key {key!r} is missing; set it in the file or as {told}"
    if first["type"] == "value_error":  # of keys that do not go together; it names them itself
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: key {key!r}: {first['msg']}, got {first['input']!r}"


def _keys_beside(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section of an unknown key has; `config_file` stands for the file itself."""
    section: Any = kind
    for part in location[:-1]:
        if get_origin(section) is dict:  # `part` is a name of the user's choice
            section = get_args(section)[1]
        else:
            section = section.model_fields[str(part)].annotation
    return [
        field.alias or name for name, field in section.model_fields.items() if name != "config_file"
    ]


def to_toml(config: BaseModel) -> str:
    """A resolved configuration as TOML, sections after plain keys; unset values are left out."""
    lines: list[str] = []
    _write_section(config.model_dump(), "", lines)
    return "\n".join(lines) + "\n"


def _write_section(tree: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in tree.items():
        if value is not None and not isinstance(value, dict):
            lines.append(f"{key} = {_toml_value(value)}")
    for key, value in tree.items():
        if isinstance(value, dict):
            lines.extend(["", f"[{prefix}{key}]"])
            _write_section(value, f"{prefix}{key}.", lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # JSON escapes what TOML wants escaped, but for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
