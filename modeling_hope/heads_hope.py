"""
Hope with heads for sequences, tokens and spans, in place of the language-modelling one.

They have no next-token loss: they read with what a memory has learned, and learn nothing at test time. Each makes its
`HopeModel` itself: the generic classes ask the Auto classes for it, which remote code is not registered with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .modeling_hope import HopeModel, HopePreTrainedModel


F = TypeVar("F", bound=Callable[..., Any])


def remembers_last(forward: F) -> F:
    """Change the caller's memory when nothing can fail any more: the head and the loss come after the reading."""
    parameters = signature(forward)

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs)
        memory = given.arguments.get("past_key_values")
        if not isinstance(memory, HopeCache):
            return forward(*args, **kwargs)
        work = given.arguments["past_key_values"] = memory.clone()
        output = forward(*given.args, **given.kwargs)
        memory.assign(work)
        if isinstance(output, tuple):
            return tuple(memory if part is work else part for part in output)
        output.past_key_values = memory
        return output

    return wrapped  # type: ignore[return-value]


class HopeForSequenceClassification(GenericForSequenceClassification, HopePreTrainedModel):
    """Hope with a linear map from the last token of each row to `config.num_labels`."""

    def __init__(self, config: HopeConfig):
        HopePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HopeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @remembers_last
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """
        As Transformers' other classifiers, except that the mask says which token is the last: a pad token may be one of
        the text, and `inputs_embeds` have none. Without a mask it is the last one that is not `config.pad_token_id`.

        Args:
            labels: `[batch]` int64 for classes, `[batch]` or `[batch, num_labels]` of floats for regression,
                `[batch, num_labels]` of floats for several labels at once; `config.problem_type` says which.

        Returns:
            `loss`, `logits` `[batch, num_labels]`, and the memory. For the other arguments see `HopeModel.forward`.

        Raises:
            ValueError: a row has no token, or where its last one is cannot be told.
        """
        if attention_mask is None:
            return super().forward(
                input_ids, None, position_ids, past_key_values, inputs_embeds, labels, use_cache, **kwargs
            )
        inputs = input_ids if input_ids is not None else inputs_embeds
        # A mask may be over history and new tokens.
        real = attention_mask[:, -inputs.shape[1] :].bool() if inputs is not None else attention_mask.bool()
        if not bool(real.any(1).all()):
            raise ValueError(
                f"`attention_mask` row {int(real.any(1).int().argmin())} is all padding: there is no token to classify."
            )
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        columns = torch.arange(real.shape[1], device=real.device)
        last = (columns * real).argmax(1)
        rows = torch.arange(len(last), device=last.device)
        logits = self.score(outputs.last_hidden_state[rows, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HopeForTokenClassification(GenericForTokenClassification, HopePreTrainedModel):
    """Hope with a linear map from every token to `config.num_labels`."""

    def __init__(self, config: HopeConfig):
        HopePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HopeModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    forward = remembers_last(GenericForTokenClassification.forward)


class HopeForQuestionAnswering(GenericForQuestionAnswering, HopePreTrainedModel):
    """Hope with a linear map from every token to two scores: that the answer starts there, and that it ends there."""

    def __init__(self, config: HopeConfig):
        HopePreTrainedModel.__init__(self, config)
        self.model = HopeModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    forward = remembers_last(GenericForQuestionAnswering.forward)


__all__ = ["HopeForQuestionAnswering", "HopeForSequenceClassification", "HopeForTokenClassification"]
