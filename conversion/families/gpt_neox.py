"""GPT-NeoX and Pythia: LayerNorm, plain MLPs, biases, a rope that turns a part of each head, parallel residuals."""

from ..family import COMMON_FIELDS, QKV, Family, Fused, always, same


GPT_NEOX = Family(
    model_type="gpt_neox",
    prefix="gpt_neox.",
    fields={
        **COMMON_FIELDS,
        **same("intermediate_size", "hidden_act", "attention_dropout", "rope_parameters", "attention_bias"),
        "rms_norm_eps": "layer_norm_eps",
        "parallel_residual": "use_parallel_residual",
        "norm_type": always("layer_norm"),
        "mlp_bias": always(True),
        "gated_mlp": always(False),
    },
    modules={
        "gpt_neox.embed_in": "model.embed_tokens",
        "gpt_neox.final_layer_norm": "model.norm",
        "embed_out": "lm_head",
        "gpt_neox.layers.{layer}.input_layernorm": "model.layers.{layer}.input_layernorm",
        "gpt_neox.layers.{layer}.post_attention_layernorm": "{mlp_norm}",
        "gpt_neox.layers.{layer}.attention.query_key_value": Fused(QKV, by_head=True),
        "gpt_neox.layers.{layer}.attention.dense": "model.layers.{layer}.mixer.o_proj",
        "gpt_neox.layers.{layer}.mlp.dense_h_to_4h": "{mlp}.up_proj",
        "gpt_neox.layers.{layer}.mlp.dense_4h_to_h": "{mlp}.down_proj",
    },
    aliases={"lm_head": "embed_out"},  # as Transformers 5 calls it in memory, and not in files
    training={"hidden_dropout": "dropout of what layers add"},
    unused=("use_cache", "classifier_dropout", "is_decoder"),
    ignored=(
        "gpt_neox.layers.{layer}.attention.bias",
        "gpt_neox.layers.{layer}.attention.masked_bias",
        "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq",
    ),
)
