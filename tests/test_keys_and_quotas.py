"""API keys and limits: who asks, and how much."""

import os
import threading

import pytest

from modeling_hope.serving.database import FILE
from modeling_hope.serving.ids import check_id, make_id
from modeling_hope.serving.keys import KEY, Keys
from modeling_hope.serving.quotas import NO_LIMITS, Limits, Quotas
from modeling_hope.serving.refusals import QuotaExceeded


def test_a_key_opens_its_owners_sessions_until_it_is_removed(tmp_path):
    keys, others = Keys(tmp_path / "store"), Keys(tmp_path / "store")  # of the command and of the server
    ann, again, bob = keys.add("ann", Limits(sessions=3)), keys.add("ann"), others.add("bob")
    assert len({ann, again, bob}) == 3 and all(KEY.fullmatch(key) for key in (ann, again, bob))
    assert [others.owner_of(key) for key in (ann, again, bob)] == ["ann", "ann", "bob"]
    assert [key.owner for key in keys.list()] == ["ann", "ann", "bob"]
    assert keys.list()[0].id in ann and keys.list()[0].created > 1e9
    assert others.limits("ann") == Limits(sessions=3) and others.limits("bob") == others.limits("cyd") == NO_LIMITS
    keys.add("bob", Limits(bytes=7))
    assert others.limits("bob") == Limits(bytes=7)
    id, secret = KEY.fullmatch(ann).groups()
    for wrong in (
        "",
        "hope-",
        secret,
        ann[:-1],
        ann + "A",
        ann.upper(),
        ann + "\n",
        f"hope-{id}-{'A' * 43}",
        f"hope-{'0' * 12}-{secret}",
        "é" * 61,
    ):
        assert keys.owner_of(wrong) is None, wrong
    removed = keys.remove(id)
    assert (removed.id, removed.owner) == (id, "ann")
    assert others.owner_of(ann) is None and others.owner_of(again) == "ann" and len(others.list()) == 3
    with pytest.raises(LookupError, match="not the key"):
        keys.remove(id)
    for wrong in ("", "a/b", "..", "x" * 65, None):
        with pytest.raises(ValueError, match="is no owner"):
            keys.add(wrong)
    assert len(keys.list()) == 3
    for each in (keys, others):
        each.close()


def test_no_key_is_kept(tmp_path, capsys):
    keys = Keys(tmp_path)
    key = keys.add("ann")
    _, secret = KEY.fullmatch(key).groups()
    keys.owner_of(key)
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes() and not os.stat(file).st_mode & 0o077
    digest = keys._database.query("SELECT digest FROM keys")[0][0]
    keys.remove(keys.list()[0].id)
    keys.close()
    assert digest not in (tmp_path / FILE).read_bytes() and capsys.readouterr() == ("", "")


def test_secrets_are_compared_in_constant_time(tmp_path, monkeypatch):
    """As many bytes are compared, and by `compare_digest`, whether or not there is such a key."""
    keys, compared = Keys(tmp_path), []
    key = keys.add("ann")
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    for each in (key, key[:-1] + ("A" if key[-1] != "A" else "B"), f"hope-{'0' * 12}-{'A' * 43}", "words"):
        keys.owner_of(each)
    assert compared == [(32, 32)] * 4
    keys.close()


def test_ids():
    assert check_id(make_id()) and len({make_id() for _ in range(1000)}) == 1000
    with pytest.raises(ValueError, match=r"\.\.\. is no session id"):
        check_id("x/" * 10_000)


def test_limits():
    assert Limits.from_json(Limits(bytes=5).to_json()) == Limits(bytes=5)
    assert Limits(bytes=5).over(Limits(bytes=7, sessions=2)) == Limits(bytes=5, sessions=2)
    for wrong in ({"sessions": 0}, {"bytes": -1}, {"prompt_tokens": 1.5}, {"tokens_per_minute": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)


def test_tokens_per_minute_and_length_of_a_prompt():
    now, limits = [0.0], {"ann": Limits(tokens_per_minute=600, prompt_tokens=500)}
    quotas = Quotas(lambda owner: limits.get(owner, NO_LIMITS), lambda: now[0])
    with pytest.raises(QuotaExceeded, match="501 tokens, and 500") as refused:
        quotas.admit("ann", 501, 1)
    assert (refused.value.limit, refused.value.retry_after) == ("prompt_tokens", None)
    charge = quotas.admit("ann", 300, 200)
    with pytest.raises(QuotaExceeded, match="100 are left of the 600") as refused:
        quotas.admit("ann", 100, 50)
    assert (refused.value.limit, refused.value.retry_after) == ("tokens_per_minute", 5)
    quotas.admit("bob", 10**9, 10**9).settle(3)  # nobody else's
    now[0] = 5.0
    quotas.admit("ann", 100, 50)
    charge.settle(310)  # 190 were not said
    charge.settle(0)  # once
    quotas.admit("ann", 100, 90)
    with pytest.raises(QuotaExceeded):
        quotas.admit("ann", 1, 0)
    # More than a minute's: let in when all is there, and paid for afterwards.
    now[0] = 100.0
    quotas.admit("ann", 400, 800)
    now[0] = 159.0
    with pytest.raises(QuotaExceeded) as refused:
        quotas.admit("ann", 10, 0)
    assert refused.value.retry_after == pytest.approx(2.0)
    now[0] = 161.0
    quotas.admit("ann", 10, 0)
    now[0] = 1000.0
    admitted = []

    def ask():
        try:
            quotas.admit("ann", 50, 50)
            admitted.append(1)
        except QuotaExceeded:
            pass

    workers = [threading.Thread(target=ask) for _ in range(20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(admitted) == 6
