"""What share of a device's figures a training step reaches, and what it costs whatever the device."""

from dataclasses import dataclass, field

from stoker.plan.cpu import CpuRates


@dataclass(frozen=True)
class Efficiencies:
    """Shares of a device's figures that a step reaches, and fixed costs; `source` says whose they are.

    The defaults are one H200's under its 700 W limit (torch 2.11; docs/engine_log.md). For other devices every one of
    them is a rule of thumb until it is measured there.
    """

    matmul: float = 0.69
    """Of the dense rate, by bf16 products inside a step: 655 to 685 of 989 TFLOP/s. Measured in cell A."""
    matmul_fp8: float = 0.64
    """The same of the fp8 rate. From 8B's and 1B's shapes (plan_proof); alone, products reach 0.72."""
    matmul_grouped: float = 0.58
    """Of the dense rate, by experts' products over routed rows. From Mixtral's shape (plan_proof)."""
    attention: float = 0.454
    """Of the dense rate, by attention over long rows with heads of 128 channels, forward and backward. Measured in cell
    A and in rows of 16,384 and 32,768 tokens (plan_proof)."""
    attention_half: float = 230.0
    """Tokens of a document at which attention reaches half of that rate: tiles on the diagonal are half empty."""
    attention_packed: float = 0.5
    """Of that rate again, by the flash attention of packed rows, which knows document borders, where whole rows have
    cuDNN's. From 1B's shape (plan_proof)."""
    attention_head: float = 0.5
    """Attention's rate grows with head_dim to this power, up to 128: heads of 64 reach 0.32. Measured in cell E."""
    bandwidth: float = 0.80
    """Of the memory's bandwidth, by elementwise kernels: 92% of a copy's, which reaches 87%. Measured in cell A."""
    scan: float = 0.20
    """Of the fp32 rate, by Mamba-1's selective scan. From Mamba 2.8B's shape (plan_proof)."""
    scan_lanes: float = 15_000.0
    """Channels of all rows together, which are scanned side by side, that it takes for that rate: with fewer it waits
    for memory. From Mamba 130M at 4 x 2048 (benchmarks/results)."""
    chunked_scan: float = 0.06
    """Of the dense rate, by Mamba-2's products within chunks. From Mamba-2 780M at 4 x 2048."""
    adapter_passes: float = 5.5
    """Reads or writes of each value that goes into and comes out of an adapted layer. Measured in A, checked in E."""
    adapter_passes_grouped: float = 2.0
    """The same of an expert's layers, whose updates are inside of their products: x and dy are read for P and dP, and
    for the gradients of A and B. By counting (kernels/mixture.py)."""
    update_bytes: float = 72.0
    """Of a step, for each weight that is trained in fp32 under bf16, besides the optimiser's state: gradient read,
    scaled and updated, casts of the weight for forward and backward and of its gradient. From 1B, 3B (plan_proof)."""
    update_bytes_narrow: float = 22.0
    """The same of a weight trained in bf16. From 8B (plan_proof)."""
    op_by_op: float = 1.5
    """Elementwise traffic of a layer under autograd, over that of the fused one. Rule of thumb."""
    layer_launch_seconds: float = 0.6e-3
    """Launching a fused layer's forward and backward. Measured in cell G: 9.5 ms for 16 layers."""
    op_by_op_launch_seconds: float = 1.5e-3
    """The same of a layer that runs op by op. Rule of thumb: two to three times as many kernels."""
    call_seconds: float = 5e-6
    """Launching one small operation. Rule of thumb: a fused layer's 0.6 ms are some 120 of them."""
    host_link: float = 0.80
    """Of the link to the host, by copies of pinned memory. Rule of thumb."""
    host_bandwidth: float = 100e9
    """Bytes a second that updates on the host read and write, of all processes of a node. Rule of thumb: eight channels
    of DDR4-3200 give 205 GB/s at most."""
    disk_bandwidth: float = 3.0e9
    """Bytes a second of an NVMe disk, read or written. Rule of thumb."""
    overlap: float = 0.8
    """Of the work beside which collectives run, the share that hides them: both want the memory. Rule of thumb."""
    start_seconds: float = 16.0
    """Before the first step at full speed: imports, compilation of kernels, the first step. Measured in A (16 s)."""
    load_bandwidth: float = 3.0e9
    """Bytes a second of weights read and moved to the device. Measured between cells A and E."""
    source: str = "an H200's, measured; rules of thumb on other devices"
    cpu: CpuRates = field(default_factory=CpuRates)
    """What a CPU has instead of launches, and of its memory."""


MEASURED = Efficiencies()
"""What was measured, used until a machine has its own."""

ON_CPU = Efficiencies(
    matmul=0.9,
    attention=0.45,
    attention_head=0.35,
    bandwidth=0.5,
    start_seconds=5.0,
    load_bandwidth=1.0e9,
    source="a Xeon's, measured; rules of thumb on other CPUs (stoker doctor --calibrate measures this machine)",
)
"""The same of a CPU that was not measured."""
