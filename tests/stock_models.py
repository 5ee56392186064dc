"""Small random models of Transformers' own classes, with every odd option of their families switched on."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)


LAYERS, WINDOW, TRAINED = 4, 7, 32
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 26, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": TRAINED, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SHARED = {**SIZES, "num_key_value_heads": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}
SOME_SLIDE = {"use_sliding_window": True, "sliding_window": WINDOW}
GEMMA = {
    **SHARED, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": WINDOW, "final_logit_softcapping": 3.0,
    "attention_bias": True,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.2], "long_factor": [2.0, 4.0], "factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}  # fmt: skip
NEOX = {**SIZES, "hidden_size": 32}
GPT2 = {
    "vocab_size": 40, "n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS = {
    "llama": LlamaConfig(**SHARED, **BIASES, head_dim=6, pretraining_tp=2),
    "llama, tied": LlamaConfig(**SHARED, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHARED, sliding_window=WINDOW, head_dim=6),
    "mistral, no window": MistralConfig(**SHARED, sliding_window=None),
    "qwen2": Qwen2Config(**SHARED, **SOME_SLIDE, max_window_layers=2),
    "qwen3": Qwen3Config(**SHARED, **SOME_SLIDE, max_window_layers=1, head_dim=6, attention_bias=True),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(
        **GEMMA,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "phi3": Phi3Config(
        **{**SHARED, "hidden_size": 32},
        sliding_window=WINDOW,
        resid_pdrop=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "olmo2": Olmo2Config(**SHARED, attention_bias=True),
    "smollm3": SmolLM3Config(**SHARED, **BIASES, **SOME_SLIDE, no_rope_layer_interval=2),
    "granite": GraniteConfig(
        **SHARED, **BIASES, attention_multiplier=0.3, residual_multiplier=0.4, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "gpt_neox": GPTNeoXConfig(**NEOX, hidden_dropout=0.1),
    "gpt_neox, in sequence": GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "gpt2": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=26, reorder_and_upcast_attn=True),
    "gpt2, not tied": GPT2Config(**GPT2, scale_attn_weights=False, tie_word_embeddings=False),
}  # fmt: skip


def stock_model(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at zero, norms at one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
