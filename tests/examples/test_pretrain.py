"""examples/pretrain.py in several processes and in bad times: shared batches, signals, kills, refusals; exports."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest
import torch

from support.packages import needs
from support.pretrain_forks import EXAMPLES, HUNG, Forks, Started

needs("matplotlib")
needs("tqdm")

sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402
from pretraining.data import BOS, load_corpus  # noqa: E402
from pretraining.norms import BLOCKS  # noqa: E402
from pretraining.train import Run, TrainConfig  # noqa: E402

CLOSE = 1e-4  # of losses, in nats


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "plot_comparison", lambda logs, path: None)  # slow, and drawn in test_example.py


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(out: Path, norm: str = "bhyt") -> dict[tuple[str, int], float]:
    return {(r["event"], r["step"]): r["loss"] for r in records(out / f"{norm}.jsonl") if "loss" in r}


def assert_same_gradients(one: Path, other: Path, norm: str = "bhyt") -> None:
    """Their norms before clipping: the losses hide a wrong scale, for which AdamW does not care."""
    norms = ([r["grad_norm"] for r in records(out / f"{norm}.jsonl") if r["event"] == "train"] for out in (one, other))
    assert next(norms) == pytest.approx(next(norms), rel=1e-3)


def assert_close(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for key, loss in expected.items():
        assert actual[key] == pytest.approx(loss, rel=0, abs=CLOSE), key


def refusal(*arguments: object) -> str:
    """The one line with which it ends before it trains, and not with 0."""
    with pytest.raises(SystemExit) as ended:
        pretrain.main(list(map(str, arguments)))
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code, ended.value.code
    return ended.value.code


def wait_until(condition: Callable[[], bool], started: Started) -> None:
    deadline = time.monotonic() + HUNG
    while not condition():
        assert time.monotonic() < deadline, started.output
        time.sleep(0.005)


def assert_one_line(output: str, *words: str) -> None:
    """Behind the progress bar, which ends with a line of its own."""
    line = output.splitlines()[-1]
    assert line.startswith("pretrain.py: ") and all(word in line for word in words), output
    assert "Traceback" not in output, output


def test_torchrun_and_one_process_have_the_same_losses(tmp_path, tiny, forks):
    """As its users start it, 50 steps of fp32; then 2 processes -> 1 and 1 -> 2, to more steps than planned."""
    tiny = [*tiny, "--norm", "bhyt", "rmsnorm", "--steps", "50"]
    two, one = tmp_path / "two", tmp_path / "one"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", "2", EXAMPLES / "pretrain.py", *tiny, "--out", two]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stdout + done.stderr
    assert done.stdout.count("comparison.png shows it") == 1 and (two / "comparison.png").exists()
    assert done.stderr.count("bhyt:   0%") == done.stdout.count("unigram entropy") == 1
    forks.run(*tiny, "--out", one)
    for norm in ("bhyt", "rmsnorm"):
        assert losses(two, norm)["train", 50] < losses(two, norm)["train", 1] - 1
        assert records(two / f"{norm}.jsonl")[0]["train"]["processes"] == 2
        assert_close(losses(two, norm), losses(one, norm))

    longer = [*tiny, "--steps", "60", "--resume"]
    assert "bhyt: resumed at step 50; for 60 steps instead of 50" in forks.run(*longer, "--out", two)
    first, second = forks.run_ranks(2, *longer, "--out", one)
    assert "rmsnorm: resumed at step 50" in first and second == ""
    for norm in ("bhyt", "rmsnorm"):
        assert ("train", 60) in losses(one, norm)
        assert_close(losses(two, norm), losses(one, norm))


def test_every_norm_and_accumulation_in_two_processes(tmp_path, tiny, forks):
    tiny = [*tiny, "--norm", "all", "--steps", "4"]
    forks.run(*tiny, "--out", tmp_path / "one")
    forks.run_ranks(2, *tiny, "--accumulate", "2", "--out", tmp_path / "two")
    for norm in BLOCKS:
        assert len(losses(tmp_path / "one", norm)) == 6
        assert_close(losses(tmp_path / "two", norm), losses(tmp_path / "one", norm))
        assert_same_gradients(tmp_path / "two", tmp_path / "one", norm)


def test_accumulation(tmp_path, tiny, monkeypatch):
    """The same losses from smaller parts, bits but for rounding; as many parts as asked for, none larger."""
    sizes, loss = [], Run.loss
    monkeypatch.setattr(Run, "loss", lambda run, x, y: sizes.append(len(x)) or loss(run, x, y))
    for accumulate in (1, 4):
        sizes.clear()
        pretrain.main([*tiny, "--accumulate", str(accumulate), "--out", str(tmp_path / str(accumulate))])
        assert set(sizes) == {8 // accumulate} and len(sizes) == (8 + 2 * 16) * accumulate
    assert_close(losses(tmp_path / "4"), losses(tmp_path / "1"))
    assert_same_gradients(tmp_path / "4", tmp_path / "1")


def test_a_process_that_fails_ends_the_others(tmp_path, tiny, forks):
    """What one cannot read ends all, in one line; of one that is killed the others say so, and the run resumes."""
    first, second = forks.start_ranks(tiny, [*tiny[:-1], tmp_path / "missing.txt", "--out", tmp_path])
    assert (first.status(), second.status()) == (1, 1)
    assert_one_line(first.output, "text cannot be read", "missing.txt")
    assert first.output.count("\n") == 1 and second.output == ""

    tiny = [*tiny, "--steps", "100000", "--out", tmp_path / "out"]
    first, second = forks.start_ranks(tiny, tiny)
    wait_until((tmp_path / "out" / "bhyt.pt").exists, first)
    second.send(signal.SIGKILL)
    assert (first.status(), second.status()) == (1, -signal.SIGKILL)
    assert_one_line(first.output, "process 0 has lost another one")
    assert "resumed at step" in forks.run(*tiny, "--resume", "--stop-at", "6")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, tiny, forks, ranks, number):
    """The step that it was at, to the last process; while it runs, nobody else writes there."""
    tiny = [*tiny, "--steps", "100000", "--checkpoint-every", "100000", "--out", tmp_path]
    started = forks.start_ranks(*[tiny] * ranks) if ranks > 1 else [forks.start(tiny)]
    log = tmp_path / "bhyt.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > 5, started[0])
    if number == signal.SIGINT:
        assert "another process writes here" in refusal(*tiny, "--resume")
    started[-1].send(number)
    assert [process.status() for process in started] == [128 + number] * ranks
    step = torch.load(tmp_path / "bhyt.pt", weights_only=True)["step"]
    assert_one_line(started[0].output, number.name, f"saved at step {step} of 100000", "--resume goes on")
    assert all(process.output == "" for process in started[1:])
    assert records(log)[-1]["step"] == step > 3
    assert f"resumed at step {step}" in forks.run(*tiny, "--resume", "--stop-at", str(step + 1))
    assert [r["step"] for r in records(log) if r["event"] == "train"] == list(range(1, step + 2))


def test_killed_runs_go_on(tmp_path, tiny, forks):
    """SIGKILL twenty times, as it starts, between two records of its log, or while it saves, at every second step: what
    is left always goes on, and ends with the bits and the log of an undisturbed run."""
    tiny = [*tiny, "--steps", "40", "--checkpoint-every", "2"]
    forks.run(*tiny, "--out", tmp_path / "whole")
    out, moments, kills = tmp_path / "killed", random.Random(17), 0
    while kills < 20:
        started = forks.start([*tiny, "--out", out, "--resume"])
        for _ in range(moments.randrange(5)):
            wait_for_growth(out / "bhyt.jsonl")
        time.sleep(moments.uniform(0, 0.02))
        started.send(signal.SIGKILL)
        status = started.status()
        assert status in (0, -signal.SIGKILL), started.output
        if status == 0:  # it was done before
            out = tmp_path / f"killed-{kills}"
        kills += status != 0
    forks.run(*tiny, "--out", out, "--resume")
    actual, expected = (torch.load(folder / "bhyt.pt", weights_only=True) for folder in (out, tmp_path / "whole"))
    assert actual["step"] == 40 and actual["model"].keys() == expected["model"].keys()
    assert all(torch.equal(actual["model"][name], value) for name, value in expected["model"].items())
    assert losses(out) == losses(tmp_path / "whole")


def wait_for_growth(path: Path) -> None:
    """Or for a second: a run that ends grows no more."""
    size, deadline = _size(path), time.monotonic() + 1
    while _size(path) <= size and time.monotonic() < deadline:
        size = min(size, _size(path))  # going on starts by shortening it
        time.sleep(0.001)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_what_is_behind_a_checkpoint_is_forgotten(tmp_path, tiny):
    """Whole lines and a torn one. A log that is shorter than that is refused, and so is what is no checkpoint."""
    pretrain.main([*tiny, "--out", str(tmp_path), "--stop-at", "5"])
    log, checkpoint = tmp_path / "bhyt.jsonl", tmp_path / "bhyt.pt"
    saved = log.read_bytes()
    log.write_bytes(saved + b'{"event": "train", "step": 6}\n{"event": "tra\x00')
    pretrain.main([*tiny, "--out", str(tmp_path), "--resume"])
    assert log.read_bytes().startswith(saved)
    assert [r["step"] for r in records(log) if r["event"] == "train"] == [*range(1, 9)]

    log.write_bytes(saved)
    assert "bhyt.jsonl has" in refusal(*tiny, "--out", tmp_path, "--resume")
    for content in (b"", b"no checkpoint", checkpoint.read_bytes()[:-100]):
        checkpoint.write_bytes(content)
        assert "bhyt.pt cannot be read" in refusal(*tiny, "--out", tmp_path, "--resume")
    torch.save({"step": 3}, checkpoint)
    assert "bhyt.pt is no checkpoint of this version" in refusal(*tiny, "--out", tmp_path, "--resume")


def test_more_steps(tmp_path, tiny, capsys):
    """The learning rate goes on as that of the longer run, which is said and logged; fewer than done are refused."""
    pretrain.main([*tiny, "--out", str(tmp_path)])
    pretrain.main([*tiny, "--out", str(tmp_path), "--resume", "--steps", "12"])
    assert "for 12 steps instead of 8 the learning rate is 0.00411 here instead of 0.001" in capsys.readouterr().out
    log = records(tmp_path / "bhyt.jsonl")
    (change,) = [r for r in log if r["event"] == "steps"]
    assert (change["step"], change["before"], change["now"]) == (8, 8, 12)
    rates = [r["lr"] for r in log if r["event"] == "train"]
    assert rates[8:] == [TrainConfig(**{**log[0]["train"], "steps": 12}).learning_rate(step) for step in range(8, 12)]
    assert change["lr_now"] == rates[8]
    assert "at step 12 of 12: cannot go on to 9" in refusal(*tiny, "--out", tmp_path, "--resume", "--steps", "9")


@pytest.mark.parametrize("norm", ["bhyt-unit-gains", "bhyt", "bhyt-exact", "rmsnorm", "layernorm"])
def test_exported_models_have_the_same_logits(tmp_path, tiny, text, norm, monkeypatch):
    """To rounding of fp32, with offsets that are three steps old; and the tokenizer gives the example's tokens."""
    transformers = needs("transformers")
    runs, train = [], Run.train
    monkeypatch.setattr(Run, "train", lambda run, *more: runs.append(run) or train(run, *more))
    folder = tmp_path / "model"
    pretrain.main([*tiny, "--norm", norm, "--lr", "0.1", "--out", str(tmp_path / "out"), "--export", str(folder)])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == {"rmsnorm": "LlamaForCausalLM", "layernorm": "StableLmForCausalLM"}.get(
        norm, "BHyTLlamaForCausalLM"
    )
    tokens, _ = load_corpus([text], 16).validation(32, 16)
    with torch.no_grad():
        expected, actual = runs[0].model(tokens), model(tokens).logits
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    odd = " two  spaces,\ttabs\r\nand lines\n", "naïve 汉字 😀 \x00\x7f\x85", "<|bos|> <s> ##a", ""
    for line in (text.read_text()[:200], *odd):
        assert tokenizer(line)["input_ids"] == [BOS, *line.encode()]
        assert tokenizer.decode([BOS, *line.encode()], skip_special_tokens=True) == line
    assert model.generation_config.bos_token_id == model.generation_config.eos_token_id == tokenizer.bos_token_id == BOS
    prompt = tokenizer(["12 squared"], return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] <= 11 + 4


def test_samples(tmp_path, tiny, capsys):
    """So many lines per norm, of the seed; none when told so."""
    outputs = []
    for out, count in ("a", "3"), ("a", "3"), ("c", "0"):  # the second time it resumes, and trains no more
        more = ["--norm", "bhyt", "dyt", "--steps", "2", "--samples", count, "--out", str(tmp_path / out)]
        assert pretrain.main([*tiny, *more, "--resume"]) == 0
        outputs.append([line for line in capsys.readouterr().out.splitlines() if " goes on " in line])
    assert outputs[0] == outputs[1] and outputs[2] == []
    assert [line.split()[0] for line in outputs[0]] == ["bhyt"] * 3 + ["dyt"] * 3
