"""Compiles every kernel for the GPUs named on the command line (compute capabilities), without one; JSON lines.

Run as a process of its own: kernels defined under TRITON_INTERPRET cannot be compiled.
"""

import json
import sys
import warnings

import state_space_cases
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stoker.kernels import (
    adamw,
    adamw_8bit,
    dora,
    dropout,
    fp8,
    glu,
    grouped_matmul,
    grouped_outer,
    head_norm,
    layer_norm,
    low_rank,
    nf4,
    rms_norm,
    rope,
    rounded_glu,
    rounded_rotation,
    routed_rows,
    routing,
    scaled_glu,
    scaled_update,
    turn_logits,
)

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

# Kernel, compile-time values, warps, and the arguments that are not tensors of the working dtype.
FLOATS = dict.fromkeys(
    (
        "part_a_ptr",
        "part_b_ptr",
        "rstd_ptr",
        "partial_ptr",
        "cos_ptr",
        "sin_ptr",
        "factor_ptr",
        "losses_ptr",
        "scale_ptr",
    ),
    "*fp32",
)
FLOATS |= dict.fromkeys(("epsilon", "scale", "scaling", "cap", "smoothing", "z_loss"), "fp32")
ROUTES = dict.fromkeys(("ends_ptr", "rows_ptr", "left_rows_ptr", "right_rows_ptr", "place_ptr"), "*i32")

CHOICE = dict.fromkeys(("logits_ptr", "weights_ptr", "grad_ptr", "grad_logits_ptr"), "*fp32") | {"scale": "fp32"}
CHOICE |= dict.fromkeys(("chosen_ptr", "counts_ptr", "tokens_ptr", "order_ptr"), "*i32")


def grouped(tile: grouped_matmul.Tile, *, transposed: bool, boxes: bool = False) -> tuple:
    """A case of the grouped matmul with all it can do, for the GPUs that have such tiles."""
    flags = dict.fromkeys(("GATHERED", "HAS_BIAS", "HAS_UPDATE", "EVEN"), True)
    flags["HALVES"] = tile is not grouped_matmul.SKINNY
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "RANK": 16, "rank": 16}
    constants |= {"EXPERTS": 128, "TRANSPOSED": transposed, "BOXES": boxes, "GROUP": 8}
    types = ROUTES | dict.fromkeys(("x_box", "half_box", "weight_box"), "i32")
    if boxes:
        flags["GATHERED"] = False
        shape = (tile.depth, tile.columns) if transposed else (tile.columns, tile.depth)
        sizes = ((tile.rows, tile.depth), (tile.rows // 2, tile.depth), shape)
        boxed = zip(("x_box", "half_box", "weight_box"), sizes, strict=True)
        types |= {name: f"tensordesc<bf16[{size[0]}, {size[1]}]>" for name, size in boxed}
    return (grouped_matmul._matmul_kernel, constants | flags, tile.warps, types, tile.stages)


def outer(tile: grouped_matmul.Tile) -> tuple:
    constants = {"LEFT": 16, "RIGHT": tile.columns, "ROWS": tile.depth, "LEFT_GATHERED": False, "RIGHT_GATHERED": True}
    return (grouped_outer._outer_kernel, constants, tile.warps, ROUTES, tile.stages)


def lengths(rows: int, rank: int) -> tuple:
    constants = {"ROWS": rows, "DEPTH": dora.depth_for(rows, rank), "RANK": rank, "SPLITS": True}
    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
    return (dora._lengths_kernel, constants, 4, types)


SUMMED = {"ROWS": dora.ROWS, "COLUMNS": dora.COLUMNS, "PROGRAM_ROWS": dora.PROGRAM_ROWS}


def rotation(half: int, rest: int, *, interleaved: bool) -> tuple:
    """A case of the rotation of heads of 128 channels with an unturned rest, backward."""
    constants = {"HEADS": 32, "HALF": half, "REST": rest, "CHANNELS": 128, "FROM_PAIRS": False}
    constants |= {"TO_PAIRS": interleaved, "BACKWARD": True, "WITH_VALUES": True}
    return (rope._rotate_kernel, constants, 4, {})


ADAMW = dict.fromkeys(("weight_ptr", "grad_ptr", "a_scale_ptr", "b_scale_ptr"), "*fp32")
ADAMW |= {"a_ptr": "*i8", "b_ptr": "*u8"} | dict.fromkeys(
    ("grad_scale", "first_weight", "second_weight", "kept", "size", "inverse_root", "epsilon"), "fp32"
)
ROUNDED = {"rounded_ptr": "*fp8e4nv", "rounded_scale_ptr": "*fp32"}
NF4 = {"packed_ptr": "*u8", "absmax_ptr": "*u8"}
NF4 |= dict.fromkeys(("code_ptr", "nested_code_ptr", "nested_absmax_ptr", "nested_offset_ptr"), "*fp32")
STEP = {name: kind for name, kind in ADAMW.items() if kind == "fp32"} | {"number": "i64", "seed": "i64"}
CASES = [
    (adamw._step_kernel, {"LANES": adamw.LANES, "ROUNDS": True}, 8, STEP),
    *((adamw_8bit._step_kernel, {"BLOCK": 256, "LANES": n, "BLOCKS": 1024 // n}, 4, ADAMW) for n in (16, 256)),
    *(
        (rms_norm._forward_kernel, {"BLOCK": 4096, "HAS_RESIDUAL": True, "ROUNDS": r}, 8, ROUNDED if r else {})
        for r in (False, True)
    ),
    *(
        (
            rms_norm._backward_kernel,
            {"BLOCK": 4096, "HAS_GRAD_TOTAL": True, "WEIGHT_GRAD": not r, "INPUT_GRAD": True, "ROUNDS": r},
            8,
            ROUNDED if r else {},
        )
        for r in (False, True)
    ),
    *(
        (kernel, {"BLOCK": rounded_glu.BLOCK, "ACTIVATION": "silu"}, rounded_glu.WARPS, ROUNDED)
        for kernel in (rounded_glu._forward_kernel, rounded_glu._backward_kernel)
    ),
    *(rotation(64, 0, interleaved=interleaved) for interleaved in (False, True)),
    rotation(16, 128, interleaved=False),
    *(
        (
            rounded_rotation._rotate_back_kernel,
            {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "PAIRS": interleaved},
            8,
            ROUNDED,
        )
        for interleaved in (False, True)
    ),
    *((glu._forward_kernel, {"BLOCK": 1024, "ACTIVATION": name}, 4, {}) for name in glu.ACTIVATIONS),
    *(
        (glu._backward_kernel, {"BLOCK": 1024, "ACTIVATION": name, "WITH_ACTIVATED": True}, 4, {})
        for name in glu.ACTIVATIONS
    ),
    *(
        (
            turn_logits._turn_logits_kernel,
            {
                "COLUMNS": turn_logits.TURN_COLUMNS,
                "GROUPS": turn_logits.TURN_GROUPS,
                "HAS_BIAS": True,
                "HAS_CAP": True,
                "HAS_FACTOR": True,
                "IS_VARIED": True,
                "WITH_GRADIENT": True,
                "IS_SCALED": is_rounded,
                "ROUNDED": is_rounded,
            },
            8,
            {"targets_ptr": "*i64", "row_scale_ptr": "*fp32", "out_scale_ptr": "*fp32"}
            | ({"out_ptr": "*fp8e4nv"} if is_rounded else {}),
        )
        for is_rounded in (False, True)
    ),
    (turn_logits._scale_kernel, {"BLOCK": turn_logits.SCALE_BLOCK}, 8, {"values_ptr": "*fp32"}),
    (
        nf4._dequantize_kernel,
        {"BLOCK_BYTES": 32, "BLOCKS": 32, "NESTED_BLOCK_SIZE": 256, "NESTED": True, "ROUTED": True},
        4,
        NF4 | ROUTES,
    ),
    (
        low_rank._grad_pair_kernel,
        {"ROWS": low_rank.ROWS, "COLUMNS": low_rank.COLUMNS, "RANK": 16, "rank": 16},
        4,
        {},
    ),
    (
        low_rank._sum_shares_kernel,
        {"ELEMENTS": low_rank.ELEMENTS, "SHARES": low_rank.SHARES, "FACTORED": True},
        1,
        {"share_b_ptr": "*fp32", "grad_b_ptr": "*fp32", "factor_ptr": "*fp32"},
    ),
    (
        low_rank._scale_columns_kernel,
        {"BLOCK": low_rank.SCALED_COLUMNS},
        4,
        {"out_ptr": "*fp32", "factor_ptr": "*bf16"},
    ),
    (
        low_rank._add_update_kernel,
        {"ROWS": low_rank.ROWS, "COLUMNS": low_rank.COLUMNS, "RANK": 16, "rank": 16, "HAS_Y": True},
        4,
        {},
    ),
    *(
        (
            scaled_update._scaled_update_kernel,
            {
                "ROWS": scaled_update.ROWS,
                "COLUMNS": scaled_update.COLUMNS,
                "RANK": rank,
                "HAS_COLUMN_SCALE": True,
                "HAS_RESIDUAL": True,
                "STAGES": scaled_update.stages_for(rank),
            },
            4,
            {"row_scale_ptr": "*fp32", "column_scale_ptr": "*fp32"},
        )
        for rank in (16, 64, 128)
    ),
    *(lengths(rows, rank) for rows in (dora.LENGTH_ROWS, dora.FEW_LENGTH_ROWS) for rank in (16, dora.MAX_RANK)),
    (dora._scale_kernel, {"BLOCK": 1024, "HAS_BIAS": True, "HAS_RESIDUAL": True}, 4, {}),
    *((dora._sums_kernel, SUMMED | {"WRITES": writes}, 4, {}) for writes in (False, True)),
    (scaled_glu._forward_kernel, {"BLOCK": 1024, "ACTIVATION": "silu", "HAS_BIAS": True}, 4, {}),
    *(
        (scaled_glu._backward_kernel, SUMMED | {"ACTIVATION": name, "HAS_BIAS": True}, 4, {})
        for name in glu.ACTIVATIONS
    ),
    (head_norm._forward_kernel, {"HEADS": 32, "HALF": 64}, 4, {}),
    (head_norm._backward_kernel, {"HEADS": 16, "HALF": 64, "WEIGHT_GRAD": True}, 4, {}),
    (layer_norm._forward_kernel, {"BLOCK": 8192, "HAS_RESIDUAL": True, "HAS_BIAS": True}, 16, {}),
    (
        layer_norm._backward_kernel,
        {"BLOCK": 8192, "HAS_GRAD_TOTAL": True, "WEIGHT_GRAD": True, "INPUT_GRAD": True},
        16,
        {},
    ),
    (dropout._drop_kernel, {"LANES": 512, "ADDS": True}, 4, {"seed": "i64"}),
    (fp8._quantize_rows_kernel, {"BLOCK": 4096, "HAS_FACTOR": True}, 4, {"out_ptr": "*fp8e4nv"}),
    *(grouped(tile, transposed=t) for tile in (grouped_matmul.SMALL, grouped_matmul.WIDE) for t in (False, True)),
    *(grouped(grouped_matmul.WIDE, transposed=t, boxes=True) for t in (False, True)),
    grouped(grouped_matmul.SKINNY, transposed=False),
    outer(grouped_matmul.SMALL),
    outer(grouped_outer.NARROW),
    (routed_rows._gate_kernel, {"BLOCK": 1024, "CLAMPED": True}, 4, {"limit": "fp32"}),
    (
        routed_rows._gate_backward_kernel,
        {"BLOCK": 1024, "CLAMPED": False},
        4,
        {"limit": "fp32", "grad_weight_ptr": "*fp32"},
    ),
    (
        routing._choose_kernel,
        {"TOP_K": 8, "SLOTS": 8, "ROWS": 16, "EXPERTS": 128, "NORMALIZED": True},
        4,
        CHOICE,
    ),
    (routing._choose_backward_kernel, {"TOP_K": 8, "ROWS": 16, "EXPERTS": 128, "NORMALIZED": True}, 4, CHOICE),
    (routed_rows._count_kernel, {"CHOICES": 256, "PART": 64, "EXPERTS": 128}, 4, CHOICE),
    (routed_rows._place_kernel, {"CHOICES": 256, "PART": 64, "EXPERTS": 128, "TOP_K": 8}, 4, CHOICE | ROUTES),
    (routed_rows._combine_kernel, {"TOP_K": 8, "BLOCK": 1024, "WEIGHTED": True}, 4, ROUTES),
]


def compile_case(case: tuple, capability: int) -> dict:
    kernel, constants, warps, types, *stages = case
    working = "*bf16" if capability >= 80 else "*fp16"
    names = kernel.arg_names
    signature = {}
    for name in names:
        default = working if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else (FLOATS | types).get(name, default)
    # As at a launch with aligned tensors and sizes: everything but floats is divisible by 16.
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32") and "desc" not in signature[name]
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": warps} | ({"num_stages": stages[0]} if stages else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    lines = compiled.asm["ptx"].splitlines()
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared_bytes": compiled.metadata.shared,
        "wide_loads": sum(
            ("ld.global" in line and (".v4." in line or ".v2." in line))
            or "cp.async.cg" in line
            or "cp.async.bulk" in line
            for line in lines
        ),
    }


for capability in map(int, sys.argv[1:]):
    for case in [*CASES, *state_space_cases.cases(capability)]:
        if capability < 89 and "*fp8e4nv" in case[3].values():
            continue  # no fp8 there
        if capability < 80 and case[4:] and case[4] > grouped_matmul.SMALL.stages:
            continue  # tiles of newer GPUs
        print(json.dumps(compile_case(case, capability)))
