"""Blocks as other families have them: rounded as theirs, read to their last position, learned, kept and adapted."""

import copy

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    Gemma3TextScaledWordEmbedding,
)
from transformers.models.granite.modeling_granite import GraniteRMSNorm

from modeling_hope import HopeCache, HopeSession, consolidate
from modeling_hope.attention import HopeAttention
from modeling_hope.fast_weights import RowWeight, fast_linear
from modeling_hope.key_layout import Span
from modeling_hope.modeling_hope import HopeScaledEmbedding
from modeling_hope.norm import HopeRMSNorm
from modeling_hope.rotary import HopeRotaryEmbeddings

from .conftest import BLOCKS, assert_same_memory, chat_tokenizer, random_ids, stirred, tiny_config, tiny_model


EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
HALF = [torch.bfloat16, torch.float16, torch.float32]
POSITIONS = {**BLOCKS["gpt2"], "max_position_embeddings": 16}


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_norms_and_embeddings_round_as_gemma_and_granite_do(dtype):
    x, weight = 3 * noise(5, 64, dtype=dtype), noise(64, seed=1)
    for ours, theirs in (
        (HopeRMSNorm(64, 1e-6, 1.0), Gemma3RMSNorm(64, 1e-6)),
        (HopeRMSNorm(64, 1e-6), GraniteRMSNorm(64, 1e-6)),
    ):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        with torch.no_grad():
            ours.weight.copy_(weight), theirs.weight.copy_(weight)
        assert torch.equal(ours(x), theirs(x))
    ours, theirs = HopeScaledEmbedding(9, 64, None, 640**0.5), Gemma3TextScaledWordEmbedding(9, 64, None, 640**0.5)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.to(dtype)(torch.arange(9)), theirs.to(dtype)(torch.arange(9)))
    # Granite multiplies by a number, 12 in all its models, which every dtype has.
    granite = HopeScaledEmbedding(9, 64, None, 12.0).to(dtype)
    assert torch.equal(granite(torch.arange(9)), torch.nn.functional.embedding(torch.arange(9), granite.weight) * 12.0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("cap", [None, 0.5])
def test_attention_rounds_as_gemmas(dtype, cap):
    shapes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 100.0}
    theirs = Gemma3Attention(
        Gemma3TextConfig(
            **shapes,
            num_hidden_layers=1,
            layer_types=["full_attention"],
            query_pre_attn_scalar=3,
            attn_logit_softcapping=cap,
            rope_parameters={"full_attention": rope, "sliding_attention": rope},
            attn_implementation="eager",
        ),
        0,
    ).to(dtype)
    fields = {"head_dim": 8, "attention_multiplier": 3**-0.5, "qk_norm": "head", "norm_weight_offset": 1.0}
    model = tiny_model(dtype=dtype, **fields, rope_parameters=rope, attn_logit_softcapping=cap).model
    ours = model.layers[0].mixer
    assert isinstance(ours, HopeAttention)
    rotary = HopeRotaryEmbeddings(model.config)  # whose angles `.to()` has not rounded
    model.set_attn_implementation("eager")
    stirred(ours)
    theirs.load_state_dict(ours.state_dict())
    x, positions = noise(2, 9, 16, dtype=dtype), torch.arange(9)[None]
    span = Span([0], [9], 9, x.device)
    span.make_plan(ours.layout, rotary.of("global"), x, flex=False)
    rotation = Gemma3RotaryEmbedding(theirs.config)(x, positions, "full_attention")
    mask = torch.zeros(9, 9, dtype=dtype).masked_fill(~torch.ones(9, 9).tril().bool(), torch.finfo(dtype).min)
    with torch.no_grad():
        expected = theirs(x, rotation, mask[None, None], softcap=cap)[0]
        found = ours(x, None, span, rotary(x, positions), keep_state=False)[0]
    assert torch.equal(found, expected)


def refused(act, memory):
    before = memory.clone()
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        act()
    assert_same_memory(memory, before, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[10], [1] * 10, [4, 6], [7, 3]])
def test_nothing_is_read_past_the_last_position(pieces):
    model, memory, start = tiny_model(**POSITIONS), HopeCache(tiny_config(**POSITIONS), 2), 0
    ids = random_ids(2, 17)
    for piece in pieces:
        model(ids[:, start : start + piece], past_key_values=memory)
        start += piece
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    refused(lambda: model(ids[:, 10:], past_key_values=memory), memory)
    refused(lambda: model(ids[:, :9], attention_mask=mask, past_key_values=memory), memory)
    refused(lambda: model(ids[:, :9], attention_mask=mask, past_key_values=memory, learn="off"), memory)
    refused(lambda: model.model(ids[:, 10:], past_key_values=memory.clone()), memory)
    refused(lambda: model(inputs_embeds=noise(2, 7, 16, dtype=torch.float64), past_key_values=memory), memory)
    refused(lambda: model.generate(ids[:, :3], past_key_values=memory, max_new_tokens=5), memory)
    refused(lambda: model(ids, use_cache=False, learn="off"), memory)
    # Padding takes no positions: rows of 6 and 5 tokens among 9 columns.
    mask[1, [0, 2, 3]] = mask[0, 8] = 0
    padded = model(ids[:, :9], attention_mask=mask, past_key_values=memory.clone()).logits
    alone = memory.clone()
    alone.select([1])
    expected = model(ids[1:, :9][:, mask[1].bool()], past_key_values=alone).logits
    torch.testing.assert_close(padded[1:, mask[1].bool()], expected, **CLOSE)
    words = model.generate(ids[:, :3], past_key_values=memory, max_new_tokens=4, do_sample=False)
    assert words.shape == (2, 7) and memory.seen == [16, 16]
    refused(lambda: model.generate(past_key_values=memory, max_new_tokens=1), memory)


def test_a_session_keeps_what_it_read_before_the_last_position():
    session = HopeSession(tiny_model(**POSITIONS, eos_token_id=None, bos_token_id=None), chat_tokenizer())
    text = " ".join(f"w{9 + index}" for index in range(20))
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        session.read(text, chunk=5)
    assert session.tokens == 15
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        session.generate("w9", max_new_tokens=3)
    assert session.tokens == 15
    session.generate("w9", max_new_tokens=1)
    assert session.tokens == 16


@torch.no_grad()
@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS.keys())
def test_consolidated_levels_give_what_the_memory_gave(fields):
    model = stirred(tiny_model(**fields))
    memory = HopeCache(model.config)
    model(random_ids(1, 16), past_key_values=memory)
    emptied = memory.clone()
    emptied.reset(levels=[0, 1, 2])
    ids = random_ids(1, 7, seed=1)
    before = [model(ids, past_key_values=each.clone(), learn="off").logits for each in (memory, emptied)]
    after = consolidate(model, memory)(ids, past_key_values=emptied, learn="off").logits
    torch.testing.assert_close(after, before[0], **CLOSE)
    assert not torch.allclose(*before)


@torch.no_grad()
@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS.keys())
def test_adapters_learn_as_merged(fields):
    """Those of scaled embeddings are scaled as they are."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens"]
    targets += ["embed_positions"] * bool(fields.get("learned_positions"))
    lora = peft.get_peft_model(stirred(tiny_model(**fields)), peft.LoraConfig(r=2, target_modules=targets)).eval()
    for index, (name, parameter) in enumerate(lora.named_parameters()):
        if "lora" in name:
            parameter.copy_(0.2 * noise(*parameter.shape, seed=index))
    merged = copy.deepcopy(lora).merge_and_unload()
    memories = [HopeCache(merged.config) for _ in range(2)]
    for seed in range(2):
        ids = random_ids(1, 9, seed=seed)
        logits = [m(input_ids=ids, past_key_values=k).logits for m, k in zip((lora, merged), memories, strict=True)]
        torch.testing.assert_close(*logits, **CLOSE)
    assert_same_memory(*memories, **CLOSE)
    assert memories[0].rows[0].updates[0] > 0


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gated_mlp", {"gated_mlp": False}),
        ("sliding_window", {"sliding_window": [None, 6]}),
        ("attention_sinks", {"attention_sinks": [0, 1]}),
        ("layer_ropes", {"layer_ropes": ["global", None]}),
        ("local_rope_parameters", {"local_rope_parameters": {"rope_theta": 1e4}}),
        ("rope_parameters", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("learned_positions", {"learned_positions": True}),
    ],
)
def test_a_memory_of_another_kind_of_block_is_refused(tmp_path, name, other):
    model, stranger, ids = tiny_model(), tiny_model(**other), random_ids(1, 9)
    with torch.no_grad():
        memory = model(ids).past_key_values
    memory.save_pretrained(tmp_path, model=model)
    for use in (
        lambda: stranger(ids, past_key_values=memory),
        lambda: consolidate(stranger, memory),
        lambda: HopeCache.from_pretrained(tmp_path, model=stranger),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            use()


@torch.no_grad()
@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS.keys())
def test_generation_with_and_without_a_memory_agree_in_padded_batches_and_beams(fields):
    model, ids = stirred(tiny_model(**fields)), random_ids(2, 11)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :5] = 0
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0, "learn": "off"}
    for more in {"do_sample": False}, {"num_beams": 3}:
        said = [model.generate(ids, attention_mask=mask, use_cache=use, **options, **more) for use in (True, False)]
        alone = model.generate(ids[:1, 5:], **options, **more)
        assert torch.equal(*said) and torch.equal(said[0][0, 11:], alone[0, 6:])


@pytest.mark.parametrize("bias", [False, True])
def test_a_changed_map_gives_gradients_to_weight_and_change_alike(bias):
    """`(W + Delta) x` by one product, as the two are: outputs, gradients, and gradients of those."""

    class Changed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(3, 2, bias=bias, dtype=torch.float64)

        def forward(self, x, changes):
            return fast_linear(
                self.map, x, [RowWeight(changes[0], whole=False), None, RowWeight(changes[1], whole=False)]
            )

    module, generator = Changed(), torch.Generator().manual_seed(0)
    names, weights = zip(*module.named_parameters(), strict=True)
    x, changes = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((3, 4, 3), (2, 2, 3))
    )

    def one_product(x, changes, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, changes))

    def two_products(x, changes, weight, *bias):
        learned = torch.stack([changes[0], torch.zeros_like(weight), changes[1]])
        return torch.nn.functional.linear(x, weight, *bias) + x @ learned.mT

    given = (x, changes, *weights)
    torch.testing.assert_close(one_product(*given), two_products(*given))
    assert torch.autograd.gradcheck(one_product, given)
    assert torch.autograd.gradgradcheck(one_product, given)
    heard = []
    module.map.register_forward_hook(lambda *call: heard.append(call))
    torch.testing.assert_close(one_product(*given), two_products(*given))
    assert len(heard) == 3  # who listens to a map hears of all its calls
