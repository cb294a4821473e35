"""Peaks of GPUs by their names, as drivers report them: no name is taken for another's."""

import pytest

from parallel.platform.gpu_peaks import find_peaks


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, 1979.0),
        ("NVIDIA H100 PCIe", 756.0, 1513.0),
        ("NVIDIA H100 NVL", 835.5, 1670.5),
        ("NVIDIA H200", 989.0, 1979.0),
        ("NVIDIA H200 NVL", 835.5, 1670.5),
        ("NVIDIA H20", 148.0, 296.0),
        ("NVIDIA GH200 480GB", 989.0, 1979.0),
        ("NVIDIA GH200 144G HBM3e", 989.0, 1979.0),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA B300 SXM6 AC", 2250.0, 4500.0),
        ("NVIDIA GB200", 2500.0, 5000.0),
        ("NVIDIA GB300", 2500.0, 5000.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("A100-SXM4-40GB", 312.0, None),
        ("NVIDIA A100 80GB PCIe", 312.0, None),
        ("NVIDIA A800-SXM4-80GB", 312.0, None),
        ("NVIDIA A10", 125.0, None),
        ("NVIDIA A10G", 70.0, None),
        ("NVIDIA A40", 149.7, None),
        ("NVIDIA A30", 165.0, None),
        ("NVIDIA L4", 121.0, 242.0),
        ("NVIDIA L40", 181.0, 362.0),
        ("NVIDIA L40S", 362.0, 733.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 330.3),
    ],
)
def test_a_known_gpu_has_its_own_peaks(name, bf16, fp8):
    peaks = find_peaks(name)
    assert (peaks["bf16"], peaks.get("fp8")) == (bf16, fp8)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A10M",
        "NVIDIA B100",
        "NVIDIA RTX A4000",
        "NVIDIA A16",
        "Tesla T4",
        "",
    ],
)
def test_an_unknown_gpu_or_a_part_of_one_has_none(name):
    assert not find_peaks(name)
