"""torchtitan's decoders with BHyT sites; the package needs `torchtitan`.

    torchrun .. -m torchtitan.train --module bhyt.torchtitan --config llama3_8b     # any config of Llama 3 and Qwen3

    def my_config():                                                                # or in a module of one's own
        return bhyt.torchtitan.convert(llama3_8b(), exact_layers=1)

Nothing of torchtitan is patched: blocks and norms are exchanged in the model's config, the hook behind the optimizer's
construction refreshes offsets and keeps weight decay from gains and lam, the state-dict adapter knows lam and offsets.
"""

from bhyt.torchtitan.checkpoints import hf_config
from bhyt.torchtitan.conversion import convert
from bhyt.torchtitan.training import refresh

__all__ = ["convert", "hf_config", "refresh"]
