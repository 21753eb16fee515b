"""Nominal peaks: against data sheets, and the clock of this machine against what a product reaches here."""

import os
import platform

import psutil
import pytest
import torch

from tozan.comm import processor
from tozan.cpuinfo import cpuinfo
from tozan.train.machine import measure_gemm_rate

AVX512 = "fma avx2 avx512f avx512_bf16"
SHEETS = [
    # Fujitsu, A64FX datasheet: 48 cores at 2.0 GHz, 6.144 TFLOP/s fp32 and twice that in fp16.
    ({"CPU implementer": "0x46", "CPU part": "0x001", "Features": "sve"}, 48, 2.0e9, "fp32", 6.144e12),
    ({"CPU implementer": "0x46", "CPU part": "0x001", "Features": "sve"}, 48, 2.0e9, "fp16", 12.288e12),
    # NVIDIA, Grace: 7.1 TFLOP/s fp64 in two times 72 cores at 3.1 GHz.
    ({"CPU implementer": "0x41", "CPU part": "0xd4f"}, 144, 3.1e9, "fp64", 7.1e12),
    # AMD, EPYC 9654 (HPC tuning guide): 96 cores, 16 FLOP a cycle in fp64 at 2.4 GHz are 3.69 TFLOP/s.
    ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17", "flags": AVX512}, 96, 2.4e9, "fp64", 3.69e12),
    # Intel, Xeon 8280: 28 cores, 32 FLOP a cycle in fp64 at 2.7 GHz are 2.42 TFLOP/s.
    ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "85", "flags": "fma avx512f",
      "model name": "Intel(R) Xeon(R) Platinum 8280 CPU @ 2.70GHz"}, 28, 2.7e9, "fp64", 2.42e12),
    # Intel, AMX: 1,024 bf16 operations a core and cycle.
    ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "143", "flags": AVX512 + " amx_bf16"}, 56, 2.0e9,
     "bf16", 56 * 1024 * 2.0e9),
]  # fmt: skip


@pytest.mark.parametrize(("cpu", "cores", "hertz", "precision", "flops"), SHEETS)
def test_flops_per_cycle_are_those_of_the_data_sheets(cpu, cores, hertz, precision, flops):
    assert cores * hertz * processor.core(cpu).flops[precision] == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
    "cpu",
    [
        {},
        {"CPU implementer": "0x41", "CPU part": "0xfff"},
        {"vendor_id": "AuthenticAMD", "cpu family": "99", "model": "1", "flags": AVX512},
        {"vendor_id": "GenuineIntel", "cpu family": "6", "model": "85", "flags": "fma avx512f",
         "model name": "Intel(R) Xeon(R) Silver 4110 CPU @ 2.10GHz"},
    ],
)  # fmt: skip
def test_what_is_not_known_is_not_guessed(cpu):
    assert processor.core(cpu) is None


def test_arms_numbers_have_names():
    assert processor.name({"CPU implementer": "0x46", "CPU part": "0x001"}) == "A64FX"
    assert processor.name({"CPU implementer": "0x41", "CPU part": "0xd4f", "model name": "ARMv8"}) == "Neoverse V2"
    assert processor.name({"CPU implementer": "0x41", "CPU part": "0xfff"}).endswith(", part 0xfff")
    assert processor.name({"model name": "AMD EPYC 9654"}) == "AMD EPYC 9654"
    assert processor.name({})


def test_cores_and_memory_where_the_system_counts_otherwise(monkeypatch):
    before = processor.peak_memory()
    assert psutil.Process().memory_info().rss * 0.9 < before < psutil.virtual_memory().total
    monkeypatch.setattr(processor.sys, "platform", "darwin")  # which counts bytes, and binds no process to cores
    monkeypatch.delattr(processor.os, "sched_getaffinity")
    assert processor.peak_memory() == pytest.approx(before / 1024, rel=0.1)
    assert processor.cores() == os.cpu_count()


def machine(root, clock):
    files = {
        "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x46\nCPU part\t: 0x001\n\nprocessor\t: 1\n",
        "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0",
    } | ({"sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2200000\n"} if clock else {})
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_peak_says_what_it_is_the_product_of_or_why_there_is_none(tmp_path):
    found = processor.nominal("fp32", 1, machine(tmp_path / "a", clock=True))
    assert found.flops == pytest.approx(64 * 2.2e9)
    assert found.how == "1 core × 64 FLOP a cycle (A64FX) × 2.20 GHz (the kernel's highest)"
    found = processor.nominal("fp32", 1, machine(tmp_path / "b", clock=False))
    assert found.flops is None
    assert "clock" in found.how
    assert "this make" in processor.nominal("fp32", 1, tmp_path / "c").how


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the clock is measured with x86 instructions")
@pytest.mark.usefixtures("one_thread")
def test_the_measured_clock_carries_what_this_machine_multiplies():
    hertz = processor.measured_clock()
    assert 0.8e9 < hertz < 7e9
    known = processor.core(cpuinfo())
    if known is None:
        pytest.skip(f"no FLOPs per cycle known for {cpuinfo().get('model name')}")
    rate = measure_gemm_rate(torch.float32, torch.device("cpu"), 0.2)
    # A clock that counts too few cycles, or too few pipes, would be overtaken; boosts between the two are allowed for.
    assert rate < 1.15 * hertz * known.flops["fp32"]
