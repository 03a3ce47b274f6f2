"""Eight-bit models: what `bhyt.quantization.quantize` makes of one, in integers; saving, compiling, casting; what is
refused."""

import copy
import zipfile
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from torch import Tensor, nn

import bhyt
from bhyt.quantization import conversion, linear
from bhyt.quantization import quantize
from support.checks import same_bits

F8 = torch.float8_e4m3fn


class Block(nn.Module):
    """Sites and linears used by hand."""

    def __init__(self, d: int = 48, bias: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = bhyt.BHyT(d, lam=2.0), bhyt.BHyTApprox(d, lam=1.0)
        self.v, self.o = nn.Linear(d, 32, bias=bias), nn.Linear(32, d, bias=bias)
        self.up, self.down = nn.Linear(d, 80, bias=bias), nn.Linear(80, d, bias=bias)
        self.norm2.set_variance_offset(0.01)
        with torch.no_grad():
            for site in (self.norm1, self.norm2):
                site.weight.uniform_(0.5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, variance = self.norm1(x, return_variance=True)
        y, x = self.norm2(self.o(self.v(y)), variance, residual=x)
        return x + self.down(torch.relu(self.up(y)))


READERS: Dict[str, Any] = {"norm1": ["v"], "norm2": ["up"]}


def quantized_block(dtype: torch.dtype = torch.int8, **options: Any) -> Block:
    torch.manual_seed(5)
    block = Block(**options)
    assert quantize(block, dtype=dtype, readers=READERS, others=("o", "down")) == 4
    return block


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_linears_are_the_integers_of_their_formula() -> None:
    """Weights with a scale per channel, the gain in them; static inputs from the site, others by row."""
    torch.manual_seed(5)
    block = Block(bias=True)
    quantized = quantized_block(bias=True)
    x = torch.randn(3, 7, 48)
    gained = block.v.weight.double() * block.norm1.weight.double()
    scale = gained.abs().amax(1) / 127
    assert (quantized.v.weight.double() - gained / scale[:, None]).abs().max() <= 0.5 + 1e-4
    q = quantized.norm1(x)
    assert q.dtype == torch.int8 and (q.float() / 127 - block.norm1(x) / block.norm1.weight).abs().max() <= 0.5001 / 127
    expected = q.double() @ quantized.v.weight.double().T / 127 * scale + block.v.bias.double()
    assert relative(quantized.v(q), expected) < 1e-6
    rows = torch.randn(3, 7, 32) * torch.tensor([1e-3, 1.0, 1e4]).view(3, 1, 1)
    step = rows.abs().amax(-1, keepdim=True) / 127
    product = (rows / step).round().double() @ quantized.o.weight.double().T
    expected = product * step * quantized.o.weight_scale.double() + block.o.bias.double()
    assert relative(quantized.o(rows), expected) < 1e-6
    assert torch.equal(quantized.o(torch.zeros(2, 32)), block.o.bias.expand(2, 48))
    assert relative(quantized(x), block(x)) < 0.02


def test_rows_do_not_depend_on_their_batch() -> None:
    """Integers are added exactly: a row has the same bits alone, and outliers elsewhere change nothing."""
    block, x = quantized_block(), torch.randn(40, 48)
    whole = block(x)
    assert same_bits(block(x[7:8]), whole[7:8])
    x[8:] *= 1e4
    assert same_bits(block(x)[:8], whole[:8])


@pytest.mark.parametrize("out,features", ((3, 40), (1025, 33), (5, 2501)))
def test_products_without_int8_instructions(out: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 in blocks is exact: sums of the largest integers, which float32 has no number for, random ones; as
    torch's."""
    for q, weight in ((torch.full((2, features), -127), torch.full((out, features), 127)),
                      (torch.randint(-127, 128, (7, features)),
                        torch.randint(-127, 128, (out, features)))):  # fmt: skip
        exact, given = q @ weight.T, (q.to(torch.int8), weight.to(torch.int8))
        for plain_loop in (True, False):
            monkeypatch.setattr(linear, "_PLAIN_LOOP", plain_loop)
            product = linear._product(*given)
            assert torch.equal(product.long(), exact), f"plain loop: {plain_loop}"


def test_a_nan_stays_in_its_row() -> None:
    block, x = quantized_block(), torch.randn(4, 48)
    whole = block(x)
    x[2, 5] = float("nan")
    bad = block(x)
    assert bad[2, 5].isnan() and same_bits(bad[[0, 1, 3]], whole[[0, 1, 3]])


def test_folded_before() -> None:
    """A model whose gains are folded already gives the same integers."""
    torch.manual_seed(5)
    block = Block()
    bhyt.fold_gain(block, READERS)
    quantize(block, readers=READERS, others=("o", "down"))
    for name, tensor in quantized_block().state_dict().items():
        assert same_bits(block.state_dict()[name], tensor), name


def test_state_dict() -> None:
    """Loads, strictly, into a model quantised in the same way."""
    block, x = quantized_block(bias=True), torch.randn(5, 48)
    torch.manual_seed(6)
    other = Block(bias=True)
    quantize(other, readers=READERS, others=("o", "down"))
    assert not torch.equal(other(x), block(x))
    other.load_state_dict(block.state_dict())
    assert same_bits(other(x), block(x)) and same_bits(copy.deepcopy(block)(x), block(x))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_casts(dtype: torch.dtype) -> None:
    """Integers and scales stay what they are, outputs follow."""
    block, x = quantized_block(bias=True), torch.randn(5, 48)
    expected, scale = block(x), block.v.weight_scale.clone()
    y = block.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and relative(y, expected) < 0.03
    assert block.v.weight.dtype == torch.int8 and same_bits(block.v.weight_scale, scale)
    assert block.v(block.norm1(x.to(dtype))).dtype == dtype


def test_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same module with float8 weights; the CPU, which has no fast product of them, is refused by `quantize`
    alone."""
    torch.manual_seed(5)
    block, x = Block(bias=True), torch.randn(5, 48)
    monkeypatch.setattr(conversion, "_check_float8", lambda name, device: None)
    quantized = quantized_block(F8, bias=True)
    assert quantized.norm1(x).dtype == quantized.v.weight.dtype == F8
    assert relative(quantized(x), block(x)) < 0.05
    assert quantized.to(torch.bfloat16).v.weight.dtype == F8


def test_training_is_refused() -> None:
    block, x = quantized_block(), torch.randn(5, 48)
    assert not block.training and not any(p.requires_grad for p in block.parameters())
    with pytest.raises(RuntimeError, match="quantised for inference"):
        block.train()(x)
    with pytest.raises(RuntimeError, match="not differentiable"):
        block.eval()(x.requires_grad_())


def test_compiled_and_exported() -> None:
    block, x = quantized_block(), torch.randn(5, 48)
    expected = block(x)
    assert relative(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected) < 1e-6
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert relative(exported(x), expected) < 1e-6 and exported(x[:2]).shape == (2, 48)


@pytest.mark.slow
def test_aoti(tmp_path: Path) -> None:
    """An AOTInductor package of a quantised model, with another number of rows too."""
    block, x = quantized_block(bias=True), torch.randn(5, 48)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    assert sum("quantized" in str(node.target) for node in program.graph.nodes) == 2
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    with zipfile.ZipFile(path) as archive:
        calls = [
            archive.read(name).count(b'_quantized.explicit"') for name in archive.namelist() if name.endswith(".json")
        ]
    assert sum(calls) == 2  # ops, not their formulas
    package = torch._inductor.aoti_load_package(path)
    for rows in (x, torch.randn(2, 48)):
        assert relative(package(rows), block(rows)) < 1e-5


def assert_refused(model: nn.Module, message: str, **options: Any) -> None:
    """ValueError, and nothing of the model has changed."""
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        quantize(model, **{"readers": READERS, "others": ("o", "down"), **options})
    assert kinds == [type(module) for module in model.modules()] and model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_refusals() -> None:
    """One clear line each, nothing half-converted."""
    assert_refused(Block(), "dtype: expected torch.int8 or torch.float8_e4m3fn, got torch.uint8", dtype=torch.uint8)
    assert_refused(Block(), "model: Block has no BHyT site whose linears are known: convert it", readers=None)
    assert_refused(Block(), "norm3: Block has no such module", readers={"norm3": ["v"]})
    assert_refused(Block(), "v: expected a BHyT site, got Linear", readers={"v": ["o"]})
    assert_refused(Block(), "norm1: expected all linears that read it, got none", readers={"norm1": []})
    assert_refused(Block(), r"o: expected a weight \[.., 48\], got \[48, 32\]", readers={"norm1": ["o"]})
    assert_refused(Block(), "v: its weight is read by something else", readers={"norm1": ["v"], "norm2": ["v"]})
    unset = Block()
    unset.norm2 = bhyt.BHyTApprox(48)
    assert_refused(unset, "norm2: its variance offset has not been set")
    half = Block()
    half.v.gain_folded = True
    assert_refused(half, "v: a gain is folded into it, and norm1 has one that is not")
    for name in ("v", "o"):  # behind a site, and one of the others
        wrapped = Block()
        setattr(wrapped, name, nn.Sequential(getattr(wrapped, name)))
        assert_refused(wrapped, f"{name}: expected torch.nn.Linear, got torch.nn.modules.container.Sequential")
    assert_refused(Block(), "others: Block has no linear called dwn", others=("o", "dwn"))
    assert_refused(
        Block(), "float8_e4m3fn needs a CUDA device of compute capability 8.9 or newer, v is on cpu", dtype=F8
    )
    with pytest.raises(ValueError, match="norm1: is quantised already"):
        quantize(quantized_block(), readers=READERS)
    with pytest.raises(
        TypeError, match="x: expected torch.int8 from the site that this linear reads, got torch.float32"
    ):
        quantized_block().v(torch.randn(2, 48))
