"""bhyt.fold_gain: what a folded model computes, that unfolding gives back every bit, and what is refused."""

import copy
import pickle
import sys
from typing import Callable, Dict

import pytest
import torch
from torch import Tensor, nn

import bhyt
from bhyt.folding import fold_gain
from support.checks import same_bits
from support.paths import EXAMPLES
from support.tolerances import ulp_error

sys.path.insert(0, str(EXAMPLES))

from pretraining.model import Decoder, ModelConfig  # noqa: E402
from pretraining.norms import BLOCKS  # noqa: E402

D, OUT = 64, 48


def snapshot(model: nn.Module) -> Dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_decoder_of_the_example() -> None:
    """The structural rule covers examples/pretraining too: every site of its blocks, logits within 1e-4 of float64."""
    config = ModelConfig(vocab=32, layers=2, dim=32, heads=4, kv_heads=2, seq_len=16)
    for name in ("bhyt", "bhyt-exact"):
        model = Decoder(config, BLOCKS[name])
        for layer in model.layers:
            for site in (layer.input_layernorm, layer.post_attention_layernorm):
                nn.init.uniform_(site.weight, 0.5, 1.5)
        tokens = torch.randint(0, 32, (2, 8))
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(tokens)
            with fold_gain(model) as folded:
                assert len(folded.sites) == 4
                assert (model(tokens) - expected).abs().max() <= 1e-4 * expected.abs().max()


class Pair(nn.Module):
    """A site and two linears that read it, one with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32, gain_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.site = bhyt.BHyT(D, lam=2.0, dtype=gain_dtype)
        self.a, self.b = nn.Linear(D, OUT, dtype=dtype), nn.Linear(D, OUT, bias=False, dtype=dtype)
        with torch.no_grad():
            for parameter in (self.site.weight, *self.a.parameters(), *self.b.parameters()):
                parameter.uniform_(0.5, 1.5).mul_(torch.randn(parameter.shape).sign())

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        return torch.cat([self.a(y), self.b(y)], -1)


READERS = {"site": ["a", "b"]}


@pytest.mark.parametrize("gain_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_rounding(dtype: torch.dtype, gain_dtype: torch.dtype) -> None:
    """By name, any model. Each product is rounded once to the linear's dtype: 0.5 ulp, and 2^-14 for a second rounding
    from float32 where the gain is wider. Outputs are within what follows of W gamma t in float64: u for the product,
    SPEC.md's ulps for t, d float32 roundings of the sum, u for the result; and 5 % for their products."""
    model = Pair(dtype, gain_dtype)
    exact = copy.deepcopy(model).double()
    x = torch.randn(16, D, dtype=dtype)
    row = x.double()
    t = torch.tanh(2 * row / (10 * (row.square().mean(-1, keepdim=True) + 1e-6).sqrt()))
    scaled = [exact.a.weight * exact.site.weight, exact.b.weight * exact.site.weight]
    expected = torch.cat([t @ scaled[0].T + exact.a.bias, t @ scaled[1].T], -1)
    magnitude = torch.cat([t.abs() @ scaled[0].abs().T + exact.a.bias.abs(), t.abs() @ scaled[1].abs().T], -1)
    bias = model.a.bias.clone()
    with fold_gain(model, READERS), torch.no_grad():
        for linear, product in zip((model.a, model.b), scaled):
            assert linear.weight.dtype == dtype and ulp_error(linear.weight, product) <= 0.5 + 2**-14
        assert same_bits(model.a.bias, bias)
        u = torch.finfo(dtype).eps / 2
        y_ulp = 6.0 if dtype == torch.float32 else 0.55  # SPEC.md section 3; an ulp is at most 2 u
        bound = 1.05 * (u + 2 * y_ulp * u + D * torch.finfo(torch.float32).eps) * magnitude + u * expected.abs()
        assert ((model(x).double() - expected).abs() <= bound).all()


def test_no_gain() -> None:
    """A site without a gain is passed over; where no site has one there is nothing to fold."""
    model = nn.ModuleDict({"bare": bhyt.BHyT(D, elementwise_affine=False), "pair": Pair(), "c": nn.Linear(D, OUT)})
    with fold_gain(model, {"bare": ["c"], "pair.site": ["pair.a", "pair.b"]}) as folded:
        assert folded.sites == ("pair.site",)
    with pytest.raises(ValueError, match="no gain"):
        fold_gain(model, {"bare": ["c"]})
    with pytest.raises(ValueError, match="no gain"):
        fold_gain(model.bare)


def test_training_after() -> None:
    """Folded weights take no gradient, the input does; an optimiser made before goes on with the originals."""
    model = Pair()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, D, requires_grad=True)
    with fold_gain(model, READERS):
        model(x).sum().backward()
        assert x.grad.any() and model.a.weight.grad is None and model.site.lam.grad is not None
    before = snapshot(model)
    optimiser.zero_grad()
    model(x).sum().backward()
    optimiser.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_folded_in_inference_mode() -> None:
    """Folded and unfolded under inference_mode, the model trains afterwards. USERS row 27."""
    model = Pair()
    with torch.inference_mode():
        folded = fold_gain(model, READERS)
    x = torch.randn(4, D, requires_grad=True)
    model(x).sum().backward()  # the folded weights are saved for the gradient of x
    with torch.inference_mode():
        folded.unfold()
    model(x).sum().backward()
    assert model.a.weight.grad is not None and model.site.weight.grad is not None


def test_undone_after_an_exception_and_once() -> None:
    """The context unfolds when its body raises; unfolding again does nothing, whatever was trained between."""
    model = Pair()
    bits = snapshot(model)
    with pytest.raises(KeyError):
        with fold_gain(model, READERS) as folded:
            raise KeyError
    assert all(same_bits(parameter, bits[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        model.a.weight.zero_()
    folded.unfold()
    assert not model.a.weight.any()


def test_copies_and_state_dicts() -> None:
    """A copy of a folded model computes the same bits and stays folded; strict loading from or into a folded model
    names the gains. USERS row 28."""
    model, x = Pair(), torch.randn(4, D)
    twin = copy.deepcopy(model)
    with fold_gain(model, READERS):
        expected = model(x)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        with pytest.raises(RuntimeError, match="Missing key.*site.weight"):
            twin.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key.*site.weight"):
            copy.deepcopy(model).load_state_dict(Pair().state_dict())
    for other in copies:
        assert same_bits(other(x), expected)
        with pytest.raises(ValueError, match="site: its gain is folded already"):
            fold_gain(other, READERS)


class Quantised(nn.Linear):
    """As quantisation libraries do it: a linear by name, with a weight of another kind."""


def with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Shard(Tensor):
    """A parameter that is not plain, as a DTensor is not."""


def wrapped(linear: nn.Linear) -> nn.Module:
    wrapper = nn.Module()
    wrapper.base_layer, wrapper.weight = linear, linear.weight  # as adapters do
    return wrapper


LINEARS: Dict[str, Callable[[nn.Linear], nn.Module]] = {
    "expected torch.nn.Linear, got .*Quantised": lambda linear: Quantised(D, OUT),
    "expected torch.nn.Linear, got .*Module": wrapped,
    "expected torch.nn.Linear, got .*Parametrized": nn.utils.parametrizations.weight_norm,
    "plain weight, got Parameter torch.int8": lambda linear: with_weight(linear, torch.ones(OUT, D, dtype=torch.int8)),
    "plain weight, got Shard": lambda linear: with_weight(linear, torch.ones(OUT, D).as_subclass(Shard)),
    "plain weight.*on meta": lambda linear: linear.to("meta"),
    rf"\[.., {D}\], got \[{OUT}, {D + 1}\]": lambda linear: nn.Linear(D + 1, OUT),
}


@pytest.mark.parametrize("message", LINEARS)
def test_refused_linears(message: str) -> None:
    """Quantised, wrapped, parametrised, sharded, meta, of another size: refused by name, nothing changed."""
    model = Pair()
    model.b = LINEARS[message](model.b)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="^b: .*" + message):
        fold_gain(model, READERS)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not hasattr(model.a, "gain_folded") and not hasattr(model.site, "gain_folded")


def test_refusals() -> None:
    """Linears that something else reads too, sites that are none, names that are none, folding twice."""
    model = Pair()
    model.other, model.linear = bhyt.BHyT(D), nn.Linear(D, D)
    model.tied = nn.Embedding(OUT, D)
    model.tied.weight = model.b.weight
    model.alias = model.linear
    for readers, message in (
        ({"site": ["a"], "other": ["a"]}, "a: .*something else"),
        ({"site": ["a", "a"]}, "a: .*something else"),
        ({"site": ["b"]}, "b: .*something else"),
        ({"site": ["linear"]}, "linear: .*something else"),
        ({"a": ["b"]}, "a: expected a BHyT site, got Linear"),
        ({"site": ["nowhere"]}, "nowhere: Pair has no such module"),
        ({"site": []}, "site: expected once, with all linears"),
    ):
        before = dict(model.named_parameters())
        with pytest.raises(ValueError, match="^" + message):
            fold_gain(model, readers)
        assert dict(model.named_parameters()).keys() == before.keys()
    with fold_gain(model, {"site": ["a"]}):
        with pytest.raises(ValueError, match="site: its gain is folded already"):
            fold_gain(model, {"site": ["a"]})
        with pytest.raises(ValueError, match="a: a gain is folded into it already"):
            fold_gain(model, {"other": ["a"]})
