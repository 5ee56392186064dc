"""Slow weights that are more than a parameter: adapters beside them, or few bits each. What is learned adds to both."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_hope import HopeCache, HopeForSequenceClassification

from .conftest import MEMORY, assert_same_memory, random_ids, tiny_config, tiny_model


EXACT = {"rtol": 1e-9, "atol": 1e-11}
WIDE = {"hidden_size": 64, "intermediate_size": 64, "adaptive_projections": ["k", "v"]}
ATTENTION, LEVELS, MEMORIES = (
    ["k_proj", "v_proj"],
    ["up_proj", "down_proj"],
    ["z_proj", "q_proj", "gate_proj", "o_proj"],
)


def adapted(model, **fields):
    """A model with LoRA on all its maps, its B not zero."""
    peft = pytest.importorskip("peft")
    fields = {"r": 2, "lora_alpha": 4, "target_modules": [*ATTENTION, *LEVELS, *MEMORIES], **fields}
    lora = peft.get_peft_model(model, peft.LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return lora


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("training", ["static", "first_order"])
def test_training_changes_the_adapters_only(training):
    model = tiny_model(cms_training=training)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    lora, ids = adapted(model).train(), random_ids(2, 11)
    adapters = {name: tensor for name, tensor in lora.named_parameters() if tensor.requires_grad}
    start = {name: tensor.detach().clone() for name, tensor in adapters.items()}
    assert all("lora" in name for name in adapters)
    lora(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(adapters.values(), lr=0.5).step()
    for name, tensor in adapters.items():
        assert not torch.equal(tensor, start[name]), name
    for name, tensor in lora.base_model.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("optimizer", ["sgd", "dgd"])
def test_learning_over_adapters_is_learning_of_the_merged_model(tmp_path, optimizer):
    peft = pytest.importorskip("peft")
    fields = {"cms_optimizer": optimizer, "mlp_bias": True, "cms_learning_rates": 0.3}
    lora = adapted(tiny_model(**fields)).eval()
    merged = copy.deepcopy(lora).merge_and_unload()
    memories = [HopeCache(merged.config, 2) for _ in range(2)]
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.no_grad():
        for step in range(3):
            ids = random_ids(2, 9, seed=step)
            logits = [
                model(input_ids=ids, attention_mask=mask, past_key_values=memory).logits
                for model, memory in zip((lora, merged), memories, strict=True)
            ]
            torch.testing.assert_close(*logits, **EXACT)
        assert_same_memory(*memories, **EXACT)
        assert any(".change." in name for name in memories[0].tensors())
        ours, theirs = memories[0].clone(), memories[1].clone()
        options = {"max_new_tokens": 5, "learn": "all"}
        said = lora.generate(input_ids=ids[:, :3], past_key_values=ours, **options)
        assert torch.equal(said, merged.generate(input_ids=ids[:, :3], past_key_values=theirs, **options))
        assert_same_memory(ours, theirs, **EXACT)

    # A memory belongs to the weights it was learned over, adapters included.
    memory = memories[0]
    memory.save_pretrained(tmp_path / "memory")
    lora.save_pretrained(tmp_path / "adapter")
    base = tiny_model(**fields)
    for other in (base, merged):
        with pytest.raises(ValueError, match="adapters count"):
            HopeCache.from_pretrained(tmp_path / "memory", model=other)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_memory(HopeCache.from_pretrained(tmp_path / "memory", model=again), memory, rtol=0, atol=0)
    memory.save_pretrained(tmp_path / "of merged", model=merged)
    loaded = HopeCache.from_pretrained(tmp_path / "of merged", model=merged)
    assert_same_memory(loaded, memory, rtol=0, atol=0)


def test_sums_of_weights_and_changes_end_when_an_adapter_is_there():
    model = tiny_model()
    memory, ids = HopeCache(model.config), random_ids(1, 5, seed=2)
    with torch.no_grad():
        model(random_ids(1, 8), past_key_values=memory)
        model(ids, past_key_values=memory.clone(), learn="off")  # makes the sums
        lora = adapted(model, target_modules=["down_proj"])
        expected = lora(ids, past_key_values=memory.clone(), learn="off").logits
        merged = lora.merge_and_unload()
        found = merged(ids, past_key_values=memory.clone(), learn="off").logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_what_adapters_can_be_put_on(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(**MEMORY, adaptive_projections=["k", "v"])
    lora, ids = adapted(model, target_modules="all-linear"), random_ids(2, 11)
    assert not any(part in name for name, _ in lora.named_parameters() for part in ("eta_proj.lora", "lm_head.lora"))
    lora(input_ids=ids, labels=ids).loss.backward()
    # The scalars' maps are more than a product: an adapter beside them could not be merged.
    with pytest.raises(ValueError, match="StaticScalars"):
        adapted(tiny_model(**MEMORY, adaptive_projections=["k", "v"]), target_modules=["eta_proj"])
    head = HopeForSequenceClassification(tiny_config(pad_token_id=0, num_labels=3))
    lora = adapted(head, task_type="SEQ_CLS")
    lora(input_ids=ids.clamp(min=1), labels=torch.tensor([0, 2])).loss.backward()
    trained = {name.split(".")[-2] for name, tensor in lora.named_parameters() if tensor.grad is not None}
    assert trained == {"default"}
    assert lora.base_model.model.score.modules_to_save["default"].weight.grad is not None
    prefix = peft.get_peft_model(tiny_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="needs a HopeCache"):  # its prefix is a cache of keys and values
        prefix(input_ids=ids)
    # By Transformers' own hand, without PEFT's model around it.
    model = tiny_model(dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=LEVELS, init_lora_weights=False))
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    other = tiny_model(dtype=torch.float32)
    other.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, expected)


def quantized(tmp_path, config, **fields):
    """A model in float32, saved in `model`, loaded with its maps in few bits."""
    tiny_model(dtype=torch.float32, **WIDE, **fields).save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, dtype=torch.float32)


def assert_only_maps_of_the_layers_are_quantized(model, kind):
    found = {name for name, module in model.named_modules() if type(getattr(module, "weight", None)).__name__ == kind}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == linear - {"lm_head"} and found


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("optimizer", ["sgd", "dgd"])
def test_torchao_weights_learn_as_the_numbers_they_stand_for(tmp_path, optimizer):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = quantized(tmp_path, config, cms_optimizer=optimizer)
    assert_only_maps_of_the_layers_are_quantized(model, "Int8Tensor")
    twin = tiny_model(dtype=torch.float32, cms_optimizer=optimizer, **WIDE)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            plain = tensor if type(tensor) is torch.Tensor else tensor.dequantize()
            twin.get_parameter(name).copy_(plain)
        memories = [HopeCache(model.config, 2) for _ in range(2)]
        for step in range(3):
            ids = random_ids(2, 9, seed=step)
            logits = [
                each(ids, past_key_values=memory).logits for each, memory in zip((model, twin), memories, strict=True)
            ]
            torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
        assert_same_memory(*memories, rtol=1e-3, atol=1e-3)
        changes = [tensor for name, tensor in memories[0].tensors().items() if ".change." in name]
        assert changes and all(change.dtype == torch.float32 for change in changes)
        assert model.generate(ids[:, :4], past_key_values=memories[0], max_new_tokens=5, learn="all").shape == (2, 9)
    memories[0].save_pretrained(tmp_path / "memory")
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    loaded = HopeCache.from_pretrained(tmp_path / "memory", model=again)
    assert_same_memory(loaded, memories[0], rtol=0, atol=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="other weights"):
        HopeCache.from_pretrained(tmp_path / "memory", model=plain)


@pytest.mark.usefixtures("family")
def test_bitsandbytes_in_8_bits_learns(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = quantized(tmp_path, BitsAndBytesConfig(load_in_8bit=True))
    assert_only_maps_of_the_layers_are_quantized(model, "Int8Params")
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), random_ids(2, 21)
    with torch.no_grad():
        ours, theirs = model(ids, learn="all"), plain(ids, learn="all")
        frozen = plain(ids, learn="off").logits
        again = model(ids[:, :9], learn="all").past_key_values
        parts = model(ids[:, 9:], past_key_values=again, learn="all").logits
    # It computes in 8 bits as well: near the plain model, and what is learned is near what that learns.
    size = theirs.logits.norm()
    assert (ours.logits - theirs.logits).norm() < 0.3 * size < (frozen - theirs.logits).norm()
    torch.testing.assert_close(parts, ours.logits[:, 9:], rtol=0.1, atol=0.2)
    changes = [
        torch.cat([tensor.flatten() for name, tensor in output.past_key_values.tensors().items() if ".change." in name])
        for output in (ours, theirs)
    ]
    assert torch.cosine_similarity(*changes, 0) > 0.9
    ours.past_key_values.save_pretrained(tmp_path / "memory")
    HopeCache.from_pretrained(tmp_path / "memory", model=model)


def test_bitsandbytes_in_4_bits_reads_and_says_where_it_cannot_learn(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, ids = quantized(tmp_path, config), random_ids(2, 9)
    assert_only_maps_of_the_layers_are_quantized(model, "Params4bit")
    with torch.no_grad():
        memory = model(ids, learn="off").past_key_values
        assert model(ids, past_key_values=memory, learn="off").logits.isfinite().all()
        memory.save_pretrained(tmp_path / "memory")
        HopeCache.from_pretrained(tmp_path / "memory", model=quantized(tmp_path, config))
        before = memory.clone()
        if bitsandbytes.functional.has_avx512bf16():
            with pytest.raises(ValueError, match="4-bit"):
                model(ids, past_key_values=memory)
            assert_same_memory(memory, before, rtol=0, atol=0)
        else:
            model(ids, past_key_values=memory)


@pytest.mark.parametrize("bits", ["torchao", "bitsandbytes"])
def test_adapters_over_few_bits_are_trained_and_learned_over(tmp_path, bits):
    package = pytest.importorskip("torchao.quantization" if bits == "torchao" else bits)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if bits == "torchao":
        config = TorchAoConfig(package.Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    fields = {"cms_optimizer": "dgd", "cms_training": "first_order", "mlp_bias": True, "cms_learning_rates": 0.1}
    lora, ids = adapted(quantized(tmp_path, config, **fields, **MEMORY)).train(), random_ids(2, 9)
    lora(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in lora.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in lora.named_parameters() if "lora" in name}
    with torch.no_grad():
        memory = lora.eval()(input_ids=ids).past_key_values
    assert [row["levels"][0]["updates"] for row in memory.summary()["rows"]] == [2, 2]
    memory.save_pretrained(tmp_path / "memory")
    assert HopeCache.from_pretrained(tmp_path / "memory", model=lora).seen == [9, 9]
