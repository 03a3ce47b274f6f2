"""The results of a study: one compressed file, a line of JSON per run, sorted by the runs' names.

    python research/study/results.py FILE OTHER..     adds the runs of other files, such as another machine's, to FILE

While runs are under way each finished one is a file of its own, NAME.json in the folder FILE-runs. `merge` moves those
into FILE. Whoever reads FILE reads that folder too.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Mapping

from jobs import Job, Result, Results

SUFFIX = ".jsonl.xz"


def runs_folder(file: Path) -> Path:
    return file.with_name(f"{file.name.removesuffix(SUFFIX)}-runs")


def run_name(common: Mapping[str, Any], job: Job) -> str:
    """Any other setting, of the job or of the study (`common`), is another name."""
    settings = json.dumps([dict(common), asdict(job)], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:10]
    return f"{job.norm}-lr{job.lr:g}-seed{job.seed}-{digest}"


def write_run(file: Path, record: Result) -> None:
    """Either all of the record is there afterwards, or nothing that anybody reads."""
    path = runs_folder(file) / f"{run_name(record['common'], Job(**record['job']))}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record), encoding="utf-8")
    os.replace(unfinished, path)


def read_results(file: Path, common: Mapping[str, Any] | None = None) -> dict[Job, Result]:
    """All runs of a study, in the order of their names.

    Args:
        file: need not exist; then there are no runs, or those of its folder.
        common: the settings that all runs must share; None: those of any of them.

    Raises:
        SystemExit: runs of different studies, which must not be compared.
    """
    lines = lzma.decompress(file.read_bytes()).decode().splitlines() if file.exists() else []
    lines += [path.read_text(encoding="utf-8") for path in runs_folder(file).glob("*.json")]
    results = {}
    for record in map(json.loads, lines):
        common = common or record["common"]
        if record["common"] != common:
            raise SystemExit(f"{file}: results of different presets or texts; run.py --out gives each its own file")
        results[Job(**record["job"])] = record
    return in_order(results)


def in_order(results: Results) -> dict[Job, Result]:
    return dict(sorted(results.items(), key=lambda item: run_name(item[1]["common"], item[0])))


def merge(file: Path, *others: Path) -> int:
    """Writes FILE anew, with the runs of its folder, which is emptied, and of the other files; of a run that several
    have, the first one's stays. The same runs give the same bytes. Returns how many there are.

    Raises:
        SystemExit: runs of different studies.
    """
    loose = list(runs_folder(file).glob("*.json"))
    results = read_results(file)
    common = next((record["common"] for record in results.values()), None)
    for other in others:
        results = {**read_results(other, common), **results}
    text = "".join(f"{json.dumps(record)}\n" for record in in_order(results).values())
    unfinished = file.with_suffix(".tmp")
    unfinished.write_bytes(lzma.compress(text.encode()))
    os.replace(unfinished, file)
    for path in loose:
        path.unlink()
    return len(results)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    print(f"{merge(*map(Path, sys.argv[1:]))} results in {sys.argv[1]}")
