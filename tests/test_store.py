"""The store of sessions: nothing that was told is ever lost, and nothing is seen by who may not."""

import errno
import io
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_hope import HopeCache, memory_files
from modeling_hope.serving import database, index, session_file, store
from modeling_hope.serving.quotas import Limits
from modeling_hope.serving.refusals import (
    QuotaExceeded,
    SessionBusy,
    SessionDamaged,
    SessionExists,
    SessionNotFound,
    StorageFailed,
    TurnLost,
)
from modeling_hope.serving.store import SessionStore

from .conftest import assert_same_memory, random_ids, read, tiny_model


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
LEARNED = 5  # tokens of a turn: every turn ends a segment of 4 or goes far into one


@pytest.fixture
def model():
    return tiny_model()


def opened(path, model, **options):
    return SessionStore(path, model, **{"warm_bytes": 2**24, **options})


def say(sessions, owner, id, seed=None, tokens=LEARNED, **options):
    """A turn that reads some tokens, by default those that follow from how many turns there were."""
    with sessions.turn(owner, id, **options) as turn:
        read(sessions.model, turn.memory, random_ids(1, tokens, seed=turn.session.turns if seed is None else seed))
        return turn.commit(turn.memory, {"prompt_tokens": tokens})


def alone(model, turns, tokens=LEARNED):
    """The memory of a session that had so many turns."""
    memory = HopeCache(model.config)
    for seed in range(turns):
        read(model, memory, random_ids(1, tokens, seed=seed))
    return memory


def memory_of(sessions, owner, id):
    with sessions.turn(owner, id) as turn:
        return turn.memory


def places(path):
    return {entry.name for entry in (path / "memories").iterdir()} - {index.EMPTY}


def files(path):
    return [file for file in path.rglob("*") if file.is_file()]


def is_clean(path, sessions):
    """No file that no session has."""
    assert places(path) == {place for _, _, place in sessions._index.all()} - {index.EMPTY}
    assert not any((path / "staging").iterdir()) and not sessions._index.trash()
    for place in places(path):
        assert len(list((path / "memories" / place).iterdir())) == 2
    return True


def test_a_session_goes_on_warm_and_cold(family, tmp_path):
    model = tiny_model()
    with opened(tmp_path, model) as sessions:
        assert sessions.create("ann", notes={"title": "bees"}).tokens == 0
        sessions.create("ann", "main")
        for _ in range(3):
            told = say(sessions, "ann", "main")
        assert told == sessions.get("ann", "main") and (told.turns, told.tokens, told.busy) == (3, 15, False)
        warm = memory_of(sessions, "ann", "main")
        assert_same_memory(warm, alone(model, 3), rtol=0, atol=0)
        assert told.memory == warm.summary()["rows"][0] and told.memory["levels"][0]["updates"] == 3
        assert told.bytes == sum(
            file.stat().st_size for file in files(tmp_path / "memories" / next(iter(places(tmp_path))))
        )
        assert is_clean(tmp_path, sessions)
    with opened(tmp_path, model, warm_bytes=0) as sessions:
        assert str(sessions.recovery) == f"2 sessions, {told.bytes / 2**20:.1f} MiB"
        assert say(sessions, "ann", "main").turns == 4 and len(sessions._warm) == 0
        assert_same_memory(memory_of(sessions, "ann", "main"), alone(model, 4), rtol=0, atol=0)
        history = sessions.history("ann", "main")
        assert [(line.turn, line.tokens, line.updates[0]) for line in history] == [
            (1, 5, 1),
            (2, 10, 2),
            (3, 15, 3),
            (4, 20, 5),
        ]
        assert history[0].record == {"prompt_tokens": 5} and history[-1].loss > 0 and history[0].at <= history[-1].at
        first, second = sessions.list("ann")
        assert (first.notes, second.id, sessions.list("ann", first.id, 1)) == ({"title": "bees"}, "main", [second])
        assert [one.id for one in sessions.list("ann", most=1)] == [first.id] and len(first.id) == 36
        # Levels are reset alone; the rest goes on. Then everything is.
        sessions.reset("ann", "main", [0])
        expected = alone(model, 4)
        expected.reset([0])
        assert_same_memory(memory_of(sessions, "ann", "main"), expected, rtol=0, atol=0)
        told = sessions.reset("ann", "main")
        assert (told.tokens, told.turns, sessions.history("ann", "main")[-1].record) == (0, 6, {"reset": "all"})
        assert is_clean(tmp_path, sessions)
        with pytest.raises(ValueError, match="levels"):
            sessions.reset("ann", "main", [7])
        assert not sessions.get("ann", "main").busy


def test_nothing_of_a_turn_is_kept_without_its_commit(tmp_path, model):
    with opened(tmp_path, model) as sessions:
        say(sessions, "ann", "main", create=True)
        with pytest.raises(ZeroDivisionError), sessions.turn("ann", "main") as turn:
            turn.memory.notes["x"] = 1
            read(model, turn.memory, random_ids(1, 9))
            raise ZeroDivisionError
        with sessions.turn("ann", "main") as turn:
            for memory, message in [
                (HopeCache(model.config, 2), "2 rows"),
                (HopeCache(tiny_model(cms_periods=[4, 12, None]).config), "another model"),
                ("memory", "HopeCache"),
            ]:
                with pytest.raises(ValueError, match=message):
                    turn.commit(memory)
            for record in ({"x": float("nan")}, {"x": object}, {"x": "y" * 20_000}, ["x"]):
                with pytest.raises(ValueError, match="record"):
                    turn.commit(turn.memory, record)
            assert turn.commit(turn.memory).turns == 2  # none of that has ended the turn
            with pytest.raises(RuntimeError, match="has ended"):
                turn.commit(turn.memory)
        assert_same_memory(memory_of(sessions, "ann", "main"), alone(model, 1), rtol=0, atol=0)
        assert memory_of(sessions, "ann", "main").notes == {} and is_clean(tmp_path, sessions)


def test_an_interrupt_and_a_store_that_is_closed(tmp_path, model):
    with opened(tmp_path, model) as sessions:
        commit = sessions._index.commit

        def interrupted(*args, **kwargs):
            commit(*args, **kwargs)
            raise KeyboardInterrupt

        sessions._index.commit = interrupted
        with pytest.raises(KeyboardInterrupt):  # just after it was kept
            say(sessions, "ann", "main", create=True)
        sessions._index.commit = commit
        assert say(sessions, "ann", "main").turns == 2
        assert_same_memory(memory_of(sessions, "ann", "main"), alone(model, 2), rtol=0, atol=0)
        with sessions.turn("ann", "main") as turn:
            sessions.close()
            with pytest.raises(StorageFailed, match="store is closed"):
                turn.commit(turn.memory)
        with pytest.raises(StorageFailed, match="store is closed"):
            sessions.get("ann", "main")
    with opened(tmp_path, model) as sessions:
        assert str(sessions.recovery).endswith(
            "1 turn cut off and lost, all before kept; 1 leftover of killed processes removed, 0.0 MiB"
        )
        assert sessions.recovery.interrupted == [("ann", "main")]
        assert_same_memory(memory_of(sessions, "ann", "main"), alone(model, 2), rtol=0, atol=0)
        assert is_clean(tmp_path, sessions)


def test_another_owners_session_does_not_exist(tmp_path, model):
    with opened(tmp_path, model) as sessions:
        say(sessions, "ann", "main", create=True)
        for attempt in (
            lambda: sessions.get("bob", "main"),
            lambda: sessions.turn("bob", "main"),
            lambda: sessions.fork("bob", "main"),
            lambda: sessions.reset("bob", "main"),
            lambda: sessions.delete("bob", "main"),
            lambda: sessions.export("bob", "main"),
            lambda: sessions.history("bob", "main"),
            lambda: sessions.list("bob", after="main"),
        ):
            with pytest.raises(SessionNotFound) as hers:
                attempt()
            with pytest.raises(SessionNotFound) as nobodys:
                sessions.get("bob", "other")
            assert str(hers.value).replace("main", "other") == str(nobodys.value)
        assert sessions.list("bob") == [] and sessions.usage("bob") == index.Usage(0, 0)
        assert sessions.create("bob", "main").tokens == 0 and sessions.get("ann", "main").tokens == LEARNED
        with pytest.raises(SessionExists):
            sessions.create("bob", "main")
        for wrong in ("", ".", "..", "a/b", "../x", "a b", "é", "x" * 65, "a\n", "a\0", 7, None, ["a"]):
            for attempt in (sessions.get, sessions.turn, sessions.delete, sessions.export, sessions.fork):
                with pytest.raises(ValueError, match="is no session id"):
                    attempt("ann", wrong)
            with pytest.raises(ValueError, match="is no owner"):
                sessions.create(wrong)
        for right in ("a", ".a", "A-b_c.9", "x" * 64, "-"):
            assert sessions.create("cyd", right).id == right
        for notes in ({"x": float("inf")}, {"x": "y" * 20_000}, "x"):
            with pytest.raises(ValueError, match="notes"):
                sessions.create("cyd", notes=notes)


def test_one_turn_at_a_time(tmp_path, model):
    with opened(tmp_path, model) as sessions, opened(tmp_path, model) as others:
        say(sessions, "ann", "main", create=True)
        with sessions.turn("ann", "main"):
            assert sessions.get("ann", "main").busy
            for each in (sessions, others):  # also from another process
                with pytest.raises(SessionBusy):
                    each.turn("ann", "main")
                with pytest.raises(SessionBusy):
                    each.reset("ann", "main")
            fork = others.fork("ann", "main", "side")  # as it is after its last turn
            assert fork.tokens == LEARNED and say(others, "ann", "side").tokens == 2 * LEARNED
        sessions.wait = others.wait = 20
        workers = [threading.Thread(target=say, args=(each, "ann", "main")) for each in (sessions, others) * 6]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert sessions.get("ann", "main").turns == 13
        assert_same_memory(memory_of(others, "ann", "main"), alone(model, 13), rtol=0, atol=0)
        assert is_clean(tmp_path, sessions)
        # One that starts leaves alone what another is writing.
        commit = sessions._index.commit
        sessions._index.commit = lambda *args, **kwargs: (opened(tmp_path, model).close(), commit(*args, **kwargs))[1]
        say(sessions, "ann", "main")
        sessions._index.commit = commit
        assert_same_memory(memory_of(others, "ann", "main"), alone(model, 14), rtol=0, atol=0)
        # One that was thought dead overwrites nothing.
        lost = sessions.turn("ann", "main")
        sessions._turns.clear()
        say(sessions, "ann", "main")
        with pytest.raises(TurnLost):
            lost.commit(lost.memory)
        lost.close()
        assert sessions.get("ann", "main").turns == 15 and is_clean(tmp_path, sessions)
    with pytest.raises(ValueError, match="wait"):
        opened(tmp_path, model, wait=-1)


def test_warm_memories_keep_to_their_budget_and_forks_share(tmp_path, model):
    with opened(tmp_path, model) as sessions:
        say(sessions, "ann", "0", create=True, tokens=9)
        memory_of(sessions, "ann", "0")
        one = sessions.stats()["warm_bytes"]
        for name in range(1, 6):
            sessions.fork("ann", "0", str(name))
            assert len(places(tmp_path)) == 1 and memory_of(sessions, "ann", str(name)).seen == [9]
        assert sessions.stats()["warm_bytes"] == one > 0
        before = memory_of(sessions, "ann", "0").tensors()
        say(sessions, "ann", "1", tokens=1)  # ends no segment: what was learned is shared still
        after = memory_of(sessions, "ann", "1").tensors()
        shared = [name for name in before if "change" in name and before[name] is after[name]]
        memories = [sessions._warm.get(sessions._index.find("ann", name).place) for name in ("0", "1")]
        assert memories[0].layers[0].levels[1][0] is memories[1].layers[0].levels[1][0]  # and so are sums made with it
        assert shared and sessions.stats()["warm_bytes"] < 2 * one and len(places(tmp_path)) == 2
        for name in range(2, 6):
            say(sessions, "ann", str(name), seed=name)
    with opened(tmp_path, model, warm_bytes=int(3.5 * one)) as sessions:
        used = random.Random(0)
        for turns in range(30):
            name = str(used.randrange(6))
            if turns % 3:
                memory_of(sessions, "ann", name)
            else:
                say(sessions, "ann", name, tokens=1)
            held = {
                key: size for memory, _ in sessions._warm._memories.values() for key, size in memory.storages().items()
            }
            assert sum(held.values()) == sessions.stats()["warm_bytes"] <= 3.5 * one
        stats = sessions.stats()
        assert stats["warm_hits"] and stats["warm_misses"] and stats["warm_evictions"] and stats["warm_sessions"] < 6
        recent = list(sessions._warm._memories)[-1]
        assert sessions._index.find("ann", name).place == recent
        for name in range(6):
            sessions.delete("ann", str(name))
        left = sessions.stats()
        assert left["sessions"] == left["bytes"] == 0 and left["warm_sessions"] <= 1 and is_clean(tmp_path, sessions)


def test_what_is_deleted_is_gone_and_its_forks_stay(tmp_path, model):
    secret = "Q7-secret-words"
    with opened(tmp_path, model) as sessions:
        say(sessions, "ann", secret, create=True)
        sessions.fork("ann", secret, "fork")
        with sessions.turn("ann", secret) as turn:
            turn.memory.notes["said"] = secret
            turn.commit(turn.memory, {"about": secret})
        assert any(secret.encode() in file.read_bytes() for file in files(tmp_path))
        place = sessions._index.find("ann", secret).place
        late = sessions.turn("ann", secret)
        sessions.delete("ann", secret)
        with pytest.raises(TurnLost):
            late.commit(late.memory)
        late.close()
        assert not (tmp_path / "memories" / place).exists() and sessions._warm.get(place) is None
        with pytest.raises(SessionNotFound):
            sessions.get("ann", secret)
        assert sessions.create("ann", secret, {"title": secret}).turns == 0 == len(sessions.history("ann", secret))
        sessions.delete("ann", secret)
        for file in files(tmp_path):
            assert secret.encode() not in file.read_bytes(), file
        assert_same_memory(memory_of(sessions, "ann", "fork"), alone(model, 1), rtol=0, atol=0)
        assert say(sessions, "ann", "fork").tokens == 2 * LEARNED and is_clean(tmp_path, sessions)


def test_a_session_that_is_deleted_while_it_is_read(tmp_path, model, monkeypatch):
    with opened(tmp_path, model, warm_bytes=0) as sessions:
        say(sessions, "ann", "main", create=True)
        from_pretrained = HopeCache.from_pretrained

        def after(do):
            def load(*args, **kwargs):
                monkeypatch.undo()
                do()
                return from_pretrained(*args, **kwargs)

            monkeypatch.setattr(HopeCache, "from_pretrained", load)

        after(lambda: sessions.delete("ann", "main"))
        with pytest.raises(SessionNotFound):
            sessions.turn("ann", "main")
        say(sessions, "ann", "main", create=True)
        packed = session_file.pack
        monkeypatch.setattr(
            store, "pack", lambda *args: (monkeypatch.undo(), say(sessions, "ann", "main"), packed(*args))
        )
        sessions.export("ann", "main").close()  # the turn after it is as good
        assert not sessions._turns and is_clean(tmp_path, sessions)
    with opened(tmp_path, model) as sessions:
        load = sessions._places.load
        monkeypatch.setattr(sessions._places, "load", lambda place: (load(place), sessions.delete("ann", "main"))[0])
        with sessions.turn("ann", "main") as turn, pytest.raises(TurnLost):
            turn.commit(turn.memory)
        assert sessions.stats()["warm_bytes"] == 0 and is_clean(tmp_path, sessions)


# Files that come and go


def test_an_exported_session_comes_back(family, tmp_path):
    model = tiny_model()
    with opened(tmp_path / "a", model) as sessions, opened(tmp_path / "b", model) as others:
        sessions.create("ann", "main", {"title": "bees"})
        for turns in range(4):
            with sessions.export("ann", "main") as file:
                told = others.import_("bob", file)
            assert (told.tokens, told.notes, told.turns) == (turns * LEARNED, {"title": "bees"}, 0)
            assert_same_memory(memory_of(others, "bob", told.id), alone(model, turns), rtol=0, atol=0)
            say(sessions, "ann", "main")
        read(model, memory_of(others, "bob", told.id), random_ids(1, 9))
        with sessions.export("ann", "main") as file, pytest.raises(SessionExists):
            others.import_("bob", file, told.id)
        with sessions.export("ann", "main") as file:
            (tmp_path / "one.safetensors").write_bytes(file.read())
        assert "rows.0.ids" in load_file(tmp_path / "one.safetensors")  # as any safetensors file
        assert is_clean(tmp_path / "a", sessions) and is_clean(tmp_path / "b", others)


def test_what_is_imported_is_checked_before_anything_is_kept(tmp_path, model):
    limits = {"bob": Limits(bytes=10**7)}
    with opened(tmp_path, model, limits=lambda owner: limits.get(owner, Limits())) as sessions:
        for _ in range(2):
            say(sessions, "ann", "main", create=True)
        with sessions.export("ann", "main") as file:
            whole = file.read()

        def rewritten(change):
            path = tmp_path / "changed.safetensors"
            path.write_bytes(whole)
            tensors = load_file(path)
            with session_file.safe_open(path, framework="pt") as file:
                told = json.loads(file.metadata()[session_file.METADATA])
            change(told, tensors)
            save_file(tensors, path, metadata={session_file.METADATA: json.dumps(told)})
            return path.read_bytes()

        def digest_of_another(told, tensors):
            tensors["rows.0.ids"] = tensors["rows.0.ids"] + 1

        def beyond_the_vocabulary(told, tensors):
            tensors["rows.0.ids"] = tensors["rows.0.ids"] + 1000
            told["tensors"]["rows.0.ids"][1] = memory_files.tensor_digest(tensors["rows.0.ids"])

        def other_weights(told, tensors):
            tensors["fingerprint"] = tensors["fingerprint"] + 0.1
            told["tensors"]["fingerprint"][1] = memory_files.tensor_digest(tensors["fingerprint"])

        wrong = [
            (b"", "no session"),
            (b"words", "no session"),
            (whole[:-9], "no session"),
            (whole[:100], "no session"),
            (
                rewritten(lambda told, tensors: None).replace(session_file.METADATA.encode(), b"hope_sessiom"),
                "metadata",
            ),
            (rewritten(lambda told, tensors: told.update(format_version=2)), "update modeling_hope"),
            (rewritten(lambda told, tensors: told.update(more=1)), "unknown `more`"),
            (rewritten(lambda told, tensors: told.update(tensors=[])), "tensors"),
            (rewritten(lambda told, tensors: told["memory"].update(rows=told["memory"]["rows"] * 2)), "one row"),
            (rewritten(lambda told, tensors: told["memory"].update(rows=7)), "one row"),
            (rewritten(lambda told, tensors: told["memory"].update(notes=7)), "notes"),
            (rewritten(lambda told, tensors: told["memory"].update(more=7)), "more"),
            (rewritten(lambda told, tensors: told["tensors"].update(a=["b", "c"])), "missing"),
            (rewritten(lambda told, tensors: told["tensors"].update(a=["rows.0.ids"])), "missing"),
            (rewritten(lambda told, tensors: told["tensors"].pop("rows.0.learn")), "nothing names|missing"),
            (rewritten(lambda told, tensors: told["memory"]["model"].update(cms_periods=[4])), "another model"),
            (rewritten(lambda told, tensors: told.update(notes={"x": "y" * 20_000})), "notes"),
            (rewritten(digest_of_another), "have changed"),
            (rewritten(beyond_the_vocabulary), "vocabulary"),
            (rewritten(other_weights), "other weights"),
        ]
        before = (sorted(files(tmp_path)), sessions.usage("ann"), places(tmp_path))
        for file, message in wrong:
            with pytest.raises(ValueError, match=message) as refused:
                sessions.import_("ann", io.BytesIO(file))
            assert str(tmp_path) not in str(refused.value)
        limits["bob"] = Limits(bytes=len(whole) - 1)
        with pytest.raises(QuotaExceeded, match="bytes"):
            sessions.import_("bob", io.BytesIO(whole))
        assert (sorted(files(tmp_path)), sessions.usage("ann"), places(tmp_path)) == before
        # A count that a session cannot have does no harm.
        told = sessions.import_(
            "ann", io.BytesIO(rewritten(lambda told, tensors: told["memory"].update(columns=10**15)))
        )
        assert say(sessions, "ann", told.id, seed=2).tokens == 3 * LEARNED
        assert_same_memory(memory_of(sessions, "ann", told.id), alone(model, 3), rtol=0, atol=0)
        assert is_clean(tmp_path, sessions)


# What is refused


def test_quotas_of_sessions_and_bytes(tmp_path, model):
    limits = {"ann": Limits(sessions=2)}
    with opened(tmp_path, model, limits=lambda owner: limits.get(owner, Limits())) as sessions:
        say(sessions, "ann", "a", create=True)
        sessions.create("ann", "b")
        for attempt in (
            lambda: sessions.create("ann"),
            lambda: sessions.fork("ann", "a"),
            lambda: sessions.turn("ann", "c", create=True),
            lambda: sessions.import_("ann", sessions.export("ann", "a")),
        ):
            with pytest.raises(QuotaExceeded, match="2 are allowed") as refused:
                attempt()
            assert refused.value.limit == "sessions"
        sessions.create("bob", "c")
        sessions.delete("ann", "b")
        held = sessions.usage("ann").bytes
        limits["ann"] = Limits(bytes=held + 1)
        say(sessions, "ann", "a")  # begun below the limit, and kept
        assert sessions.usage("ann").bytes > held + 1
        for attempt in (
            lambda: sessions.create("ann"),
            lambda: sessions.turn("ann", "a"),
            lambda: sessions.fork("ann", "a"),
        ):
            with pytest.raises(QuotaExceeded) as refused:
                attempt()
            assert refused.value.limit == "bytes"
        assert sessions.reset("ann", "a").bytes < held and not sessions.get("ann", "a").busy
        limits["ann"] = Limits(bytes=10**7, sessions=10)
        results = []

        def create():
            try:
                results.append(sessions.create("ann").id)
            except QuotaExceeded:
                results.append(None)

        workers = [threading.Thread(target=create) for _ in range(20)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len([id for id in results if id]) == 9 and sessions.usage("ann").sessions == 10
        assert is_clean(tmp_path, sessions)


def test_a_directory_that_is_not_this_models(tmp_path, model):
    with opened(tmp_path, model) as sessions:
        say(sessions, "ann", "main", create=True)
    with pytest.raises(ValueError, match="other weights"):
        opened(tmp_path, tiny_model(seed=1))
    with pytest.raises(ValueError, match="cms_periods"):
        opened(tmp_path, tiny_model(cms_periods=[4, 12, None]))
    with opened(tmp_path, tiny_model(dtype=torch.float32)) as sessions:  # cast, it is the same
        assert say(sessions, "ann", "main").turns == 2
    for statement, message in [
        ("PRAGMA user_version = 2", "schema version 2.*update"),
        ("PRAGMA user_version = 0", "schema version 0.*export"),
        ("PRAGMA application_id = 7", "give another directory"),
    ]:
        with closing(sqlite3.connect(tmp_path / database.FILE)) as connection:
            connection.execute(statement)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path, model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / database.FILE).write_bytes(b"words" * 100)
    with pytest.raises(ValueError, match="no index of sessions, or damaged"):
        opened(tmp_path / "other", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        opened(tmp_path / "file", model)
    with pytest.raises(ValueError, match="warm_bytes"):
        opened(tmp_path / "new", model, warm_bytes=-1)
    assert not (tmp_path / "new").exists()
    with opened(tmp_path / "new", model) as sessions:
        assert {path.stat().st_mode & 0o077 for path in (tmp_path / "new", tmp_path / "new" / database.FILE)} == {0}


def test_damaged_files_are_told_and_cost_no_other_session(tmp_path, model):
    with opened(tmp_path, model) as sessions:
        for name in ("a", "b", "c"):
            say(sessions, "ann", name, create=True)
        lost, cut = (sessions._index.find("ann", name).place for name in ("a", "b"))
    (tmp_path / "memories" / lost / "memory.json").unlink()
    (tensors,) = (tmp_path / "memories" / cut).glob("*.safetensors")
    os.truncate(tensors, 100)
    with opened(tmp_path, model) as sessions:
        assert sessions.recovery.missing == [("ann", "a")] and "1 session WITHOUT FILES" in str(sessions.recovery)
        for name in ("a", "b"):
            for attempt in (sessions.turn, sessions.export):
                with pytest.raises(SessionDamaged, match=f"{name!r} cannot be read") as refused:
                    attempt("ann", name)
                assert str(tmp_path) not in str(refused.value)
            assert not sessions.get("ann", name).busy
        assert say(sessions, "ann", "c").turns == 2
        assert sessions.reset("ann", "a").tokens == 0 and say(sessions, "ann", "a", seed=0).tokens == LEARNED
        sessions.delete("ann", "b")
        assert is_clean(tmp_path, sessions)


# Crashes


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(tensors, path, **kwargs):
    save_file(tensors, path, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)
    full_disk()


def test_a_full_disk_loses_nothing(tmp_path, model, monkeypatch):
    with opened(tmp_path, model) as sessions:
        say(sessions, "ann", "main", create=True)
        with sessions.export("ann", "main") as file:
            whole = file.read()
        for target, name, failing in [
            (memory_files, "save_file", half_written),
            (os, "fsync", full_disk),
            (os, "mkdir", full_disk),
        ]:
            with sessions.turn("ann", "main") as turn, monkeypatch.context() as patched:
                patched.setattr(target, name, failing)
                for attempt in (lambda: turn.commit(turn.memory), lambda: sessions.import_("ann", io.BytesIO(whole))):
                    with pytest.raises(StorageFailed, match="No space left") as refused:
                        attempt()
                    assert refused.value.errno == errno.ENOSPC
            assert is_clean(tmp_path, sessions) and len(sessions._warm) <= 2
        with monkeypatch.context() as patched:
            patched.setattr(session_file, "save_file", half_written)
            with pytest.raises(StorageFailed, match="No space left"):
                sessions.export("ann", "main")
        # The index, for real: SQLite may not take another page.
        (pages,) = sessions._database._connection.execute("PRAGMA page_count").fetchone()
        sessions._database._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageFailed, match="full") as refused:
            for name in range(1000):
                sessions.fork("ann", "main", f"fork-{name}-{'x' * 40}")
        assert refused.value.errno == errno.ENOSPC
        with sessions.turn("ann", "main") as turn, pytest.raises(StorageFailed, match="full"):
            turn.commit(turn.memory, {"x": "y" * 15_000})
        sessions._database._connection.execute("PRAGMA max_page_count = 100000")
        assert is_clean(tmp_path, sessions)
        # There is space again: the same turn is kept, and is what it would have been.
        assert say(sessions, "ann", "main").turns == 2
        assert_same_memory(memory_of(sessions, "ann", "main"), alone(model, 2), rtol=0, atol=0)
        with sessions.turn("ann", "main") as turn, monkeypatch.context() as patched:
            patched.setattr(sessions._index, "release", lambda *args: (_ for _ in ()).throw(StorageFailed(28, "full")))
            turn.close()
        assert say(sessions, "ann", "main").turns == 3  # not held for ever


def script(path, model, told, network=False):
    """One of each thing that changes a store. What was told is what may not be lost."""
    with opened(path, model, network=network) as sessions:
        done = sessions.usage("ann").sessions and sessions.get("ann", "main").turns
        for turns in range(done, 3):
            say(sessions, "ann", "main", create=True)
            told(f"main {turns + 1}")
        if not any(session.id == "fork" for session in sessions.list("ann")):
            sessions.fork("ann", "main", "fork")
        told("fork")
        if sessions.get("ann", "fork").turns < 1:
            say(sessions, "ann", "fork", seed=3)
        told("forked")
        with sessions.export("ann", "main") as file:
            if not any(session.id == "copy" for session in sessions.list("ann")):
                sessions.import_("ann", file, "copy")
        told("copy")
        sessions.reset("ann", "copy", [0])
        sessions.delete("ann", "copy")
        told("deleted")


def check(path, model, told, sessions):
    """A store after any crash: what was told is there, what is there is right, and nothing else is."""
    assert is_clean(path, sessions) and not sessions.recovery.missing
    there = {session.id: session for session in sessions.list("ann")}
    turns = there["main"].turns if "main" in there else 0
    assert turns >= max((int(word[5:]) for word in told if word.startswith("main ")), default=0)
    assert not any(session.busy for session in there.values())
    if turns:
        assert_same_memory(memory_of(sessions, "ann", "main"), alone(model, turns), rtol=0, atol=0)
    if "fork" in told:
        forked = there["fork"].turns
        assert forked or "forked" not in told
        assert_same_memory(memory_of(sessions, "ann", "fork"), alone(model, 3 + forked), rtol=0, atol=0)
    if "copy" in told and "copy" in there and not there["copy"].turns:
        assert_same_memory(memory_of(sessions, "ann", "copy"), alone(model, 3), rtol=0, atol=0)
    assert "deleted" not in told or "copy" not in there
    locks = [entry.name for entry in (path / "holders").iterdir()]
    assert locks == [sessions._holder.name]


def killed_at(step, run):
    """
    Whether a child was killed before that step, a line of the store's code or of the memory's files, and what it told.

    Where it was not, it tells the steps at which it came to a line for the first or the last time.
    """
    parent, child = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            count, first, last, files = 0, {}, {}, (os.path.dirname(store.__file__), memory_files.__file__)

            def trace(frame, event, argument):
                nonlocal count
                if not frame.f_code.co_filename.startswith(files):
                    return None
                if event == "line":
                    count += 1
                    first.setdefault((frame.f_code, frame.f_lineno), count)
                    last[frame.f_code, frame.f_lineno] = count
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            run(lambda word: os.write(child, f"{word}\n".encode()))
            sys.settrace(None)
            with open(child, "w") as pipe:
                pipe.writelines(f"{count}\n" for count in sorted({*first.values(), *last.values()}))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(child)
    with open(parent) as pipe:
        told = pipe.read().split("\n")[:-1]
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), (step, told)
    return status != 0, told


def kill_everywhere(tmp_path, model, steps, network=False):
    interrupted = removed = 0
    for number, step in enumerate(steps):
        path = tmp_path / str(step)
        killed, told = killed_at(step, lambda told, path=path: script(path, model, told, network))
        assert killed
        with opened(path, model, network=network) as sessions:
            interrupted += len(sessions.recovery.interrupted)
            removed += sessions.recovery.removed
            assert ("cut off" in str(sessions.recovery)) == bool(sessions.recovery.interrupted)
            check(path, model, told, sessions)
        if number % 6:
            continue
        script(path, model, lambda word: None, network)  # and goes on as if nothing had been
        with opened(path, model, network=network) as sessions:
            check(path, model, ["main 3", "fork", "forked", "deleted"], sessions)
            assert not sessions.recovery.interrupted and not sessions.recovery.removed
    return interrupted, removed


@pytest.fixture
def unsynced(monkeypatch):
    """What a killed process has written is written: only a power failure would need more, which no test has."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def steps_of_script(tmp_path, model):
    return [int(word) for word in killed_at(0, lambda told: script(tmp_path / "0", model, told))[1] if word.isdecimal()]


@forks
def test_a_process_killed_at_any_line_loses_at_most_its_turn(tmp_path, model, unsynced):
    steps = steps_of_script(tmp_path, model)
    chosen = steps[:: len(steps) // 15]
    interrupted, removed = kill_everywhere(tmp_path, model, chosen)
    assert len(steps) > 500 and interrupted > 2 and removed > 2
    kill_everywhere(tmp_path / "network", model, chosen[::8], network=True)


@pytest.mark.slow
@forks
def test_a_process_killed_at_every_line_loses_at_most_its_turn(tmp_path, model, unsynced):
    kill_everywhere(tmp_path, model, steps_of_script(tmp_path, model))


@forks
@pytest.mark.parametrize("network", [False, True])
def test_processes_that_share_a_directory_and_are_killed_at_any_time(tmp_path, model, unsynced, network):
    """Two at a time go on with the same session; whichever is killed, the others take it up."""
    chosen, told = random.Random(2), 0
    for _ in range(4):
        parent, child = os.pipe()
        workers = []
        for _ in range(2):
            pid = os.fork()
            if not pid:
                try:
                    with opened(tmp_path, model, wait=60, network=network) as sessions:
                        while True:
                            turns = say(sessions, "ann", "main", create=True).turns
                            os.write(child, turns.to_bytes(4, "big"))
                finally:
                    os._exit(1)
            workers.append(pid)
        os.close(child)
        with open(parent, "rb", buffering=0) as pipe:
            written = b""
            for pid in workers:
                for _ in range(chosen.randint(1, 4)):
                    written += pipe.read(4)
                time.sleep(0.02 * chosen.random())
                os.kill(pid, signal.SIGKILL)
                assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            written += pipe.readall()
        turns = [int.from_bytes(written[start : start + 4], "big") for start in range(0, len(written), 4)]
        assert len(set(turns)) == len(turns)  # no turn was done twice
        told = max([told, *turns])
        with opened(tmp_path, model, network=network) as sessions:
            session = sessions.get("ann", "main")
            assert is_clean(tmp_path, sessions) and told <= session.turns <= told + 2  # one each
            assert_same_memory(memory_of(sessions, "ann", "main"), alone(model, session.turns), rtol=0, atol=0)
    assert told > 10
