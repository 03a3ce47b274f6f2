"""Models without the Python that made them: TorchScript in a fresh process, export. C++, AOTInductor packages and ONNX
are in engines/test_deploy_page.py."""

import io
from pathlib import Path
from typing import List

import pytest
import torch

import bhyt
from support.checks import same_bits
from support.deployed import CONFIG, assert_same_results, decoder, fresh_process, one_step, tokens


def test_torchscript_in_a_fresh_process(tmp_path: Path) -> None:
    """Scripted, traced and frozen: saved here, the same bits where `bhyt` was never imported. Gradients of the script
    are those of eager: autograd lives in the library. USERS row 23."""
    ids = tokens()
    expected = one_step(decoder(), ids)
    scripts = {
        "script": torch.jit.script(decoder()),
        "trace": torch.jit.trace(decoder(), (ids[:, :-1],)),
        "freeze": torch.jit.freeze(torch.jit.script(decoder()).eval()),
    }
    for how, script in scripts.items():
        torch.jit.save(script, str(tmp_path / f"{how}.pt"))
    torch.save(ids, tmp_path / "ids.pt")
    fresh_process(
        "import os; os.chdir(a[0]); assert 'bhyt' not in sys.modules\n"
        "ids, results = torch.load('ids.pt'), {}\n"
        "for how in a[1:]:\n"
        "    m = torch.jit.load(f'{how}.pt')\n"
        "    results[how] = logits = m(ids[:, :-1])\n"
        "    if how == 'script':\n"
        "        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()\n"
        "        results['grads'] = {n: p.grad for n, p in m.named_parameters()}\n"
        "torch.save(results, 'results.pt')",
        tmp_path,
        *scripts,
    )
    results = torch.load(tmp_path / "results.pt")
    for how in scripts:
        assert same_bits(results[how].detach(), expected["logits"]), how
    assert results["grads"].keys() == dict(decoder().named_parameters()).keys()
    for name, grad in results["grads"].items():
        assert same_bits(grad, expected[f"grad.{name}"]), name


def test_freezing_keeps_the_offset() -> None:
    """A frozen graph holds the offset that was set; one that was not set still refuses to run. USERS row 23."""
    site = bhyt.BHyTApprox(8)
    x, v = torch.randn(3, 8), torch.ones(3, 1)
    with pytest.raises(torch.jit.Error, match="offset has not been set"):
        torch.jit.freeze(torch.jit.script(site.eval()))(x, v)
    site.set_variance_offset(0.5)
    with torch.no_grad():
        assert same_bits(torch.jit.freeze(torch.jit.script(site))(x, v), site(x, v))


def test_export_keeps_the_ops() -> None:
    """An exported model holds our ops; decomposed, none of them, and the same values. USERS row 23."""
    program = torch.export.export(decoder().eval(), (tokens(),))

    def ours(exported: torch.export.ExportedProgram) -> List[str]:
        return [str(node.target) for node in exported.graph.nodes if str(node.target).startswith("bhyt.")]

    assert len(ours(program)) == 2 * CONFIG.layers
    stream = io.BytesIO()
    torch.export.save(program, stream)
    plain = program.run_decompositions(bhyt.decompositions())
    assert not ours(plain)
    with torch.no_grad():
        assert_same_results(plain.module()(tokens()), decoder()(tokens()))
