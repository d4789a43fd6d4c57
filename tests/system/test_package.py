# SPDX-License-Identifier: Apache-2.0
"""The package in an administrator's hands, from installation to purge; the tests build on each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import NEWER, ROOT, Machine

HOME = "usr/lib/flashd"
UNIT = ROOT / "systemd" / "flashd.service"


def test_it_is_ready_in_the_moment_it_is_installed(bare_machine: Machine) -> None:
    """The bus reads our policy when all of dpkg is done, which is no reason to fail before."""
    bare_machine.run("sh", "-ec", "dpkg -i /root/flashd.deb; systemctl enable --now flashd")
    assert bare_machine.show("flashd", "ActiveState") == "active"
    assert bare_machine.show("flashd", "NRestarts") == "0"
    assert "No models yet" in bare_machine.run("flash", "list").err


def test_it_has_no_torch_in_it(machine: Machine) -> None:
    packages = next((machine.root / HOME / "lib").glob("python3*")) / "site-packages"
    names = {entry.name.split("-")[0].lower() for entry in packages.iterdir()}
    assert {"flashd", "dbus_next", "typer"} <= names
    assert not {"torch", "transformers", "setuptools"} & names
    elsewhere = machine.run("grep", "-rlE", "^#!.*(/tmp|/build|debian)", f"/{HOME}/bin", check=False)
    assert elsewhere.out == ""


def test_the_daemon_is_nobody_special_and_well_shut_in(machine: Machine) -> None:
    pid = machine.show("flashd", "MainPID")
    status = machine.run("cat", f"/proc/{pid}/status").out
    assert machine.run("stat", "-c", "%U", f"/proc/{pid}").out.strip() == "flashd"
    assert re.search(r"^CapEff:\s*0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s*1$", status, re.MULTILINE)
    modes = machine.run("sh", "-c", "dpkg --listfiles flashd | xargs --delimiter '\\n' stat --format '%A %n'").out
    assert re.findall(r"^-\S*[sS].*", modes, re.MULTILINE) == [], "setuid or setgid"
    exposure = machine.run("systemd-analyze", "security", "--no-pager", "flashd").out
    found = re.search(r"Overall exposure level for flashd.service: ([\d.]+)", exposure)
    assert found is not None
    assert float(found[1]) <= 1.5, exposure
    verified = machine.run("systemd-analyze", "--man=no", "verify", "flashd.service")
    assert verified.err == ""
    comments = "".join(line for line in UNIT.read_text().splitlines() if line.startswith("#"))
    relaxed = re.findall(r"^✗ (?:\w+=~@?)?(\w+)", exposure, re.MULTILINE)
    assert {"PrivateDevices", "privileged", "net"} <= set(relaxed), exposure
    assert [name for name in relaxed if not re.search(rf"\b{name}\b", comments)] == [], "is not explained"


def test_a_service_manager_learns_how_it_is(machine: Machine) -> None:
    machine.until(lambda: machine.show("flashd", "StatusText") == "0 models, none is active")
    assert machine.show("flashd", "WatchdogTimestampMonotonic") != "0"


def test_what_is_dropped_into_the_machines_folder_becomes_a_model(machine: Machine) -> None:
    machine.run("useradd", "-m", "-G", "flashd", "erin")
    machine.make_source("/home/erin/one", seed=1, owner="erin")
    machine.run_as("erin", "cp", "-r", "/home/erin/one", "/var/lib/flashd/models/dropped")
    machine.until(lambda: "dropped" in machine.models())


def test_a_member_imports_from_a_home_that_the_daemon_cannot_read(machine: Machine) -> None:
    machine.make_source("/home/erin/two", seed=2, owner="erin")
    machine.run("chmod", "0700", "/home/erin")
    machine.run_as("erin", "flash", "import", "/home/erin/two", "imported")
    assert set(machine.models()) == {"dropped", "imported"}
    machine.run_as("erin", "flash", "verify", "imported")


def resident(machine: Machine) -> bool:
    return machine.models() == {"dropped": "host", "imported": "host"}


@pytest.mark.parametrize("how", ["restart", "kill", "upgrade"])
def test_warm_models_outlive_the_daemon(machine: Machine, newer: Path, how: str) -> None:
    machine.until(lambda: resident(machine))  # not requested yet
    before = machine.show("flashd", "MainPID")
    if how == "restart":
        machine.run("systemctl", "restart", "flashd")
    elif how == "kill":
        machine.run("systemctl", "kill", "-s", "KILL", "flashd")
    else:
        shutil.copy(newer, machine.root / "root" / "newer.deb")
        machine.run("dpkg", "-i", "/root/newer.deb")
        assert machine.run("dpkg-query", "-W", "-f", "${Version}", "flashd").out.endswith(NEWER)
    machine.until(lambda: machine.show("flashd", "MainPID") not in {before, "0"})
    machine.until(lambda: machine.show("flashd", "ActiveState") == "active")
    assert resident(machine)
    machine.run("flash", "verify", "dropped")


def test_the_first_call_starts_it_and_stopping_it_does_not(machine: Machine) -> None:
    machine.run("systemctl", "stop", "flashd")
    assert set(machine.models()) == {"dropped", "imported"}
    assert machine.show("flashd", "ActiveState") == "active"
    machine.run("flash", "stop")
    machine.until(lambda: machine.show("flashd", "ActiveState") == "inactive")
    assert machine.show("flashd", "Result") == "success"


def test_an_administrators_setting_lasts(machine: Machine) -> None:
    machine.run("flash", "config", "memory.host_budget", "3GB")
    machine.run("systemctl", "restart", "flashd")
    assert 'host_budget = "3GB"' in machine.run("flash", "config").out


def test_what_the_interface_files_say_is_installed_and_served(machine: Machine) -> None:
    folder = machine.root / "usr/share/dbus-1/interfaces"
    assert len(list(folder.glob("org.flashd1.*.xml"))) == 6
    served = machine.run("busctl", "introspect", "--xml-interface", "org.flashd1", "/org/flashd1").out
    text = (folder / "org.flashd1.Manager.xml").read_text()
    assert text[text.index("<interface") : text.index("</interface>")] in served


def test_manual_and_completion_are_installed(machine: Machine) -> None:
    share = machine.root / "usr/share"
    pages = ("man1/flash.1", "man8/flashd.8", "man5/flashd.toml.5", "man5/org.flashd1.5", "man1/flashd-inbox.1")
    for page in (*pages, "man8/flashd-gateway.8"):
        assert (share / "man" / f"{page}.gz").exists(), page
    for script in ("bash-completion/completions/flash", "zsh/vendor-completions/_flash",
                   "fish/vendor_completions.d/flash.fish"):  # fmt: skip
        assert "_FLASH_COMPLETE" in (share / script).read_text()
    completed = machine.run(
        "flash", env=("_FLASH_COMPLETE=complete_bash", "COMP_WORDS=flash show dr", "COMP_CWORD=2")
    ).out
    assert "dropped" in completed


def test_documentation_is_installed_and_its_links_lead_somewhere(machine: Machine) -> None:
    folder = machine.root / "usr/share/doc/flashd"
    pages = [folder / "README.md", *(folder / "docs").glob("*.md")]
    assert len(pages) > 15
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s:]+)[)#]", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_trays_package_has_what_a_desktop_looks_for(packages: Path) -> None:
    (tray,) = packages.glob("flashd-tray_*.deb")
    listed = subprocess.run(["dpkg-deb", "--contents", tray], capture_output=True, text=True, check=True).stdout
    for path in ("usr/share/metainfo/org.flashd1.Tray.metainfo.xml", "usr/share/applications/flashd-tray.desktop",
                 "usr/share/man/man1/flashd-tray.1.gz", "etc/xdg/autostart/flashd-tray.desktop"):  # fmt: skip
        assert f" ./{path}\n" in listed, path


def test_lintian_has_nothing_to_say(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("needs lintian: tests/system/run installs it")
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", *package.parent.glob("*.deb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_removing_it_keeps_models_and_settings(machine: Machine) -> None:
    machine.run("dpkg", "-r", "flashd")
    assert machine.show("flashd", "ActiveState") in {"inactive", "failed"}
    assert machine.run("busctl", "status", "org.flashd1", check=False).status != 0
    assert (machine.root / "etc/flashd/flashd.toml").exists()
    machine.run("dpkg", "-i", "/root/flashd.deb")
    assert set(machine.models()) == {"dropped", "imported"}
    assert 'host_budget = "3GB"' in machine.run("flash", "config").out


def test_purging_asks_before_it_takes_models(machine: Machine) -> None:
    def purge(answer: str) -> None:
        done = machine.run("sh", "-c", f"echo {answer} | dpkg -P flashd 2>&1", env=("DEBIAN_FRONTEND=teletype",))
        assert "Remove all models and the store as well?" in done.out

    purge("no")
    assert (machine.root / "var/lib/flashd/store").exists()
    assert not (machine.root / "etc/flashd").exists()
    machine.run("dpkg", "-i", "/root/flashd.deb")
    assert set(machine.models()) == {"dropped", "imported"}
    machine.run("systemctl", "enable", "flashd", "flashd-gateway.socket")
    purge("yes")
    assert list((machine.root / "etc/systemd/system").rglob("flashd*")) == [], "links to units that are gone"
    assert not (machine.root / "var/lib/flashd").exists()
    assert not (machine.root / HOME).exists()


def test_purging_keeps_models_where_nobody_can_be_asked(machine: Machine) -> None:
    quiet = ("DEBIAN_FRONTEND=noninteractive",)
    machine.run("dpkg", "-i", "/root/flashd.deb")
    machine.run("systemctl", "start", "flashd")
    machine.make_source("/root/third", seed=3)
    machine.run("flash", "import", "/root/third", "third")
    machine.run("dpkg", "-P", "flashd", env=quiet)
    assert (machine.root / "var/lib/flashd/store").exists()
    machine.run("dpkg", "-i", "/root/flashd.deb")
    assert set(machine.models()) == {"third"}
    # ... unless the answer was given beforehand.
    machine.run("sh", "-ec", "echo flashd flashd/remove-models boolean true | debconf-set-selections", env=quiet)
    machine.run("dpkg", "-P", "flashd", env=quiet)
    assert not (machine.root / "var/lib/flashd").exists()
