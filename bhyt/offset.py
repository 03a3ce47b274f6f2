"""The variance offset of an approximate site as state: a buffer that is set, refused while unset, saved and loaded."""

import math
from typing import Any, Callable, Dict, List, Union

import torch
from torch import Tensor, nn

_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
_NAME = "variance_offset"


class VarianceOffset(nn.Module):
    """Mixed into `bhyt.BHyTApprox`.

    Attributes:
        variance_offset: [1] float32 buffer; NaN while it is not set.
        offset_is_set: whether a look at the buffer has found a number there.
        offset_given: whether a state dict or `set_variance_offset` has given an offset that bhyt.hf has not seen yet.
            bhyt.hf keeps offsets in step with weights.
    """

    variance_offset: Tensor
    offset_is_set: bool
    offset_given: bool

    def _register_offset(self, device: Union[torch.device, str, int, None]) -> None:
        self.register_buffer(_NAME, torch.full((1,), math.nan, device=device, dtype=torch.float32))
        self.offset_is_set = self.offset_given = False

    def has_variance_offset(self) -> bool:
        """Whether the offset has been set, wherever it came from: a state dict, a loader of buffers, an average.

        Each call reads the buffer (a synchronisation on a GPU) until the offset is set.

        Returns:
            True once the buffer holds a number.
        """
        if not self.offset_is_set and not self.variance_offset.is_meta:
            if self.variance_offset.dtype != torch.float32 or self.variance_offset.dim() != 1:
                self.variance_offset = self.variance_offset.float().reshape(1)  # a loader put it there
            self.offset_is_set = not bool(torch.isnan(self.variance_offset))
        return self.offset_is_set

    @torch.no_grad()
    def set_variance_offset(self, offset: Union[Tensor, float]) -> None:
        """Set v' - v, one non-negative number, stored as float32 on the site's device, without gradient.

        The number is written in place, so that captured CUDA graphs see it. Where the graph of a forward still holds
        the buffer, a new buffer takes its place: the backward then uses the offset of its forward.

        Args:
            offset: a number, or a tensor of one element.

        Raises:
            ValueError: several numbers, a negative one or NaN. On other devices than the CPU values are not looked at.
        """
        value = torch.as_tensor(offset).detach()
        if value.numel() != 1:
            raise ValueError(f"offset: expected one element, got shape {list(value.shape)}")
        if value.device.type == "cpu" and not value.item() >= 0:
            raise ValueError(f"offset: expected a number >= 0, got {value.item()}")
        if _is_held(self.variance_offset):
            with torch.inference_mode(False):  # a tensor that training may save
                self.variance_offset = torch.empty_like(self.variance_offset)
        self.variance_offset.copy_(value.reshape(1))
        self.offset_is_set = self.offset_given = not self.variance_offset.is_meta

    def _put_offset(self, buffer: Tensor) -> None:
        """Exchange the buffer for another one that is set."""
        self.variance_offset = buffer
        self.offset_is_set, self.offset_given = True, False

    def _unset_offset(self) -> None:
        nn.init.constant_(self.variance_offset, math.nan)
        self.offset_is_set = self.offset_given = False

    def _offset(self) -> Tensor:
        """The offset, if there is one."""
        if not self.offset_is_set:
            if _scripting():
                is_set = not bool(torch.isnan(self.variance_offset))
            else:
                is_set = self.has_variance_offset()
            if not is_set:
                raise RuntimeError(
                    "BHyTApprox: the variance offset has not been set; call update_variance_offset(gain, first) or"
                    " set_variance_offset(offset) after construction, or after loading weights that were saved without"
                )
        return self.variance_offset

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, empty = self.variance_offset, self._is_empty()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.variance_offset
        if empty and not self._is_empty():  # to_empty: memory, but no value yet
            self._unset_offset()
        elif not before.is_meta and after is not before:
            if after.dtype != torch.float32 or type(after) is type(before):
                self.variance_offset = before.to(after.device)  # the value stays through casts and to_empty
        return self

    def _is_empty(self) -> bool:
        return any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))

    def _load_from_state_dict(
        self, state_dict: Dict[str, Any], prefix: str, local_metadata: Dict[str, Any], strict: bool,
        missing_keys: List[str], unexpected_keys: List[str], error_msgs: List[str],
    ) -> None:  # fmt: skip
        key = prefix + _NAME
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        others = [name for name, tensor in (*self._parameters.items(), *self._buffers.items()) if tensor is not None]
        others.remove(_NAME)
        if key in state_dict:
            self.offset_is_set = False
            self.offset_given = self.has_variance_offset()
        elif all(prefix + name in state_dict for name in others):  # the whole site, saved without its offset
            self._unset_offset()
        if key in missing_keys:
            missing_keys.remove(key)


def _is_held(buffer: Tensor) -> bool:
    """Whether another holder than the module, such as the graph of a forward, has this very tensor."""
    return bool(buffer._use_count() > 1)  # type: ignore[attr-defined]
