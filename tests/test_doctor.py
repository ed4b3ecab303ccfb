"""doctor: every check is a finding, whatever happens in it."""

from __future__ import annotations

import io

from rich.console import Console

from underdrawing import doctor
from underdrawing.cli import main


def printed(findings) -> tuple[str, int]:
    console = Console(file=io.StringIO(), width=200)
    code = doctor.print_findings(findings, console)
    return console.file.getvalue(), code


def test_this_machine_is_examined(capsys):
    findings = doctor.examine(ray=False)
    names = [f.name for f in findings]
    assert names == ["packages", "lock", "torch", "GPU", "bf16", "torchvision", "W&B", "memory", "disk", "loopback"]
    assert all(f.what for f in findings)
    assert all(f.advice for f in findings if f.state != "ok")
    by_name = {f.name: f for f in findings}
    assert by_name["packages"].state == by_name["torch"].state == by_name["torchvision"].state == "ok"
    assert "GFLOP/s" in by_name["torch"].what


def test_the_exit_code_says_whether_something_is_broken(monkeypatch, capsys):
    def broken():
        raise RuntimeError("operator torchvision::nms does not exist")

    fine = doctor.Finding("disk", "ok", "9 GiB free here")
    for name in ("_packages", "_lock", "_torch", "_gpu", "_bf16", "_wandb", "_memory", "_disk", "_loopback"):
        monkeypatch.setattr(doctor, name, lambda: fine)
    monkeypatch.setattr(doctor, "_torchvision", broken)
    assert main(["doctor", "--no-ray"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "torchvision" in said and "different builds" in said
    monkeypatch.setattr(doctor, "_torchvision", lambda: fine)
    assert main(["doctor", "--no-ray"]) == 0


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    finding = doctor._packages()
    assert finding == doctor.Finding("packages", "broken", "missing: no-such-package", "pip install no-such-package")
    text, code = printed([finding])
    assert code == 1 and "pip install no-such-package" in text


def test_no_login_is_a_warning_and_says_what_happens(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    finding = doctor._wandb()
    assert finding.state == "warning" and "offline" in finding.what
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert doctor._wandb().state == "ok"
    assert printed([finding])[1] == 0


def test_ray_is_started_as_a_run_starts_it_and_left_stopped():
    import ray

    finding = doctor._ray()
    assert finding.state == "ok" and "a local one, a task ran in" in finding.what
    assert not ray.is_initialized()


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    finding = doctor._ray()
    assert finding.state == "broken" and "RAY_ADDRESS=127.0.0.1:1" in finding.what and finding.advice
