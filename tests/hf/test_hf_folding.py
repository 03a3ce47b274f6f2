"""bhyt.fold_gain of converted models: the tokens and logits of a folded one, every bit of it afterwards; what is
refused."""

import copy
from typing import Dict, List

import pytest
import torch
from torch import Tensor, nn

import bhyt
from bhyt.folding import fold_gain
from support.checks import same_bits
from support.hf_models import FAMILIES, SIZES, converted, hf, ids, logits_by_hand, stock

D = SIZES["hidden_size"]
LAYERS = SIZES["num_hidden_layers"]


def snapshot(model: nn.Module) -> Dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def offsets(model: nn.Module) -> List[Tensor]:
    return [m.variance_offset.clone() for m in model.modules() if isinstance(m, bhyt.BHyTApprox)]


def generated(model: nn.Module) -> Tensor:
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(ids()))
    return model.generate(ids(), max_new_tokens=8, **options)


@pytest.mark.parametrize(
    "family, options",
    [(family, {"last_layer_lam": 1.5}) for family in FAMILIES] + [("Llama", {}), ("Llama", {"norm_type": "bhytstar"})],
    ids=str,
)
def test_converted_model(family: str, options: dict) -> None:
    """Greedy generation is the same before, folded and after; folded logits are within 1e-4 of the float64 evaluation
    of the unfolded model; afterwards the parameters are the same objects, in the same order, with the same bits, and
    the offsets never change."""
    model = converted(family, **options)
    parameters, bits, constants = dict(model.named_parameters()), snapshot(model), offsets(model)
    tokens, expected = generated(model), logits_by_hand(copy.deepcopy(model).double(), ids())
    with fold_gain(model) as folded:
        sites = [m for m in model.modules() if isinstance(m, (bhyt.BHyT, bhyt.BHyTApprox))]
        assert len(folded.sites) == len(sites) == 2 * LAYERS + ("last_layer_lam" in options)
        assert all(site.weight is None for site in sites)
        assert torch.equal(generated(model), tokens)
        with torch.no_grad():
            assert (model(ids()).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert all(map(same_bits, offsets(model), constants))
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(n, id(p)) for n, p in parameters.items()]
    assert all(same_bits(parameter, bits[name]) for name, parameter in model.named_parameters())
    assert all(map(same_bits, offsets(model), constants))
    assert not any(hasattr(module, "gain_folded") for module in model.modules())
    assert torch.equal(generated(model), tokens)


def test_tied_head() -> None:
    """A final site in front of embeddings used as the head keeps its gain, and so does one without a head."""
    model = stock(tie_word_embeddings=True)
    hf.convert(model, seq_len=32, last_layer_lam=1.5)
    for folds in (model, model.model):
        with fold_gain(folds) as folded:
            assert len(folded.sites) == 2 * LAYERS and model.model.norm.weight is not None


def test_no_gain() -> None:
    """Where no site has a gain there is nothing to fold."""
    with pytest.raises(ValueError, match="no gain"):
        fold_gain(stock())


def test_refresh_is_refused() -> None:
    """c of a folded W_V would be wrong: refresh raises, writes no offset, and works again afterwards."""
    model = converted()
    constants = offsets(model)
    with fold_gain(model):
        with pytest.raises(RuntimeError, match="unfold"):
            hf.refresh(model)
        assert all(map(same_bits, offsets(model), constants))
    hf.refresh(model)
    assert all(map(same_bits, offsets(model), constants))


def test_refused_layers() -> None:
    """In a decoder: a further module that may read the site, and linears of other names, are named; folding twice."""
    model = converted()
    model.model.layers[1].mlp.router = nn.Linear(D, 4)
    with pytest.raises(ValueError, match="^model.layers.1.mlp.router: may read model.*post_attention_layernorm"):
        fold_gain(model)
    model = converted()
    del model.model.layers[0].self_attn.k_proj
    with pytest.raises(ValueError, match="^model.layers.0.self_attn.k_proj: .*no such module.*readers"):
        fold_gain(model)
    model = converted()
    with fold_gain(model):
        with pytest.raises(ValueError, match="^model.layers.0.input_layernorm: its gain is folded already"):
            fold_gain(model)
