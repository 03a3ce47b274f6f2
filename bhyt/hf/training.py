"""Training with `transformers.Trainer`: the callback that keeps the offsets in step with the weights."""

from typing import Any

from torch import nn

from bhyt.hf.conversion import converted_layers, refresh
from bhyt.hf.projections import active_site


def refresh_callback(every: int = 10) -> Any:
    """Make a `transformers.TrainerCallback` that refreshes the offsets while a model trains.

    It refreshes before the first optimizer step, every `every` steps, before each evaluation, and after the last step,
    when `Trainer` may have loaded the best weights. A resumed run goes on with the offsets that were saved, as if it
    had not stopped.

    Args:
        every: optimizer steps between refreshes.

    Returns:
        The callback, for `Trainer(callbacks=[..])`.

    Raises:
        ValueError: every is below 1.
    """
    from transformers import TrainerCallback  # imports the trainer: seconds

    if every < 1:
        raise ValueError(f"every: expected an integer >= 1, got {every}")

    class RefreshCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            layers = [layer for layer in converted_layers(model) if layer.approximate]
            sites = [active_site(layer.post_attention_layernorm) for layer in layers]
            if state.global_step == 0 or not all(site.has_variance_offset() for site in sites):
                refresh(model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if state.global_step % every == 0 or control.should_evaluate:
                refresh(model)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if control.should_evaluate:  # a compiled model does not look at its weights, as an eager one does
                refresh(model)

        def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            refresh(model)

    return RefreshCallback()
