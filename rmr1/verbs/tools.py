"""The verbs around training: report, export, bench, doctor."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.verbs.arguments import Verb

ROOT = Path(__file__).resolve().parents[2]


class Report(Verb):
    """Write the self-contained HTML report of a run (also of one in progress)."""

    run_dir: CliPositionalArg[str] = Field(description="the folder of a run, such as runs/demo")

    def run(self) -> int:
        """Write report.html into the run's folder."""
        from rmr1.reporting.report import write_report

        print(write_report(self.run_dir))
        return 0


class Export(Verb):
    """Write the model of a checkpoint as a Hugging Face directory, without the trainer's state.

    rmr1 export runs/rlvr my-judge --dtype bfloat16
    rmr1 export runs/rlvr/checkpoints/step-000040 my-judge
    """

    source: CliPositionalArg[str] = Field(description="a run's folder, or one of its checkpoints")
    output: CliPositionalArg[str] = Field(description="the directory to write, a new one")
    dtype: Literal["same", "float32", "bfloat16", "float16"] = Field(
        "same", description="convert the weights"
    )
    best: bool = Field(False, description="of a run: the best checkpoint instead of the newest")

    def run(self) -> int:
        """Find the checkpoint, verify it, and write."""
        from rmr1.engine.checkpoint import best_checkpoint, export_model, newest_whole

        checkpoint: Path | None = Path(self.source)
        if (runs := Path(self.source) / "checkpoints").is_dir():
            checkpoint = best_checkpoint(runs) if self.best else newest_whole(runs)[0]
        if checkpoint is None or not checkpoint.is_dir():
            raise ValueError(
                f"{self.source} holds no checkpoint; name a run's folder or a checkpoint"
            )
        dtype = None if self.dtype == "same" else self.dtype
        export_model(checkpoint, Path(self.output), dtype=dtype)
        print(f"{checkpoint} written to {self.output}")
        return 0


class Bench(Verb):
    """Check and time every kernel: the benchmarks of a checkout, one after the other.

    Writes JSON and a page of plots, and compares with the last saved run.

    rmr1 bench --quick
    rmr1 bench --only token_logprob --device cuda --dtype bfloat16
    """

    only: str = Field("", description="run the benchmarks whose name holds this text")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the kernels run")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of activations and weights; auto: bfloat16 on a GPU, else float32"
    )
    quick: bool = Field(False, description="small sizes, only to see that everything works")
    output: str = Field(
        "",
        description="folder of the results; empty: results, with /cuda and /quick where they are",
    )
    json_output: bool = Field(False, alias="json", description="print all rows as JSON")

    def run(self) -> int:
        """Run benchmarks/bench_*.py; the exit code says whether all of them succeeded."""
        from rmr1 import bench

        scripts = sorted((ROOT / "benchmarks").glob("bench_*.py"))
        scripts = [path for path in scripts if self.only in path.stem.removeprefix("bench_")]
        if not scripts:
            raise ValueError(
                f"no benchmark matches {self.only!r} in {ROOT / 'benchmarks'}; the benchmarks stand"
                " in a checkout, not in the installed package"
            )
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ValueError("bench --device cuda: no CUDA device is here; use --device cpu")
        parts = ("results", "cuda" * (self.device == "cuda"), "quick" * self.quick)
        folder = Path(self.output) if self.output else Path(*filter(None, parts))
        dtype = "" if self.dtype == "auto" else self.dtype
        options = {"device": self.device, "dtype": dtype, "quick": self.quick}
        rows, before, failed = bench.run_all(scripts, options, folder)
        page = folder / "bench.html"
        # Of all benchmarks, also those that --only left out this time.
        saved = [row for path in sorted(folder.glob("bench_*.json")) for row in bench.read(path)]
        page.write_text(bench.page(saved))
        if self.json_output:
            print(json.dumps(rows))
        elif found := bench.changes(rows, before):
            Console().print(bench.changes_table(found))
        print(f"plots: {page}", file=sys.stderr)
        if failed:
            print(f"rmr1 bench: failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0


class Doctor(Verb):
    """Say what this machine and installation can do, and what is missing."""

    json_output: bool = Field(False, alias="json", description="print as JSON")

    def run(self) -> int:
        """Print the findings; exit code 1 when something needed is missing."""
        findings = {**_machine(), **_packages()}
        extension = _extension()
        findings["rmr1._C"] = extension or "ready"
        if self.json_output:
            print(json.dumps(findings))
        else:
            table = Table(show_header=False, box=None, pad_edge=False)
            for name, value in findings.items():
                table.add_row(Text(name), Text(value))
            Console().print(table)
        return 1 if extension else 0


def _machine() -> dict[str, str]:
    import torch

    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": f"{pages * size / 1e9:.1f} GB",
        "disk here": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free",
        "GPU": ", ".join(gpus) or "none",
    }


def _packages() -> dict[str, str]:
    """Installed versions of what the engine uses."""
    names = ("torch", "triton", "transformers", "safetensors", "deepspeed", "flash-attn", "gguf")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _extension() -> str:
    """Empty when the compiled extension loads, else why it does not."""
    try:
        import rmr1._C  # noqa: F401
    except ImportError as error:
        return f"missing ({error}); run `pip install -e .` in the checkout"
    return ""
