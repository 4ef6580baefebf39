"""packed-attn doctor: what it says of backends that run, cannot, fail or are wrong, and of GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from packed_attn import backends, doctor
from packed_attn.cli import main
from packed_attn.doctor import FEATURES, Gpu, examine, gpu_findings
from packed_attn.reference import reference_attention
from packed_attn.request import AttentionRequest

NO_GPU = Gpu(
    usable=False,
    torch_version="2.13.0",
    cuda_of_torch="13.0",
    hip_of_torch=None,
    driver=True,
    hidden_by=None,
    error="The NVIDIA driver on your system is too old (found version 12020).",
    devices=(),
)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every machine that runs these tests."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_gpu_facts", lambda: replace(NO_GPU, driver=False))


class _Reference:
    """A backend that is right, with a change to its answer."""

    def __init__(self, *reasons: str, change: Any = None) -> None:
        self.reasons, self.change = list(reasons), change

    def reasons_against(self, request: AttentionRequest) -> list[str]:
        return [*self.reasons, *(["has no softcap"] if request.softcap else [])]

    def run(self, request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        out, _ = reference_attention(request)
        return (out if self.change is None else self.change(out)), None


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts other backends before the reference."""
    load = backends.load

    def replaced(**others: _Reference) -> None:
        monkeypatch.setattr(doctor, "BACKENDS", (*others, "reference"))
        monkeypatch.setattr(doctor, "load", lambda name: others.get(name) or load(name))

    return replaced


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    verdicts = {v["name"]: v for v in said["verdicts"]}
    assert tuple(verdicts) == backends.BACKENDS
    assert verdicts["flash2"]["reasons"] == ["needs a CUDA device, but q is on cpu"]
    assert verdicts["cpu"]["reasons"] == []
    assert 0 < verdicts["cpu"]["error"] < 2e-2
    assert verdicts["reference"]["error"] == 0
    assert said["machine"]["torch"] == version("torch")
    assert said["device"] == "cpu"
    assert said["findings"] == []
    assert "no NVIDIA driver was found" in said["notes"][0]


def test_the_longest_name_stands_apart_from_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--no-run"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("flash-linear")]
    assert line.split()[0] == "flash-linear-attention"


def test_tables(table, capsys: pytest.CaptureFixture[str]) -> None:
    table(gpu=_Reference("no GPU", "no luck"), other=_Reference())
    assert main(["doctor"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "  gpu          no: no GPU; no luck" in lines
    assert "  other        runs, 0e+00 off the reference" in lines
    assert 'backend="auto" takes: other' in lines
    header = next(line for line in lines if "window" in line and "softcap" in line)
    for name in ("gpu", "other", "reference"):
        row = [line for line in lines if line.startswith(f"  {name} ")][1]
        assert row[header.index("window") :].startswith("yes"), "asked apart from the machine"
        assert row[header.index("softcap") :].startswith("yes" if name == "reference" else "-")
    assert max(map(len, lines)) <= 110


def test_not_run(table, capsys: pytest.CaptureFixture[str]) -> None:
    table(other=_Reference(change=lambda out: 1 / 0))
    assert main(["doctor", "--no-run"]) == 0
    assert "  other        can\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: 1 / 0, "other can run here but fails: ZeroDivisionError: division by zero"),
        (lambda out: out.roll(1, 0), "other can run here but is wrong: off by"),
        (lambda out: out * torch.nan, "other can run here but is wrong: off by nan"),
        (lambda out: out * 1.2, "other can run here but is wrong: off by 2.1e-01"),
        (lambda out: out + (out - out).sqrt(), "other can run here but is wrong: off by nan"),
    ],
    ids=["raises", "rows", "nan", "scale", "gradient"],
)
def test_a_backend_that_fails_is_a_finding(
    change: Any, words: str, table, capsys: pytest.CaptureFixture[str]
) -> None:
    table(other=_Reference(change=change))
    assert main(["doctor"]) == 1
    assert f"to mend: {words}" in capsys.readouterr().out


def test_features_are_those_without_a_reason_of_their_own(table) -> None:
    table(gpu=_Reference("no GPU"))
    gpu, reference = examine(run=False).verdicts
    assert not gpu.works
    assert set(FEATURES) - set(gpu.features) == {"softcap"}
    assert reference.features == tuple(FEATURES)


@pytest.mark.parametrize(
    ("gpu", "finding"),
    [
        (NO_GPU, "torch cannot use it: The NVIDIA driver on your system is too old"),
        (
            replace(NO_GPU, cuda_of_torch=None, torch_version="2.13.0+cpu"),
            "torch 2.13.0+cpu is built for the CPU: install a torch for CUDA",
        ),
        (
            replace(NO_GPU, hidden_by="CUDA_VISIBLE_DEVICES=''"),
            "CUDA_VISIBLE_DEVICES='' hides every GPU from torch",
        ),
    ],
    ids=["driver", "cpu build", "hidden"],
)
def test_a_gpu_that_torch_does_not_find(
    gpu: Gpu, finding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings, notes = gpu_findings(gpu)
    assert finding in findings[0]
    assert notes == []
    monkeypatch.setattr(doctor, "_gpu_facts", lambda: gpu)
    assert main(["doctor", "--no-run", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"] == findings


def test_what_is_no_finding() -> None:
    assert gpu_findings(replace(NO_GPU, usable=True)) == ([], [])
    findings, (note,) = gpu_findings(replace(NO_GPU, driver=False))
    assert (findings, "docker run --gpus all" in note) == ([], True)
    findings, (note,) = gpu_findings(replace(NO_GPU, hip_of_torch="6.4"))
    assert (findings, "ROCm 6.4" in note) == ([], True)


def test_gpu_facts_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    gpu = doctor._gpu_facts()
    assert not gpu.usable
    assert gpu.hidden_by == "CUDA_VISIBLE_DEVICES='-1'"
    assert gpu.error
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert doctor._gpu_facts().hidden_by is None
