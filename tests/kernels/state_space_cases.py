"""What compile_for.py compiles of the kernels of state spaces."""

from stoker.kernels import (
    causal_conv,
    chunked_scan_backward,
    chunked_scan_forward,
    gated_norm,
    selective_scan_backward,
    selective_scan_forward,
)

WIDE = ["A", "bias", "D", "begin", "end", "grad_A", "grad_bias", "grad_D", "shares", "key_shares", "partial"]
FLOATS = {f"{name}_ptr": "*fp32" for name in WIDE} | {"documents_ptr": "*i32", "lowest": "fp32", "highest": "fp32"}
CHUNKED = FLOATS | {"steps_ptr": "*fp32", "logs_ptr": "*fp32"}
KEYS = {f"{name}_ptr": "*fp32" for name in ("B", "C", "keys", "states", "grad_states", "totals")}
SELECTIVE = FLOATS | KEYS


def cases(capability: int) -> list[tuple]:
    """Kernel, compile-time values, warps, and the arguments that are not of the working dtype."""
    tile = chunked_scan_forward.MAX_CHUNK if capability >= 80 else chunked_scan_forward.MAX_CHUNK // 2
    tiles = {"CHUNK": tile, "CHANNELS": 64, "STATES": tile, "PACKED": True}
    stages = {"STAGES": chunked_scan_forward.STAGES}
    flags = {"HAS_D": True, "HAS_BIAS": True, "PARAMETER_GRADS": True}
    forward, backward = chunked_scan_forward.WARPS, chunked_scan_backward.WARPS
    scan = {
        "CHUNK": selective_scan_forward.CHUNK,
        "CHANNELS": selective_scan_forward.CHANNELS,
        "NEIGHBOURS": selective_scan_forward.NEIGHBOURS,
        "HAS_BIAS": True,
        "HAS_GATE": True,
        "PACKED": True,
    }
    warps = selective_scan_forward.WARPS
    conv = {"ROWS": causal_conv.ROWS, "WIDTH": 4, "HAS_BIAS": True, "SILU": True, "PACKED": True}
    carry = {"CHUNK": scan["CHUNK"], "BLOCK": 128, "HAS_BEGIN": True, "PACKED": True, "BACKWARD": True, "STAGES": 4}
    return [
        (chunked_scan_forward._steps_kernel, {"CHUNK": tile, "HEADS": 16, "HAS_BIAS": True}, 4, CHUNKED),
        (
            chunked_scan_forward._states_kernel,
            tiles | stages | {"HAS_BEGIN": True, "BACKWARD": True},
            forward,
            CHUNKED,
        ),
        (chunked_scan_forward._output_kernel, tiles | stages | {"HAS_D": True}, forward, CHUNKED),
        (chunked_scan_backward._grad_inputs_kernel, tiles | stages | flags, backward, CHUNKED),
        (chunked_scan_backward._grad_shared_kernel, tiles | stages, backward, CHUNKED),
        (selective_scan_forward._chunk_states_kernel, scan | {"BACKWARD": True}, warps, SELECTIVE),
        (selective_scan_forward._carry_kernel, carry, 1, SELECTIVE),
        (selective_scan_forward._scan_kernel, scan | {"HAS_D": True}, warps, SELECTIVE),
        (
            selective_scan_backward._scan_backward_kernel,
            scan | {"HAS_D": True, "PARAMETER_GRADS": True},
            warps,
            SELECTIVE,
        ),
        (causal_conv._forward_kernel, conv | {"CHANNELS": causal_conv.FORWARD_CHANNELS}, causal_conv.WARPS, FLOATS),
        (
            causal_conv._backward_kernel,
            conv | {"CHANNELS": causal_conv.BACKWARD_CHANNELS, "PARAMETER_GRADS": True},
            causal_conv.WARPS,
            FLOATS,
        ),
        (gated_norm._forward_kernel, {"BLOCK": 4096, "GATE_FIRST": True}, 8, {}),
        (gated_norm._backward_kernel, {"BLOCK": 4096, "GATE_FIRST": True, "WEIGHT_GRAD": True}, 8, {}),
    ]
