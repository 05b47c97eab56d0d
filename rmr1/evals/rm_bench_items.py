"""RM-Bench (THU-KEG/RM-Bench) becomes items: three right and three wrong answers, nine pairs.

A row has id, prompt, chosen[3] and rejected[3] (concise, detailed, markdown), and a domain, which
the per-domain files leave to their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmr1.data import Kind
from rmr1.evals.benchmark_items import (
    Contest,
    Dataset,
    Ids,
    Item,
    conversation,
    name_of,
    need,
    rows_from,
    text,
)

DOMAINS = ("chat", "math", "code", "safety-refuse", "safety-response")
TOTAL = "total_dataset"
_REASONING = ("math", "code")


def load_rm_bench(data: str | Path) -> Dataset:
    """Read a folder (`<domain>_filtered.json`, else `total_dataset.json`), a file or a hub name.

    A domain without items is allowed and named in `missing`. ValueError names the file, the item
    and the field.
    """
    items: dict[str, list[Item]] = {domain: [] for domain in DOMAINS}
    ids = Ids()
    for where, row, domain in _rows(data):
        try:
            item = _item(row, domain, ids)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        items[item.part].append(item)
    return Dataset(
        "rm-bench",
        tuple(item for found in items.values() for item in found),
        tuple(domain for domain, found in items.items() if not found),
        ids.repeated,
    )


def _rows(data: str | Path) -> Iterator[tuple[str, Any, str | None]]:
    """(where, row, the domain that the file's name tells)."""
    path = Path(data)
    named = {domain: path / f"{domain}_filtered.json" for domain in DOMAINS}
    files = {domain: file for domain, file in named.items() if file.is_file()}
    if path.is_file():
        files = {domain: path for domain, file in named.items() if file.name == path.name}
    elif path.is_dir() and not files and not any(path.glob(f"{TOTAL}.*")):
        raise ValueError(
            f"{path}: no RM-Bench file; wanted {', '.join(file.name for file in named.values())}"
            f" or {TOTAL}.json"
        )
    for domain, file in files.items():
        yield from ((where, row, domain) for where, row in rows_from(file, split=""))
    if not files:
        yield from (
            (where, row, None) for where, row in rows_from(data, split="train", named=TOTAL)
        )


def _item(row: Any, domain: str | None, ids: Ids) -> Item:
    fields = need(row, "id", "prompt", "chosen", "rejected", *([] if domain else ["domain"]))
    domain = domain or fields["domain"]
    if domain not in DOMAINS:
        raise ValueError(f'field "domain" must be one of {", ".join(DOMAINS)}, got {domain!r:.80}')
    name = ids.own(domain, name_of(fields["id"], "id"))
    chosen, rejected = (_answers(fields[field], field) for field in ("chosen", "rejected"))
    kind: Kind = "reasoning" if domain in _REASONING else "chat"
    return Item(
        id=str(name),
        part=domain,
        cluster=str(name),
        conversation=conversation(fields["prompt"], "prompt"),
        kind=kind,
        contests=tuple(
            Contest(
                chosen[i],
                rejected[j],
                {"id": name, "domain": domain, "chosen_index": i, "rejected_index": j},
            )
            for i in range(3)
            for j in range(3)
        ),
    )


def _answers(value: Any, field: str) -> list[str]:
    if not isinstance(value, list) or len(value) != 3:
        found = f"{len(value)} entries" if isinstance(value, list) else f"{value!r:.80}"
        raise ValueError(
            f'field "{field}" must be a list of three texts (concise, detailed, markdown),'
            f" got {found}"
        )
    return [text(answer, f"{field}[{index}]") for index, answer in enumerate(value)]
