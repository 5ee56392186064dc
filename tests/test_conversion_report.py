"""What a conversion reports: figures of a comparison, every tensor's fate, bytes of a memory; and its bar."""

import gc
import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from modeling_hope import HopeCache
from modeling_hope.conversion import ConversionReport, compare, convert
from modeling_hope.conversion.progress import tracked
from modeling_hope.conversion.report import REPORT_FILE, fast_weight_bytes

from .conftest import chat_tokenizer, random_ids, read, tiny_model


def llama(**fields):
    torch.manual_seed(0)
    options = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**options, **fields})).eval()


def pair(**fields):
    source = llama(**fields)
    return source, convert(source, periods=(4, 8), check=False)


def calls(model):
    """What a model is given, call by call."""
    given = []
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    return given


def test_figures_of_logits_that_were_scaled():
    source, hope = pair()
    same = compare(lambda: source, lambda: hope)
    assert same.relative <= 1e-5 and 0 <= same.kl <= 1e-9 and same.probe == "random ids"
    assert same.greedy_tokens == same.greedy_agreement == 64
    given = calls(source)
    with torch.no_grad():
        hope.lm_head.weight *= 1.25
    found = compare(lambda: source, lambda: hope)
    ids, mask = given[0]["input_ids"], given[0]["attention_mask"].bool()
    # Each row alone and unpadded: its logits count, and no others.
    with torch.no_grad():
        logits = torch.cat([source(row[real][None]).logits[0].double() for row, real in zip(ids, mask, strict=True)])
    expected = logits.log_softmax(-1), (1.25 * logits).log_softmax(-1)
    assert ids.shape == (2, 128) and mask.sum(1).tolist() == [128, 85] and mask[1, -1] and not mask[1, 0]
    assert found.probe_tokens == len(logits) == 213
    assert found.max_difference == pytest.approx(0.25 * float(logits.abs().max()), rel=1e-4)
    assert found.range == pytest.approx(float(logits.max() - logits.min()), rel=1e-4)
    assert found.relative == pytest.approx(found.max_difference / found.range)
    kl = float((expected[0].exp() * (expected[0] - expected[1])).sum(-1).mean())
    assert kl > 0.01 and found.kl == pytest.approx(kl, rel=1e-4)
    assert found.greedy_agreement == 64  # scaling moves no maximum
    with torch.no_grad():
        source.lm_head.weight.zero_()
    flat = compare(lambda: source, lambda: hope, tokens=1)
    assert flat.range == 0 and flat.relative == flat.max_difference > 0


def test_greedy_agreement_counts_to_the_first_token_that_differs():
    source, hope = pair()
    for parts_at in (0, 5, 63, 64):
        steps = []

        def other_token(module, args, output, steps=steps, parts_at=parts_at):
            steps.append(1)  # the first call is the probe's
            if len(steps) - 2 == parts_at:
                output.logits[1] *= -1
            return output

        hook = hope.register_forward_hook(other_token)
        found = compare(lambda: source, lambda: hope)
        hook.remove()
        assert found.greedy_agreement == parts_at and found.relative <= 1e-5


def test_a_model_s_own_generation_config_changes_nothing_and_nothing_is_printed(tmp_path, capfd):
    source, hope = pair(eos_token_id=list(range(3, 30)), pad_token_id=5)
    for model in (source, hope):
        model.save_pretrained(tmp_path / model.config.model_type)
    capfd.readouterr()
    plain = compare(lambda: source, lambda: hope)
    loaded = (partial(type(model).from_pretrained, tmp_path / model.config.model_type) for model in (source, hope))
    assert compare(*loaded) == plain
    for model in (source, hope):
        model.generation_config.update(
            temperature=0.3, top_p=0.5, top_k=3, do_sample=True, repetition_penalty=3.0, forced_bos_token_id=2,
            eos_token_id=list(range(3, 30)), num_beams=2, max_length=9, return_dict_in_generate=True,
        )  # fmt: skip
    kept = [model.generation_config.to_dict() for model in (source, hope)]
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    try:
        assert compare(lambda: source, lambda: hope) == plain and plain.greedy_agreement == 64
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() == bars
    finally:
        logging.set_verbosity_warning()
    assert kept == [model.generation_config.to_dict() for model in (source, hope)]
    assert capfd.readouterr() == ("", "")


def test_never_both_models_in_memory():
    made = []

    def source():
        made.append(weakref.ref(model := llama()))
        model.itself = [model]  # a cycle, as hooks make them
        return model

    def hope():
        assert made[0]() is None
        return pair()[1]

    gc.disable()
    try:
        assert compare(source, hope, tokens=2).greedy_agreement == 2
    finally:
        gc.enable()


def test_no_more_tokens_than_a_limit():
    source, hope = pair()
    given = calls(source)
    for limit, width, greedy in [(1, 1, 0), (2, 1, 1), (9, 5, 4), (40, 16, 24), (100, 36, 64), (500, 128, 64)]:
        given.clear()
        found = compare(lambda: source, lambda: hope, limit=limit)
        assert given[0]["input_ids"].shape[1] == width and found.greedy_tokens == found.greedy_agreement == greedy
        assert width + greedy <= limit
    assert compare(lambda: source, lambda: hope, tokens=3).greedy_tokens == 3
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        compare(lambda: source, lambda: hope, limit=0)
    with pytest.raises(ValueError, match="`tokens` must be 0 or more"):
        compare(lambda: source, lambda: hope, tokens=-1)


def test_learned_positions_count_a_row_s_own_tokens():
    torch.manual_seed(0)
    source = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=48, initializer_range=0.5)
    ).eval()
    given = calls(source)
    hope = pair()[1]
    compare(lambda: source, lambda: hope, limit=48)
    ids, mask, positions = (given[0][name] for name in ("input_ids", "attention_mask", "position_ids"))
    padding = int((1 - mask[1]).sum())
    assert padding and positions[1, padding:].tolist() == list(range(ids.shape[1] - padding))
    with torch.no_grad():
        padded = source(ids, attention_mask=mask, position_ids=positions).logits[1, padding:]
        torch.testing.assert_close(padded, source(ids[1:, padding:]).logits[0])


class Bytes:
    """A tokenizer of bytes, from `first`."""

    unk_token_id = None

    def __init__(self, first=0):
        self.first = first

    def __call__(self, text, **kwargs):
        return type("Encoding", (), {"input_ids": [self.first + byte for byte in text.encode()]})


def test_the_probe_is_text_that_the_tokenizer_knows():
    source, hope = pair(vocab_size=256)
    given = calls(source)
    assert compare(lambda: source, lambda: hope, Bytes()).probe == "text"
    assert bytes(given[0]["input_ids"][0].tolist()).startswith(b"The lighthouse keeper")
    unknown = compare(lambda: source, lambda: hope, chat_tokenizer())
    assert unknown.probe == "random ids" and unknown == compare(lambda: source, lambda: hope)
    with pytest.raises(ValueError, match=r"tokenizer has the id \d+, and the source has embeddings for 256"):
        compare(lambda: source, lambda: hope, Bytes(first=200))


def test_random_ids_are_no_special_ones():
    source, hope = pair(bos_token_id=1, eos_token_id=list(range(2, 36)), pad_token_id=0)
    source.generation_config.eos_token_id = 37
    given = calls(source)
    compare(lambda: source, lambda: hope, tokens=0)
    assert set(given[0]["input_ids"][0].tolist()) == {36, 38, 39}


def test_damaged_weights_are_named():
    source, hope = pair()
    broken = pair()
    for model in broken:
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
    for models, name in [((broken[0], hope), "LlamaForCausalLM"), ((source, broken[1]), "HopeForCausalLM")]:
        with pytest.raises(ValueError, match=f"{name} gives logits that are not finite"):
            compare(lambda models=models: models[0], lambda models=models: models[1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cms_fast_weights": "down_proj"},
        {"cms_optimizer": "momentum"},
        {"cms_variant": "nested"},
        {"cms_variant": "independent", "intermediate_size": [8, 12, 20]},
        {"cms_periods": [4, 8, 16], "cms_levels_per_layer": [[0, 2], [1]]},
        {"cms_learning_rates": [0.0, 0.4, 0.1], "cms_periods": [4, 8, 16]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_of_a_memory_are_those_of_a_cache(fields, dtype):
    model = tiny_model(dtype=dtype, **{"cms_learning_rates": 0.1, "layer_types": None, **fields})
    told = fast_weight_bytes(model)
    memory = HopeCache(model.config)

    def held(*kinds):
        tensors = memory.tensors()
        levels = {name: tensor for name, tensor in tensors.items() if ".levels." in name}
        kept = {n: t for n, t in levels.items() if n.split(".")[-2] in kinds} if kinds else levels
        others = memory.nbytes() - sum(t.nbytes for n, t in tensors.items() if n not in levels) if not kinds else 0
        return sum(t.nbytes for t in kept.values()), others

    slowest = model.config.cms_periods[model.config.learning_levels[-1]]
    read(model, memory, random_ids(1, slowest))
    if model.config.cms_variant != "nested":
        assert held()[0] == told["saved"]
    # One segment, and with it what waits; one token more, and with it every sum is made.
    read(model, memory, random_ids(1, 5))
    assert held("change", "initial", "momentum")[0] == told["saved"]
    assert held()[1] == told["in_use"]
    assert [level["level"] for level in told["levels"]] == model.config.learning_levels
    for kind in ("saved", "in_use"):
        assert told[kind] == sum(level[kind] for level in told["levels"]) > 0
    with torch.device("meta"):
        abstract = type(model)(model.config)
    assert fast_weight_bytes(abstract, dtype) == told


def report(**fields):
    return ConversionReport("a/model", "llama", "split", **fields)


def test_table_says_layers_that_are_alike_once():
    fates = {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        **{f"model.layers.{i}.self_attn.q_proj.weight": f"model.layers.{i}.mixer.q_proj.weight" for i in range(12)},
        **{f"model.layers.{i}.mlp.up.weight": f"model.layers.{i}.cms.levels.{i % 2}.up.weight" for i in range(12)},
        **{f"model.layers.{i}.norm": f"model.layers.{i}.cms.norms.0" for i in (0, 1, 2, 7, 9, 10)},
        **{
            f"model.layers.{i}.qkv.weight": ", ".join(f"model.layers.{i}.mixer.{n}_proj.weight" for n in "qkv")
            for i in range(12)
        },
        **{f"model.layers.{i}.inv_freq": "not needed: computed, not stored" for i in range(12)},
        **{f"transformer.h.{i}.ln_1.weight": f"model.layers.{i}.input_layernorm.weight" for i in range(12)},
        "model.layers.3.odd": "model.layers.3.even",
        "model.layers.4.swapped": "model.layers.5.swapped",
        "model.layers.5.swapped": "model.layers.4.swapped",
    }
    origins = {f"model.layers.{i}.cms.levels.0.down_proj.weight": "new: zero" for i in range(12)}
    origins["model.embed_tokens.weight"] = "model.embed_tokens.weight"
    table = report(fates=fates, origins=origins, notes=["resid_pdrop 0.1: not carried over, " * 5]).table()
    lines = table.splitlines()
    squeezed = [" ".join(line.split()) for line in lines]
    blocks = [
        ["model.embed_tokens.weight -> model.embed_tokens.weight"],
        [
            "model.layers.{0-11} -> model.layers.{} x12",
            ".self_attn.q_proj.weight -> .mixer.q_proj.weight",
            ".qkv.weight -> .mixer.{q,k,v}_proj.weight",
        ],
        ["model.layers.{0,2,4,6,8,10} -> model.layers.{} x6", ".mlp.up.weight -> .cms.levels.0.up.weight"],
        ["model.layers.{1,3,5,7,9,11} -> model.layers.{} x6", ".mlp.up.weight -> .cms.levels.1.up.weight"],
        ["model.layers.{0-2,7,9-10} -> model.layers.{} x6", ".norm -> .cms.norms.0"],
        ["transformer.h.{0-11} -> model.layers.{} x12", ".ln_1.weight -> .input_layernorm.weight"],
        ["model.layers.3 -> model.layers.3", ".odd -> .even"],
        ["model.layers.4", ".swapped -> model.layers.5.swapped"],
        ["model.layers.5", ".swapped -> model.layers.4.swapped"],
        ["model.layers.{0-11} x12", ".inv_freq not needed: computed, not stored"],
        [".cms.levels.0.down_proj.weight new: zero"],
    ]
    for block in blocks:
        start = squeezed.index(block[0])
        assert squeezed[start : start + len(block)] == block
    assert max(map(len, lines)) <= 100
    assert "tensors 58 mapped, 12 not needed, 12 new, none left over" in squeezed
    assert "logits not compared" in squeezed and "greedy" not in table


def test_a_real_report_in_lines_and_in_a_file(tmp_path):
    source = llama()
    made = convert(source, tmp_path / "out", strategy="stack", periods=(4, 8)).conversion_report
    assert made.fates.keys() == source.state_dict().keys()
    assert {origin for origin in made.origins.values() if origin not in made.fates} == {
        "new: zero, so that the level is a no-op",
        "new: initialised",
    }
    assert set(made.fates.values()) <= made.origins.keys()
    for path in (tmp_path / "out", tmp_path / "out" / REPORT_FILE, str(tmp_path / "out")):
        loaded = ConversionReport.load(path)
        assert loaded == made and loaded.table() == made.table()
    assert loaded.comparison.greedy_agreement == 64 and loaded.memory_bytes["levels"][1]["period"] == 8
    lines = [" ".join(line.split()) for line in made.table().splitlines()]
    assert {"greedy 64 of 64 tokens the same", "strategy stack"} < set(lines)
    assert "level 0 each 4 tokens: 2.2 KiB saved, up to 4.5 KiB in use" in lines
    assert made.table().startswith(made.summary())
    made.comparison, made.notes = None, ["ä: ö"]
    made.save(tmp_path)
    assert ConversionReport.load(tmp_path) == made
    for text in ("{", "[]", "{}", json.dumps({**json.loads((tmp_path / REPORT_FILE).read_text()), "other": 1})):
        (tmp_path / REPORT_FILE).write_text(text)
        with pytest.raises(ValueError, match="is no conversion report"):
            ConversionReport.load(tmp_path)
    with pytest.raises(OSError):
        ConversionReport.load(Path(tmp_path / "nothing"))


def test_a_bar_follows_a_stream_of_tensors(monkeypatch, capsys):
    tensors = [("a.weight", torch.zeros(1024)), ("b.weight", torch.zeros(3, 1024, dtype=torch.bfloat16))]
    shown = {True: lambda: True, False: lambda: False}
    for terminal, wanted in [(False, True), (True, False), (True, True)]:
        monkeypatch.setattr("sys.stderr.isatty", shown[terminal], raising=False)
        if not wanted:
            logging.disable_progress_bar()
        try:
            assert list(tracked(iter(tensors), 10 * 1024, "Converting")) == tensors
        finally:
            logging.enable_progress_bar()
        text = capsys.readouterr().err
        assert all(part in text for part in ("Converting", "10.0k/10.0k")) if terminal and wanted else text == ""
    stream = tracked(iter(tensors), 10 * 1024, "Converting")
    assert next(stream)[0] == "a.weight"
    stream.close()
