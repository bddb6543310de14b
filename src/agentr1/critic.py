"""The critic: what the policy's weights say a state is worth.

Layer 6. A trunk that turns tokens into hidden states and a value head that turns each of those
into a number. The trunk is the policy's frozen base under an adapter of its own, so that policy,
reference and critic share one set of weights; or the policy's own; or a copy. What the critic
trains hangs below the model that is trained, where DDP, DeepSpeed and the optimizer find it, and
is taken off wherever the policy alone is wanted. Knows tokens and weights, no rewards, no turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ADAPTER = "value_adapter"
"""Its name beside the policy's; no model has a layer of that name."""
HEAD = "value_head"
TRUNK = "value_trunk"
FILE = "critic.safetensors"


def check_kind(kind: str, adapter: Any, deepspeed: bool) -> None:
    """Refuse a critic that cannot be built, before any weight is loaded.

    Args:
        kind: "adapter", "shared" or "separate".
        adapter: peft's configuration of the policy, None for full fine-tuning.
        deepspeed: whether DeepSpeed will wrap the model.

    Raises:
        ValueError: with the reason and the way out.
    """
    lora = isinstance(adapter, LoraConfig) and not adapter.modules_to_save
    if kind == "adapter" and not lora:
        raise ValueError(
            "critic: adapter puts a second LoRA adapter beside the policy's, which must be LoRA "
            f"without modules_to_save, got {adapter}; set use_peft: true, or critic: shared"
        )
    if kind == "separate" and adapter is not None:
        raise ValueError(
            "critic: separate trains a whole second trunk, but the policy is an adapter on a "
            "frozen one; set critic: adapter, which shares it, or use_peft: false"
        )
    if kind == "separate" and deepspeed:
        raise ValueError(
            "critic: separate is a second model, but a DeepSpeed engine holds one; set critic: "
            "shared, or use_peft: true with critic: adapter"
        )


class Critic:
    """A value for every state that ends before a token.

    Contact with peft and transformers, pinned by `tests/test_critic.py`: `PeftModel.add_adapter`,
    `set_requires_grad` and `peft_config`; a tuner layer's `set_adapter`; the
    `_gradient_checkpointing_func` of a model's layers.

    Args:
        model: the policy, not yet wrapped; the critic is hung below it.
        kind: "adapter", "shared" or "separate", see `CreditConfig.critic` and `check_kind`.
        seed: of the value adapter's first weights; the same on every process.
    """

    def __init__(self, model: Any, kind: str, seed: int) -> None:
        self.kind = kind
        self._model = model
        self._policy: str | None = model.active_adapter if is_peft_model(model) else None
        inner = model.get_base_model() if self._policy else model
        self._backbone: nn.Module = inner.base_model
        self._trunk = self._backbone
        if kind == "separate":
            self._trunk = copy.deepcopy(self._backbone)
            model.add_module(TRUNK, self._trunk)
        width = inner.config.get_text_config().hidden_size
        place = {"device": next(model.parameters()).device, "dtype": _head_dtype(model)}
        used = [place["device"]] if place["device"].type == "cuda" else []
        # The run's own draws stay what they are without a critic.
        with torch.random.fork_rng(devices=used):
            torch.manual_seed(seed)
            if kind == "adapter":
                self._add_adapter()
            self._head = nn.Linear(width, 1, **place)
        # Zero: before it has learned, the critic has no opinion and the returns are as they come.
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        model.add_module(HEAD, self._head)

    def _add_adapter(self) -> None:
        config = copy.deepcopy(self._model.peft_config[self._policy])
        # The others change the base, which the policy's adapter has been fitted to.
        config.init_lora_weights = True
        self._model.add_adapter(ADAPTER, config, autocast_adapter_dtype=False)
        known = dict(self._model.named_parameters())
        for name, parameter in self.named_parameters().items():
            policys = known[name.replace(f".{ADAPTER}.", f".{self._policy}.")]
            parameter.data = parameter.data.to(policys.dtype)
        self.make_trainable()

    def make_trainable(self) -> None:
        """Undo what peft's switches do to the adapter they leave: freeze it."""
        if self.kind == "adapter":
            self._model.set_requires_grad([self._policy, ADAPTER])

    # Values -------------------------------------------------------------------------------------

    def values(self, ids: Tensor, mask: Tensor, places: int) -> Tensor:
        """One pass through the critic's trunk.

        Args:
            ids: (b, S), padded anywhere.
            mask: (b, S), 0 on padding.
            places: how many of the last states to value.

        Returns:
            (b, places); the last column is the state behind the last token.
        """
        with self._reading():
            output = self._trunk(input_ids=ids, attention_mask=mask, use_cache=False)
        return self.of_hidden(output.last_hidden_state[:, -places:])

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """(b, n, H) -> (b, n), in the head's precision whatever the trunk's is."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self._head(hidden.to(self._head.weight.dtype)).squeeze(-1).float()

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Collect the hidden states (b, S, H) of the policy's passes meanwhile.

        Hooks run in the order they came, so this one sees them before `MaskedHead` narrows them.
        """
        seen: list[Tensor] = []
        hook = self._backbone.register_forward_hook(
            lambda module, arguments, output: seen.append(output.last_hidden_state)
        )
        try:
            yield seen
        finally:
            hook.remove()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The trunk as the critic sees it, also where checkpointing computes a layer again."""
        if self.kind != "adapter":
            yield
            return
        layers: list[Any] = [
            m for m in self._trunk.modules() if hasattr(m, "_gradient_checkpointing_func")
        ]
        functions = [layer._gradient_checkpointing_func for layer in layers]
        for layer, function in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = self._recomputing(layer, function)
        try:
            with self._switched(self._trunk):
                yield
        finally:
            for layer, function in zip(layers, functions, strict=True):
                layer._gradient_checkpointing_func = function

    def _recomputing(self, layer: nn.Module, checkpoint: Any) -> Callable[..., Any]:
        """A layer's checkpointing under the value adapter.

        The backward pass runs a layer once more when the policy's adapter is long back in place.
        """

        def run(forward: Callable[..., Any], *arguments: Any) -> Any:
            def switched(*again: Any) -> Any:
                with self._switched(layer):
                    return forward(*again)

            return checkpoint(switched, *arguments)

        return run

    @contextmanager
    def _switched(self, part: nn.Module) -> Iterator[None]:
        tuned = [m for m in part.modules() if isinstance(m, BaseTunerLayer)]
        before = [list(m.active_adapters) for m in tuned]
        _activate(tuned, [[ADAPTER]] * len(tuned), [self._policy, ADAPTER])
        try:
            yield
        finally:
            _activate(tuned, before, [self._policy, ADAPTER])

    # Weights ------------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What the critic alone trains, by its name in the model."""
        return {name: p for name, p in self._model.named_parameters() if self.owns(name)}

    def owns(self, name: str) -> bool:
        """Whether a parameter of the model is the critic's alone."""
        parts = name.split(".")
        return parts[0] in (HEAD, TRUNK) or (self.kind == "adapter" and ADAPTER in parts)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """The model without its critic, for whoever reads or writes the policy."""
        taken: list[tuple[Any, str, Any]] = []
        for holder, name in self._places():
            taken.append((holder, name, holder.pop(name)))
        try:
            yield
        finally:
            for holder, name, value in taken:  # in the order in which they were hung up
                holder[name] = value

    def _places(self) -> list[tuple[Any, str]]:
        """Every mapping of the model that holds a part of the critic, and the part's name there."""
        modules = self._model._modules
        places: list[tuple[Any, str]] = [(modules, name) for name in (TRUNK, HEAD)]
        if self.kind == "adapter":
            places.append((self._model.peft_config, ADAPTER))
            tuned = [m for m in self._backbone.modules() if isinstance(m, BaseTunerLayer)]
            places += [(getattr(m, n), ADAPTER) for m in tuned for n in m.adapter_layer_names]
        return [(holder, name) for holder, name in places if name in holder]

    def save(self, folder: Path, write: bool) -> None:
        """Write the critic's weights; every process calls it, one with `write`."""
        parameters = self.named_parameters()
        with _gathered(list(parameters.values())):
            if write:
                folder.mkdir(parents=True, exist_ok=True)
                state = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
                save_file(state, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; not under ZeRO-3, whose engine restores every weight itself.

        Raises:
            FileNotFoundError, ValueError: no critic there, or one of another kind.
        """
        path = folder / FILE
        if not path.exists():
            raise FileNotFoundError(
                f"no {FILE} in {folder}: the checkpoint was made without a critic; start a run "
                "without --resume"
            )
        state, parameters = load_file(path), self.named_parameters()
        if state.keys() != parameters.keys():
            raise ValueError(
                f"{path} holds a critic with other weights than critic: {self.kind} has; resume "
                "with the settings the checkpoint was made with"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])


def _activate(
    layers: Sequence[BaseTunerLayer], adapters: Sequence[list[str]], trained: Sequence[Any]
) -> None:
    for layer, names in zip(layers, adapters, strict=True):
        layer.set_adapter(names)
        layer.set_requires_grad(list(trained))  # peft freezes whatever it switches off


def _head_dtype(model: Any) -> torch.dtype:
    """fp32, but ZeRO-3 gathers parameters of one type only."""
    split = any(hasattr(p, "ds_id") for p in model.parameters())  # an adapter's are not, yet
    trained = next(p for p in model.parameters() if p.requires_grad)
    return trained.dtype if split else torch.float32


def _gathered(parameters: Sequence[nn.Parameter]) -> Any:
    """Whole weights where ZeRO-3 has split them."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(list(parameters))
