"""research/study in miniature: it trains, goes on, measures what it says, and writes its page."""

import json
import lzma
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Iterator

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import jobs
import page as study_page
import results as store
import run as study
import tables
from conftest import ROOT
from jobs import PRESETS, Job
from pretraining.data import load_corpus

pytestmark = pytest.mark.slow
SMOKE = PRESETS["smoke"]
STUDY = ROOT / "research" / "study"


@pytest.fixture(scope="module")
def results(tmp_path_factory, text) -> Path:
    out = tmp_path_factory.mktemp("study") / f"smoke{store.SUFFIX}"
    command = [sys.executable, STUDY / "run.py", "--preset", "smoke", "--text", text, "--out", out, "--processes", "2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning rates: 100%" in done.stderr and "experiments: 100%" in done.stderr
    return out


def lines_of(file: Path) -> list[str]:
    return lzma.decompress(file.read_bytes()).decode().splitlines()


def write_lines(file: Path, lines: list[str]) -> Path:
    file.write_bytes(lzma.compress("".join(f"{line}\n" for line in lines).encode()))
    return file


def strict_records(file: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{file}: {constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines_of(file)]


# ---- run.py


def test_every_run_has_a_complete_result(results):
    """11 norms x 2 rates, one more where the lower is the best; then 12 x 2 seeds, 5 variants, 2 refreshes, 2 bounds,
    LNS, and short runs of 2 x 3 alphas and of what may explain the distance to RMSNorm; equal tokens for equals."""
    records = strict_records(results)
    found = store.read_results(results)
    assert not list(store.runs_folder(results).glob("*.json"))  # all merged
    lrs, searched = jobs.best_lrs(SMOKE, found), jobs.searches(SMOKE, found)
    assert 11 * 2 <= len(searched) == len({*searched} & found.keys()) <= 11 * 3
    assert lrs["pre-crmsnorm"] == lrs["layernorm"] and lrs.keys() >= {*jobs.NORMS, *jobs.VARIANTS}
    gap = {(norm, lrs[other]) for norm, others in jobs.GAP.items() for other in others}
    assert len(records) == len(searched) + 12 * 2 + 5 * 2 + 2 * 2 + 2 * 2 + 2 + 2 * 3 + len(gap)
    for record in records:
        job, steps = record["job"], [m["step"] for m in record["measurements"]]
        assert steps == ([0, 2] if job["steps"] == SMOKE.short else [0, 2, 4]) and not record["diverged"]
        assert record["train"][-1]["tokens"] == job["steps"] * SMOKE.batch * SMOKE.seq_len
        seconds = [m["seconds"] for m in record["measurements"]]
        assert seconds == sorted(seconds) and seconds[0] == 0 < seconds[-1]
        for m in record["measurements"]:
            assert len(m["magnitude"]) == len(m["variance"]) == SMOKE.layers + 1
            assert len(m["gradient"]) == len(m["sites"]) == SMOKE.layers and min(m["gradient"]) > 0
            every_block = "bhyt" in job["norm"] and not job["norm"].endswith(("exact", "first"))
            assert ("approximation" in m) == every_block
            assert ("saturated" in m["sites"][0][0]) == job["norm"].startswith(("dyt", "derf", "bhyt"))
    shared = {json.dumps(record["measurements"][0]["variance"]) for record in records
              if record["job"]["norm"] == "rmsnorm" and record["job"]["seed"] == 1}
    assert len(shared) == 1  # a seed is an initialisation


def test_goes_on_where_it_was_interrupted(results, text, tmp_path):
    """What has its result is left alone, bytes and all, merged or not; what has none, or an unfinished one, gets its
    old numbers again, in its old place."""
    before = lines_of(results)
    gone = [next(i for i, line in enumerate(before) if f'"norm": "{norm}"' in line and f'"seed": {seed}' in line)
            for norm, seed in (("dyt", 0), ("bhyt-position", 2))]
    kept = [line for i, line in enumerate(before) if i not in gone]
    out = write_lines(tmp_path / results.name, kept[2:])
    store.runs_folder(out).mkdir()
    for line in kept[:2]:  # of a process that was killed before it merged them
        store.write_run(out, json.loads(line))
    (store.runs_folder(out) / "unfinished.tmp").write_text('{"job": ')
    assert study.main(["--preset", "smoke", "--text", str(text), "--out", str(out), "--processes", "1"]) == 0
    after = lines_of(out)
    assert len(after) == len(before)
    assert {i for i, line in enumerate(after) if line != before[i]} <= {*gone}
    for i in gone:
        old, new = json.loads(before[i]), json.loads(after[i])
        for record in (old, new):
            del record["environment"]
            for timed in (*record["train"], *record["measurements"]):
                del timed["seconds"]
        assert old == new


def test_divergence_is_a_result(text):
    """A loss that stops being a number ends a run early, and one that ends far above its best counts too."""
    corpus = load_corpus([text], SMOKE.seq_len)
    steps = []
    result = study.train(Job("rmsnorm", 1e30, 1, 4), SMOKE, corpus, lambda: steps.append(1))
    assert result["diverged"] and len(steps) == result["train"][-1]["step"] < 4
    assert result["train"][-1]["loss"] is None and math.isinf(jobs.final_loss(result))
    result = study.train(Job("rmsnorm", 10.0, 1, 20), SMOKE, corpus, lambda: None)
    assert result["measurements"][-1]["loss"] > 0.5 + min(record["loss"] for record in result["train"])
    assert result["diverged"]


def searched(loss) -> dict:
    """A complete search, by the loss at a learning rate: None for a run that diverged."""
    results = {}
    while missing := [job for job in jobs.searches(SMOKE, results) if job not in results]:
        for job in missing:
            results[job] = {"diverged": loss(job.lr) is None, "measurements": [{"loss": loss(job.lr)}]}
    return results


def test_the_best_rate_is_not_a_diverged_one():
    results = searched(lambda lr: 3 - lr if lr < 0.005 else None)
    assert set(jobs.best_lrs(SMOKE, results).values()) == {1e-3}


def test_below_the_grid_where_its_lowest_rate_is_the_best():
    """And no further than rates were named."""
    assert {job.lr for job in searched(lambda lr: 3 - lr)} == {1e-3, 1e-2}
    results = searched(lambda lr: 3 + lr)
    assert {job.lr for job in results} == {1e-4, 1e-3, 1e-2}
    assert set(jobs.best_lrs(SMOKE, results).values()) == {1e-4}


def test_an_incomplete_search_has_no_best_rate():
    """It hides no other norm's; and Pre-CRMSNorm has LayerNorm's."""
    results = searched(lambda lr: 3 - lr)
    del results[Job("layernorm", 1e-3, 0, SMOKE.short)]
    lrs = jobs.best_lrs(SMOKE, results)
    assert not {"layernorm", "pre-crmsnorm"} & lrs.keys() and lrs["rmsnorm"] == lrs[jobs.UNIT] == 1e-2


# ---- page.py


def page_of(tmp_path: Path) -> Path:
    """The page of the repository, without what was measured."""
    page = (ROOT / "research" / "study.md").read_text()
    empty = study_page.MARKED.sub(lambda match: match[1] + match[3], page)
    assert {match["name"] for match in study_page.MARKED.finditer(page)} == {*study_page.TABLES, *study_page.FIGURES}
    (tmp_path / "study.md").write_text(empty)
    return tmp_path / "study.md"


@pytest.fixture
def not_saved(monkeypatch) -> Iterator[None]:
    """Figures are drawn, and not saved, which takes longest."""
    monkeypatch.setattr(study_page, "save", lambda figure, path: figure is not None)
    yield
    study_page.plt.close("all")


def write_page(page: Path, results: Path) -> str:
    assert study_page.main(["--preset", "smoke", "--results", str(results), "--page", str(page)]) == 0
    return page.read_text()


def test_page(results, tmp_path, not_saved):
    """Every marked place is filled, with what the files hold; the words between stay; a second time changes nothing."""
    page = page_of(tmp_path)
    empty = page.read_text()
    full = write_page(page, results)
    assert study_page.MARKED.sub(lambda match: match[1] + match[3], full) == empty
    assert all(match[0].count("\n") > 2 for match in study_page.MARKED.finditer(full))
    assert all(f"(figures/study-{name.removesuffix('-figure')}.png)" in full for name in study_page.FIGURES)

    records = strict_records(results)
    search = [r for r in records if r["job"]["norm"] == "dyt" and r["job"]["seed"] == 0]
    by_rate = {r["job"]["lr"]: r["measurements"][-1]["loss"] for r in search}
    best = min(by_rate, key=by_rate.get)
    spread = {r["job"]["lr"]: tables.number(r["measurements"][-1]["variance"][-1]) for r in search}
    for texts in ({lr: f"{loss:.3f}" for lr, loss in by_rate.items()}, spread):
        texts[best] = f"**{texts[best]}**"
        assert f"| DyT | {' | '.join(texts.get(lr, '') for lr in (1e-4, 1e-3, 1e-2))} |" in full
    losses = [r["measurements"][-1]["loss"] for r in records if r["job"]["norm"] == "dyt" and r["job"]["seed"] > 0]
    assert len(losses) == 2 and f"| DyT | {best:g} | {mean(losses):.3f} ± {stdev(losses):.3f} |" in full

    assert write_page(page, results) == full


def test_gradients_of_zero_have_a_ratio():
    assert tables.ratio(6, 3) == 2 and tables.number(tables.ratio(1, 0)) == "-"


def test_errors_of_the_first_block_and_the_others():
    """Means over runs block by block, then the root mean square of the other blocks."""
    blocks = [[{"estimates": {"T": {"error": error}}} for error in some] for some in ((1.0, 2.0, 3.0), (3.0, 4.0, 5.0))]
    runs = [{"measurements": [{"approximation": {"layers": layers}}]} for layers in blocks]
    assert tables.errors(runs, "T") == pytest.approx((2.0, math.sqrt((3.0**2 + 4.0**2) / 2)))


def test_page_of_an_unfinished_study(results, tmp_path, not_saved):
    """Only what has all of its runs is shown: here the search, and no comparison."""
    lines = [line for line in lines_of(results) if '"seed": 0' in line]
    part = write_lines(tmp_path / "part.jsonl.xz", lines)
    full = write_page(page_of(tmp_path), part)
    filled = {match["name"] for match in study_page.MARKED.finditer(full) if match[0].count("\n") > 2}
    assert filled == {"setup", "search", "search-figure", "search-variance", "alphas", "distance"}
    assert "| LNS | **" in full or "**" in next(line for line in full.splitlines() if line.startswith("| LNS |"))
    lines.remove(next(line for line in lines if '"norm": "lns"' in line))
    write_lines(part, lines)
    full = write_page(page_of(tmp_path), part)
    rows = [line for line in full.splitlines() if line.startswith("| LNS |")]
    assert rows and all("|  |" in row and "**" not in row for row in rows[:2])  # its search is not complete


@pytest.mark.parametrize("words", ["<!-- study:gone -->\n<!-- /study:gone -->\n", "<!-- study:setup -->\n"])
def test_page_refuses_unknown_and_unpaired(results, tmp_path, words):
    page = tmp_path / "study.md"
    page.write_text(words)
    with pytest.raises(SystemExit, match="study:"):
        study_page.main(["--preset", "smoke", "--results", str(results), "--page", str(page)])
    assert page.read_text() == words


# ---- results.py


def test_merge(results, tmp_path):
    """The runs of both files and of the folder, in order, with the same bytes whatever the order they come in; of a run
    that both have, the first file's stays."""
    lines = lines_of(results)
    changed = [json.dumps({**json.loads(line), "parameters": 0}) for line in lines]
    one = write_lines(tmp_path / "one.jsonl.xz", lines[:20])
    other = write_lines(tmp_path / "other.jsonl.xz", changed[10:20] + lines[:29:-1])
    store.runs_folder(one).mkdir()
    for line in lines[20:30]:
        store.write_run(one, json.loads(line))
    command = [sys.executable, STUDY / "results.py", one, other]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    assert one.read_bytes() == results.read_bytes() and not list(store.runs_folder(one).iterdir())


def test_results_of_two_texts_do_not_mix(results, text, tmp_path):
    """Neither in a file nor in what is merged; and a run with another text adds none."""
    lines = lines_of(results)
    one = write_lines(tmp_path / "one.jsonl.xz", lines[:1])
    record = json.loads(lines[1])
    record["common"]["text"] = "another"
    other = write_lines(tmp_path / "other.jsonl.xz", [json.dumps(record)])
    both = write_lines(tmp_path / "both.jsonl.xz", [lines[0], json.dumps(record)])
    for refused in (lambda: store.read_results(both), lambda: store.merge(one, other),
                    lambda: study.main(["--preset", "smoke", "--text", str(text), "--out", str(other)])):
        with pytest.raises(SystemExit, match="different presets or texts"):
            refused()
    assert lines_of(one) == lines[:1] and len(lines_of(other)) == 1
