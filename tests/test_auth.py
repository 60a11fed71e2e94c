"""Keys, voters and the rule that a public bind needs keys; settings and where they come from."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.auth import Keyring, VoterHash, check_bind, foreign_page
from server.errors import StartupError
from server.settings import Settings, SettingsError, explain, is_loopback, load_settings
from store.errors import DiskFull


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_key_is_found_and_its_hash_alone_is_kept(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    key = ring.create("user", "ana")
    found = ring.find(key)
    assert found is not None and (found.role, found.voter) == ("user", "ana")
    secret = key.split("-", 2)[2]
    assert secret not in ring.path.read_text()
    assert json.loads(ring.path.read_text())["keys"][0]["hash"].startswith("$argon2id$")
    assert ring.path.stat().st_mode & 0o077 == 0


def test_wrong_keys_find_nothing(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    key = ring.create("operator", "ben")
    for wrong in ("", "plaudit", key[:-1], key + "x", key.replace("plaudit", "sk"), "plaudit--", "-" * 50, "\ud800"):
        assert ring.find(wrong) is None, wrong


def test_a_key_that_names_none_of_ours_is_told_without_hashing(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    key = ring.create("user", "ann")
    prefix, key_id, _ = key.split("-", 2)
    assert ring.named(key) == ring.named(f"{prefix}-{key_id}-guess") == key_id
    for wrong in ("", "plaudit", f"{prefix}-{key_id}", f"{prefix}-{key_id}-", f"{prefix}-000000000000-guess", f"other-{key_id}-guess"):
        assert ring.named(wrong) is None and ring.find(wrong) is None


def test_a_verified_key_is_found_without_hashing_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring(tmp_path)
    key = ring.create("user", "ana")
    assert not ring.is_cached(key)
    ring.find(key)
    assert ring.is_cached(key)
    monkeypatch.setattr(ring, "_hasher", None)  # what takes its time
    assert ring.find(key) is not None


def test_a_key_made_or_revoked_by_another_process_counts_at_once(tmp_path: Path) -> None:
    server, cli = Keyring(tmp_path), Keyring(tmp_path)
    key = cli.create("user", "ana")
    found = server.find(key)
    assert found is not None
    assert cli.revoke(found.id) and not cli.revoke(found.id)
    assert server.find(key) is None


def test_keys_made_and_revoked_at_once_are_all_as_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is being hashed, another process revokes a key and makes one."""
    mine, others = Keyring(tmp_path), Keyring(tmp_path)
    old, made = mine.create("operator", "old"), []
    hashed = mine._hasher.hash

    def slow(secret: str) -> str:
        assert others.revoke(old.split("-")[1])
        made.append(others.create("user", "ben"))
        return hashed(secret)

    monkeypatch.setattr(mine, "_hasher", SimpleNamespace(hash=slow, verify=mine._hasher.verify))
    made.append(mine.create("user", "ana"))
    assert all(Keyring(tmp_path).find(key) for key in made) and len(mine) == len(others) == 2
    assert mine.find(old) is None and others.find(old) is None


def test_a_full_disk_leaves_the_keys_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring(tmp_path)
    key = ring.create("user", "ana")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="nothing was written"):
        ring.create("user", "ben")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.json", "keys.lock"] and ring.find(key) is not None


def test_a_damaged_key_file_stops_the_start_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    with pytest.raises(StartupError, match=r"keys\.json is damaged"):
        Keyring(tmp_path)


def test_voters_are_hashed_with_a_salt_that_stays(tmp_path: Path) -> None:
    one, again = VoterHash(tmp_path), VoterHash(tmp_path)
    (tmp_path / "other").mkdir()
    assert one("ana") == again("ana") != one("ben")
    assert VoterHash(tmp_path / "other")("ana") != one("ana")
    assert "ana" not in one("ana") and len(one("ana")) == 32


def test_a_start_that_is_cut_short_leaves_no_half_salt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            VoterHash(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(VoterHash(tmp_path)("ana")) == 32


def test_a_public_bind_refuses_to_start_without_keys(tmp_path: Path) -> None:
    public = Settings(host="0.0.0.0", data_dir=tmp_path)
    with pytest.raises(StartupError) as refusal:
        check_bind(public, Keyring(tmp_path))
    assert "\n" not in str(refusal.value) and "0.0.0.0" in str(refusal.value)
    Keyring(tmp_path).create("operator", "ben")
    check_bind(public, Keyring(tmp_path))


@pytest.mark.parametrize(("host", "answer"), [
    ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
    ("0.0.0.0", False), ("192.168.1.4", False), ("::", False), ("example.org", False), ("localhost.evil.org", False),
])
def test_loopback_is_told_apart(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


@pytest.mark.parametrize(("host", "origin", "foreign"), [
    ("127.0.0.1:7860", None, False),
    ("localhost:7860", "http://localhost:7860", False),
    ("[::1]:7860", "http://127.0.0.1:7860", False),
    ("127.0.0.1:7860", "https://evil.example", True),
    ("127.0.0.1:7860", "null", True),
    ("rebound.example:7860", None, True),
    (None, None, True),
    ("[x", None, True),
    ("127.0.0.1:7860", "http://[", True),
])
def test_a_foreign_web_page_is_told_apart(host: str | None, origin: str | None, foreign: bool) -> None:
    assert foreign_page(host, origin) is foreign


def test_flags_win_over_environment_over_toml_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plaudit.toml").write_text('port = 1\nmax_queue = 2\nmix_share = 0.25\n')
    monkeypatch.setenv("PLAUDIT_PORT", "3")
    monkeypatch.setenv("PLAUDIT_MAX_QUEUE", "4")
    settings = load_settings(port=5, host=None)
    assert (settings.port, settings.max_queue, settings.mix_share, settings.host) == (5, 4, 0.25, "127.0.0.1")
    where = {name: source for name, _, source, _ in explain(port=5)}
    assert where["port"] == "flag --port" and where["max_queue"] == "PLAUDIT_MAX_QUEUE"
    assert where["mix_share"] == "plaudit.toml" and where["host"] == "default"


def test_every_setting_says_what_it_means() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description and "\n" not in field.description, name


@pytest.mark.parametrize(("flags", "named"), [
    ({"port": 70000}, "port (flag --port)"),
    ({"rate_chat": "often"}, "rate_chat (flag --rate-chat)"),
    ({"rate_chat": "0/minute"}, "rate_chat (flag --rate-chat)"),
    ({"rate_chat": "10/second;100/minute"}, "rate_chat (flag --rate-chat)"),
    ({"promotion": "maybe"}, "promotion (flag --promotion)"),
])
def test_a_bad_setting_is_named_in_one_line(flags: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        load_settings(**flags)
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_misspelt_line_in_the_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "plaudit.toml").write_text("prot = 1\n")
    with pytest.raises(SettingsError, match=r"prot \(plaudit\.toml\)"):
        load_settings()
    (tmp_path / "plaudit.toml").write_text("port = \n")
    with pytest.raises(SettingsError, match=r"plaudit\.toml"):
        load_settings()


def test_learner_args_may_be_one_string(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAUDIT_LEARNER_ARGS", "--updates 4 --note 'a b'")
    assert load_settings().learner_args == ("--updates", "4", "--note", "a b")
