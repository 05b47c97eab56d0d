"""What the tests of `rmr1 data build` share: rows, configurations, a build that shows nothing."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rmr1.datasets.build import build
from rmr1.datasets.build_config import BuildConfig
from rmr1.datasets.build_report import BuildReport
from rmr1.terminal import Phase


def quiet(title: str, total: int, unit: str) -> Any:
    return nullcontext(Phase(title, total, unit))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def skywork(n: int, source: str = "helpsteer2", **change: Any) -> dict[str, Any]:
    """A row; every third has a conversation of several turns."""
    turns = [user(f"Question {n}?")]
    if n % 3 == 0:
        turns = [user("Hello"), {"role": "assistant", "content": "Hi"}, *turns]
    rows: dict[str, Any] = {
        side: [*turns, {"role": "assistant", "content": f"{side[0]}nswer {n} " + "x" * (n % 7)}]
        for side in ("chosen", "rejected")
    }
    return rows | {"source": source} | change


def write_jsonl(path: str, rows: list[Any]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(**sections: Any) -> BuildConfig:
    """One Skywork source in rows.jsonl, unless the test has others."""
    one = {"path": "rows.jsonl", "format": "skywork", "kind": "chat"}
    sources = sections.pop("sources", {"sky": one | sections.pop("source", {})})
    return BuildConfig.model_validate({"sources": sources, **sections})


def run(**sections: Any) -> BuildReport:
    return build(config(**sections), show=quiet)


def total(report: BuildReport, reason: str) -> int:
    return sum(counts.dropped.get(reason, 0) for counts in report.sources.values())


def many(count: int) -> None:
    """Rows of five sources in turn."""
    write_jsonl("rows.jsonl", [skywork(n, f"source-{n % 5}") for n in range(count)])
