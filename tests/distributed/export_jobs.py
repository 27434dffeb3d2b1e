"""What each process does for the tests of exported checkpoints."""

from pathlib import Path

import jobs

from stoker.checkpoint.saver import Saver

NAMES = ("full", "tied", "mixture")  # the mixture's files have a tensor for each expert, its checkpoint one for all


def train_and_save(ranks, kinds, folder):
    """Takes a step under each strategy and saves; returns the weights that were gathered whole."""
    found = {}
    for kind in kinds:
        for name in NAMES:
            model = jobs.build(jobs.CASES[name])
            strategy = jobs.make_strategy(kind, ranks, model)
            result = jobs.train(name, kind, model=model, strategy=strategy, steps=1)
            options = {"rank": strategy.rank, "world_size": strategy.world_size, "gather": strategy.gather_over_ranks}
            saver = Saver(Path(folder) / kind / name, **options)
            saver.begin(1, tensors={"weights": strategy.shared_state().weights}, values={})
            saver.commit()
            found[kind, name] = result["whole"]
    return found
