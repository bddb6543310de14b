"""The update without waste: similar lengths together, and no projection outside the loss mask.

Layer 6. Two savings over TRL's path at the same loss and gradients. Rows of one accumulation window
are put into micro-batches by length (`microbatches.py`). And the head of a language model, its
largest matrix, is kept from what is never trained on: TRL's fused head skips what is labelled -100,
but labels observations like actions, and skips only on devices with Triton; here the hidden states
are narrowed between backbone and head, so that every device saves. Knows no turns and no rewards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer

from agentr1.microbatches import regrouped


class FrugalUpdate(GRPOTrainer):
    """GRPOTrainer whose update computes only what the loss needs, once it is told the loss mask.

    Contact with TRL 1.16, pinned by `tests/test_trl_contract.py`:

    - `_prepare_inputs`: `super()` around, replaces the micro-batches in `_buffered_inputs`; reads
      `_step`.
    - `_compute_loss`: `super()` around, reads the mask from its inputs.
    - `_get_per_token_logps_and_entropies`: `super()` around, with a stand-in for the model.

    Attributes:
        frugal: whether to save at all; as it comes this is `GRPOTrainer`, to the last bit.
        loss_mask: `(B, T)` of the rows that are being scored, None for "project everything".
    """

    frugal = False
    loss_mask: Tensor | None = None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.frugal or self._buffered_inputs is before:
            return inputs
        batches: Any = self._buffered_inputs
        window = regrouping_window(self.args) if not self.aux_loss_enabled else 1
        self._buffered_inputs = regrouped(batches, window)
        return self._buffered_inputs[self._step % len(batches)]

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self.frugal:
            self.loss_mask = inputs["completion_mask"] * inputs["tool_mask"]  # (B, T)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.loss_mask = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.frugal and self.loss_mask is not None:
            inner: Any = self.accelerator.unwrap_model(model)
            inner = inner.get_base_model() if is_peft_model(inner) else inner
            # TRL may have padded completions to a multiple since the mask was made.
            missing = logits_to_keep - self.loss_mask.shape[1]
            mask = torch.nn.functional.pad(self.loss_mask, (0, missing))  # (B, T)
            model = MaskedHead(model, inner.base_model, mask)
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )


def regrouping_window(config: Any) -> int:
    """How many consecutive micro-batches may exchange rows without changing the gradient.

    One where a micro-batch has a statistic of its own: the normaliser of bnpo and of the entropy
    bonus, the quantile of high-entropy tokens; and where the batches of one generation do not end
    together with an accumulation window.
    """
    alone = (
        config.loss_type == "bnpo"
        or config.top_entropy_quantile < 1
        or config.entropy_coef != 0
        or config.use_adaptive_entropy
    )
    steps, window = config.steps_per_generation, config.gradient_accumulation_steps
    if alone or max(steps, window) % min(steps, window):
        return 1
    return min(steps, window)


class MaskedHead:
    """Stands for a model in one call of TRL's log-probability pass.

    Args:
        model: as TRL would call it, wrapped by DDP or DeepSpeed or not.
        backbone: what its language-model head is fed from (`PreTrainedModel.base_model`).
        loss_mask: `(B, T)`, 1 where a log-probability is wanted, over the last T columns.
    """

    def __init__(self, model: Any, backbone: torch.nn.Module, loss_mask: torch.Tensor) -> None:
        self._model = model
        self._backbone = backbone
        self._loss_mask = loss_mask
        self._row = 0

    def __call__(self, *, labels: torch.Tensor, **inputs: Any) -> Any:
        """Run the next `len(labels)` rows; zeros stand where the mask is 0.

        Args:
            labels: `(b, S)`.
            **inputs: of a model with TRL's fused head.

        Returns:
            TRL's output with `log_probs` and `entropy` of shape `(b, S - 1)`.
        """
        mask = self._loss_mask[self._row : self._row + len(labels)].bool()
        self._row += len(labels)
        places = torch.zeros_like(labels[:, 1:], dtype=torch.bool)  # (b, S - 1)
        places[:, -mask.shape[1] :] = mask
        shown = places.clone()
        shown[0, 0] |= not bool(places.any())  # the loss needs a path to the weights
        with _narrowed(self._backbone, shown):
            output = self._model(shift_labels=labels[:, 1:][shown][None], **inputs)
        for name in ("log_probs", "entropy"):
            values = getattr(output, name)  # (1, N) or None
            if values is not None:
                spread = values.new_zeros(shown.shape).masked_scatter(shown, values[0])
                setattr(output, name, spread.masked_fill(~places, 0))
        return output


@contextmanager
def _narrowed(backbone: torch.nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Let the backbone hand on the hidden states of `places` `(b, S - 1)` alone, as `(1, N, H)`."""

    def narrow(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, :-1][places][None]
        return output

    hook = backbone.register_forward_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
