"""The doctor: a made-up machine is read right, each injected problem is found with its cost and its cure, and a real
examination of a process that was started wrongly says so."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from tozan.bench import backends, hardware
from tozan.bench.problems import Measured, find
from tozan.bench.result import Result
from tozan.cli import main
from tozan.cpuinfo import cores

WELL = Measured(
    {("bf16", 1): 1e12, ("bf16", 8): 8e12, ("fp32", 1): 2e11, ("fp32", 8): 1.4e12},
    threads=8,
    kept=True,
    fresh=0.05,
    reused=0.01,
    small_pages=0.04,
    large_pages=0.01,
    clock=5e-8,
)


@pytest.fixture
def root(tmp_path):
    """A healthy machine of two NUMA domains with AMX, as files."""
    files = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Made Xeon\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_bf16\n\n",
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
        "proc/loadavg": "0.10 0.10 0.10 1/1 1\n",
        "proc/self/maps": "7f00 r-xp 00 00 1 /usr/lib/libc.so.6\n",
        "proc/sys/kernel/hostname": "made\n",
        "proc/sys/kernel/numa_balancing": "1\n",
        "etc/hosts": "127.0.0.1 localhost\n10.0.0.7 made\n",
        "sys/devices/system/cpu/online": "0-15\n",
        "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0,8\n",
        "sys/devices/system/node/node0/cpulist": "0-3,8-11\n",
        "sys/devices/system/node/node1/cpulist": "4-7,12-15\n",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       32000000 kB\n",
        "sys/devices/system/node/node0/distance": "10 21\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
        "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/class/net/ib0/operstate": "up\n",
        "sys/class/net/ib0/flags": "0x1003\n",
        "sys/class/net/ib0/speed": "200000\n",
        "sys/class/net/ib0/mtu": "4092\n",
        "sys/class/net/eth1/operstate": "down\n",
        "sys/class/net/eth1/flags": "0x1002\n",
        "sys/class/net/eth1/speed": "-1\n",
        "sys/class/net/eth1/mtu": "1500\n",
    }
    for name, text in files.items():
        write(tmp_path, name, text)
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def look(root, **changes):
    """The machine under `root`, with what does not come from files as on a healthy one."""
    found = hardware.read(root, changes.pop("environment", {}))
    healthy = {"affinity": 16, "cores": 8, "shared_memory": 8 << 30, "limits": {"nofile": 65536}}
    return replace(found, **healthy | changes)


def test_a_machine_is_read_from_its_files(root):
    found = look(root, environment={"OMP_NUM_THREADS": "3", "HOME": "x"})
    assert (found.processor, found.online, found.threads_per_core) == ("Made Xeon", 16, 2)
    assert found.machine_cores == 8
    assert found.units == ("AMX bf16", "AVX-512", "AVX-512 bf16", "AVX2")
    assert found.domain_cores == {0: (0, 1, 2, 3, 8, 9, 10, 11), 1: (4, 5, 6, 7, 12, 13, 14, 15)}
    assert found.domains[0] == 32_000_000 * 1024
    assert found.distance == 2.1
    assert found.numa_balancing
    assert (found.memory, found.available) == (64_000_000 * 1024, 60_000_000 * 1024)
    assert (found.quota, found.memory_limit) == (None, None)
    assert (found.huge_pages, found.clock, found.load) == ("always", "tsc", 0.1)
    assert found.variables == {"OMP_NUM_THREADS": "3"}
    assert not found.own_name_is_loopback
    by_name = {one.name: one for one in found.interfaces}
    assert (by_name["ib0"].up, by_name["ib0"].bits_per_second, by_name["ib0"].mtu) == (True, 200e9, 4092)
    assert (by_name["eth1"].up, by_name["eth1"].bits_per_second) == (False, None)


def test_an_arm_processor_and_the_first_generation_of_control_groups(root):
    write(root, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU part\t: 0xd40\n\n")
    (root / "sys/fs/cgroup/cpu.max").unlink()
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "250000\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    found = look(root)
    assert found.units == ("SVE", "Arm bf16", "Arm int8", "Neon")
    assert found.quota == 2.5


def test_a_folder_without_anything_is_no_error(tmp_path):
    assert find(hardware.read(tmp_path, {}), WELL) is not None


def test_a_healthy_machine_has_no_problem(root):
    assert find(look(root), replace(WELL, launcher="torchrun")) == []


NETWORK = hardware.Interface("eth0", True, ("10.0.0.7",), 1e9, 1500)

PROBLEMS = {
    # name: (files, changes of the machine, changes of what was measured, a part of the cost, a part of the cure)
    "threads": ({}, {"environment": {"OMP_NUM_THREADS": "1"}}, {"threads": 1}, "8.00×", "unset OMP_NUM_THREADS"),
    "affinity": ({}, {"cores": 1}, {"threads": 1, "all_cores": 1.4e13}, "10.00×", "taskset -c 0-15 torchrun"),
    "quota": ({"sys/fs/cgroup/cpu.max": "200000 100000"}, {}, {}, "75%", "--train.threads=2"),
    "load": ({"proc/loadavg": "16.0 9 9 1/1 1"}, {}, {}, "1/2.0", "top"),
    "allocator": ({}, {}, {"kept": False}, "50 ms", "LD_PRELOAD=libtcmalloc"),
    "huge pages": (
        {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"},
        {},
        {},
        "5%",
        "echo madvise | sudo tee",
    ),
    "precision": ({}, {}, {"gemm": {("bf16", 8): 1e11, ("fp32", 8): 2e11}}, "2.00×", "--train.precision=fp32"),
    "domains": ({}, {}, {"launcher": "none"}, "2.1×", "--layout.data=2"),
    "memory": ({"proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 2000000 kB\n"}, {}, {}, "5 GB", "micro_batch=1"),
    "shared memory": ({}, {"shared_memory": 1 << 20}, {}, "4 MB", "--shm-size"),
    "open files": ({}, {"limits": {"nofile": 1024}}, {}, "256", "ulimit -n 65536"),
    "clock": (
        {"sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet"},
        {},
        {"clock": 1.2e-6},
        "1200 ns",
        "echo tsc",
    ),
    "network": ({}, {"interfaces": (NETWORK,)}, {}, "4.0 s", "--train.accumulate"),
    "host name": (
        {"etc/hosts": "127.0.1.1 made.here made"},
        {"interfaces": (replace(NETWORK, bits_per_second=1e11),)},
        {},
        "0 other hosts",
        "export GLOO_SOCKET_IFNAME=eth0",
    ),
    "launcher": ({}, {}, {"launcher_error": "RANK=5, WORLD_SIZE=2 contradict"}, "no job", "unset RANK"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_injected_problem_is_found_with_cost_and_cure(root, name):
    texts, changes, measured, cost, cure = PROBLEMS[name]
    for path, text in texts.items():
        write(root, path, text)
    found = find(look(root, **changes), replace(WELL, **{"launcher": "torchrun"} | measured))
    [trouble] = [one for one in found if one.name == name]
    assert cost in trouble.cost
    assert cure in trouble.fix
    assert trouble.source
    assert {one.name for one in found} == {name}, "and no other"


def test_hardware_threads_are_no_cores(root):
    every = {"threads": 16, "launcher": "torchrun"}
    slower = {("bf16", 8): 8e12, ("bf16", 16): 5e12}
    found = look(root, environment={"OMP_NUM_THREADS": "16"})
    [trouble] = find(found, replace(WELL, gemm=slower, **every))
    assert "OMP_NUM_THREADS=16 lets programs compute with 16 threads on 8 cores" in trouble.what
    assert "1.60× faster with 8" in trouble.cost
    assert find(found, replace(WELL, gemm={("bf16", 8): 8e12, ("bf16", 16): 8e12}, **every)) == []
    one_of_each_core = look(root, affinity=8, cores=8)  # as srun --hint=nomultithread leaves it
    assert find(one_of_each_core, replace(WELL, launcher="slurm")) == []


def test_the_dearest_problem_comes_first(root):
    write(root, "sys/fs/cgroup/cpu.max", "100000 100000")
    found = find(look(root), replace(WELL, launcher="none"))
    assert [one.name for one in found] == ["quota", "domains"]


def test_a_process_that_was_started_wrongly(tmp_path):
    """One core of two, one thread, by the real doctor: found, measured, and every part of the answer is there."""
    if cores() < 2:
        pytest.skip("needs two cores")
    program = "import os, sys; os.sched_setaffinity(0, [0]); from tozan.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["doctor", "--json", "--out", str(tmp_path / "doctor.json")]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    raw = json.loads(done.stdout)
    jsonschema.validate(raw, Result.model_json_schema())
    found = Result.model_validate(raw)
    assert "affinity" in {one["name"] for one in found.problems}
    assert all(one["cost"] and one["fix"] and one["source"] for one in found.problems)
    assert {row.unit for row in found.rows} == {"s", "FLOP/s", "bytes/s"}
    assert {"lo", "shared memory"} <= {row.get("route") for row in found.rows}
    gloo = found.facts["backends"]["gloo"]
    assert set(gloo) == set(backends.OPERATIONS)
    assert gloo["all_reduce max"]["fp32"] == "NaN lost"
    assert gloo["all_reduce sum"]["fp32"] == "ok"
    assert gloo["all_reduce sum"]["bf16"] == "rounded"
    assert "wrong" not in {verdict for by_type in gloo.values() for verdict in by_type.values()}
    assert found.facts["process"]["mallopt"]["M_TOP_PAD"] == 64 << 20
    assert "PyTorch's libraries" in found.facts["process"]["products"]
    page_fits(found)


def page_fits(found):
    """The page of a result, 100 columns wide, in which every problem's cure can be read."""
    from tozan.bench.doctor_page import page

    console = Console(width=100, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    for part in page(found):
        console.print(part)
    text = console.export_text()
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
    for one in found.problems:
        assert one["fix"].split()[0] in text
    assert "tozan sets, by mallopt" in text
    assert f"products      {found.facts['process']['products'][:40]}" in text


def test_help_is_torch_free():
    program = "import sys; sys.modules['torch'] = None; from tozan.cli import main; sys.exit(main(['doctor', '-h']))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_the_first_line_of_help(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "what is wrong" in capsys.readouterr().out
