"""The verb that measures a judge: eval.

What needs torch is imported where a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.data import Pair, read_pairs, write_whole
from rmr1.endpoints.endpoint import EndpointConfig
from rmr1.engine.launch import launched
from rmr1.evals.benchmark_table import print_best_of_n, show_score
from rmr1.evals.judgment_rows import Benchmark
from rmr1.evals.paper_results import TITLES
from rmr1.evals.rewardbench_items import load_rewardbench
from rmr1.evals.rm_bench_items import load_rm_bench
from rmr1.evals.rmb_items import load_rmb
from rmr1.evals.score import credit_unparsed
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import interval, percent, phase
from rmr1.verbs.model import ModelVerb

if TYPE_CHECKING:
    from rmr1.answers import Answers
    from rmr1.engine.launch import Launch
    from rmr1.evals.benchmark_items import Dataset
    from rmr1.evals.benchmark_run import Making
    from rmr1.judge import Judgment
    from rmr1.pair_judging import PairLog

_WANTED = {
    "rewardbench": "a Parquet, JSON or JSONL file, a folder, or allenai/reward-bench",
    "rm-bench": "the folder of RM-Bench's JSON files, or THU-KEG/RM-Bench",
    "rmb": "the folder of RMB's JSON files",
}


class _Asked(NamedTuple):
    """A judge, its name, its longest prompt (None: no limit) and judgment, and its dtype."""

    model: Answers
    name: str
    room: int | None
    longest: int
    dtype: str


class Eval(ModelVerb):
    """Measure a judge.

    rmr1 eval tasks --model pocket --prompt_style compact       held-out embedded tasks
    rmr1 eval pairs --data pairs.jsonl --model DIR              your own pairs
    rmr1 eval rewardbench --data allenai/reward-bench --model DIR
    rmr1 eval rm-bench --data DIR --model DIR --limit 20        files or a hub name; resumable
    rmr1 eval rmb --data DIR --endpoint.model NAME --endpoint.base_url URL
    """

    benchmark: CliPositionalArg[Literal["tasks", "pairs", "rewardbench", "rm-bench", "rmb"]]
    model: str = Field("", description="Hugging Face directory, or `pocket`, `smollm2`")
    endpoint: EndpointConfig = EndpointConfig()
    data: str = Field(
        "", description="JSONL of pairs; of a benchmark: file, folder, or hub NAME/DATA[:SPLIT]"
    )
    limit: int | None = Field(
        None, ge=1, description="pairs, or items of each part of a benchmark, drawn with the seed"
    )
    votes: int = Field(
        1, ge=1, description="samples a judgment of a benchmark, whose majority counts; 1: greedy"
    )
    temperature: float | None = Field(
        None, ge=0, description="of the judgments; unset: greedy, or 1 with several votes"
    )
    output: str = Field(
        "",
        description="JSONL of every judgment; the same command goes on from what is there (of pairs"
        " from FILE.partial)",
    )
    both_orders: bool = Field(False, description="of a benchmark: each pair in both placements")
    best_of_n: Literal["", "round_robin", "knockout"] = Field(
        "", description="of rmb: how often this tournament of a list's answers finds the best one"
    )
    unparsed: float | None = Field(
        None, description="what no verdict earns; unset: the official rule (RewardBench .5, else 0)"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="judgments saved at a time; unset: 64 (pairs 256), endpoints 4 x concurrency",
    )
    json_output: bool = Field(False, alias="json", description="print figures as JSON")

    def run(self) -> int:
        """Evaluate and print the figures."""
        self._refuse_what_makes_no_sense()
        if self.output:  # found out now, not when there are hours of judgments to write
            if Path(self.output).is_dir():
                raise ValueError(f"{self.output}: a folder; --output names the file to write")
            Path(self.output).parent.mkdir(parents=True, exist_ok=True)
            there = self.data and Path(self.data).exists() and Path(self.output).exists()
            if there and Path(self.output).samefile(self.data):
                raise ValueError(f"{self.output}: --data and --output are one file; name two")
        try:
            if self.benchmark in ("tasks", "pairs"):
                return self._pairs()
            return self._benchmark(cast("Benchmark", self.benchmark))
        except KeyboardInterrupt:
            kept = self.output or self.benchmark not in ("tasks", "pairs")
            words = "the same command goes on" if kept else "with --output it could go on"
            raise KeyboardInterrupt(words) from None

    def _say_what_it_cost(self, judge: Answers) -> None:
        cost = getattr(judge, "cost", 0.0)  # of an endpoint
        if cost:
            words = f"The endpoint's answers cost {cost:.2f} dollars by the prices given"
            Console(stderr=True).print(words, highlight=False)

    def _refuse_what_makes_no_sense(self) -> None:
        name = self.benchmark
        if not self.model and not self.endpoint.model:
            raise ValueError("arguments are required: --model, or --endpoint.model")
        if self.model and self.endpoint.model:
            raise ValueError("there are two judges; give --model or --endpoint.model, not both")
        if name in ("tasks", "pairs"):
            if self.data and name == "tasks":
                raise ValueError("eval tasks draws its own pairs; for those of --data: eval pairs")
            if self.both_orders:
                raise ValueError(f"eval {name} always judges both orders; drop --both_orders")
            if self.votes > 1 or self.unparsed is not None or self.best_of_n:
                raise ValueError(
                    f"eval {name} knows no --votes, --unparsed, --best_of_n; drop them"
                )
            return
        if self.best_of_n and (name != "rmb" or self.both_orders or self.unparsed is not None):
            raise ValueError(
                "--best_of_n goes with eval rmb, and without --both_orders and --unparsed"
            )
        if not self.data:
            raise ValueError(f"eval {name} needs --data, {_WANTED[name]}")
        credit_unparsed(cast("Benchmark", name), self.unparsed)
        if self.temperature is not None and not self.endpoint.send_sampling:
            raise ValueError("endpoint.send_sampling is false; drop --temperature")
        if self.temperature is not None and self.votes == 1:
            raise ValueError(
                f"eval {name} is always greedy with one vote; drop --temperature, or give --votes"
            )

    def _judge(self, place: Launch | None) -> _Asked:
        if self.endpoint.model:
            from rmr1.endpoints.remote_model import RemoteModel

            name = f"{self.endpoint.model}@{self.endpoint.base_url}"
            return _Asked(RemoteModel(self.endpoint), name, None, self.max_new_tokens or 1024, "")
        judge = self.judge(place)
        longest, room = judge.greedy.max_new_tokens, judge.model.max_prompt_tokens
        return _Asked(judge.model, judge.name, room, longest, judge.dtype)

    def _drawn_at(self) -> float | None:
        """Temperature of several votes; None: that of a server which is sent none."""
        if self.endpoint.model and not self.endpoint.send_sampling:
            return None
        return 1.0 if self.temperature is None else self.temperature

    def _benchmark(self, name: Benchmark) -> int:
        from rmr1.evals.benchmark_run import Making, run_benchmark

        load = {"rewardbench": load_rewardbench, "rm-bench": load_rm_bench, "rmb": load_rmb}[name]
        place = launched()
        first = place is None or place.rank == 0
        what = "lists" if self.best_of_n else "judgments"
        with phase(TITLES[name], 1, what) if first else nullcontext() as bar:
            dataset = load(self.data)
            asked = self._judge(place)
            making = Making(
                model=asked.name,
                prompt=self.template,
                seed=self.seed,
                votes=self.votes,
                temperature=self._drawn_at(),
                max_new_tokens=asked.longest,
                max_prompt_tokens=asked.room,
                dtype=asked.dtype,
            )
            shared: Any = {
                "limit": self.limit,
                "batch_size": self._batch_size(64),
                "place": place,
                "progress": bar.count if bar else None,
            }
            try:
                if self.best_of_n:
                    return self._best_of_n(asked.model, dataset, making, shared)
                done = run_benchmark(
                    asked.model,
                    dataset,
                    making,
                    output=self.output or f"results/{name}.jsonl",
                    both_orders=self.both_orders,
                    unparsed=self.unparsed,
                    **shared,
                )
            finally:
                self._say_what_it_cost(asked.model)
        if done is not None:
            show_score(done.to_json(), as_json=self.json_output)
        return 0

    def _best_of_n(self, judge: Answers, dataset: Dataset, making: Making, shared: Any) -> int:
        from rmr1.evals.best_of_n_run import pick_best

        assert self.best_of_n
        output = self.output or f"results/rmb-{self.best_of_n}.jsonl"
        found = pick_best(judge, dataset, making, method=self.best_of_n, output=output, **shared)
        if found is not None:
            if self.json_output:
                print(json.dumps(found))
            else:
                print_best_of_n(found)
        return 0

    def _pairs(self) -> int:
        from rmr1.engine.sampling import SamplingParams
        from rmr1.evaluate import evaluate_pairs

        pairs: list[Pair]
        if self.benchmark == "tasks":
            pairs = draw_pairs(self.limit or 510, seed=self.seed, split="heldout")
        elif self.data:
            pairs = read_pairs(self.data)[: self.limit]
        else:
            raise ValueError("eval pairs needs --data, a JSONL file of pairs")
        asked = self._judge(None)
        sampling = SamplingParams(
            temperature=self.temperature or 0.0, max_new_tokens=asked.longest, seed=self.seed
        )
        log = self._pair_log(asked, sampling.temperature)
        try:
            with phase("Evaluate", 2 * len(pairs), "judgments") as bar:
                found = evaluate_pairs(
                    asked.model,
                    pairs,
                    prompt=self.template,
                    sampling=sampling,
                    log=log,
                    batch_size=self._batch_size(256),
                    progress=bar.count,
                )
        finally:
            self._say_what_it_cost(asked.model)
            if log and log.path.exists() and not log.path.stat().st_size:
                log.path.unlink()  # nothing came
        # Both took hours: neither must be lost because the other has nowhere to go.
        try:
            if self.json_output:
                print(json.dumps(found.to_json()), flush=True)
            else:
                _print_families(found.to_json())
        finally:
            if self.output:
                _write_judgments(Path(self.output), found.judgments)
        if log:
            log.path.unlink(missing_ok=True)
        return 0

    def _pair_log(self, asked: _Asked, temperature: float) -> PairLog | None:
        """Where judgments are until the output is written; nowhere beside what is no file."""
        from rmr1.pair_judging import PairLog

        output = Path(self.output)
        if not self.output or (output.exists() and not output.is_file()):
            return None
        made_by = {
            "model": asked.name,
            "prompt_hash": self.template.hash,
            "seed": self.seed,
            "temperature": temperature if self.endpoint.send_sampling else None,
            "max_new_tokens": asked.longest,
            "max_prompt_tokens": asked.room,
            "dtype": asked.dtype,
        }
        return PairLog(output.with_name(f"{output.name}.partial"), made_by)

    def _batch_size(self, of_a_model: int) -> int:
        of_an_endpoint = 4 * self.endpoint.concurrency
        return self.batch_size or (of_an_endpoint if self.endpoint.model else of_a_model)


def _write_judgments(path: Path, judgments: Sequence[Judgment]) -> None:
    """Write the judgments as JSONL. A file that is there is replaced at the end or not at all."""
    text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in judgments)
    try:
        write_whole(path, text)
    except OSError as error:
        raise ValueError(
            f"{path}: the judgments could not be written ({error.strerror}); free some space there"
            " or give another --output (the figures are printed and complete)"
        ) from error


def _print_families(figures: dict[str, Any]) -> None:
    table = Table(caption="Accuracy counts unparsed judgments as wrong; intervals are 95%.")
    table.add_column("")
    for name in ("Accuracy", "interval", "Of parsed", "Parsed", "Pairs"):
        table.add_column(name, justify="right")
    rows = [*figures["families"].items(), ("all", figures)]
    for name, row in rows:
        table.add_row(
            Text(name),
            percent(row["accuracy"]),
            interval(row["ci"]),
            percent(row["accuracy_parsed"]),
            percent(row["parse_rate"]),
            str(row["n"]),
        )
    console = Console()
    console.print(table)
    console.print(
        f"Swap consistency {percent(figures['swap_consistency'])}, share of A"
        f" {percent(figures['position_bias'])}, prompt {figures['prompt_hash']}, seed"
        f" {figures['seed']}",
        highlight=False,
    )
    if figures["skipped_prompt_too_long"]:
        console.print(
            f"{figures['skipped_prompt_too_long']} of {figures['judgments']} prompts were too long"
            " for the model; they count as wrong",
            highlight=False,
        )
