"""/proc/cpuinfo, of processors that are not here, and of this machine's beside what another tool makes of it."""

import platform
import shutil
import subprocess

import pytest

from tozan.cpuinfo import cpuinfo, flags, processors

HYBRID = "processor\t: 0\nmodel name\t: Two: kinds\nflags\t\t: fpu avx512f\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0x001\n\n"


@pytest.mark.parametrize(
    ("text", "units"), [(HYBRID, [{"fpu", "avx512f"}, {"fpu", "avx2"}]), (ARM, [{"fp", "asimd", "sve"}]), ("", [set()])]
)
def test_every_processor_has_its_flags(tmp_path, text, units):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert [flags(cpu) for cpu in processors(tmp_path)] == units
    assert flags(cpuinfo(tmp_path)) == units[0]


def test_values_may_hold_what_separates_them_from_names(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(HYBRID)
    assert cpuinfo(tmp_path)["model name"] == "Two: kinds"


def test_a_system_without_the_file_has_no_entries(tmp_path):
    assert processors(tmp_path) == []
    assert flags(cpuinfo(tmp_path)) == set()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("lscpu"), reason="lscpu names x86 flags alike")
def test_this_machine_is_as_lscpu_sees_it():
    lines = subprocess.run(
        ["lscpu"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
    ).stdout.splitlines()
    seen = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert flags(cpuinfo()) == set(seen["Flags"].split())
    assert cpuinfo()["model name"] == seen["Model name"]
