"""What of the machine's memory is free, and what is said when it holds fewer rows than asked for."""

import os

import pytest
import torch

from support.tiny import make_model
from zs_lightning.generation import Generator, kv_cache
from zs_lightning.generation.kv_cache import FRACTION, free_bytes, slot_bytes

MEMINFO = "MemTotal:       16384000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\nCached:          8200 kB\n"
CPU = torch.device("cpu")


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """Writes what the system says of its memory, by file name."""
    monkeypatch.setattr(kv_cache, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(kv_cache, "CGROUP", tmp_path)
    kv_cache.say_fewer.cache_clear()

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)

    return write


def test_memory_that_keeps_files_is_free(linux):
    linux(meminfo=MEMINFO)
    assert free_bytes(CPU) == 9000 * 1024


@pytest.mark.parametrize("text", ["", "MemTotal: 16384000 kB\nMemFree: 1000 kB\n"], ids=["no file", "an old kernel"])
def test_where_nothing_is_said_of_it_the_unused_pages_count(text, linux, monkeypatch):
    linux(**({"meminfo": text} if text else {}))
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 70, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_bytes(CPU) == 70 * 4096


@pytest.mark.parametrize(
    ("most", "used", "free"),
    # 2,000,000 of the container's bytes hold files.
    [
        ("7000000\n", "6000000\n", 3_000_000),
        ("1000000\n", "4000000\n", 0),
        ("99000000000\n", "6000000\n", 9000 * 1024),
        ("max\n", "6000000\n", 9000 * 1024),
    ],
)
def test_a_container_has_its_own_limit(most, used, free, linux):
    stat = "anon 4000000\nfile 2500000\nshmem 500000\ninactive_anon 4500000\ninactive_file 1500000\nactive_file 500000\n"
    linux(meminfo=MEMINFO, memory_max=most, memory_current=used, memory_stat=stat)
    assert free_bytes(CPU) == free


def test_fewer_slots_than_asked_for_are_said_once(linux, monkeypatch, caplog):
    model = make_model("llama")
    slot = slot_bytes(model.config, 96, torch.float32)
    linux(meminfo=f"MemAvailable: {10 * slot // 1024} kB\n")
    assert len(Generator(model, int(10 * FRACTION), 96).slots) == 6
    assert caplog.messages == []
    assert [len(Generator(model, 50, 96).slots) for _ in range(2)] == [6, 6]
    [said] = caplog.messages
    assert said.startswith("slots: memory holds 6 of the 50 rows of 96 tokens asked for")
