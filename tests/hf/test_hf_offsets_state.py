"""Offsets in state dicts and files."""

import copy
import io
from pathlib import Path
from typing import Dict

import pytest
import torch
from torch import Tensor

import bhyt
from support.checks import same_bits
from load_saved import outputs
from support.hf_models import (
    SIZES, close, converted, hf, ids, offsets, offsets_by_hand, stock,
    transformers,
)
from test_hf_offsets import multiply


def test_a_state_dict_without_keys_of_a_layer(tmp_path: Path) -> None:
    """F10: an embedding alone, or another layer, leaves a layer's offset; in eight bits, where none can be computed."""
    for quantised in (False, True):
        model = converted()
        if quantised:
            bhyt.quantization.quantize(model)
        before, state = offsets(model), model.state_dict()
        for part in ("model.embed_tokens.", "model.layers.0.mlp.", "model.layers.1.self_attn.q_proj"):
            model.load_state_dict({name: t for name, t in state.items() if name.startswith(part)}, strict=False)
            model(ids())
            assert same_bits(offsets(model), before)
    whole = {name: t for name, t in state.items() if not name.endswith("variance_offset")}
    model.load_state_dict(whole)  # no old offset stays in force
    with pytest.raises(RuntimeError, match="offset has not been set"):
        model(ids())


def test_no_nan_beside_weights(tmp_path: Path) -> None:
    """F11: a model that has its weights has its offsets, however it came to them, before it has run."""
    built = transformers.AutoModelForCausalLM.from_config(hf.BHyTLlamaConfig(**SIZES, seq_len=32))
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(hf.BHyTLlamaConfig(**SIZES, seq_len=32))
    if transformers.__version__ >= "5":  # before, init_weights left such a model alone
        empty.to_empty(device="cpu").init_weights()
    else:
        empty = built
    plain = stock()
    hf.convert(plain, seq_len=32)
    given = copy.deepcopy(plain)
    given.load_state_dict({n: t for n, t in plain.state_dict().items() if not n.endswith("variance_offset")})
    for model in (built, empty, plain, given):
        assert not any(tensor.isnan().any() for tensor in model.state_dict().values())
        assert close(offsets(model), offsets_by_hand(model.model.layers))
    buffer = io.BytesIO()
    torch.save(given, buffer)


def test_sharded_files_keep_offsets(tmp_path: Path) -> None:
    """F3: torch's consolidation of sharded safetensors, which drops tensors without a dimension, has the offsets."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint

    model = converted()
    writer = getattr(checkpoint, "HuggingFaceStorageWriter", None)
    if writer is None:
        pytest.skip("this torch has no HuggingFaceStorageWriter")
    checkpoint.save(
        model.state_dict(), storage_writer=writer(str(tmp_path), save_distributed=True, enable_consolidation=True)
    )
    written: Dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == model.state_dict().keys()
    assert all(same_bits(written[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(name.endswith("variance_offset") for name in written) == 3


def test_offsets_without_a_dimension_load() -> None:
    """Saved before 0.2: the same bits, copied or assigned."""
    model = converted()
    state = {n: t.reshape(()) if n.endswith("variance_offset") else t for n, t in model.state_dict().items()}
    expected = outputs(model, ids())
    for assign in (False, True):
        other = converted()
        multiply("weight")(other)
        other.load_state_dict(state, assign=assign)
        assert same_bits(outputs(other, ids()), expected) and same_bits(offsets(other), offsets(model))
        assert offsets(other).shape == (3,)
