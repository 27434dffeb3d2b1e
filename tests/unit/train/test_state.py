import json

from stoker.train.settings import EarlyStopping
from stoker.train.state import TrainState


def noted(losses, min_improvement=0.0):
    state, bests = TrainState(), []
    for step, loss in enumerate(losses, start=1):
        state.step = step
        bests.append(state.note_evaluation(loss, min_improvement))
    return state, bests


def test_the_lowest_loss_is_the_best():
    state, bests = noted([3.0, 2.0, 2.5, 2.0, 1.0])
    assert bests == [True, True, False, False, True]
    assert (state.best_step, state.best_loss, state.evaluated_step) == (5, 1.0, 5)


def test_patience_counts_evaluations_without_enough_improvement():
    state, bests = noted([3.0, 2.95, 2.9, 2.85], min_improvement=0.1)
    assert bests == [True, True, True, True]
    # 2.9 is not more than 0.1 below 3.0; 2.85 is.
    assert state.evaluations_without_improvement == 0
    state, _ = noted([3.0, 2.95, 2.9], min_improvement=0.1)
    assert state.evaluations_without_improvement == 2
    assert state.is_out_of_patience(EarlyStopping(2))
    assert not state.is_out_of_patience(EarlyStopping(3))
    assert not state.is_out_of_patience(None)


def test_state_survives_json_exactly():
    state, _ = noted([0.1 + 0.2, 1e-17])
    assert TrainState.from_values(json.loads(json.dumps(state.to_values()))) == state
