"""What runs of examples/pretrain.py read, and their arguments."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}, and cubed {i**3}.\n" for i in range(1500)))
    return path


@pytest.fixture(scope="session")
def tiny(text: Path) -> list[str]:
    arguments = (
        "--layers 2 --dim 32 --heads 4 --kv-heads 2 --seq-len 16 --batch 8 --steps 8 --warmup 2 --lr 1e-2 --refresh 3"
        " --log-every 1 --eval-every 25 --checkpoint-every 5 --device cpu --samples 0 --norm bhyt --text"
    )
    return [*arguments.split(), str(text)]
