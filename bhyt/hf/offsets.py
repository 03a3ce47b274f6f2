"""The variance offset of a layer: c of its attention, who computed it, and from which tensors.

An offset follows from W_V, W_O and the first site's lam (and gain, with use_gamma_var). `LayerOffset` notes these
sources. In eval mode a call that finds others computes the offset anew; in training the offset stays as it is, until
`bhyt.hf.refresh`. A write through `tensor.data` that keeps the memory leaves no trace in a tensor: after one, call
`bhyt.hf.refresh`.
"""

from typing import Any, Dict, Hashable, List, Optional, Tuple

import torch
from torch import Tensor

from bhyt.gain import attention_gain, whole
from bhyt.hf.projections import active_adapters, active_site, adapters_of_rows, matrix_of, present
from bhyt.hf.sources import Sources
from bhyt.modules import offset_of


def _is_its_own(layer: Any) -> bool:
    """Whether the layer has W_V and W_O, and they are its own. Otherwise the offset stays as computed or loaded."""
    if torch._C._are_functorch_transforms_active() or getattr(layer, "_is_replica", False):
        return False  # the weights are a transform's, or nn.DataParallel's
    return not hasattr(active_site(layer.input_layernorm), "gain_folded") and _has_projections(layer.self_attn)


def _has_projections(attention: Any) -> bool:
    """Not so where an engine has merged q, k and v."""
    return hasattr(attention, "v_proj") and hasattr(attention, "o_proj")


class _Value:
    """An offset in the buffer of a site, and its sources."""

    def __init__(self, sources: Sources, known: bool = True) -> None:
        self.sources, self.site = sources, sources.second
        self.known = known  # False: the offset may not be that of its sources
        self.buffer = self.site.variance_offset
        self.version = None if self.buffer.is_inference() else self.buffer._version

    def is_in_place(self) -> bool:
        return self.site.offset_is_set and self.site._buffers["variance_offset"] is self.buffer

    def is_unwritten(self) -> bool:
        return self.version is None or self.buffer._version == self.version

    def is_fresh(self) -> bool:
        return self.known and self.sources.same_tensors()


@torch.no_grad()
def _compute(layer: Any, adapter: Optional[str] = None) -> Tensor:
    """The offset of the layer as it is, a scalar. adapter: PEFT's, instead of those that are active.

    Raises:
        RuntimeError: the first site's gain is folded (see `bhyt.fold_gain`); a weight has not been loaded (meta), is
            a shard of an engine's, or is merged with others.
    """
    attention, first = layer.self_attn, active_site(layer.input_layernorm)
    if hasattr(first, "gain_folded"):
        raise RuntimeError("model: its gains are folded into W_V, of which c must not be computed; unfold it before")
    if not _has_projections(attention):
        raise RuntimeError(
            "model: its attention has no v_proj and o_proj, of which c is computed; load the offset instead"
        )
    with present(attention.v_proj, attention.o_proj, first):
        values = matrix_of(attention.v_proj, first.lam.dtype, adapter)
        rows = layer.config.num_key_value_heads * attention.head_dim
        if len(values) != rows:
            raise RuntimeError(f"model: v_proj has {len(values)} of its {rows} rows here; c is that of all of them")
        gain = attention_gain(
            values, matrix_of(attention.o_proj, first.lam.dtype, adapter),
            layer.config.seq_len, attention.num_key_value_groups, head_dim=attention.head_dim,
        )  # fmt: skip
        if layer.config.use_gamma_var and first.weight is not None:
            gain = gain * whole(first.weight).to(gain).square().mean()
        return offset_of(gain, first)


class LayerOffset:
    """Keeps the offset of one layer's approximate site in step with the layer: a value for each set of active adapters.

    Each value has a buffer of its own. So exchanging adapters exchanges buffers: nothing is computed anew, and no
    tensor that a graph has saved is written.
    """

    def __init__(self) -> None:
        self._values: Dict[Hashable, _Value] = {}  # by `Sources.adapters`
        self._current: Optional[_Value] = None
        self._stale = False  # without a current value: the buffer's offset may not be that of the weights
        self._rows: Optional[Tuple[Sources, Dict[str, Tensor]]] = None  # offsets of single adapters

    def __getstate__(self) -> Dict[str, bool]:
        """A copy knows no tensor, only whether its offset is to be trusted."""
        return {"stale": not self.is_fresh()}

    def __setstate__(self, state: Dict[str, bool]) -> None:
        LayerOffset.__init__(self)
        self._stale = state["stale"]

    def is_fresh(self) -> bool:
        """Whether the offset is that of the tensors as they are, for the adapters that were active."""
        if self._current is None:
            return not self._stale
        return self._current.is_fresh() and self._current.sources.same_modules()

    def settle(self, layer: Any) -> Optional[Tensor]:
        """Make the buffer hold the offset of the layer as it is; in training, the offset of the active adapters.

        Args:
            layer: the decoder layer.

        Returns:
            For a batch whose rows run with adapters of their own (PEFT's adapter_names), the difference of their
            offsets from the buffer's, [rows, 1, 1], to be added to the variance. None otherwise.
        """
        value = self._current
        if value is None:
            return self._settle(layer)
        sources, site = value.sources, value.site
        if site._buffers["variance_offset"] is not value.buffer or not site.offset_is_set or not sources.same_modules():
            return self._settle(layer)
        if sources.wrapped and (any(m._forward_pre_hooks for m in sources.wrapped) or not sources.same_adapters()):
            return self._settle(layer)
        if not layer.training and not (value.known and value.is_unwritten() and sources.same_tensors()):
            return self._settle(layer)
        return None

    def _settle(self, layer: Any) -> Optional[Tensor]:
        if not _is_its_own(layer):
            return None
        site, sources, rebuilt = active_site(layer.post_attention_layernorm), Sources(layer), False
        if self._current is not None:
            rebuilt = not self._current.sources.same_modules()
            if rebuilt or site.offset_given:
                self._values, self._current, self._rows = {}, None, None

        if not site.has_variance_offset() or rebuilt and not sources.absent:
            self.refresh(layer)
        elif not sources.absent:
            self._settle_value(layer, site, sources)
        names = adapters_of_rows(*sources.wrapped)
        return self._of_rows(layer, site, sources, names) if names else None

    def _settle_value(self, layer: Any, site: Any, sources: Sources) -> None:
        current = self._current
        if current is None:
            known = site.offset_given or not self._stale
            if known or layer.training:
                self._note(layer, sources, known)
            else:
                self.refresh(layer)
        elif sources.adapters != current.sources.adapters:
            if not current.is_in_place() or not current.is_unwritten():  # somebody else has set it
                self._values.pop(current.sources.adapters, None)
            value = self._values.get(sources.adapters)
            if value is not None and (value.known and layer.training or value.is_fresh()):
                self._current = value
                value.site._put_offset(value.buffer)
                layer.offset_adapters = active_adapters(layer.self_attn)
            else:
                self.refresh(layer)
        elif not current.is_in_place() or current.is_fresh():  # somebody else has set it
            self._note(layer, sources)
        elif not layer.training:
            self.refresh(layer)

    def _of_rows(self, layer: Any, site: Any, sources: Sources, names: List[str]) -> Tensor:
        if self._rows is None or not (self._rows[0].same_modules() and self._rows[0].same_tensors()):
            self._rows = sources, {}
        offsets = self._rows[1]
        for name in set(names) - offsets.keys():
            offsets[name] = _compute(layer, name)
        own = site.variance_offset
        rows = torch.stack([offsets[name] for name in names]).to(own.device, own.dtype)
        more: Tensor = rows.view(-1, 1, 1) - own
        return more

    def _note(self, layer: Any, sources: Sources, known: bool = True) -> None:
        """Note that the offset in the buffer belongs to these sources."""
        self._current = self._values[sources.adapters] = _Value(sources, known)
        self._stale, sources.second.offset_given = False, False
        layer.offset_adapters = active_adapters(layer.self_attn)

    def refresh(self, layer: Any) -> None:
        """Compute the offset from the layer as it is.

        Args:
            layer: the decoder layer.

        Raises:
            RuntimeError: the first site's gain is folded (see `bhyt.fold_gain`); a weight has not been loaded (meta).
        """
        offset, sources = _compute(layer), Sources(layer)
        site = sources.second
        if self._current is not None and self._current.sources.adapters != sources.adapters:
            with torch.inference_mode(False):  # the buffer at hand belongs to other adapters
                site.variance_offset = torch.empty_like(site.variance_offset)
        site.set_variance_offset(offset)
        self._values = {key: value for key, value in self._values.items() if value.is_fresh()}
        self._note(layer, sources)

    def trust(self, layer: Any, known: bool = True) -> None:
        """Note that the offset in the buffer, if there is one, belongs to the layer as it is.

        The two were loaded, moved or copied together.

        Args:
            layer: the decoder layer.
            known: False where the offset was not known before.
        """
        self._values, self._current, self._rows, self._stale = {}, None, None, not known
        if active_site(layer.post_attention_layernorm).offset_is_set and _is_its_own(layer):
            self._note(layer, Sources(layer), known)

    def look(self) -> None:
        """Look at the tensors now. If they have changed, the next call in eval mode computes the offset.

        That call may not see the change any more.
        FSDP2 shows the sharded weights, which training has written, between calls only; PEFT adds a merged adapter to a
        weight through `tensor.data`.
        """
        if self._current is not None and not self.is_fresh() and not self._current.sources.absent:
            self._current.known = False

    def doubt(self) -> None:
        """Note that adapters may be written through `tensor.data` from here on: the next call in eval mode computes."""
        self._rows = None
        for value in self._values.values():
            value.known = value.known and not value.sources.wrapped
