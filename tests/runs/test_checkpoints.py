"""Checkpoints on disk: whole or not there, known by their checksums, and the one before the last at hand."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from zs_lightning.errors import RunError, UserError
from zs_lightning.runs.checkpoints import find_checkpoint, load_checkpoint, replace_folder, save, size_of, sweep, write_whole
from zs_lightning.runs.folder import CHECKSUMS, hold, refuse_existing_run

WEIGHTS = 20_000


def state(step):
    return {"step": step, "schema": 1, "state_dict": {"w": torch.full((WEIGHTS,), float(step))}, "moments": [torch.zeros(9)]}


def child(act):
    """The end of a forked process: minus the signal, or its exit code."""
    if not (number := os.fork()):
        code = 2
        try:
            act()
            code = 0
        except (UserError, RunError) as error:
            print(type(error).__name__, error, flush=True)
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def die_at(call):
    """Has the process killed before its n-th call that the disk or a name depends on."""
    calls = iter(range(100))

    def counted(function):
        def act(*args):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return act

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def step_of(folder):
    return int(load_checkpoint(find_checkpoint(folder, "here"), "here")["step"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(tmp_path, caplog):
    """Before the third save there are two; whatever its kill leaves, the next save leaves two good ones."""
    found = []
    for call in range(100):
        folder = tmp_path / str(call)
        folder.mkdir()
        for step in (1, 2):
            save(folder, state(step))
        ended = child(lambda call=call, folder=folder: (die_at(call), save(folder, state(3))))
        found.append(step_of(folder))
        assert find_checkpoint(folder / "last.ckpt", "here"), "also under the name that a message has told"
        sweep(folder)
        assert not [name for name in names(folder) if name.endswith(".part")]
        save(folder, state(4))
        assert names(folder) == [CHECKSUMS, "last.ckpt", "previous.ckpt"]
        assert step_of(folder) == 4
        (folder / "last.ckpt").write_bytes(b"")
        assert step_of(folder) in (2, 3)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert len(found) > 5
    assert found == sorted(found)
    assert (found[0], found[-1]) == (2, 3)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def damage(path, kind):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped":
        flip(path, path.stat().st_size // 2)
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        path.unlink()


KINDS = ["truncated", "empty", "flipped", "foreign", "gone"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_checkpoint_is_found_before_it_is_loaded(kind, tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, state(step))
    last, former = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    damage(last, kind)
    assert find_checkpoint(tmp_path, "--ckpt_path") == former
    (said,) = caplog.messages
    assert said.startswith(f"--ckpt_path: {last} is ")
    assert said.endswith(f"; the one before it is used: {former}")
    # Who names the file means it.
    with pytest.raises(UserError, match=rf"^--ckpt_path: .*{last}\b") as error:
        find_checkpoint(last, "--ckpt_path")
    assert str(error.value).endswith(f"; {'the one before it is there:' if kind == 'gone' else 'beside it is'} {former}")
    damage(former, "flipped")
    with pytest.raises(UserError, match=r"last.ckpt .*; .*previous.ckpt is damaged"):
        find_checkpoint(tmp_path, "--ckpt_path")


def test_a_newer_one_is_not_passed_over(tmp_path):
    """The one before it would take its place."""
    for step in (1, 2):
        save(tmp_path, state(step))
    known = json.loads((tmp_path / CHECKSUMS).read_text())
    known[0]["schema"] = 2
    (tmp_path / CHECKSUMS).write_text(json.dumps(known))
    for place in (tmp_path, tmp_path / "last.ckpt"):
        with pytest.raises(UserError, match=r"^--ckpt_path: .*last.ckpt was written by a newer version .* \(schema 2\)"):
            find_checkpoint(place, "--ckpt_path")


def test_a_kill_in_the_first_save_leaves_that_of_an_older_version_good(tmp_path, caplog):
    """It wrote no checksums; they are added to those of the new one, if it is whole."""
    found = []
    for call in range(20):
        folder = tmp_path / str(call)
        folder.mkdir()
        torch.save(state(1), folder / "last.ckpt")
        ended = child(lambda call=call, folder=folder: (die_at(call), save(folder, state(2))))
        found.append(step_of(folder))
        if ended == 0:
            break
    assert len(found) > 5
    assert found == sorted(found)
    flip(folder / "previous.ckpt", WEIGHTS)
    (folder / CHECKSUMS).unlink()
    save(folder, state(3))
    (folder / "last.ckpt").write_bytes(b"")
    assert step_of(folder) == 2
    torch.save(state(1), folder / "last.ckpt")
    flip(folder / "last.ckpt", WEIGHTS)
    (folder / CHECKSUMS).unlink()
    save(folder, state(4))
    (folder / "last.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"previous.ckpt is damaged"):
        find_checkpoint(folder, "here")


@pytest.mark.parametrize("sums", ["", "{", '{"a": 1}', "[1]", '[{"schema": "x"}]'])
def test_without_checksums_those_of_the_archive_count(sums, tmp_path):
    """As in folders of older versions, and of a checkpoint that was copied."""
    save(tmp_path, state(1))
    last = tmp_path / "last.ckpt"
    (tmp_path / CHECKSUMS).unlink()
    if sums:
        (tmp_path / CHECKSUMS).write_text(sums)
    assert step_of(tmp_path) == 1
    flip(last, last.stat().st_size // 2)
    with pytest.raises(UserError, match=r"last.ckpt is damaged or no checkpoint"):
        find_checkpoint(tmp_path, "--ckpt_path")


def test_what_a_checkpoint_may_hold(tmp_path):
    class Other:
        pass

    odd = [{"a": 1}, [1], torch.ones(2), {"state_dict": 1}, {**state(1), "schema": "x"}, {**state(1), "schema": None}]
    newer = ({**state(1), "schema": 2}, r"newer version .* \(schema 2\)")
    for content, said in (newer, *((content, "cannot be read: .") for content in odd)):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=said):
            load_checkpoint(tmp_path / "x.ckpt", "--ckpt_path")
    globals()["Other"] = Other
    Other.__qualname__ = "Other"
    torch.save({"state_dict": Other()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="it holds more than numbers"):
        load_checkpoint(tmp_path / "x.ckpt", "--ckpt_path")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("at", [0, 40, 300])
def test_a_damaged_archive_of_any_kind_is_called_so(method, at, tmp_path):
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("data", bytes(random.Random(0).choices(range(9), k=3000)))
    content = bytearray(path.read_bytes())
    content[34 + at : 44 + at] = b"\xff" * 10  # Behind the head and the name.
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last.ckpt is damaged or no checkpoint"):
        find_checkpoint(tmp_path, "--ckpt_path")


def test_files_and_names_are_on_the_disk_in_their_order(tmp_path, monkeypatch):
    """The content before it has its name, and the name before anyone relies on it."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name) or sync(number)
    )
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(f"> {Path(new).name}") or replace(old, new))
    write_whole(tmp_path / "fit.json", "{}")
    assert done == ["fit.json.part", "> fit.json", tmp_path.name]
    save(tmp_path, state(1))
    done.clear()
    save(tmp_path, state(2))
    sums = [f"{CHECKSUMS}.part", f"> {CHECKSUMS}", tmp_path.name]
    last = ["last.ckpt.part", "> last.ckpt", tmp_path.name]
    assert done == [*sums, "last.ckpt.part", "> previous.ckpt", *last]


def test_without_links_the_last_one_is_moved(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    for step in (1, 2, 3):
        save(tmp_path, state(step))
    assert names(tmp_path) == [CHECKSUMS, "last.ckpt", "previous.ckpt"]
    assert [int(load_checkpoint(tmp_path / name, "here")["step"]) for name in ("last.ckpt", "previous.ckpt")] == [3, 2]


def test_a_save_that_fails_says_the_bytes_and_keeps_what_was_there(tmp_path, capfd, monkeypatch):
    save(tmp_path, state(1))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def with_a_small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        save(tmp_path, state(2))

    assert child(with_a_small_disk) == 1
    assert size_of(state(2)) == 4 * (WEIGHTS + 9)
    said = capfd.readouterr().out
    assert said.startswith(f"RunError {tmp_path / 'last.ckpt'} was not written: ")
    assert "; it takes 80,036 bytes, " in said
    full = shutil.disk_usage(tmp_path)._replace(free=80_035)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(RunError, match=r"it takes 80,036 bytes, 80,035 are free; what was there is kept$"):
        save(tmp_path, state(2))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    with pytest.raises(RunError, match="was not written: No such file or directory"):
        write_whole(tmp_path / "gone" / "fit.json", "{}")


def test_a_folder_that_is_gone_is_said_and_half_a_save_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match=r"No such file or directory; it takes 80,036 bytes, there is no folder .*gone any more"):
        save(tmp_path / "gone", state(1))
    (tmp_path / "last.ckpt.part").mkdir()
    with pytest.raises(RunError, match=r"last\.ckpt was not written: Is a directory"):
        save(tmp_path, state(1))
    (tmp_path / "last.ckpt.part").rmdir()
    (tmp_path / CHECKSUMS / "in the way").mkdir(parents=True)
    with pytest.raises(RunError, match=r"checkpoints\.json was not written: Is a directory"):
        save(tmp_path, state(1))
    assert names(tmp_path) == [CHECKSUMS]


@pytest.mark.parametrize("call", range(8))
def test_a_folder_is_replaced_whole(call, tmp_path):
    """Killed at any call: after the sweep there is the old one or the new one."""
    new, part = tmp_path / "model", tmp_path / "model.part"
    for folder, text in ((new, "old"), (part, "new")):
        folder.mkdir()
        (folder / "weights").write_text(text)

    def replace():
        calls = iter(range(100))
        for name in ("rename", "fsync", "rmdir"):

            def act(*args, _function=getattr(os, name), **options):
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _function(*args, **options)

            setattr(os, name, act)
        replace_folder(part, new)

    ended = child(replace)
    assert ended == (-signal.SIGKILL if call < 6 else 0)
    sweep(tmp_path)
    assert names(tmp_path) == ["model"]
    assert (new / "weights").read_text() == ("old" if call < 4 else "new")


def test_the_sweep_takes_what_is_ours(tmp_path):
    kept = ["notes.part", "film.mp4.part", "last.ckpt", "archive"]
    for name in [*kept, "last.ckpt.part", "config-2.yaml.part", "fit.json.part", "questions.jsonl.part"]:
        (tmp_path / name).write_text("x")
    (tmp_path / "best.part").mkdir()
    (tmp_path / "bad_steps").mkdir()
    for name in ("step-3.jsonl", "step-4.jsonl.part"):
        (tmp_path / "bad_steps" / name).write_text("x")
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "bad_steps"])
    assert names(tmp_path / "bad_steps") == ["step-3.jsonl"]


def test_the_one_before_the_last_counts_alone(tmp_path):
    """As a kill between two renames leaves it."""
    save(tmp_path, state(1))
    former = (tmp_path / "last.ckpt").rename(tmp_path / "previous.ckpt")
    for anew in (False, True):
        with pytest.raises(UserError, match=rf"or go on with it by fit --ckpt_path {former}$"):
            refuse_existing_run(tmp_path, None, anew)
    # Whoever gives the name that was printed is told the other one.
    with pytest.raises(UserError, match=rf"there is no file {tmp_path}/last.ckpt; the one before it is there: {former}$"):
        find_checkpoint(tmp_path / "last.ckpt", "--ckpt_path")


def test_a_folder_is_for_one_run_at_a_time(tmp_path, capfd):
    held = hold(tmp_path)
    assert child(lambda: hold(tmp_path)) == 1
    assert f"UserError run.folder: another process trains in {tmp_path}" in capfd.readouterr().out
    os.close(held)
    assert child(lambda: hold(tmp_path)) == 0
