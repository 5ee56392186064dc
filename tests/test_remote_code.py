"""Remote code: a directory that loads, remembers and is saved again where this package is not installed."""

import ast
import filecmp
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

import modeling_hope
from modeling_hope import HopeConfig, HopeForCausalLM, HopePreTrainedModel
from modeling_hope.auto_hope import AUTO_CLASSES, AUTO_MAP

from .conftest import FAMILIES, tiny_config, tiny_model
from .without_package import converse


SOURCES = Path(modeling_hope.__file__).parent
# Python's own, and the equations to read and to test against.
NOT_COPIED = {"__init__.py", "memory_reference.py"}
CODE = sorted(path.name for path in SOURCES.glob("*.py") if path.name not in NOT_COPIED)


def code_of(directory):
    return sorted(path.name for path in Path(directory).glob("*.py"))


def written_map(directory):
    return json.loads((Path(directory) / "config.json").read_text()).get("auto_map")


def assert_whole(directory, code=SOURCES):
    """All the code is there, byte for byte, and found by every Auto class."""
    assert code_of(directory) == CODE and written_map(directory) == AUTO_MAP
    assert filecmp.cmpfiles(code, directory, CODE, shallow=False) == (CODE, [], [])


def fresh_environment(path):
    """An environment with all that the running one has, but this package; returns its Python."""
    venv.create(path, symlinks=True)
    folders = [
        folder
        for folder in map(Path, sys.path)
        if folder.name in ("site-packages", "dist-packages") and folder.is_dir()
    ]
    linked = [path / "packages" / str(place) for place in range(len(folders))]
    for folder, links in zip(folders, linked, strict=True):
        links.mkdir(parents=True)
        for entry in folder.iterdir():
            if "hope_transformers" not in entry.name and entry.name != "modeling_hope":
                (links / entry.name).symlink_to(entry)
    # Folders that a .pth file names have their own .pth files ignored, which is where editable installs come from.
    (site,) = path.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(map(str, linked)))
    return path / "bin" / "python"


def save_tokenizer(directory):
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(40)}, "unk_token": "w0"}
    split = {"type": "WhitespaceSplit"}
    text = json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model})
    (directory / "tokenizer.json").write_text(text)
    PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json")).save_pretrained(directory)


def test_a_directory_with_code_serves_where_the_package_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(HopeForCausalLM, "_auto_class", None)
    HopeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    said = {}
    for family, fields in FAMILIES.items():
        model = tiny_model(**fields)
        model.save_pretrained(tmp_path / "models" / family)
        assert_whole(tmp_path / "models" / family)
        said[family] = converse(model, tmp_path / f"{family}-memory")
        assert any(count for row in said[family]["updates"] for count in row)
        assert said[family]["turns"][-1] == said[family]["turns"][-2]
    save_tokenizer(tmp_path / "models" / "memory")
    changed = shutil.copytree(tmp_path / "models" / "memory", tmp_path / "changed" / "memory")
    with open(changed / "stream_record.py", "a") as file:
        file.write("CHANGED = True\n")
    hub, commit = tmp_path / "home" / "hub" / "models--tiny--hope", "0" * 40
    shutil.copytree(tmp_path / "models" / "hybrid", hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(
        [fresh_environment(tmp_path / "venv"), "-I", Path(__file__).with_name("without_package.py"), tmp_path],
        env={**environment, **settings},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        check=True,
    )

    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["package"]
    for refused in results["refused"]:
        assert refused.startswith("ValueError") and "`trust_remote_code=True`" in refused
    for family, used in results["used"].items():
        for there in (used["first"], used["again"]):
            torch.testing.assert_close(torch.tensor(there.pop("logits")), torch.tensor(said[family]["logits"]))
            assert there == {name: value for name, value in said[family].items() if name != "logits"}
        again = f"{family}-again"
        assert used["classes"] == [
            [place, name, path.split(".")[1]] for place in (family, again) for name, path in AUTO_MAP.items()
        ]
        assert used["packages"] == 2 and used["configs"] == 1  # a package for each directory, for all its classes
        assert_whole(tmp_path / "again" / again)
    assert results["hub"]["turns"] == said["hybrid"]["turns"]
    assert_whole(tmp_path / "again" / "hub")
    assert results["changed"] == [False, True]
    assert_whole(tmp_path / "again" / "changed", code=changed)
    assert "model.load_memory" in results["memory_of_other_code"]
    assert results["same_cache_class"] and results["pipeline"]


def test_code_is_written_for_what_is_registered_and_stays_with_a_model(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "plain")
    assert code_of(tmp_path / "plain") == [] and written_map(tmp_path / "plain") is None

    each = [(hope_class, hope_class, [auto_class]) for auto_class, hope_class in AUTO_CLASSES.items()]
    for registered, saved, arguments in [
        *each,
        (HopeConfig, HopeForCausalLM, []),
        (HopePreTrainedModel, HopeForCausalLM, []),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(registered, "_auto_class", None)
            registered.register_for_auto_class(*arguments)
            saved(tiny_config()).save_pretrained(tmp_path / registered.__name__)
        assert_whole(tmp_path / registered.__name__)

    # The installed package goes before the directory's code, with no question of trust.
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "HopeConfig", **options)
        assert type(model) is HopeForCausalLM and type(model.config) is HopeConfig
    model.save_pretrained(tmp_path / "again")
    assert_whole(tmp_path / "again")
    AutoConfig.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "config")
    assert_whole(tmp_path / "config")


def test_what_is_copied_is_complete_and_needs_nothing_else():
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in CODE, f"{path.name}:{node.lineno}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                allowed = {"torch", "transformers", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
                assert {name.split(".")[0] for name in names} <= allowed, f"{path.name}:{node.lineno}"
        check_imports(path)
    # By its pattern, in docstrings too: from any class's file, everything is found.
    for hope_class in (HopeConfig, *AUTO_CLASSES.values()):
        found = get_relative_import_files(sys.modules[hope_class.__module__].__file__)
        assert sorted({Path(file).name for file in found}) == CODE
    assert sorted({Path(file).name for file in get_relative_import_files(SOURCES / "auto_hope.py")}) == CODE
