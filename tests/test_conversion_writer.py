"""A checkpoint is written tensor by tensor, and its directory appears whole or not at all."""

import errno
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling_hope.benchmarks import conversion_peak
from modeling_hope.conversion import writer as writing
from modeling_hope.conversion.staging import staged_directory
from modeling_hope.conversion.tensor_info import TensorInfo
from modeling_hope.conversion.writer import CheckpointWriter


def llama(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, **fields)).eval()


def infos_of(tensors, dtype=None):
    return {name: replace(TensorInfo.of(tensor), dtype=dtype or tensor.dtype) for name, tensor in tensors.items()}


def write(directory, tensors, infos=None, **options):
    writer = CheckpointWriter(directory, infos or infos_of(tensors), **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


@pytest.mark.parametrize("size", ["5GB", "8KB", 3000, 1])
@pytest.mark.parametrize("order", [list, reversed, sorted])
def test_files_are_those_of_save_pretrained(tmp_path, size, order):
    model = llama()
    model.save_pretrained(tmp_path / "expected", max_shard_size=size)
    weights = model.state_dict()
    with staged_directory(tmp_path / "given", 1) as staged:
        write(staged, {name: weights[name] for name in order(weights)}, infos_of(weights), max_shard_size=size)
        model.config.save_pretrained(staged)
    names = {path.name for path in (tmp_path / "given").iterdir()}
    assert names == {path.name for path in (tmp_path / "expected").iterdir()} - {"generation_config.json"}
    for name in names:
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    assert ("model.safetensors.index.json" in names) == (size != "5GB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in weights.items())


def test_views_casts_and_every_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "WRITTEN_AT_ONCE", 64)  # so that tensors go in several parts
    base = torch.randn(12, 10, dtype=torch.float64)
    tensors = {
        "é transposed": base.T, "rows": base[2:5], "columns": base[:, ::3], "same": base, "again": base,
        "repeated": torch.arange(3.0).expand(7, 3), "scalar": torch.nn.Parameter(torch.tensor(2.5)),
        "none": torch.empty(0, 4), "parameter": torch.nn.Parameter(torch.randn(5, 3, 2)), "ids": torch.arange(9),
        "flags": torch.arange(5) > 2, "bytes": torch.arange(7, dtype=torch.uint8), "half": torch.randn(9).half(),
        "brain": torch.randn(3).bfloat16(),
    }  # fmt: skip
    write(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        directory = tmp_path / str(dtype)
        directory.mkdir()
        floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        write(directory, floating, infos_of(floating, dtype))
        for name, tensor in load_file(directory / "model.safetensors").items():
            assert tensor.dtype == dtype and torch.equal(tensor, floating[name].to(dtype)), name


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(())}
    writer = CheckpointWriter(tmp_path, {**infos_of(tensors), "b": TensorInfo((2,), torch.float16)})
    writer.add("a", tensors["a"])
    for name, tensor, message in (
        ("a", tensors["a"], "'a' was written already"),
        ("d", tensors["a"], "'d' has no place"),
        ("b", torch.zeros(3), r"'b' is \(3,\), its place in the checkpoint \(2,\)"),
        ("b", torch.tensor([1.0, 7e4]), "'b' has values too large for torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.add(name, tensor)
    with pytest.raises(ValueError, match="lacks 'b', 'c'"):
        writer.close()
    writer.add("b", torch.tensor([float("inf"), float("nan")]))  # as the source has them
    writer.add("c", tensors["c"])
    writer.close()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"`max_shard_size` is not a size: .*'5 apples'"):
        CheckpointWriter(tmp_path / "other", infos_of(tensors), "5 apples")
    assert not list((tmp_path / "other").iterdir())


def contents(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def taken(tmp_path):
    """Directories and files that are there already."""
    for name in ("empty", "real", "here", "full"):
        (tmp_path / name).mkdir(mode=0o750)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "full" / "file").write_text("kept")
    return tmp_path


def test_a_directory_appears_whole(taken, monkeypatch):
    monkeypatch.chdir(taken / "here")
    for output in (taken / "new", str(taken / "deep" / "er" / "new"), taken / "empty", taken / "link", "."):
        with staged_directory(output, needed_bytes=1) as staged:
            (staged / "folder").mkdir()
            (staged / "folder" / "file").write_text("f")
            (staged / "weights").write_text("w")
            assert not os.path.exists(os.path.join(output, "weights"))
        assert sorted(os.listdir(output)) == ["folder", "weights"]
        assert (Path(output) / "folder" / "file").read_text() == "f"
    assert sorted(os.listdir(taken)) == ["deep", "empty", "full", "here", "link", "new", "real"]
    assert (taken / "link").is_symlink() and sorted(os.listdir(taken / "deep")) == ["er"]
    modes = {name: (taken / name).stat().st_mode & 0o777 for name in ("new", "empty")}
    assert modes == {"new": 0o755, "empty": 0o750}


def test_an_output_in_the_way_is_refused(taken, monkeypatch):
    before = contents(taken)
    file = taken / "full" / "file"
    for output, message in (
        (taken / "full", "`output_dir` .*full exists and is not empty"),
        (file, "`output_dir` .*file is a file"),
        (file / "deep" / "er", "`output_dir` .*er cannot be made: .*file is not a directory"),
    ):
        with pytest.raises(ValueError, match=message), staged_directory(output, 1):
            raise AssertionError("the block was entered")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may write anywhere
    for output in (taken / "new", taken / "empty", taken / "deep" / "er"):
        with pytest.raises(ValueError, match="no permission to write to"), staged_directory(output, 1):
            raise AssertionError("the block was entered")
    assert contents(taken) == before and file.read_text() == "kept"


def test_too_little_space_is_refused_with_both_figures(taken, monkeypatch):
    before = contents(taken)
    asked = []

    def little(path):
        asked.append(Path(path))
        return namedtuple("Usage", "free")(2 * 10**9)

    monkeypatch.setattr(shutil, "disk_usage", little)
    for output in (taken / "new", taken / "deep" / "er", taken / "empty"):
        figures = r"5\.00 GB needed, 2\.00 GB free"
        with pytest.raises(OSError, match=figures) as raised, staged_directory(output, 5 * 10**9):
            raise AssertionError("the block was entered")
        assert raised.value.errno == errno.ENOSPC
    assert asked == [taken, taken, taken / "empty"]  # the disk that the output will lie on
    assert contents(taken) == before


FULL = "No space left on device"


@pytest.mark.parametrize(
    "failure, raised, message",
    [
        (OSError(errno.ENOSPC, FULL), OSError, r"Not enough space: at least 1\.50 GB needed, [\d.,]+ GB free"),
        (
            SafetensorError(f"I/O error: {FULL} (os error {errno.ENOSPC})"),
            OSError,
            "Not enough space: at least 1.50 GB needed",
        ),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
        (ValueError("a tensor has no place"), ValueError, "a tensor has no place"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("output", ["new", "deep/er/new", "empty"])
def test_a_failure_leaves_nothing_behind(taken, monkeypatch, failure, raised, message, output):
    before = contents(taken)
    weights = llama().state_dict()

    def part_way(tensor):
        yield tensor[:1]
        raise failure

    with pytest.raises(raised, match=message), staged_directory(taken / output, int(1.5e9)) as staged:
        writer = CheckpointWriter(staged, infos_of(weights))
        writer.add("model.norm.weight", weights["model.norm.weight"])
        monkeypatch.setattr(writing, "_parts", part_way)
        writer.add("lm_head.weight", weights["lm_head.weight"])
    assert contents(taken) == before


def test_a_failure_at_the_last_step_leaves_nothing_behind(taken, monkeypatch):
    rename = Path.rename

    def fails(path, target):
        if path.name in ("second", *(entry for entry in os.listdir(taken) if entry.startswith(".new-"))):
            raise KeyboardInterrupt
        return rename(path, target)

    before = contents(taken)
    monkeypatch.setattr(Path, "rename", fails)
    for output in ("new", "empty"):
        with pytest.raises(KeyboardInterrupt), staged_directory(taken / output, 1) as staged:
            (staged / "first").mkdir()
            (staged / "second").write_text("2")
        assert contents(taken) == before


def test_what_others_wrote_meanwhile_is_kept(taken):
    for output in ("new", "deep/er/new"):
        with pytest.raises(OSError), staged_directory(taken / output, 1):
            (taken / output).mkdir()
            (taken / output / "theirs").write_text("kept")
        assert contents(taken / output) == ["theirs"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_the_benchmark_of_the_peak_runs_small(tmp_path, capsys):
    source = conversion_peak.make_checkpoint(tmp_path / "source", layers=2, width=64, shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    conversion_peak.measure(source, tmp_path / "out", torch.float32, "100KB")
    assert capsys.readouterr().out.startswith("imports=")
    assert conversion_peak.count_equal(source, tmp_path / "out") == 2 * 9 + 3
    assert conversion_peak.largest_shard(tmp_path / "out") < 0.2
    file = next(file for file in (tmp_path / "out").glob("*.safetensors") if "lm_head.weight" in load_file(file))
    tensors = load_file(file)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"is not lm_head\.weight"):
        conversion_peak.count_equal(source, tmp_path / "out")
