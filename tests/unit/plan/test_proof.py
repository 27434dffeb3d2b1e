"""The cells of the plan's proof on a GPU: what they cover, and that all of them can run."""

import pytest
from benchmarks import plan_cells as cells

from stoker.plan.catalogue import shipped


def test_the_grid_covers_models_methods_lengths_batches_and_rungs():
    grid = cells.GRID
    assert len(grid) >= 40
    assert len({cell.name for cell in grid}) == len(grid)
    assert {cell.method for cell in grid} == {"full", "bf16", "lora", "nf4", "int8", "fp8"}
    assert {cell.rung for cell in grid} == {"none", "mixer", "attention", "input"}
    assert {512, 32768} <= {cell.length for cell in grid}
    assert {1, 16} <= {cell.rows for cell in grid}
    assert any(cell.packed for cell in grid)
    held = [cell for cell in grid if cells.is_held_out(cell.name)]
    assert len(held) / len(grid) == pytest.approx(1 / 3, abs=0.03)


def test_every_cell_fits_on_an_h200_as_it_says():
    device = shipped()["h200"].device()
    for cell in cells.GRID:
        plan = cells.predict(cell, device).plan
        assert plan.micro_batch_size == cell.rows
        assert plan.offload_activations == cell.offload
        assert set(plan.keep) == {"all" if cell.rung == "none" else cell.rung}


@pytest.mark.slow
def test_frontiers_are_caps_that_a_few_rows_fill():
    from dataclasses import replace

    whole = shipped()["h200"].device()
    assert len(cells.FRONTIERS) >= 10
    for one in cells.FRONTIERS:
        capped = replace(whole, memory_bytes=int(one.cap_gib * cells.GIB))
        rows = cells.most_rows(one.cell, capped)
        assert 1 <= rows <= 16, one.name
        # A row more is a step of at least a fiftieth of the cap: less could not be told from noise.
        more = cells.predict(one.cell, whole, count=rows + 1).plan.memory.total
        now = cells.predict(one.cell, whole, count=rows).plan.memory.total
        assert more - now > 0.02 * one.cap_gib * cells.GIB
