"""A memory's files: what is saved is what is loaded, whatever crashes, whatever is damaged."""

import errno
import gc
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_hope import HopeCache, memory_files, memory_format
from modeling_hope.memory_files import _header, _sealed, read_files, write_files
from modeling_hope.stream_record import NO_TOKEN

from .conftest import FAMILIES, assert_same_memory, random_ids, read, tiny_model


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")


def remember(model, tokens=21, rows=2, seed=0):
    """A memory with updates of two levels, waiting gradients and an open segment."""
    memory = HopeCache(model.config, rows)
    read(model, memory, random_ids(rows, tokens, seed=seed))
    return memory


def files(path):
    return sorted(entry.name for entry in path.iterdir())


def tensors_file(path):
    (file,) = path.glob("memory-*.safetensors")
    return file


def is_whole(path, others=0):
    """Two files, and nothing left over."""
    description = json.loads((path / "memory.json").read_text())
    return {description["file"]["name"], "memory.json"} <= set(files(path)) and len(files(path)) == 2 + others


@pytest.mark.parametrize("tokens", [2, 4, 11, 16])
def test_saved_and_loaded_it_goes_on(model, tmp_path, tokens):
    memory = HopeCache(model.config, 2)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, 1:2] = False
    read(model, memory, random_ids(2, tokens), attention_mask=mask)
    memory.notes["topic"] = ["bees"]
    saved = memory.save_pretrained(tmp_path, model=model)
    assert saved.bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) and "nothing lost" in str(saved)
    assert saved.relative_error == saved.worst_error == 0 < saved.full_bytes
    loaded = HopeCache.from_pretrained(tmp_path, model=model)
    assert_same_memory(loaded, memory, rtol=0, atol=0)
    assert loaded.notes == memory.notes == memory.clone().notes
    assert loaded.summary()["rows"] == memory.summary()["rows"] and loaded.lost is None
    follow = random_ids(2, 9, seed=1)
    assert torch.equal(read(model, loaded, follow), read(model, memory, follow))
    assert is_whole(tmp_path)
    memory.save_pretrained(tmp_path)
    assert is_whole(tmp_path) and HopeCache.from_pretrained(tmp_path, model=model).seen == memory.seen
    assert len({entry.stat().st_mode for entry in tmp_path.iterdir()}) == 1


def test_a_pending_token_and_embeddings_are_saved(tmp_path):
    model = tiny_model(eos_token_id=None)
    memory = HopeCache(model.config)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 3, 16, dtype=torch.float64), past_key_values=memory)
        memory.save_pretrained(tmp_path)
        assert_same_memory(HopeCache.from_pretrained(tmp_path, model=model), memory, rtol=0, atol=0)
        model.generate(random_ids(1, 3), past_key_values=memory, max_new_tokens=4, do_sample=False)
    memory.save_pretrained(tmp_path)
    loaded = HopeCache.from_pretrained(tmp_path, model=model)
    assert loaded.rows[0].pending == memory.rows[0].pending is not None
    assert_same_memory(loaded, memory, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("attention", {"cms_variant": "nested"}),
        ("attention", {"cms_levels_per_layer": [[0, 2], [1]]}),
        ("memory", {"cms_optimizer": "momentum", "memory_momentum": False}),
        ("memory", {"cms_fast_weights": "down_proj", "cms_surprise_threshold": 3.6, "projection_chunk_size": 6}),
        ("hybrid", {"cms_variant": "nested", "cms_optimizer": "momentum", "dtype": torch.bfloat16}),
        ("hybrid", {"cms_periods": [None], "cms_learning_rates": 0.1}),
    ],
)
def test_whatever_was_done_to_a_memory_it_can_be_saved_and_read(tmp_path, kind, fields):
    model, chosen = tiny_model(eos_token_id=None, **{**FAMILIES[kind], **fields}), random.Random(1)
    memory = HopeCache(model.config, 2)
    memory.save_pretrained(tmp_path, model=model)
    assert HopeCache.from_pretrained(tmp_path, model=model).seen == [0, 0]
    for step in range(14):
        ids = random_ids(memory.batch_size, chosen.randint(1, 9), seed=step)
        mask = torch.rand(ids.shape) > 0.3
        mask[:, -1] = True
        kind = chosen.randrange(5)
        if kind == 0:
            model.generate(ids, past_key_values=memory, max_new_tokens=3, learn=chosen.choice(["all", "prompt"]))
        elif kind == 1:
            memory.select([chosen.randrange(memory.batch_size) for _ in range(2)])
            memory.reset(levels=[chosen.randrange(len(memory.periods))])
        elif kind == 2:
            embeds = model.get_input_embeddings()(ids).detach()
            with torch.no_grad():
                model(inputs_embeds=embeds, past_key_values=memory)
        else:
            read(model, memory, ids, attention_mask=mask, learn=chosen.choice(["all", "all", "off"]))
        memory.save_pretrained(tmp_path)
        assert_same_memory(HopeCache.from_pretrained(tmp_path, model=model), memory, rtol=0, atol=0)


def test_rows_that_share_are_written_once_and_share_again(model, tmp_path):
    memory = remember(model, rows=1)
    one = memory.save_pretrained(tmp_path / "one").bytes
    memory.batch_repeat_interleave(4)
    saved = memory.save_pretrained(tmp_path / "four")
    learned = sum(t.nbytes for name, t in memory.tensors().items() if ".rows.0." in name)
    others = sum(t.nbytes for name, t in memory.tensors().items() if ".mixer." in name or ".opened." in name)
    description = (tmp_path / "four" / "memory.json").stat().st_size
    assert learned and saved.bytes - description < one + others + 4096
    loaded = HopeCache.from_pretrained(tmp_path / "four", model=model)
    assert_same_memory(loaded, memory, rtol=0, atol=0)
    assert loaded.nbytes() <= memory.nbytes()
    for layer in loaded.layers:
        assert all(row is rows[0] for rows in layer.levels.values() for row in rows)
        assert layer.opened is None or layer.opened is not layer.mixer
    read(model, loaded, random_ids(4, 8, seed=2))
    assert (
        len({float(t.sum()) for n, t in loaded.tensors().items() if n.endswith("levels.0.rows.0.change.up_proj")}) == 2
    )


def test_another_dtype_of_the_model_reads_it_and_another_model_does_not(model, tmp_path):
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 9))
    memory.save_pretrained(tmp_path)  # the model it was used with is the one it belongs to
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = tiny_model().to(dtype)
        with torch.inference_mode():
            loaded = HopeCache.from_pretrained(tmp_path, model=cast)
            loaded.select([0, 0])
            loaded.save_pretrained(tmp_path / "again")
        assert read(cast, loaded, random_ids(2, 9)).isfinite().all() and loaded.seen == [18, 18]
    with torch.no_grad():
        model.model(random_ids(1, 3), past_key_values=memory)
    memory.save_pretrained(tmp_path)
    assert HopeCache.from_pretrained(tmp_path, model=model).seen == [12]
    assert HopeCache.from_pretrained(tmp_path, model=model.model).seen == [12]
    tuned = tiny_model()
    for parameter in tuned.parameters():
        parameter.data *= 1.005
    for other, message in [
        (tuned, "other weights"),
        (tiny_model(seed=1), "other weights"),
        (tiny_model(cms_periods=[4, 12, None]), "cms_periods"),
        (torch.nn.Linear(2, 2), "`model` is a Linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            HopeCache.from_pretrained(tmp_path, model=other)
    with pytest.raises(ValueError, match="another model"):
        memory.save_pretrained(tmp_path, model=tiny_model(cms_periods=[4, 12, None]))
    memory.notes = {"now": time}
    for notes in ({"now": time}, {1: "one"}, {"pair": (1, 2)}, {"none": float("nan")}):
        memory.notes = notes
        with pytest.raises(ValueError, match="notes"):
            memory.save_pretrained(tmp_path)
    assert HopeCache.from_pretrained(tmp_path, model=model).seen == [12] and is_whole(tmp_path, others=1)


# Saving


class Crash(BaseException):
    pass


class Steps:
    """Makes the n-th step of a save that touches the disk fail: a crash, after which nothing is done, or an error."""

    FUNCTIONS = ("mkdir", "replace", "fsync", "chmod", "unlink", "rmdir")

    def __init__(self, monkeypatch, number, crash):
        self.number, self.crash, self.done, self.failed = number, crash, 0, False
        for name in self.FUNCTIONS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(memory_files, "save_file", self.wrap(save_file, after=True))

    def wrap(self, function, after=False):
        def step(*args, **kwargs):
            self.done += 1
            if self.failed and self.crash:
                raise Crash
            if self.done == self.number:
                self.failed = True
                if after:  # half of it is written
                    function(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                raise Crash if self.crash else OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return step


@pytest.mark.parametrize("crash", [True, False])
def test_a_save_that_fails_anywhere_leaves_the_old_memory_or_the_new(tmp_path, monkeypatch, crash):
    model = tiny_model()
    old, new = remember(model), remember(model, tokens=30)
    seen, number = set(), 0
    while True:
        number += 1
        path = tmp_path / str(number)
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "memory-of-mine.safetensors").write_text("mine")
        old.save_pretrained(path)
        with monkeypatch.context() as patched:
            steps = Steps(patched, number, crash)
            try:
                new.save_pretrained(path)
                raised = None
            except (Crash, OSError) as error:
                raised = error
        loaded = HopeCache.from_pretrained(path, model=model)
        assert_same_memory(loaded, new if loaded.seen == [30, 30] else old, rtol=0, atol=0)
        if not steps.failed:
            break
        seen.add(tuple(loaded.seen))
        if isinstance(raised, OSError):
            assert raised.errno == errno.ENOSPC and str(path) in str(raised) and "unharmed" in str(raised)
            assert loaded.seen == new.seen or is_whole(path, others=2)
        new.save_pretrained(path)
        assert is_whole(path, others=2) and HopeCache.from_pretrained(path, model=model).seen == [30, 30]
        assert (path / "config.json").read_text() == "{}"
    assert number > 8 and seen == {(21, 21), (30, 30)} and is_whole(path, others=2)


@forks
def test_writers_that_are_killed_and_writers_at_once(tmp_path):
    model = tiny_model()
    memories = [remember(model), remember(model, tokens=30), remember(model, tokens=5)]
    memories[0].save_pretrained(tmp_path)
    for delay in (0.02, 0.05, 0.11, 0.23, 0.31):
        writers = []
        for memory in memories[1:]:
            writer = os.fork()
            if not writer:
                for _ in range(1000):  # it is killed long before
                    memory.save_pretrained(tmp_path)
                os._exit(1)
            writers.append(writer)
        end = time.monotonic() + delay
        while time.monotonic() < end:
            HopeCache.from_pretrained(tmp_path, model=model)
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        loaded = HopeCache.from_pretrained(tmp_path, model=model)
        same = next(memory for memory in memories if memory.seen == loaded.seen)
        assert_same_memory(loaded, same, rtol=0, atol=0)
    memories[0].save_pretrained(tmp_path)
    assert is_whole(tmp_path)


def test_a_reader_finds_the_memory_that_replaced_the_one_it_began_with(tmp_path, monkeypatch):
    model = tiny_model()
    old, new = remember(model), remember(model, tokens=30)
    old.save_pretrained(tmp_path)
    read_tensors, replaced = memory_files._read_tensors, []

    def replacing(path, description):
        if not replaced:
            replaced.append(new.save_pretrained(tmp_path))
        return read_tensors(path, description)

    monkeypatch.setattr(memory_files, "_read_tensors", replacing)
    assert_same_memory(HopeCache.from_pretrained(tmp_path, model=model), new, rtol=0, atol=0)


def test_without_locks_a_writer_removes_what_it_replaces_and_no_more(tmp_path, monkeypatch):
    model = tiny_model()
    memory = remember(model)
    memory.save_pretrained(tmp_path)
    others = [tmp_path / f"memory-{'0' * 16}.safetensors", tmp_path / f".memory-{'0' * 16}"]
    others[0].write_bytes(b"")
    others[1].mkdir()
    with (
        memory_files._Directory(tmp_path),
        monkeypatch.context() as patched,
    ):  # beside another writer, then without locks
        memory.save_pretrained(tmp_path)
        patched.setattr(memory_files, "fcntl", None)
        memory.save_pretrained(tmp_path)
    assert is_whole(tmp_path, others=2) and all(other.exists() for other in others)
    memory.save_pretrained(tmp_path)
    assert is_whole(tmp_path)


@forks
def test_a_full_disk(tmp_path):
    import resource

    model = tiny_model()
    old, new = remember(model, tokens=5), remember(model, tokens=30)
    old.save_pretrained(tmp_path)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (tensors_file(tmp_path).stat().st_size,) * 2)
        try:
            new.save_pretrained(tmp_path)
        except OSError as error:
            os._exit(0 if "could not be saved" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0 and is_whole(tmp_path)
    assert_same_memory(HopeCache.from_pretrained(tmp_path, model=model), old, rtol=0, atol=0)
    with pytest.raises(OSError, match="could not be saved"):
        old.save_pretrained(tmp_path / "memory.json")


def test_nothing_is_copied_that_can_be_written_as_it_is(monkeypatch, tmp_path):
    model, written = tiny_model(), {}
    memory = remember(model)
    monkeypatch.setattr(memory_format, "write_files", lambda path, description, tensors: written.update(tensors) or 1)
    memory.save_pretrained(tmp_path)
    changes = {name: tensor for name, tensor in memory.tensors().items() if ".levels." in name}
    assert changes and all(written[name].data_ptr() == tensor.data_ptr() for name, tensor in changes.items())


def test_a_memory_whose_model_is_gone_is_saved_with_that_model_given(tmp_path):
    memory = remember(tiny_model())
    gc.collect()
    with pytest.raises(ValueError, match="model="):
        memory.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model = tiny_model()
    memory.save_pretrained(tmp_path, model=model)
    assert HopeCache.from_pretrained(tmp_path, model=model).seen == memory.seen


# Less precision


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"low_rank_error": 0.3},
        {"low_rank_error": 0.05, "dtype": torch.bfloat16},
    ],
)
def test_less_precision_says_what_it_lost(family, tmp_path, options):
    model = tiny_model(cms_variant="nested", intermediate_size=48, hidden_size=64)
    memory = remember(model, tokens=14)
    exact = memory.save_pretrained(tmp_path / "exact")
    saved = memory.save_pretrained(tmp_path / "less", **options)
    loaded = HopeCache.from_pretrained(tmp_path / "less", model=model)
    held, back = memory.tensors(), loaded.tensors()
    assert held.keys() == back.keys() and saved.bytes < 0.9 * exact.bytes and saved.full_bytes == exact.full_bytes
    errors = {
        name: float((back[name] - tensor).norm() / tensor.norm()) if tensor.any() else 0.0
        for name, tensor in held.items()
        if tensor.is_floating_point()
    }
    worst = max(errors.values())
    mean = (sum(error**2 for error in errors.values()) / len(errors)) ** 0.5
    assert saved.worst_error == pytest.approx(worst) == pytest.approx(errors[saved.worst_tensor])
    assert saved.relative_error == pytest.approx(mean) and 0 < mean <= worst
    rounding = torch.finfo(options["dtype"]).eps if "dtype" in options else 0
    if options.get("dtype") != torch.float16:  # whose smallest numbers are not small enough for that
        assert worst <= options.get("low_rank_error", 0) + 2 * rounding
    factored = [name for name in read_files(tmp_path / "less")[1] if name.endswith(".left")]
    assert all(".change." in name or ".initial." in name for name in factored)
    assert bool(factored) == ("low_rank_error" in options)
    for name, tensor in held.items():
        assert errors.get(name, 1) > 0 or torch.equal(tensor, back[name])
    lost = loaded.summary()["lost"]
    assert lost["relative_error"] == saved.relative_error and lost["worst_tensor"] == saved.worst_tensor
    assert "relative error" in str(saved) and saved.worst_tensor in str(saved) and "\n" not in str(saved)
    loaded.save_pretrained(tmp_path / "again")  # exactly, and what was lost before is not forgotten
    again = HopeCache.from_pretrained(tmp_path / "again", model=model)
    assert_same_memory(again, loaded, rtol=0, atol=0)
    assert again.lost == lost == loaded.clone().lost
    again.reset()
    assert again.lost is None
    if worst < 0.1:
        follow = random_ids(2, 3, seed=5)
        torch.testing.assert_close(read(model, loaded, follow), read(model, memory, follow), rtol=0.2, atol=0.5)
    assert model.generate(random_ids(2, 4, seed=6), past_key_values=loaded, max_new_tokens=5).shape == (2, 9)


def test_options_that_cannot_be_met(tmp_path):
    model = tiny_model(dtype=torch.float32)
    memory = remember(model)
    for options, message in [
        ({"dtype": torch.int8}, "`dtype`"),
        ({"dtype": torch.float64}, "`dtype`"),
        ({"low_rank_error": 0.0}, "`low_rank_error`"),
        ({"low_rank_error": 1.0}, "`low_rank_error`"),
        ({"low_rank_error": float("nan")}, "`low_rank_error`"),
    ]:
        with pytest.raises(ValueError, match=message):
            memory.save_pretrained(tmp_path / "wrong", **options)
    assert not (tmp_path / "wrong").exists()
    # Beyond the range of float16, it stays as it is.
    state = memory.layers[0].mixer
    state.tensors["keys"] = state.tensors["keys"] * 1e6
    memory.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = HopeCache.from_pretrained(tmp_path, model=model)
    assert torch.equal(loaded.layers[0].mixer.tensors["keys"], state.tensors["keys"])
    # Of full rank, and of none.
    for matrix, whole in [(torch.randn(8, 16), True), (torch.zeros(8, 16), False), (torch.ones(8, 16), False)]:
        factors = memory_format.encode({"a.change.b": matrix}, None, 1e-3)[0]
        assert (set(factors) == {"a.change.b"}) == whole


# Loading


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "memory.json").unlink(), "holds no memory"),
        (lambda path: (path / "memory.json").write_text("{"), "damaged"),
        (lambda path: (path / "memory.json").write_text("[]"), "no format version"),
        (lambda path: (path / "memory.json").write_text("[" * 100_000), "damaged"),
        (lambda path: (path / "memory.json").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda path: edit(path, lambda d: d.update(format_version=3)), "version 3 .* update"),
        (lambda path: edit(path, lambda d: d.update(format_version=1)), "version 1 .* read the text again"),
        (lambda path: edit(path, lambda d: d["file"].update(name="../x.safetensors")), "`file`"),
        (lambda path: edit(path, lambda d: d.update(tensors=[])), "`tensors`"),
        (lambda path: tensors_file(path).unlink(), "is missing"),
        (lambda path: tensors_file(path).write_bytes(b""), "0 bytes of"),
        (lambda path: tensors_file(path).write_bytes(tensors_file(path).read_bytes()[:-9]), "damaged"),
        (lambda path: edit_header(path, lambda header: b"\xff" * 8), "damaged"),
        (lambda path: edit_header(path, lambda header: (10**8).to_bytes(8, "little") + header[8:]), "damaged"),
        (lambda path: edit_header(path, lambda header: header[:8] + b"[" * (len(header) - 8)), "damaged"),
        (lambda path: edit_header(path, lambda h: h.replace(b'"BOOL"', b'"F999"')), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    model = tiny_model()
    remember(model).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        HopeCache.from_pretrained(tmp_path, model=model)
    assert str(tmp_path) in str(error.value)


def swap(one, other):
    def change(description, tensors):
        row = description["rows"][0]
        row[one], row[other] = row[other], row[one]

    return change


def put(name, value):
    return lambda description, tensors: description["rows"][0].update({name: value})


LEVEL = "layers.0.levels.0.rows.0."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap("pairs", "updates"), "level 0 has 5 `pairs`"),
        (swap("segments", "skipped"), "5 `updates`"),
        (swap("segments", "pending"), "has to be a int"),
        (swap("losses", "pairs"), "has to be a"),
        (put("pairs", [0, 3]), "2 entries for 3 levels"),
        (put("pairs", [0, 0, 0]), "gradient.* is there"),
        (put("pairs", [0, 6, 0]), "level 1"),
        (put("pairs", [0, 3, 1]), "level 2"),
        (put("pairs", [0, True, 0]), "int"),
        (put("updates", [5, 2.0, 0]), "int"),
        (put("updates", [6, 2, 0]), "level 0"),
        (put("updates", [0, 2, 0]), "change.* is there"),
        (put("skipped", -1), "`skipped` is -1"),
        (put("skipped", 1), "whole segments"),
        (put("nonfinite", 99), "whole segments"),
        (put("losses", [1.5]), "1 `losses`"),
        (put("losses", [1] * 5), "float"),
        (put("pending", 40), "vocabulary"),
        (put("pending", -1), "vocabulary"),
        (put("seen", 3), "unknown `seen`"),
        (lambda d, t: d["rows"][0].pop("losses"), "lacks `losses`"),
        (lambda d, t: d["rows"].pop(), "has to be .1, 2, 21, 4. of floats"),
        (lambda d, t: d["rows"].append(d["rows"][0]), "rows.2.ids is missing"),
        (lambda d, t: d.update(rows={}), "has to be a list"),
        (lambda d, t: d.update(columns=20), "`columns`"),
        (lambda d, t: d.update(notes=None), "`notes`"),
        (lambda d, t: d.update(dtype=None), "`dtype`"),
        (lambda d, t: d.update(more=1), "unknown `more`"),
        (lambda d, t: d.update(lost={"dtype": None}), "`lost`"),
        (
            lambda d, t: d.update(
                lost=dict.fromkeys(("relative_error", "worst_error"), float("inf"))
                | {"dtype": None, "low_rank_error": None, "worst_tensor": ""}
            ),
            "`lost`",
        ),
        (lambda d, t: d["model"].update(cms_periods=[4, 8]), "cms_periods"),
        (lambda d, t: d["model"].pop("cms_variant"), "cms_variant"),
        (lambda d, t: d["model"].update(colour="red"), "colour"),
        (lambda d, t: t.pop("fingerprint"), "fingerprint"),
        (lambda d, t: t.pop("rows.1.learn"), "rows.1.learn is missing"),
        (lambda d, t: t.update({"rows.0.learn": torch.ones(2, dtype=torch.bool)}), r"rows.0.learn is \[2\]"),
        (lambda d, t: t.update({"rows.0.ids": t["rows.0.ids"] + 30}), "vocabulary"),
        (lambda d, t: t.update({"rows.0.ids": t["rows.0.ids"] - NO_TOKEN * -3}), "vocabulary"),
        (lambda d, t: t.update({"rows.0.ids": t["rows.0.ids"] * 0 + NO_TOKEN}), "embeds is missing"),
        (lambda d, t: t.update({"rows.0.embeds": torch.zeros(2, 16)}), "rows.0.embeds"),
        (lambda d, t: t.update({"rows.0.ids": t["rows.0.ids"][:8]}), "learn is"),
        (lambda d, t: t.update({"rows.7.ids": t["rows.0.ids"]}), "no place"),
        (lambda d, t: t.pop(LEVEL + "change.up_proj"), "change.up_proj is missing"),
        (lambda d, t: t.update({LEVEL + "initial.up_proj": t[LEVEL + "change.up_proj"]}), "initial.up_proj is there"),
        (lambda d, t: t.update({LEVEL + "change.up_proj": t[LEVEL + "change.down_proj"]}), "change.up_proj is"),
        (lambda d, t: t.update({LEVEL + "change.up_proj.left": torch.ones(12, 1)}), "no two factors"),
        (lambda d, t: t.update({LEVEL + "change.up_proj.right": torch.ones(1, 16)}), "without"),
        (
            lambda d, t: t.update(
                {LEVEL + "change.q.left": torch.ones(12, 1), LEVEL + "change.q.right": torch.ones(1, 9)}
            ),
            "no place",
        ),
        (lambda d, t: t.pop("layers.0.mixer.keys"), "layers.0.mixer.keys is missing"),
        (lambda d, t: t.update({"layers.0.mixer.more": torch.ones(2)}), "mixer.more.* no place"),
        (lambda d, t: t.update({"layers.0.opened.keys": torch.ones(2)}), "opened.keys.* no place"),
        (lambda d, t: t.update({"layers.0.mixer.keys": t["layers.0.mixer.keys"][:, :, :-1].clone()}), "21 slots"),
        (lambda d, t: t.update({"layers.0.mixer.keys": t["layers.0.mixer.keys"].long()}), "of floats"),
    ],
)
def test_a_memory_that_contradicts_itself_or_its_model_is_refused(tmp_path, change, message):
    model = tiny_model()
    remember(model).save_pretrained(tmp_path)
    description, tensors = read_files(tmp_path)
    change(description, tensors)
    write_files(tmp_path, description, {name: tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=message) as error:
        HopeCache.from_pretrained(tmp_path, model=model)
    assert f"The memory in {tmp_path} cannot be used" in str(error.value)


def edit(path, change):
    """Change the JSON, and repair its checksum."""
    description = json.loads((path / "memory.json").read_text())
    change(description)
    description.pop("checksum", None)
    (path / "memory.json").write_bytes(_sealed(json.dumps(description, indent=2)[:-2].encode() + b",\n"))


def edit_header(path, change):
    """Change the header of the tensors, and repair its checksums."""
    file = tensors_file(path)
    header, _ = _header(file)
    numbers = file.read_bytes()[len(header) :]
    changed = change(header)
    file.write_bytes(changed + numbers)
    header, size = _header(file)
    digest = memory_files.hashlib.sha256(header).hexdigest()
    edit(path, lambda description: description["file"].update(bytes=size, header_sha256=digest))


def leaves(node, place=()):
    """Where in a JSON tree values stand."""
    if isinstance(node, dict | list) and node:
        entries = node.items() if isinstance(node, dict) else enumerate(node)
        return [leaf for key, value in entries for leaf in leaves(value, (*place, key))]
    return [place]


def parent(tree, place):
    for key in place[:-1]:
        tree = tree[key]
    return tree


class Corruption:
    """One random way to damage a memory's files; `False` where it would have changed nothing."""

    KINDS = (
        "flip", "flip", "cut", "append", "exchange", "swap_fields", "remove_field", "retype_field", "rename_tensors",
        "drop_tensor", "reshape_tensor", "retype_tensor",
    )  # fmt: skip

    def __init__(self, path: Path, other: Path, seed: int):
        self.path, self.other, self.random = path, other, random.Random(seed)
        self.kind = self.random.choice(self.KINDS)
        self.changed = getattr(self, self.kind)() is not False

    def file(self, path=None):
        return self.random.choice([(path or self.path) / "memory.json", tensors_file(path or self.path)])

    def flip(self):
        file = self.file()
        content = bytearray(file.read_bytes())
        for _ in range(self.random.choice([1, 1, 4])):
            content[self.random.randrange(len(content))] ^= self.random.randint(1, 255)
        same = bytes(content) == file.read_bytes()
        file.write_bytes(content)
        return not same

    def cut(self):
        file = self.file()
        os.truncate(file, self.random.randrange(file.stat().st_size))

    def append(self):
        with open(self.file(), "ab") as opened:
            opened.write(self.random.randbytes(self.random.randint(1, 20)))

    def exchange(self):
        if self.random.random() < 0.5:
            (self.path / "memory.json").write_bytes((self.other / "memory.json").read_bytes())
        else:
            tensors_file(self.path).write_bytes(tensors_file(self.other).read_bytes())

    def field(self, tree):
        """Of a part of the description drawn first, so that long parts do not take all draws."""
        part = self.random.choice(sorted(tree.keys() - {"checksum"}))
        return self.random.choice(leaves(tree[part], (part,)))

    def swap_fields(self):
        changed = []

        def change(tree):
            one, other = self.field(tree), self.field(tree)
            first, second = parent(tree, one)[one[-1]], parent(tree, other)[other[-1]]
            parent(tree, one)[one[-1]], parent(tree, other)[other[-1]] = second, first
            changed.append(json.dumps(first) != json.dumps(second))

        edit(self.path, change)
        return changed[0]

    def remove_field(self):
        def change(tree):
            place = self.field(tree)
            del parent(tree, place)[place[-1]]

        edit(self.path, change)

    def retype_field(self):
        def change(tree):
            place = self.field(tree)
            old = parent(tree, place)[place[-1]]
            others = [None, True, 7, 0.5, "7", [old], {"is": old}]
            new = (
                [float(old), str(old)]
                if type(old) is int
                else [value for value in others if type(value) is not type(old)]
            )
            parent(tree, place)[place[-1]] = self.random.choice(new)

        edit(self.path, change)

    def rename_tensors(self):
        def change(header):
            entries = json.loads(header[8:])
            one, other = self.random.sample(sorted(entries.keys() - {"__metadata__"}), 2)
            entries[one], entries[other] = entries[other], entries[one]
            text = json.dumps(entries).encode()
            return len(text).to_bytes(8, "little") + text

        edit_header(self.path, change)

    def rewritten(self, change):
        """As a writer with a fault would have written it: every checksum is right."""
        description, tensors = read_files(self.path)
        name = self.random.choice(sorted(tensors))
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        write_files(self.path, description, {name: tensor.clone() for name, tensor in tensors.items()})

    def drop_tensor(self):
        self.rewritten(lambda tensor: None)

    def reshape_tensor(self):
        shapes = [lambda t: t[None], lambda t: t.reshape(-1, 1), lambda t: t.flatten(), lambda t: t.mT]
        choices = shapes[:2] if self.random.random() < 0.5 else shapes[2:]
        shape = self.random.choice(choices)

        def change(tensor):
            shaped = tensor[None] if tensor.dim() < 2 else shape(tensor)
            return (shaped if shaped.shape != tensor.shape else tensor[None]).contiguous()

        self.rewritten(change)

    def retype_tensor(self):
        other = {
            torch.float64: torch.int64,
            torch.float32: torch.int32,
            torch.int64: torch.float64,
            torch.bool: torch.uint8,
        }
        self.rewritten(lambda tensor: tensor.view(other[tensor.dtype]))


def test_random_corruptions_are_clear_errors(model, tmp_path):
    """Over the three families, 201 of them, and all kinds in each."""
    memory = remember(model)
    sources = [tmp_path / "one", tmp_path / "other"]
    memory.notes = {"topic": "bees"}
    memory.save_pretrained(sources[0])
    remember(model, seed=1).save_pretrained(sources[1])
    path, done, seed = tmp_path / "damaged", [], 0
    path.mkdir()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    while len(done) < 67:
        seed += 1
        for entry in path.iterdir():
            entry.unlink()
        for entry in sources[0].iterdir():
            (path / entry.name).write_bytes(entry.read_bytes())
        corruption = Corruption(path, sources[1], seed)
        if not corruption.changed:
            continue
        with pytest.raises(ValueError) as error:
            HopeCache.from_pretrained(path, model=model)
        assert str(path) in str(error.value), (corruption.kind, seed)
        done.append(corruption.kind)
    assert set(done) == set(Corruption.KINDS) and len(load_file(tensors_file(sources[0]))) > 10
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
