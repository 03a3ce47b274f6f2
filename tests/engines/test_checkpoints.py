"""Distributed checkpoints and state dicts of sharded models: rows 61 and 62 of docs/users.md."""

import tempfile

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from support.checks import same_bits
from support.processes import assert_same, processes, whole
from test_parallel import batch, llama, loss_of, shard_layers


@processes(2)
def test_async_save() -> None:
    """Weights and offsets change while a distributed checkpoint is written: the file has those of the call. USERS row
    61."""
    model = shard_layers(llama())
    before = {name: whole(t).clone() for name, t in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as mine:
        folders = [mine]
        dist.broadcast_object_list(folders)
        written = checkpoint.async_save(get_model_state_dict(model), checkpoint_id=folders[0])
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(2)
        written.result()
        state = get_model_state_dict(model)
        checkpoint.load(state, checkpoint_id=folders[0])
        dist.barrier()
    set_model_state_dict(model, state)
    assert any("variance_offset" in name for name in before)
    for name, tensor in model.state_dict().items():
        assert same_bits(whole(tensor), before[name]), name


@processes(2)
def test_weights_of_the_first_process() -> None:
    """A state dict of one process, for all (broadcast_from_rank0): the loss is that of its model, so every process has
    its offsets. USERS row 62."""
    reference = llama()
    expected = loss_of(reference, batch())
    model = shard_layers(llama())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(2)
    state = reference.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert_same(loss_of(model, batch()), expected, "loss")
