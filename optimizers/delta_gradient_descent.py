"""Gradient descent whose weights forget along the inputs they are taught on (Eq. 57)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from .base import PLAIN, GroupOptimizer, State, at_least


GRAM = "input_gram"
SHORTEST = 1e-6


class DeltaGradientDescent(GroupOptimizer):
    """
    Delta Gradient Descent (Eq. 57), for the weights of a model's `nn.Linear` layers; SGD for all other parameters.

    ```
    W_{t+1} = W_t (I - lr x x^T) - lr grad_W L
    ```

    It solves `min_W 1/2 |W x - u|^2 + 1/(2 eta) |W - W_t|^2` with u = -dL/dy (Eq. 56): for |x| = lambda, by
    Sherman-Morrison, lr = eta / (1 + eta lambda^2), below 1 for the paper's lambda = 1. So `lr` is its eta'. As the paper
    assumes normalised inputs, `normalize` scales the x of the decay term, not the layer's own input, to norm 1.

    A weight taught by a dot product, L = -<W x, v>, comes to W x = v where gradient descent adds up forever: the delta
    rule. A loss with a minimum of its own is regularised: what W comes to minimises L + 1/2 |W x|^2.

    For many tokens the gradient of a mean loss is a mean over them, and so is the decay,

    ```
    W <- W (I - lr delta C) - lr grad          C = mean of x x^T     [in, in]
    ```

    over the positions, of whatever batch and sequence, of all calls of the layer since the last step or `zero_grad`
    (a layer called several times, layers that share a weight, gradient accumulation). With `normalize` C has a trace of
    1, and the decay never overshoots for lr delta <= 1. A bias takes no part: it steps as in SGD.

    Inputs are collected by hooks on the layers, at the moment a gradient reaches a call's output: a call under
    `no_grad` or without a backward pass counts nothing, recomputation (gradient checkpointing) not twice, and a
    position whose output gets no gradient, such as padding, or whose input is not finite, has no part in it. With
    several processes (DDP) C is that of all of them. `remove_hooks` takes the hooks away; only sums were ever kept.

    Args:
        params: parameters, or groups of them.
        model: whose `nn.Linear` layers are listened to: those whose weight is among the parameters.
        lr: eta'.
        weight_decay, maximize, foreach: as in `GroupOptimizer`. With maximize=True the decay remains a decay.
        delta: strength of the delta term, 0 or more; 1 in the paper, 0 for SGD.
        normalize: whether inputs count as unit vectors.
        process_group: the processes that train the model together; `None` for all there are.

    State of a layer's weight: `input_gram` `[in + 1, in + 1]`, float32 or better: the sum over positions of the outer
    product of (x, 1), so that its last entry counts them. It goes when it is used.

    Raises:
        ValueError: the model has no layer whose weight is among the parameters; a weight is sharded (DTensor).
        RuntimeError: from `step`, before anything changed: a layer's weight has a gradient, but the layer was not
            called, as where its weight is used directly. Such a weight belongs in a group with delta=0.
    """

    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        lr: float | torch.Tensor = 1e-3,
        delta: float = 1.0,
        normalize: bool = True,
        weight_decay: float = 0.0,
        process_group: Any = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        self.process_group = process_group
        self.handles: list[RemovableHandle] = []
        self.layers: dict[torch.Tensor, tuple[str, int]] = {}  # its name, and the group of its weight
        self.model = weakref.ref(model)
        defaults = {
            "lr": lr,
            "delta": delta,
            "normalize": normalize,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)
        if not self.layers:
            raise ValueError("`model` has no nn.Linear layer whose weight is among `params`.")

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        at_least(options, 0.0, "delta")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        added, model = set(group["params"]), self.model()
        for name, module in model.named_modules() if model is not None else ():
            if isinstance(module, nn.Linear) and module.weight in added:
                if type(module.weight) not in PLAIN:
                    raise ValueError(f"`{name}.weight` is sharded, and its decay needs all of it: use DDP, or M3.")
                self.layers.setdefault(module.weight, (name, len(self.param_groups) - 1))
                self._listen(module)

    def _listen(self, layer: nn.Linear) -> None:
        # A function and a weak reference: a copy of the model must not copy, nor feed, the optimizer.
        found = weakref.ref(self)

        def heard(
            module: nn.Linear, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
        ) -> None:
            optimizer = found()
            if optimizer is not None and module.weight in optimizer.layers and output.requires_grad:
                weight, x = module.weight, (args[0] if args else kwargs["input"]).detach()
                output.register_hook(lambda gradient: optimizer.count(weight, x, gradient))

        self.handles.append(layer.register_forward_hook(heard, with_kwargs=True))

    def remove_hooks(self) -> None:
        """Stop listening: for when training is over, or before the model is pickled. Later steps are refused."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @torch.no_grad()
    def count(self, weight: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a call's inputs `[..., in]`, of which the gradient `[..., out]` has reached the output."""
        group = self.param_groups[self.layers[weight][1]]
        if not group["delta"]:
            return
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(0, -2) if x.dim() > 1 else x[None]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if group["normalize"]:
                x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=SHORTEST)
            taught = gradient.reshape(len(x), -1).ne(0).any(-1) & x.isfinite().all(-1)
            x = torch.where(taught[:, None], F.pad(x, (0, 1), value=1.0), 0.0)
            gram, state = x.mT @ x, self.state[weight]
            state[GRAM] = state[GRAM] + gram if GRAM in state else gram

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the inputs that came with them."""
        super().zero_grad(set_to_none)
        for weight in self.layers:
            self.state.pop(weight, None)

    def before(self, stepping: list[list[torch.Tensor]]) -> None:
        if self._together():
            return  # every process has to meet the others in the sum
        for group, params in zip(self.param_groups, stepping, strict=True):
            for param in params:
                if group["delta"] and param in self.layers and GRAM not in self.state.get(param, {}):
                    name = self.layers[param][0]
                    raise RuntimeError(
                        f"`{name}.weight` has a gradient, but no call of `{name}` was heard since the last step: where a "
                        "weight is used without its layer, put it in a param group with delta=0."
                    )

    def _together(self) -> bool:
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def directions(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[State],
        at_once: bool,
    ) -> list[torch.Tensor]:
        if not group["delta"]:
            return gradients
        return [
            gradient.add(decay(param, self._gram(param, state)), alpha=group["delta"])
            if param in self.layers
            else gradient
            for param, gradient, state in zip(params, gradients, states, strict=True)
        ]

    def _gram(self, weight: torch.Tensor, state: State) -> torch.Tensor:
        gram = state.pop(GRAM, None)
        if self._together():
            size = weight.shape[1] + 1
            if gram is None:
                gram = weight.new_zeros(size, size, dtype=torch.promote_types(weight.dtype, torch.float32))
            distributed.all_reduce(gram, group=self.process_group)
        return gram


def decay(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """W C, `[out, in]`, of the sum over positions."""
    mean = gram[:-1, :-1] / gram[-1, -1].clamp(min=1.0)
    return (weight.to(mean.dtype) @ mean).to(weight.dtype)
