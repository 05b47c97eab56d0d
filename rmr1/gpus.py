"""What `rmr1 plan` knows of GPUs, from memory of their data sheets. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU in a node of eight. Bytes, FLOP/s of dense products, bytes/s.

    `flops` are of bf16; `flops32` of plain fp32, as torch leaves TF32 off unless told otherwise.
    """

    memory: float  # what its driver shows
    flops: float
    flops32: float
    bandwidth: float  # of its memory
    link: float  # to the others of its node, one direction
    network: float = 50e9  # to other nodes, a share of 8 x 400 Gb/s
    host: float = 50e9  # to its host's memory, PCIe 5 x16


GPUS = {
    "a100": Gpu(85.1e9, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, 25e9),
    "h100": Gpu(85.0e9, 989e12, 67e12, 3.35e12, 450e9),
    "h200": Gpu(150.7e9, 989e12, 67e12, 4.8e12, 450e9),
    "b200": Gpu(192.0e9, 2250e12, 80e12, 8.0e12, 900e9, 50e9, 60e9),
    "mi300x": Gpu(206.1e9, 1307e12, 163.4e12, 5.3e12, 448e9),
}
NODE = 8  # GPUs

# Of the rates above, what is assumed to be reached. Guesses: no GPU has run any of this.
GEMM_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.45, 0.7, 0.7
# Of the memory, what CUDA, NCCL and fragmentation leave.
MEMORY_SHARE = 0.94
STEP_SECONDS = 3e-3  # of a decoding step besides its products and reads
ADAM_PER_SECOND = 1e9  # parameters that a rank's share of the host steps in a second
