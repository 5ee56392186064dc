"""torch.compile and torch.export: a call without a memory, in which nothing is learned, is one graph."""

import io
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from modeling_hope import HopeCache

from .conftest import BLOCKS, MEMORY, assert_same_memory, random_ids, stirred, tiny_model


STATIC = {"use_cache": False, "learn": "off"}
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor builds C++ on a CPU")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Tracing takes a while for every operation: one layer of each kind, two chunks and two blocks of queries in 12 tokens.
SMALL = {"num_hidden_layers": 1, "memory_chunk_size": 8, "cms_periods": [4, None], "cms_learning_rates": [0.7, 0.0]}
ATTENTION = {**SMALL, "layer_types": ["sliding_attention"], "sliding_window": 8, "attention_sinks": 1}
MEMORY = {**SMALL, **MEMORY, "layer_types": ["hope_memory"], "memory_chunk_size": 8, "projection_chunk_size": 8}
FEW_STEPS = [ATTENTION, pytest.param({**MEMORY, "memory_chunk_size": 4}, marks=pytest.mark.slow)]
HYBRID = {**MEMORY, "layer_types": ["hope_memory", "full_attention"], "num_hidden_layers": 2}


@pytest.fixture(params=[ATTENTION, MEMORY, HYBRID], ids=["attention", "memory", "hybrid"])
def fields(request):
    return request.param


def padded(rows=2, width=12):
    mask = torch.ones(rows, width, dtype=torch.int64)
    mask[0, [0, 3]] = 0
    return mask


def graph_of(model, **options):
    """The compiled model, and the counter of its graphs; any graph break raises."""
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


def test_one_graph_gives_the_same_outputs_loss_and_gradients(fields):
    eager, model = (tiny_model(**fields).train() for _ in range(2))
    compiled, counter = graph_of(model)
    ids = random_ids(2, 12)
    expected, output = (m(ids, attention_mask=padded(), labels=ids, use_cache=False) for m in (eager, compiled))
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-9, atol=1e-9)
    expected.loss.backward()
    output.loss.backward()
    for (name, parameter), other in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-8, atol=1e-9, msg=name)
    assert counter.frame_count == 1
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids, **STATIC).logits, eager(ids, **STATIC).logits)
    assert counter.frame_count == 2


@pytest.mark.parametrize("fields", [{"memory_read": "chunk"}, {"memory_depth": 1, "memory_momentum": False}])
def test_every_kind_of_memory_is_one_graph(fields):
    model, ids = tiny_model(**MEMORY, **fields), random_ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(graph_of(model)[0](ids, **STATIC).logits, model(ids, **STATIC).logits)


@pytest.mark.parametrize("name", ["gemma", "neox", "phi"])
def test_blocks_of_other_families_are_one_graph_and_export(name):
    model, ids = stirred(tiny_model(**BLOCKS[name], cms_periods=[None], cms_learning_rates=0.1)), random_ids(2, 12)
    with torch.no_grad():
        expected = model(ids, **STATIC).logits
        torch.testing.assert_close(graph_of(model)[0](ids, **STATIC).logits, expected)
        program = torch.export.export(model, (ids,), STATIC)
        torch.testing.assert_close(program.module()(ids, **STATIC).logits, expected)


def test_no_graph_reads_past_the_last_position():
    model = tiny_model(**{**SMALL, "layer_types": ["full_attention"]}, sliding_window=None, learned_positions=True,
                       max_position_embeddings=16)  # fmt: skip
    compiled, _ = graph_of(model)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(random_ids(1, 16), **STATIC).logits, model(random_ids(1, 16), **STATIC).logits
        )
        with pytest.raises(torch._dynamo.exc.Unsupported, match="max_position_embeddings=16"):
            compiled(random_ids(1, 17), **STATIC)
        shapes = {"input_ids": {1: torch.export.Dim.DYNAMIC}, **dict.fromkeys(STATIC)}
        program = torch.export.export(model, (), {"input_ids": random_ids(1, 12), **STATIC}, dynamic_shapes=shapes)
        for width in 7, 16:
            ids = random_ids(1, width)
            torch.testing.assert_close(program.module()(input_ids=ids, **STATIC).logits, model(ids, **STATIC).logits)
        with pytest.raises(AssertionError, match="16"):
            program.module()(input_ids=random_ids(1, 17), **STATIC)


def test_all_that_can_be_asked_of_a_call_is_in_the_graph():
    model, ids = tiny_model(**ATTENTION), random_ids(2, 12)
    model.set_attn_implementation("eager")
    asked = {**STATIC, "output_hidden_states": True, "output_attentions": True, "attention_mask": padded()}
    with torch.no_grad():
        expected, output = model.model(ids, **asked), graph_of(model.model)[0](ids, **asked)
        torch.testing.assert_close(tuple(output.hidden_states), tuple(expected.hidden_states))
        torch.testing.assert_close(tuple(output.attentions), tuple(expected.attentions))
        embeds = model.get_input_embeddings()(ids)
        last = graph_of(model)[0](inputs_embeds=embeds, logits_to_keep=1, return_dict=False, **STATIC)[0]
        torch.testing.assert_close(last, model(ids, **STATIC).logits[:, -1:])


@pytest.mark.parametrize(
    ("fields", "lengths", "graphs"),
    [
        ({"layer_types": ["full_attention"], "sliding_window": None}, (5, 9, 30, 31), 1),
        # One graph for each number of blocks of queries, which see the sinks at different places.
        ({"layer_types": ["sliding_attention"], "sliding_window": 16}, (10, 13, 22, 23), 2),
        # One for each number of chunks; one more where the last is whole.
        pytest.param(MEMORY, (5, 7, 8), 2, marks=pytest.mark.slow),
    ],
    ids=["full", "sliding", "memory"],
)
def test_a_dynamic_length_is_not_compiled_for_every_length(fields, lengths, graphs):
    model = tiny_model(**{**SMALL, **fields})
    compiled, counter = graph_of(model, dynamic=True)
    with torch.no_grad():
        for length in lengths:
            ids, mask = random_ids(2, length), padded(2, length)
            outputs = [m(ids, attention_mask=mask, **STATIC).logits for m in (compiled, model)]
            torch.testing.assert_close(*outputs)
    assert counter.frame_count <= graphs


def test_what_cannot_be_in_a_graph_is_refused_or_runs_beside_it(fields):
    model, other = tiny_model(**fields), tiny_model(**fields)
    ids = random_ids(1, 9)
    for options in {"learn": "off"}, {"use_cache": False, "learn": "all"}:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="use_cache=False and learn='off'"):
            graph_of(model)[0](ids, **options)
        with pytest.raises(ValueError, match="use_cache=False and learn='off'"):
            torch.export.export(model, (ids,), options)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="position_ids"):
        graph_of(model)[0](ids, position_ids=torch.arange(9)[None], **STATIC)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.forward = torch.compile(model.forward, backend=counter)
    memory, expected = HopeCache(model.config), HopeCache(model.config)
    for seed in range(2):
        words, others = (
            m.generate(random_ids(1, 6, seed=seed), past_key_values=k, max_new_tokens=5, do_sample=False)
            for m, k in ((model, memory), (other, expected))
        )
        assert torch.equal(words, others)
    assert_same_memory(memory, expected, rtol=0, atol=0)
    assert counter.frame_count == 0
    with pytest.raises(ValueError, match="vocab_size"), torch.no_grad():
        model(ids + 40, past_key_values=memory)


@pytest.mark.parametrize("fields", FEW_STEPS, ids=["attention", "memory"])
def test_layers_compiled_one_by_one_read_on_with_a_memory(fields):
    """Over many steps the number of graphs is bounded: what counts tokens becomes symbolic."""
    model, other = tiny_model(**fields), tiny_model(**fields)
    counter = CompileCounterWithBackend("eager")
    for layer in model.model.layers:
        layer.compile(backend=counter)
    memory, expected = HopeCache(model.config), HopeCache(model.config)
    ids, graphs = random_ids(1, 30), []
    with torch.no_grad():
        for step in range(24):
            part = ids[:, step : step + 1]
            outputs = [m(part, past_key_values=k, learn="off").logits for m, k in ((model, memory), (other, expected))]
            torch.testing.assert_close(*outputs)
            graphs.append(counter.frame_count)
    assert 0 < graphs[-1] <= 7 and graphs[-1] == graphs[13]
    assert_same_memory(memory, expected)


@pytest.mark.parametrize(
    "fields",
    [ATTENTION, MEMORY, pytest.param(HYBRID, marks=pytest.mark.slow)],
    ids=["attention", "memory", "hybrid"],
)
def test_export_save_and_load(fields):
    model = tiny_model(**fields)
    rows = {0: torch.export.Dim.DYNAMIC}
    inputs = {"input_ids": random_ids(2, 12), "attention_mask": padded(), **STATIC}
    with torch.no_grad():
        shapes = {"input_ids": rows, "attention_mask": rows, **dict.fromkeys(STATIC)}
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for batch in (2, 3):
            inputs |= {"input_ids": random_ids(batch, 12, seed=batch), "attention_mask": padded(batch)}
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
        # One length serves all shorter ones: nothing real sees what is padded.
        ids, mask = inputs["input_ids"], torch.ones(3, 12, dtype=torch.int64)
        mask[:, 7:] = 0
        logits = loaded(**{**inputs, "attention_mask": mask}).logits
        torch.testing.assert_close(logits[:, :7], model(ids[:, :7], **STATIC).logits)
        assert not logits[:, 7:].any()


def test_export_with_any_length_where_there_is_no_window():
    model = tiny_model(**{**SMALL, "layer_types": ["full_attention"], "sliding_window": None})
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"input_ids": random_ids(2, 12), "attention_mask": padded(), **STATIC},
            dynamic_shapes={"input_ids": any_size, "attention_mask": any_size, **dict.fromkeys(STATIC)},
        )
        for batch, width in ((2, 12), (3, 7), (1, 31)):
            inputs = {"input_ids": random_ids(batch, width), "attention_mask": padded(batch, width), **STATIC}
            torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


def test_an_export_with_a_static_cache_is_refused():
    """Transformers' own exporter reads on with a cache of its own, which holds keys and values alone."""
    model = tiny_model(dtype=torch.float32, **{**SMALL, "layer_types": ["full_attention"], "sliding_window": None})
    with pytest.raises(AssertionError, match="static"):
        TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)
    model.generation_config.cache_implementation = "static"
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)
    with pytest.raises(Exception, match="use_cache=False"):
        exportable.export(input_ids=random_ids(1, 1), cache_position=torch.tensor([0]))


def test_trainer_compiles(tmp_path):
    model = tiny_model(dtype=torch.float32, **ATTENTION)
    data = [{"input_ids": row, "labels": row} for row in random_ids(4, 12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, torch_compile=True, torch_compile_backend="eager",
    )  # fmt: skip
    before = model.model.layers[0].mixer.q_proj.weight.clone()
    trainer = Trainer(model, arguments, train_dataset=data)
    assert trainer.train().training_loss > 0
    assert not torch.equal(model.model.layers[0].mixer.q_proj.weight, before)


@pytest.mark.slow
@needs_a_compiler
def test_inductor(fields):
    eager, model = (tiny_model(dtype=torch.float32, **fields).train() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True)
    ids = random_ids(2, 12)
    outputs = [m(ids, attention_mask=padded(), labels=ids, use_cache=False) for m in (eager, compiled)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-3, atol=1e-4)
    for output in outputs:
        output.loss.backward()
    for (name, parameter), other in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
