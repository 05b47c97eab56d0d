"""`rmr1 data build`: from preference sets to a distillation set and an RL set.

    rows -> candidates -> filters -> store        one pass over every source, in the config's order
    store -> drawn -> split -> placed -> files

Memory does not grow with the data: what has to be remembered is in a temporary SQLite file beside
the output. Files appear whole, all at the end; after an error or Ctrl-C none has changed.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from rmr1.data import Damaged, instead_of_a_file, provisional, write_whole
from rmr1.datasets.build_config import BuildConfig, SourceConfig
from rmr1.datasets.build_report import BuildReport, expectations, report_of, unmatched
from rmr1.datasets.filters import Dropped, Filters
from rmr1.datasets.row_files import Located, PairWriter, count_rows, hub_rows, rows_of
from rmr1.datasets.sources import Unfit, candidate_from_row
from rmr1.datasets.store import PairStore, Part
from rmr1.datasets.tally import Tally
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import Phase, phase

BAD_ROW = "bad row"
DAMAGED = "damaged line"
_TELL_EVERY = 64  # rows

Show = Callable[[str, int, str], AbstractContextManager[Phase]]


def build(config: BuildConfig, *, show: Show = phase) -> BuildReport:
    """Build the sets of a configuration and say what came of every row.

    `show(title, total, unit)` opens a phase that is followed while it runs.

    Raises:
        ValueError: a source cannot be read, a row is not of its format, no pair is left, or (with
            `strict`) a count is not the expected one.
    """
    _check_outputs(config)
    folder = Path(config.output.rl).resolve().parent
    try:
        with PairStore(folder, seed=config.seed) as store, ExitStack() as files:
            log = _dropped_log(config, files)
            filters = Filters(config, store)
            tally = Tally(store.database)
            for name, source in config.sources.items():
                total, rows = open_source(source, config.seed, go_on=config.bad_rows == "drop")
                with show(f"Read {name}", total, "rows") as bar:
                    _read(name, config, rows, filters, tally, log, bar)
            _draw(config, store)
            report = _report(config, store, filters, tally)
            written = _write(config, store, report, files, show)
            if log:
                log.close()
            if config.output.report:
                write_whole(Path(config.output.report), json.dumps(asdict(report), indent=2) + "\n")
            # Nothing that is left to do needs space.
            _put_in_place(config, report, written)
            if log:
                Path(log.name).replace(Path(config.output.dropped).resolve())
    except sqlite3.Error as error:
        raise ValueError(
            f"{folder}: the working file of the build fails ({error}); free some space, or write"
            " the output elsewhere"
        ) from error
    return report


def _check_outputs(config: BuildConfig) -> None:
    """Refuse before the work what could not be written after it, and make the folders."""
    for key in ("rl", "distill", "dropped", "report"):
        if not (name := getattr(config.output, key)):
            continue
        path = Path(name)
        # The report may go to /dev/stdout; the others are replaced.
        if path.is_dir() or (path.exists() and not path.is_file() and key != "report"):
            raise ValueError(f"output.{key}: {path} {instead_of_a_file(path)}; name a file")
        path.resolve().parent.mkdir(parents=True, exist_ok=True)


def open_source(
    source: SourceConfig, seed: int, *, go_on: bool = False
) -> tuple[int, Iterator[Located]]:
    """(how many rows, 0 if unknown; the rows) of a source; `go_on` is that of `rows_of`."""
    if source.hub:
        total, rows = hub_rows(
            source.hub, subset=source.subset, split=source.split, revision=source.revision
        )
    elif source.tasks:
        pairs = draw_pairs(source.tasks, seed=seed, split="train")
        # As decoded JSON would have it.
        made = (json.loads(json.dumps(asdict(pair))) for pair in pairs)
        total, rows = len(pairs), ((f"task {at}", row) for at, row in enumerate(made))
    else:
        total, rows = count_rows(source.path), rows_of(source.path, go_on=go_on)
    return total, rows


def _read(
    name: str,
    config: BuildConfig,
    rows: Iterator[Located],
    filters: Filters,
    tally: Tally,
    log: TextIO | None,
    bar: Phase,
) -> None:
    """Filter the rows of one source into the store."""
    source = config.sources[name]
    taken = number = 0
    bar.begin(0, bar.total)
    for number, (where, row) in enumerate(rows, start=1):
        group = _group(row) or name
        tally.count(name, group, "read")
        if not isinstance(row, Damaged) and (
            group in source.drop or (source.keep and group not in source.keep)
        ):
            tally.count(name, group, "left out")
            continue
        outcome = _keep(name, group, where, row, config, filters)
        if isinstance(outcome, Dropped):
            tally.count(name, group, "dropped", outcome.reason)
            if log:
                told = {"source": group, "row": where, **asdict(outcome)}
                log.write(json.dumps(told, ensure_ascii=False) + "\n")
        elif outcome:
            tally.count(name, group, "renamed")
        taken += 1
        if taken == source.limit:
            break
        if number % _TELL_EVERY == 0:
            bar.reach(number, max(number, bar.total) if bar.total else 0)
            bar.show({"kept": tally.kept_share})
    bar.reach(number, number)


def _group(row: Any) -> str:
    """The value of a row's column `source`, "" if it has none."""
    said = row.get("source") if isinstance(row, dict) else None
    text = said if isinstance(said, str) and said.strip() else ""
    # Half a character is another test's business; it must not end the counting.
    return text.encode("utf-8", "replace").decode()


def _keep(
    name: str, group: str, where: str, row: Any, config: BuildConfig, filters: Filters
) -> Dropped | bool:
    """Store a row as a candidate, or say why not. True: its id was taken and is another now."""
    source = config.sources[name]
    if isinstance(row, Damaged):
        return Dropped(DAMAGED, row.reason)
    try:
        candidate = candidate_from_row(row, source.format)
    except Unfit as error:
        return Dropped(str(error))
    except ValueError as error:
        if config.bad_rows == "drop":
            return Dropped(BAD_ROW, str(error))
        raise ValueError(f'{where}: {error} (bad_rows = "drop" leaves such rows out)') from None
    if not source.traces:
        candidate = replace(candidate, trace="", label=None)
    if candidate.trace and not config.output.distill:
        raise ValueError(
            f"{where}: the pair has a trace; name a file for such pairs as output.distill, or set"
            f" sources.{name}.traces = false"
        )
    content = candidate.content
    named = replace(
        candidate,
        source=group,
        id=candidate.id.strip() or f"{name}/{content}",
        kind=candidate.kind or source.kind,
    )
    return filters.keep(named, content, name)


def _draw(config: BuildConfig, store: PairStore) -> None:
    """Choose what is kept, what each set has, and the sides."""
    for name, source in config.sources.items():
        if source.sample is not None:
            store.sample(name, source.sample)
    store.split(config.split.distill, distill_in_rl=config.split.distill_in_rl)
    store.place()


def _report(config: BuildConfig, store: PairStore, filters: Filters, tally: Tally) -> BuildReport:
    """Count what came out and compare it with what is expected; an error if `strict` says so."""
    benchmarks = filters.benchmarks.prompts if filters.benchmarks else {}
    report = report_of(config, store, tally, benchmarks)
    if not report.files:
        reasons: Counter[str] = Counter()
        for counts in report.sources.values():
            reasons.update(counts.dropped)
        most = "".join(f" (most are dropped as: {reason})" for reason, _ in reasons.most_common(1))
        why = "".join(f"; {sentence}" for sentence in unmatched(config, tally))
        raise ValueError(f"no pair is left after the filters{most}{why}; nothing is written")
    wrong = expectations(config, report, tally, store.by_origin())
    if wrong and config.strict:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}; nothing is written, as strict is set")
    report.mismatches.extend(wrong)
    return report


def _write(
    config: BuildConfig, store: PairStore, report: BuildReport, files: ExitStack, show: Show
) -> list[PairWriter]:
    """Write the sets that have pairs beside their places."""
    written: list[PairWriter] = []
    parts: list[tuple[Part, str]] = [("distill", config.output.distill), ("rl", config.output.rl)]
    for part, path in parts:
        count = sum(report.sets[part].values())
        if not count:
            continue
        writer = files.enter_context(PairWriter(path))
        with show(f"Write {path}", count, "pairs") as bar:
            bar.begin(0, count)
            for number, pair in enumerate(store.pairs(part), start=1):
                writer.write(pair)
                if number % _TELL_EVERY == 0 or number == count:
                    bar.reach(number, count)
        writer.close()
        written.append(writer)
    return written


def _put_in_place(config: BuildConfig, report: BuildReport, written: list[PairWriter]) -> None:
    """Replace the old sets. Of an empty one none stays: its pairs may be in the new other set."""
    for writer in written:
        writer.finish()
    for part, path in (("distill", config.output.distill), ("rl", config.output.rl)):
        if path and part not in report.files:
            Path(path).resolve().unlink(missing_ok=True)


def _dropped_log(config: BuildConfig, files: ExitStack) -> TextIO | None:
    """The list of what is dropped, under a provisional name."""
    if not config.output.dropped:
        return None
    partial = provisional(Path(config.output.dropped).resolve())
    files.callback(partial.unlink, missing_ok=True)
    return files.enter_context(partial.open("w", encoding="utf-8"))
