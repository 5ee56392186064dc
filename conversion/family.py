"""A family of Transformers, described: which of its config's fields and which of its modules are Hope's, by what name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Derived:
    """A HopeConfig field that is computed from fields of the source's config: which, and how."""

    uses: tuple[str, ...]
    compute: Callable[[Any], Any]


def always(value: Any) -> Derived:
    """A HopeConfig field that is the same for the whole family, and that the source's config does not name."""
    return Derived((), lambda config: value)


@dataclass(frozen=True)
class Fused:
    """
    A source module that holds several of Hope's, stacked along their outputs, or one that is transposed.

    Attributes:
        modules: Hope's, in order.
        by_head: the outputs of one head lie together, and the modules alternate inside it.
        transposed: the weight is `[in_features, out_features]`, as in Transformers' `Conv1D`.
    """

    modules: tuple[str, ...]
    by_head: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Only:
    """Values of a source's config field with which it can become a Hope model, and what others would need."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Family:
    """
    One `model_type`, in the words of its own config and state dict.

    A source's module is given without `.weight` and `.bias`: both go where Hope has them. In names `{layer}` is a layer's
    number. In Hope's, `{mlp}` stands for a layer's MLP and `{mlp_norm}` and `{mlp_output_norm}` for the norms before and
    after it, which a strategy places among the levels.

    Attributes:
        model_type: of the source's config.
        prefix: of the decoder's modules, which checkpoints of the bare decoder lack.
        fields: HopeConfig field to the source's field that is the same, or to how it is computed.
        modules: source module to Hope's.
        windows: for each layer, the sliding window of its attention; `None` for all.
        only: fields of the source's config that Hope serves with some values only.
        training: fields that act in training alone, and are not carried over: what each is.
        unused: fields that change nothing in a converted model.
        aliases: source modules that some checkpoints, or models in memory, name otherwise: that name to the one here.
        ignored: source tensors that some checkpoints carry and Hope computes by itself.
    """

    model_type: str
    prefix: str
    fields: Mapping[str, str | Derived]
    modules: Mapping[str, str | Fused]
    windows: Callable[[Any], list[int | None]] = lambda config: [None] * config.num_hidden_layers
    only: Mapping[str, Only] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def config_fields(self, config: Any) -> dict[str, Any]:
        """The HopeConfig fields that a source's config decides."""
        return {
            name: field.compute(config) if isinstance(field, Derived) else getattr(config, field)
            for name, field in self.fields.items()
        }

    def check(self, config: Any) -> None:
        """Raise `ValueError` when a config of this family needs what Hope does not carry."""
        for name, only in self.only.items():
            value = getattr(config, name, None)
            if value not in only.values:
                allowed = " or ".join(repr(v) for v in only.values)
                raise ValueError(
                    f"`source` has {name}={value!r} in its config, {only.reason}. Hope serves {self.model_type} models "
                    f"with {allowed}."
                )

        for name in self.fields_unknown(config):
            raise ValueError(
                f"`source` has {name}={getattr(config, name)!r} in its config, a field that conversion/families does not speak of "
                f"for {self.model_type} models: what it changes is not known here. Take it out if it changes nothing."
            )

    def fields_unknown(self, config: Any) -> list[str]:
        """Fields of the family's own config that this description does not speak of, and that are not at their defaults."""
        spoken_of = {of_all.name for of_all in dataclasses.fields(PreTrainedConfig)} | self.fields_known()
        names = [own.name for own in dataclasses.fields(config) if own.name not in spoken_of]
        defaults = type(config)()
        return [name for name in names if getattr(config, name) != getattr(defaults, name)]

    def notes(self, config: Any) -> list[str]:
        """What of the source's config is not carried over."""
        return [
            f"{name} {value}: {what} (in training alone)"
            for name, what in self.training.items()
            if (value := getattr(config, name, None))
        ]

    def canonical(self, name: str) -> str:
        """A source tensor's name as `modules` has it, the decoder's prefix aside."""
        module, _, kind = name.rpartition(".")
        return f"{self.aliases.get(module, module)}.{kind}"

    def ignores(self, name: str) -> bool:
        """Whether Hope computes a source tensor by itself."""
        patterns = (re.escape(pattern).replace(r"\{layer\}", r"\d+") for pattern in self.ignored)
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    def fields_known(self) -> set[str]:
        """The fields of the source's config that this description speaks of."""
        used = {
            name for field in self.fields.values() for name in (field.uses if isinstance(field, Derived) else (field,))
        }
        return {*used, *self.only, *self.training, *self.unused}


def same(*names: str) -> dict[str, str]:
    """HopeConfig fields that have the same name in the source's config."""
    return {name: name for name in names}


def without(described: Mapping[str, Any], *endings: str) -> dict[str, Any]:
    """Fields or modules of another family, but for those whose names end so."""
    return {name: target for name, target in described.items() if not name.endswith(endings)}


# What nearly every family's config has, by Hope's (which are Llama's) names.
COMMON_FIELDS: dict[str, str | Derived] = {
    **same(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "initializer_range",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ),
    # The first Llamas have -1, for none.
    "pad_token_id": Derived(
        ("pad_token_id",), lambda config: None if (config.pad_token_id or 0) < 0 else config.pad_token_id
    ),
    "head_dim": Derived(
        ("hidden_size", "num_attention_heads", "head_dim"),
        lambda config: getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    ),
}


def rope_of_whole_heads(rope: dict[str, Any]) -> dict[str, Any]:
    """
    The `rope_parameters` of a class that turns whole heads. Its default angles take no notice of a `partial_rotary_factor`.

    Raises:
        ValueError: others do, and the class fails on them.
    """
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    if kind == "default":
        return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    if kind != "proportional" and part not in (None, 1):
        raise ValueError(
            f"`source` has partial_rotary_factor={part!r} with rope_type {kind!r} in its config, and Transformers' own class "
            "turns whole heads: take it out."
        )
    return rope


LLAMA_FIELDS: dict[str, str | Derived] = {
    **COMMON_FIELDS,
    **same("intermediate_size", "num_key_value_heads", "hidden_act", "rms_norm_eps", "attention_dropout"),
    "rope_parameters": Derived(("rope_parameters",), lambda config: rope_of_whole_heads(config.rope_parameters)),
}

LLAMA_MODULES: dict[str, str | Fused] = {
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
    "model.layers.{layer}.input_layernorm": "model.layers.{layer}.input_layernorm",
    "model.layers.{layer}.post_attention_layernorm": "{mlp_norm}",
    "model.layers.{layer}.self_attn.q_proj": "model.layers.{layer}.mixer.q_proj",
    "model.layers.{layer}.self_attn.k_proj": "model.layers.{layer}.mixer.k_proj",
    "model.layers.{layer}.self_attn.v_proj": "model.layers.{layer}.mixer.v_proj",
    "model.layers.{layer}.self_attn.o_proj": "model.layers.{layer}.mixer.o_proj",
    "model.layers.{layer}.mlp.gate_proj": "{mlp}.gate_proj",
    "model.layers.{layer}.mlp.up_proj": "{mlp}.up_proj",
    "model.layers.{layer}.mlp.down_proj": "{mlp}.down_proj",
}

# What families fuse to one module.
QKV = tuple(f"model.layers.{{layer}}.mixer.{name}_proj" for name in "qkv")

QK_NORM_MODULES: dict[str, str | Fused] = {
    "model.layers.{layer}.self_attn.q_norm": "model.layers.{layer}.mixer.q_norm",
    "model.layers.{layer}.self_attn.k_norm": "model.layers.{layer}.mixer.k_norm",
}

ROTARY_BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def windows_by_layer_type(config: Any) -> list[int | None]:
    """Of a config with `layer_types` and one `sliding_window`."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def windows_everywhere(config: Any) -> list[int | None]:
    """Of a config whose `sliding_window` is that of all layers."""
    return [config.sliding_window] * config.num_hidden_layers
