"""The plot of bhyt.diagnostics."""

from pathlib import Path

import torch

from bhyt.diagnostics import record
from support.deployed import decoder, tokens
from support.packages import needs

needs("matplotlib")


def test_plot(tmp_path: Path) -> None:
    """plot writes a picture, also of exact sites only."""
    model = decoder()
    with record(model) as found, torch.no_grad():
        model(tokens())
    found.plot(tmp_path / "all.png")
    with record(model.layers[0].input_layernorm) as found, torch.no_grad():
        model(tokens())
    found.plot(tmp_path / "exact.svg")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert b"mean |x|" in (tmp_path / "exact.svg").read_bytes()
