"""Threads, forks, data loaders, signals: the ops where Python programs call them from."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import bhyt
from support.cases import FORMS, Outputs, make_call, make_upstream, run_with_gradients
from support.checks import same_bits

THREADS = 8


def in_threads(function: Callable[[int], object]) -> list:
    """The results of function(0), function(1), .. run by as many threads at once."""
    start = threading.Barrier(THREADS)

    def run(i: int) -> object:
        start.wait()
        return function(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def flat(out: Outputs, grads: Dict[str, Tensor]) -> List[Tensor]:
    return [t for t in (*out, *grads.values()) if t is not None]


def in_a_process(program: str, timeout: float = 120) -> str:
    """What `program` prints in a fresh process that has imported torch and bhyt (the package under test, wherever
    pytest was started)."""
    command = [sys.executable, "-c", "import torch, bhyt\n" + textwrap.dedent(program)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parent)
    assert run.returncode == 0, f"exit status {run.returncode}:\n{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.mark.parametrize("form", FORMS)
def test_threads(form: str, device: str) -> None:
    """Eight threads on the same inputs, some with a graph and some without: the bits of one thread. USERS rows 17
    and 18."""
    call = make_call(form, (300, 200), torch.bfloat16, device)
    upstream = make_upstream(call)
    expected = flat(*run_with_gradients(call, *upstream))
    outputs = [t for t in call.run() if t is not None]

    def work(i: int) -> bool:
        for _ in range(5):
            if i % 2:
                right = all(map(same_bits, expected, flat(*run_with_gradients(call, *upstream))))
            else:
                with torch.inference_mode() if i % 4 else torch.no_grad():
                    right = all(map(same_bits, outputs, (t for t in call.run() if t is not None)))
            if not right:
                return False
        return True

    assert all(in_threads(work))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_from_many_threads(form: str, device: str) -> None:
    """Eight threads go backward through one graph at once: each gets the bits of one thread. USERS row 17."""
    call = make_call(form, (300, 200), device=device).requiring_grad()
    out, inputs = call.run(), list(call.differentiable().values())
    grad_y = torch.randn_like(out.y)
    expected = torch.autograd.grad(out.y, inputs, grad_y, retain_graph=True)
    results = in_threads(lambda i: torch.autograd.grad(out.y, inputs, grad_y, retain_graph=True))
    for grads in results:
        assert all(map(same_bits, expected, grads))


def test_first_calls_from_many_threads() -> None:
    """The first calls a process makes, from eight threads at once: what is set up once is set up once, and right."""
    in_a_process(
        """
        import threading
        x, results, start = torch.randn(64, 100), [None] * 8, threading.Barrier(8)

        def work(i):
            leaf, lam = x.clone().requires_grad_(), torch.ones(1, requires_grad=True)
            start.wait()
            y = bhyt.functional.forward(leaf, None, lam)[0]
            y.sum().backward()
            results[i] = y.detach(), leaf.grad, lam.grad

        threads = [threading.Thread(target=work, args=[i]) for i in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        true = torch.tanh(x.double() / (10 * (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()))
        assert (results[0][0].double() - true).abs().max() < 1e-6
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))
        """
    )


# How a parent forks and a child answers; `check` in the child says whether what it computes has the parent's bits.
FORK = """
import os, time

def exit_status(check, patience):
    # Of a forked child that runs check(): 0 if it is true; None if it has not come back in `patience` seconds.
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)

def site(rows):
    x = torch.linspace(-3, 3, rows * 512).reshape(rows, 512).requires_grad_()
    lam = torch.ones(1, requires_grad=True)
    y, _ = bhyt.functional.forward(x, None, lam)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, lam])]

def norm(rows):
    x = torch.linspace(-3, 3, rows * 512).reshape(rows, 512)
    return [torch.nn.functional.layer_norm(x, [512])]

def same(function, rows):
    expected = function(rows)
    return lambda: all(map(torch.equal, expected, function(rows)))

def alone(check):
    return lambda: torch.set_num_threads(1) or check()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_use() -> None:
    """A child forked after the ops were used, forward and backward, computes the parent's bits: with one thread
    in both; and after the parent's pool of threads was used, once the child asks for one thread (as a data loader's
    worker does), or for rows too few to be shared out. Where more threads work after a fork (libgomp's wait for
    ever, torch's own ops' too) ours do."""
    in_a_process(
        FORK
        + """
torch.set_num_threads(1)
assert exit_status(same(site, 4000), 60) == 0, "one thread"
torch.set_num_threads(2)
site(4000), norm(4000)
assert exit_status(alone(same(site, 4000)), 60) == 0, "one thread after a pool of two"
assert exit_status(same(site, 4), 60) == 0, "few rows after a pool of two"
if exit_status(same(norm, 4000), 3) == 0:
    assert exit_status(same(site, 4000), 60) == 0, "layer_norm works, this does not"
"""
    )


class Normed(Dataset):
    """Rows of 0, 1, .., each passed through a site, with the gradient of its lam."""

    def __init__(self) -> None:
        self.site = bhyt.BHyT(32, lam=2.0)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        x = torch.linspace(-1, 1, 32) * (i + 1)
        y = self.site(x)
        grad = torch.autograd.grad(y.square().sum(), self.site.lam)[0]
        return torch.cat([y.detach(), grad])


@pytest.mark.parametrize("start", ("spawn", "fork"))
def test_data_loader(start: str) -> None:
    """A dataset that runs a module, in workers spawned (pickled, with torch imported anew) or forked: the bits
    of this process."""
    torch.set_num_threads(2)
    data = Normed()
    make_call("forward", (1000, 200)).run()  # by now there is a pool of threads
    expected = torch.stack([data[i] for i in range(len(data))])
    loaded = torch.cat(list(DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start)))
    assert same_bits(loaded, expected)


LONG_CALL = """
import os, signal, threading, time
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # Python leaves it ignored when started in the background

def long_call(rows):
    # One row, repeated by stride 0: hours of work in no memory.
    row = torch.linspace(-2, 2, 4096).expand(rows, 4096)
    variance = torch.ones(1, 1).expand(rows, 1)
    return torch.ops.bhyt.backward(row, None, None, row, variance, None, torch.ones(1), 10.0, 1e-6, [0, 0, 1])[2]

long_call(8192)
start = time.process_time()
long_call(8192)
rows = int(8192 / (time.process_time() - start))  # about a second's
"""


def test_interrupt() -> None:
    """Ctrl-C in a long call: other Python threads run meanwhile, KeyboardInterrupt is raised when the call has ended,
    and the process goes on with right results."""
    in_a_process(
        LONG_CALL
        + """
expected, sent = long_call(4096), []

def press():
    time.sleep(0.1)
    sent.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=press).start()
try:
    long_call(rows)
    time.sleep(60)
    raise AssertionError("no KeyboardInterrupt")
except KeyboardInterrupt:
    caught = time.process_time()
assert caught - sent[0] > 0.3, f"raised {caught - sent[0]} s of work after the signal: not during the call"
assert torch.equal(long_call(4096), expected)
"""
    )
