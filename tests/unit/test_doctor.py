"""The report on a machine: true of this one, and in words for others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import app
from backend.doctor import GPU, Machine, examine, report

LAPTOP = Machine(
    python="CPython 3.12.1", system="Linux", packages={"torch": "2", "triton": "3"}, cores=4,
    memory=16 * 10**9, memory_free=10**10, bfloat16=True, int8=True, disk_free=10**12,
)
BOX = replace(LAPTOP, gpus=(GPU("H100", 80 * 10**9, (9, 0)),) * 3)


def test_a_laptop() -> None:
    text = report(LAPTOP)
    assert "GPU        none\n" in text and "4 cores; instructions for bfloat16 and int8" in text
    assert "up to 4.0B parameters in 16 bits" in text and "in 4 bits (AWQ)" in text
    plain = report(replace(LAPTOP, bfloat16=False, int8=False))
    assert "up to 2.0B parameters in 16 bits" in plain and "4 bits" not in plain
    assert "float32" in plain and "slowly" in plain


def test_gpus() -> None:
    text = report(BOX)
    assert "GPU 2      H100, 80.0 GB, compute capability 9.0" in text
    assert "On one GPU, models of up to 32.0B parameters in 16 bits" in text
    assert "On 2 GPUs together (--tp 2), up to 64.0B" in text
    old = replace(LAPTOP, gpus=(GPU("V100", 10**10, (7, 0)),))
    assert "older than compute capability 8.0" in report(old)
    assert "none: its driver" in report(replace(LAPTOP, gpu_problem="its driver"))


def test_what_is_in_the_way() -> None:
    text = report(replace(LAPTOP, disk_free=10**9, busy_ports=(6006,)))
    assert "Port 6006, of the page, is in use" in text and "The disk has 1.0 GB free" in text


def test_secrets_are_not_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    machine = examine()
    assert machine.settings["HF_TOKEN"] == "set" and machine.cores >= 1
    file = tmp_path / "env.txt"
    assert app.main(["check_env", "--dump-file", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert "secret" not in text and "CUDA_VISIBLE_DEVICES=1,3" in text and "What it can" in text


def test_a_report_that_cannot_be_written(capsys, tmp_path: Path) -> None:
    assert app.main(["check_env", "--dump-file", str(tmp_path / "no" / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
