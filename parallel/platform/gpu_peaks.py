"""Dense peaks of NVIDIA GPUs in TFLOP/s by their whole name; none for a name that is not here. Torch-free.

Half of what datasheets show with sparsity; of GeForce with fp32 accumulation. What is behind each entry says where it
was looked up; a GPU for which nothing dependable was found (B100) has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Regular expressions for the name without "NVIDIA ". A part of a GPU (MIG) adds a suffix, so it matches none of them.
# Sources: NVIDIA's datasheets and whitepapers, or the public tables named, which took their numbers from those. FP8 is
# twice bf16, to the datasheet's rounding.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"GB[23]00", {"bf16": 2500.0, "fp8": 5000.0}),  # datasheet of GB200 NVL72; B300's gain is in FP4 alone
    (r"B200|B300 SXM6 AC", {"bf16": 2250.0, "fp8": 4500.0}),  # datasheet of HGX B200; B300 as above
    (r"GH200 \d+GB?( HBM3e?)?", {"bf16": 989.0, "fp8": 1979.0}),  # Bekman, Machine Learning Engineering
    (r"H[128]00( \d+GB HBM3e?)?", {"bf16": 989.0, "fp8": 1979.0}),  # datasheet of H100 SXM
    (r"H[12]00 NVL", {"bf16": 835.5, "fp8": 1670.5}),  # torchtitan (835), nanochat (836), from NVIDIA's pages
    (r"H[18]00 PCIe", {"bf16": 756.0, "fp8": 1513.0}),  # datasheet of H100 PCIe
    (r"H20", {"bf16": 148.0, "fp8": 296.0}),  # LLM-Prof and LLMRoofline
    (r"A[18]00(-SXM4?-[48]0GB|-PCI[Ee]-[48]0GB| 80GB PCIe)", {"bf16": 312.0}),  # datasheet
    (r"A40", {"bf16": 149.7}),  # datasheet
    (r"A30", {"bf16": 165.0}),  # nanochat, LLMRoofline
    (r"A10", {"bf16": 125.0}),  # datasheet
    (r"A10G", {"bf16": 70.0}),  # Baseten's comparison with A10
    (r"L40S", {"bf16": 362.0, "fp8": 733.0}),  # datasheet
    (r"L40", {"bf16": 181.0, "fp8": 362.0}),  # NVIDIA BioNeMo's recipes, LLMRoofline
    (r"L4", {"bf16": 121.0, "fp8": 242.0}),  # datasheet
    (r"GeForce RTX 4090", {"bf16": 165.2, "fp8": 330.3}),  # whitepaper of Ada; nanochat
)


def find_peaks(device_name: str) -> Mapping[str, float]:
    """Return the peaks of a GPU by number format (`bf16`, `fp8`), empty for one that is not known."""
    name = device_name.strip().removeprefix("NVIDIA ")
    return next((peaks for pattern, peaks in _PEAKS if re.fullmatch(pattern, name)), {})
