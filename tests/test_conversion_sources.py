"""Where a pretrained model comes from, and what is refused before any of it is read in bulk."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from modeling_hope.conversion import hub, load_tokenizer
from modeling_hope.conversion.architecture import check_architecture
from modeling_hope.conversion.checkpoint_files import SafetensorsFile
from modeling_hope.conversion.source import open_source

from .conftest import chat_tokenizer, random_ids, tiny_model
from .test_conversion import llama


SUPPORTED = ("llama", "gemma3_text", "gpt2")


def edit_json(path, **fields):
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


def pickled(directory, model, *, shards=1, legacy=False):
    """The weights of a model as PyTorch pickles, in so many files."""
    state = model.state_dict()
    names = list(state)
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i:05}.bin" for i in range(shards)]
    for index, file in enumerate(files):
        part = {name: state[name] for name in names[index::shards]}
        torch.save(part, directory / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        places = {name: files[index % shards] for index, name in enumerate(names)}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / "model.safetensors").unlink(missing_ok=True)


def cast(model, dtype):
    """Its weights in another dtype, as a checkpoint has them, and not its rotary angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """A Llama in shards, with a tokenizer, its chat template and a generation config."""
    model = llama(tie_word_embeddings=True)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(tmp_path / "llama", max_shard_size="8KB")
    chat_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", model


def assert_holds(source, model, dtype=torch.float32):
    """A source gives a model's tensors, its headers say the same of them, and its own model gives the same logits."""
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    given = {name: tensor.clone() for name, tensor in source.tensors()}
    assert (
        given.keys() - model.all_tied_weights_keys.keys() == expected.keys() and given.keys() == source.infos().keys()
    )
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name
    for name, info in source.infos().items():
        assert (info.shape, info.dtype) == (tuple(given[name].shape), given[name].dtype)
    assert source.dtype == dtype
    reference = source.model()
    assert reference.dtype == torch.float32 and not reference.training
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(reference(ids).logits, model.float()(ids).logits)


def test_directories_of_safetensors_and_pickles(checkpoint, tmp_path):
    sharded, model = checkpoint
    source = open_source(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_holds(source, model)
    assert source.name == str(sharded) and source.config.model_type == "llama"
    assert source.generation_config.temperature == 0.7
    assert source.tokenizer.chat_template and source.tokenizer("w9 w10")["input_ids"] == [9, 10]
    assert open_source(str(sharded)).infos() == source.infos()
    for dtype in (torch.bfloat16, torch.float16):
        whole = cast(llama(), dtype)
        whole.save_pretrained(tmp_path / str(dtype))
        source = open_source(tmp_path / str(dtype))
        assert source.tokenizer is None and source.generation_config is not None
        assert_holds(source, whole, dtype)
    for name, options in (("one", {}), ("shards", {"shards": 3}), ("legacy", {"legacy": True})):
        model.save_pretrained(tmp_path / name)
        pickled(tmp_path / name, model, **options)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickle.*run code.*`allow_pickle`"):
            open_source(tmp_path / name).infos()
        assert_holds(open_source(tmp_path / name, allow_pickle=True), model)
    # Safetensors come first where there are both.
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "pytorch_model.bin").exists()
    assert_holds(open_source(tmp_path / "one"), model)


def test_pickles_that_would_run_code_are_refused_even_when_pickles_are_read(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    llama().save_pretrained(tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    for content, message in (
        ({"model.norm.weight": Harmful()}, "damaged shard.*pytorch_model.bin"),
        ([torch.zeros(2)], "not a dict of tensors"),
        ({"state_dict": {"a": torch.zeros(2)}}, "not a dict of tensors"),
    ):
        torch.save(content, tmp_path / "bad" / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "bad", allow_pickle=True).infos()
    assert not (tmp_path / "ran").exists()


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Each is a map of its own of the file, which goes with it: the pages that were read are given back."""
    opened = []
    save_file({f"t{i}": torch.full((3,), float(i)) for i in range(4)}, tmp_path / "x.safetensors")
    original = SafetensorsFile.tensors.__globals__["safe_open"]
    monkeypatch.setitem(
        SafetensorsFile.tensors.__globals__, "safe_open", lambda *a, **k: opened.append(a) or original(*a, **k)
    )
    storages = []
    for name, tensor in SafetensorsFile(tmp_path / "x.safetensors").tensors():
        assert float(tensor[0]) == int(name[1])
        storages.append(tensor.untyped_storage().data_ptr())
    assert len(opened) == 5  # one for the names
    model = llama()
    source = open_source(model)
    for name, tensor in source.tensors():
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()  # a model in memory is not copied


def test_models_in_memory(tmp_path):
    tied = llama(tie_word_embeddings=True)
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = open_source(tied, tokenizer=tokenizer)
    assert source.tokenizer is tokenizer and source.name == "LlamaForCausalLM" and source.model() is tied
    assert_holds(source, tied)
    assert "lm_head.weight" not in source.infos() and "lm_head.weight" in open_source(llama()).infos()
    assert open_source(tied, tokenizer=tmp_path / "tokenizer").tokenizer("w9")["input_ids"] == [9]
    # A cast has rounded the rotary angles of this one; the one to compare with has those that the config says.
    half = llama().bfloat16().train()
    assert_holds(open_source(half), cast(llama(), torch.bfloat16), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.training
    # Its class counts, and not what its checkpoint was of.
    tied.config.architectures = ["LlamaForSequenceClassification"]
    check_architecture(open_source(tied).config, SUPPORTED)
    assert tied.config.architectures == ["LlamaForSequenceClassification"]
    away = llama()
    away.lm_head.to("meta")
    lora = LoraConfig(target_modules=["q_proj"])
    adapted = llama()
    adapted.add_adapter(lora)
    for model, message in (
        (away, "'lm_head.weight' outside memory"),
        (adapted, "merge_and_unload"),
        (get_peft_model(llama(), lora), "merge_and_unload"),
        (torch.nn.Linear(2, 2), "got a Linear"),
        (None, "got a NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(model).infos()


def test_hub_names_are_read_from_the_cache(checkpoint, tmp_path, monkeypatch):
    """As the hub's cache lies on the disk: blobs, snapshots by commit, and refs."""
    directory, model = checkpoint
    commits = {"main": "0" * 40, "old": "1" * 40}
    for revision, commit in commits.items():
        repository = tmp_path / "cache" / "models--someone--tiny-llama"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(directory, repository / "snapshots" / commit)
    edit_json(repository / "snapshots" / commits["old"] / "config.json", rms_norm_eps=0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    source = open_source("someone/tiny-llama")
    assert source.name == "someone/tiny-llama" and source.tokenizer.chat_template
    assert source.generation_config.temperature == 0.7
    assert_holds(source, model)
    for revision in ("old", commits["old"]):
        assert open_source("someone/tiny-llama", revision=revision).config.rms_norm_eps == 0.5
    for name, options in (("someone/other", {}), ("someone/tiny-llama", {"revision": "new"})):
        with pytest.raises(ValueError, match=f"{name}.*no path here.*cache.*HF_HUB_OFFLINE"):
            open_source(name, **options)
    shard = next((repository / "snapshots" / commits["main"]).glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        open_source("someone/tiny-llama").infos()
    # A path that exists wins.
    here = llama(seed=1)
    here.save_pretrained(tmp_path / "someone" / "tiny-llama")
    assert_holds(open_source("someone/tiny-llama"), here)


def test_only_what_is_needed_is_downloaded(checkpoint, tmp_path, monkeypatch):
    directory, model = checkpoint
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        snapshot = tmp_path / ("2" * 40)
        snapshot.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in directory.glob(pattern):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    (directory / "consolidated.safetensors").touch()
    source = open_source("someone/tiny-llama", revision="v1")
    assert [call[:2] for call in asked] == [("someone/tiny-llama", "v1")]
    assert not list((tmp_path / ("2" * 40)).glob("*.safetensors"))
    check_architecture(source.config, SUPPORTED)  # before gigabytes are fetched
    assert_holds(source, model)
    shards = sorted(file.name for file in directory.glob("model-*.safetensors"))
    assert asked[1:] == [("someone/tiny-llama", "2" * 40, shards)]  # of the same commit, each once
    shutil.rmtree(directory)
    directory.mkdir()
    model.save_pretrained(directory)
    pickled(directory, model)
    shutil.rmtree(tmp_path / ("2" * 40))
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        open_source("someone/tiny-llama").infos()
    assert_holds(open_source("someone/tiny-llama", allow_pickle=True), model)


def test_what_the_hub_answers_is_told(tmp_path, monkeypatch):
    response = Mock(headers={})
    monkeypatch.chdir(tmp_path)
    for error, message in (
        (GatedRepoError("", response=response), "gated: accept its terms at https://huggingface.co/a/b.*hf auth login"),
        (RepositoryNotFoundError("", response=response), "neither a path here nor a repository on the hub"),
        (RevisionNotFoundError("", response=response), "no revision 'v2'"),
        (LocalEntryNotFoundError(""), "hub cannot be reached"),
        (HfHubHTTPError("500 out of order", response=response), "could not be downloaded.*out of order"),
        (HTTPError("no route"), "could not be downloaded.*no route"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match=message):
            open_source("a/b", revision="v2")


def test_what_looks_like_a_path_is_never_sent_to_the_hub(checkpoint, tmp_path, monkeypatch):
    directory, _ = checkpoint
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    for name in (
        "./a/b",
        "../a",
        "/no/where",
        "a",
        "gpt2",
        "a/b/c",
        "a/",
        "~/a",
        ".a/b",
        "a/.b",
        "",
        Path("a/b"),
        "a\\b",
    ):
        with pytest.raises(ValueError, match=r"does not exist|neither a directory"):
            open_source(name)
    with pytest.raises(ValueError, match="`revision`"):
        open_source(directory, revision="main")
    with pytest.raises(ValueError, match="`revision`"):
        open_source(llama(), revision="main")


def permuted(weight, heads):
    """The rows of a query or key projection as llama.cpp orders them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokens=40, add=lambda writer: None, without=()):
    """A Llama as llama.cpp's converter writes it."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(["a", "b", "ab", *(f"w{index}" for index in range(3, tokens))])
        writer.add_token_types([1] * tokens)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    add(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in without:
            continue
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files(tmp_path, caplog, monkeypatch):
    gguf = pytest.importorskip("gguf")
    model = llama()
    write_gguf(tmp_path / "good.gguf", model)
    source = open_source(tmp_path / "good.gguf")
    assert_holds(source, model)
    assert source.tokenizer("ab")["input_ids"] == [2] and source.generation_config.eos_token_id == 2
    check_architecture(source.config, SUPPORTED)  # it is not called quantized
    write_gguf(tmp_path / "mute.gguf", model, tokens=0)
    assert open_source(tmp_path / "mute.gguf").tokenizer is None
    assert load_tokenizer(tmp_path / "good.gguf").get_vocab() == source.tokenizer.get_vocab()
    given = chat_tokenizer()
    assert open_source(tmp_path / "mute.gguf", tokenizer=given).tokenizer is given
    assert not caplog.records  # nothing a user cannot use is said
    whole = (tmp_path / "good.gguf").read_bytes()
    for length in (len(whole) - 5, len(whole) // 2, 300, 20, 4):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is not whole"):
            open_source(tmp_path / "cut.gguf").infos()
    part = np.ones(3, np.float32)
    for options, message in (
        ({"tokens": 45}, "disagrees with the model's `vocab_size`: it has 45 tokens"),
        ({"without": ["model.layers.1.mlp.up_proj.weight"]}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            {"add": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
            "rotary positions .llama.rope.scaling.type",
        ),
        ({"add": lambda w: w.add_tensor("rope_freqs.weight", part)}, "rotary positions .rope_freqs.weight"),
        ({"add": lambda w: w.add_tensor("blk.0.ffn_up.bias", part)}, "some would be lost"),
        ({"add": lambda w: w.add_uint16("split.count", 3)}, "one part of 3"),
    ):
        write_gguf(tmp_path / "bad.gguf", model, **options)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "bad.gguf").infos()
    with pytest.raises(ValueError, match="`vocab_size`: 1 of its tokens"):
        open_source(tmp_path / "good.gguf", tokenizer=chat_tokenizer(words=41))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="package gguf"):
        open_source(tmp_path / "good.gguf")


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    directory, _ = checkpoint
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.Q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "false.gguf").write_text("GGML of old")
    cases = [
        (tmp_path / "empty", "neither a directory with a config.json"),
        (tmp_path / "gguf", r"one of the files in it, as model\.Q4\.gguf"),
        (tmp_path / "false.gguf", r"nor a \.gguf file"),
        (next(directory.glob("*.safetensors")), "give the directory that holds them"),
        (directory / "config.json", "neither a directory"),
    ]
    configs = {
        "{": "not a JSON object",
        "[1]": "not a JSON object",
        "{}": "without `model_type`",
        '{"model_type": "new_model"}': "'new_model', which Transformers .* does not know.*`auto_map`",
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}': "`auto_map`.*is not run",
        '{"model_type": "llama", "hidden_size": "wide"}': "not of a 'llama' model.*hidden_size",
    }
    for index, (text, message) in enumerate(configs.items()):
        path = tmp_path / f"config{index}"
        path.mkdir()
        (path / "config.json").write_text(text)
        (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnConfig: pass")
        cases.append((path, message))
    shutil.copytree(directory, tmp_path / "generation")
    (tmp_path / "generation" / "generation_config.json").write_text("{")
    cases.append((tmp_path / "generation", r"generation_config\.json that cannot be read"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    cases.append((adapter, "is an adapter.*merge_and_unload"))
    for path, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            open_source(path)
        assert str(path) in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_half_a_checkpoint_is_refused_before_a_tensor_is_read(checkpoint, tmp_path):
    directory, _ = checkpoint
    index_file = "model.safetensors.index.json"
    places = json.loads((directory / index_file).read_text())["weight_map"]
    first, *others = sorted(set(places.values()))
    in_first = next(name for name, file in places.items() if file == first)

    def truncate(path, cut=5):
        (path / first).write_bytes((path / first).read_bytes()[:-cut])

    def index(path, **changed):
        edit_json(path / index_file, weight_map={name: file for name, file in (places | changed).items() if file})

    def add_to_first(path, **tensors):
        save_file(load_file(path / first) | tensors, path / first)

    cases = {
        "truncated": (truncate, rf"damaged shard.*{first}"),
        "no header": (lambda path: truncate(path, (path / first).stat().st_size - 4), rf"damaged shard.*{first}"),
        "empty": (lambda path: (path / first).write_bytes(b""), rf"damaged shard.*{first}"),
        "missing": (lambda path: (path / others[0]).unlink(), f"lacks {others[0]}"),
        "named, not held": (
            lambda path: index(path, extra=first),
            f"says 'extra' is in {first}, which does not hold it",
        ),
        "held, not named": (lambda path: index(path, **{in_first: None}), f"{in_first!r} in {first}, .* does not name"),
        "held elsewhere": (lambda path: index(path, **{in_first: others[0]}), f"{in_first}.*{others[0]}|{first}"),
        "held twice": (
            lambda path: add_to_first(path, **{n: torch.zeros(1) for n, f in places.items() if f == others[0]}),
            f"in {first}, which its index says is in {others[0]}",
        ),
        "index of nothing": (lambda path: edit_json(path / index_file, weight_map={}), "names no file"),
        "index no JSON": (
            lambda path: (path / index_file).write_text("{"),
            "not JSON with `metadata` and a `weight_map`",
        ),
        "index without map": (
            lambda path: edit_json(path / index_file, weight_map=None),
            "not JSON with `metadata` and a `weight_map`",
        ),
        "index without metadata": (
            lambda path: edit_json(path / index_file, metadata=None),
            "not JSON with `metadata`",
        ),
        "index of numbers": (
            lambda path: edit_json(path / index_file, weight_map={"a": 1}),
            "not JSON with `metadata` and a `weight_map`",
        ),
        "index elsewhere": (lambda path: index(path, extra="../x.safetensors"), "lie next to their index"),
        "no index": (lambda path: (path / index_file).unlink(), f"lacks {index_file}"),
        "no weights": (lambda path: [p.unlink() for p in path.glob("model*")], r"lacks model\.safetensors"),
        "8 bits": (lambda path: add_to_first(path, **{in_first: torch.zeros(2).to(torch.float8_e4m3fn)}), "quantized"),
    }
    for name, (spoil, message) in cases.items():
        path = tmp_path / name
        shutil.copytree(directory, path)
        spoil(path)
        source = open_source(path)
        for read in (source.infos, lambda source=source: next(source.tensors())):
            with pytest.raises(ValueError, match=message):
                read()
    (tmp_path / "pickle").mkdir()
    llama().save_pretrained(tmp_path / "pickle")
    pickled(tmp_path / "pickle", llama())
    whole = (tmp_path / "pickle" / "pytorch_model.bin").read_bytes()
    for length in (len(whole) - 30, 100, 0):
        (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged shard.*pytorch_model\.bin"):
            open_source(tmp_path / "pickle", allow_pickle=True).infos()


def test_a_tokenizer_that_the_model_has_no_rows_for_is_refused(checkpoint, tmp_path):
    directory, model = checkpoint
    large = chat_tokenizer(words=43)
    large.save_pretrained(directory)
    message = "`vocab_size`: 3 of its tokens have no embedding, 'abcdef' with id 42 where ids end at 39"
    for source, options in (
        (directory, {}),
        (model, {"tokenizer": large}),
        (model, {"tokenizer": directory}),
        (model, {"tokenizer": str(directory)}),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(source, **options)
    assert open_source(directory, tokenizer=chat_tokenizer()).tokenizer("w9")["input_ids"] == [9]
    assert open_source(model, tokenizer=chat_tokenizer(words=20)).tokenizer is not None  # rows to spare
    # Gemma 3's text models keep a token for images, past their last row.
    images = chat_tokenizer()
    images = PreTrainedTokenizerFast(
        tokenizer_object=images.backend_tokenizer, extra_special_tokens={"image_token": "<image>"}
    )
    assert images.convert_tokens_to_ids("<image>") == 40
    assert open_source(model, tokenizer=images).tokenizer is images
    images.save_pretrained(directory)
    assert open_source(directory).tokenizer.image_token == "<image>"
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="does not load"):
        open_source(directory)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_source(model, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_architectures_that_hope_is_not_are_refused_by_name(tmp_path):
    def config(model_type, **fields):
        made = AutoConfig.for_model(model_type)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    refused = [
        *((config(name), f"'{name}' is a mixture of experts.*(num_experts|num_local_experts|n_routed_experts)")
          for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "phimoe", "jamba", "llama4_text")),
        (config("dbrx"), "'dbrx' is a mixture of experts"),
        (config("llama", num_experts=4), "'llama' is a mixture of experts .`num_experts` is 4"),
        *((config(name), f"'{name}' is an encoder: ") for name in ("bert", "roberta", "modernbert")),
        *((config(name), f"'{name}' is an encoder-decoder") for name in ("t5", "bart", "whisper")),
        *((config(name), f"'{name}' is multimodal. Convert a language model") for name in ("llama4", "clip")),
        (config("gemma3"), r"'gemma3' is multimodal.*Gemma3ForCausalLM\(whole.config.text_config\)"),
        *((config(name), f"'{name}' is a state-space model") for name in ("mamba", "mamba2", "bamba", "falcon_h1")),
        *((config(name), f"'{name}' is not supported. Supported are gemma3_text, gpt2, llama") for name in ("rwkv", "opt")),
        (config("llama", quantization_config={"quant_method": "gptq"}), "quantized .`quantization_config`.*dequantize"),
        (tiny_model().config, "it is one already"),
        (config("llama", architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification.*LlamaForCausalLM"),
        (config("gpt2", architectures=["GPT2DoubleHeadsModel"]), "GPT2DoubleHeadsModel.*GPT2LMHeadModel"),
    ]  # fmt: skip
    llama_config = llama().config
    for model in (LlamaForSequenceClassification(llama_config), LlamaModel(llama_config)):
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        refused += [(open_source(model).config, name), (open_source(tmp_path / name).config, name)]
    for given, message in refused:
        with pytest.raises(ValueError, match=f"`source` cannot become a Hope model: .*{message}"):
            check_architecture(given, SUPPORTED)
    for name in SUPPORTED:
        check_architecture(config(name), SUPPORTED)
        check_architecture(config(name, architectures=None, quantization_config=None), SUPPORTED)
    check_architecture(config("gpt2", architectures=["GPT2LMHeadModel"]), SUPPORTED)


def test_the_language_model_of_a_multimodal_one_is_got_as_the_error_says(tmp_path):
    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    wholes = (
        (Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)), Gemma3ForCausalLM),
        (LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)), LlamaForCausalLM),
    )
    for whole, text_class in wholes:
        whole.eval().save_pretrained(tmp_path / f"whole {text_class.__name__}")
        for source in (whole, tmp_path / f"whole {text_class.__name__}"):
            with pytest.raises(ValueError, match=f"multimodal.*{text_class.__name__}"):
                check_architecture(open_source(source).config, SUPPORTED)
        text = text_class(whole.config.text_config).eval()
        text.model, text.lm_head = whole.model.language_model, whole.lm_head
        text.save_pretrained(tmp_path / text_class.__name__)
        ids = random_ids(1, 9)
        with torch.no_grad():
            expected = whole(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
            for source in (text, tmp_path / text_class.__name__):
                opened = open_source(source)
                check_architecture(opened.config, SUPPORTED)
                assert torch.equal(opened.model()(ids).logits, expected)
