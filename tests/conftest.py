import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_hope import HopeConfig, HopeForCausalLM


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "sliding_window": 6,
    "attention_sinks": 2,
    "layer_types": ["full_attention", "sliding_attention"],
    "cms_periods": [4, 8, None],
    "cms_learning_rates": [0.7, 0.4, 0.0],
    "initializer_range": 0.2,
}


MEMORY = {
    "layer_types": ["hope_memory"] * 2,
    "sliding_window": None,
    "num_memory_heads": 2,
    "memory_chunk_size": 3,
    "projection_chunk_size": 6,
}
FAMILIES = {"attention": {}, "memory": MEMORY, "hybrid": {**MEMORY, "layer_types": ["hope_memory", "full_attention"]}}
# Blocks as other families have them.
PLAIN = {"norm_type": "layer_norm", "gated_mlp": False, "mlp_bias": True, "attention_bias": True, "hidden_act": "gelu"}
BLOCKS = {
    "gemma": {
        "head_dim": 6,
        "norm_placement": "both",
        "norm_weight_offset": 1.0,
        "qk_norm": "head",
        "hidden_act": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": [5, None],
        "attention_sinks": 0,
        "layer_ropes": ["local", "global"],
        "local_rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "embedding_multiplier": 1.7,
        "attention_multiplier": 0.7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "olmo": {"norm_placement": "post", "qk_norm": "all"},
    "neox": {
        **PLAIN,
        "head_dim": 8,
        "parallel_residual": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "gpt2": {**PLAIN, "learned_positions": True, "max_position_embeddings": 128, "layer_ropes": [None, None]},
    "granite": {
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.3,
    },
    "smollm": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6, "layer_ropes": ["global", None]},
    "phi": {
        "head_dim": 8,
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": [3, 5],
        "attention_sinks": [2, 1],
        "attention_multiplier": [0.3, 0.5],
        "layer_ropes": ["local", "global"],
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [1.0, 1.5, 2.0],
            "attention_factor": 2.0,
            "partial_rotary_factor": 0.75,
        },
        "local_rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    },
}
_family = {}


@pytest.fixture(params=FAMILIES)
def family(request):
    """Runs a test for each kind of mixer: `tiny_config` builds what this says."""
    _family.update(FAMILIES[request.param])
    yield request.param
    _family.clear()


def tiny_config(**fields):
    return HopeConfig(**{**TINY, **_family, **fields})


def tiny_model(seed=0, dtype=torch.float64, **fields):
    """A small model with weights large enough for learning to show."""
    torch.manual_seed(seed)
    return HopeForCausalLM(tiny_config(**fields)).to(dtype).eval()


def stirred(model, seed=0):
    """Nothing is left at its initial value: norms, biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture
def model(family):
    """A small model of each kind; test files that need another have their own."""
    return tiny_model()


@torch.no_grad()
def read(model, memory, ids, **kwargs):
    return model(ids, past_key_values=memory, **kwargs).logits


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template=CHATML, words=TINY["vocab_size"]):
    """A token for each of `words` words, w9 and on, and those of a ChatML template; the last is what stop strings need."""
    named = ["<pad>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "\n", "system", "user", "assistant"]
    added = [
        {
            "id": index,
            "content": named[index],
            "special": index < 5,
            "normalized": False,
            **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
        }
        for index in range(6)
    ]
    names = [*named, *(f"w{index}" for index in range(9, words - 1)), "abcdef"]
    vocab = {word: index for index, word in enumerate(names)}
    raw = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def random_ids(*shape, seed=0, vocab_size=TINY["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_same_memory(memory, other, rtol=None, atol=None):
    """Same tensors, up to rounding (`atol` in parts of a tensor's largest entry above 1), and the same records."""
    ours, theirs = memory.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        near = atol
        if atol and tensor.is_floating_point() and tensor.numel():
            near = atol * max(float(tensor.abs().max()), 1.0)
        torch.testing.assert_close(
            ours[name], tensor, rtol=rtol, atol=near, msg=lambda text, name=name: f"{name}: {text}"
        )
    for row, other_row in zip(memory.rows, other.rows, strict=True):
        for field in ("pairs", "updates", "segments", "skipped", "nonfinite", "pending"):
            assert getattr(row, field) == getattr(other_row, field), field
        assert row.losses == pytest.approx(other_row.losses, rel=rtol, abs=atol)
