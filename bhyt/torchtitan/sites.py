"""Sites as torchtitan's modules: built from a config, each with the one forward that its place in a block needs.

torchtitan shards a module's inputs by the names of its forward's arguments, all of which it takes for given.
"""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

import bhyt.parallel  # noqa: F401  (the rules by which DTensors go through the ops)
from bhyt.modules import BHyT, BHyTApprox


@dataclass(kw_only=True, slots=True)
class SiteConfig(Module.Config):
    """What a site is built from. `sharding_config` is what torchtitan sets for the norm in its place."""

    hidden_size: int
    lam: float
    kappa: float
    eps: float
    gain: float

    @property
    def gain_counts(self) -> bool:
        """Whether c has the mean square of the gain in it, as `use_gamma_var` says in a config of `bhyt.hf`."""
        return self.gain != 1

    def build(self, **kwargs: Any) -> Any:
        """Construct the site, its rows and states sharded as the norm's."""
        site = Module.Config.build(self, **kwargs)
        site._sharding_config = self._sharding(site)
        return site

    def _sharding(self, site: Any) -> Optional[ShardingConfig]:
        """Parameters and the offset lie as the norm's gain does, all rows as the norm's."""
        norm = self.sharding_config
        if norm is None:
            return None
        states = [name for name, _ in (*site.named_parameters(), *site.named_buffers())]
        rows = norm.in_src_shardings["input"]
        return ShardingConfig(
            state_shardings=dict.fromkeys(states, norm.state_shardings["weight"]),
            in_src_shardings=dict.fromkeys(site._cache_pos_arg_names(), rows),
            out_src_shardings=(rows, rows),
        )


class _Site(Module):
    """In front of a site's class: construction from a config, and gains that start at `config.gain`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_size, lam=config.lam, kappa=config.kappa, eps=config.eps)
        self._initial_gain, self.gain_counts = config.gain, config.gain_counts

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, self._initial_gain)


class FirstSite(_Site, BHyT):
    """A block's first site."""

    @dataclass(kw_only=True, slots=True)
    class Config(SiteConfig):
        """The fields of `SiteConfig`."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """(y, variance)"""
        return BHyT.forward(self, x, return_variance=True)


class ExactSecondSite(_Site, BHyT):
    """A block's second site, with a reduction of its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(SiteConfig):
        """The fields of `SiteConfig`."""

    def forward(self, x: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        """(y, sum)"""
        return BHyT.forward(self, x, residual)


class SecondSite(_Site, BHyTApprox):
    """A block's second site."""

    @dataclass(kw_only=True, slots=True)
    class Config(SiteConfig):
        """The fields of `SiteConfig`."""

    def forward(self, x: Tensor, variance: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        """(y, sum)"""
        return BHyTApprox.forward(self, x, variance, residual)

    @torch.no_grad()
    def put_offset(self, offset: Tensor) -> None:
        """Write the offset into the buffer, which a CUDA graph may read; between steps, when no backward is pending."""
        buffer: Any = self.variance_offset
        local = buffer.to_local() if hasattr(buffer, "to_local") else buffer
        local.copy_(offset.reshape(1))
        self.offset_is_set = True
