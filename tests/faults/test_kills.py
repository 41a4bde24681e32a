"""A run that is killed and resumed ends with the weights of one that never stopped."""

import pytest
from fault_runs import (
    difference,
    dying_at_rename,
    dying_in_step,
    dying_in_write,
    run_forked,
    run_overrides,
)

KILLED = -9


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_kills_at_every_kind_of_moment(tmp_path, small_data, undisturbed, workers):
    """In a step, in the writing of a checkpoint, and before and between the two renamings."""
    overrides = run_overrides(tmp_path, small_data, f"dataloader.train.num_workers={workers}")
    log = tmp_path / "console.txt"
    moments = [
        dying_in_step(5),
        dying_in_write(2, share=0.6),
        dying_at_rename(1, after=False),
        dying_at_rename(3, after=True),
    ]
    for sabotage in moments:
        code = run_forked(["--resume", *overrides], sabotage=sabotage, log=log)
        assert code == KILLED, log.read_text()
    assert run_forked(["--resume", *overrides], log=log) == 0, log.read_text()
    assert difference(undisturbed, tmp_path) is None
    assert not list(tmp_path.glob(".*.partial"))
