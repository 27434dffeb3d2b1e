from stoker.plan import timeline
from stoker.plan.catalogue import shipped
from stoker.plan.survey import Request, survey
from stoker.plan.workload import log_normal


def moments(run, spec, *overrides, key="h100", method="lora"):
    request = Request(run(*overrides), spec, log_normal(1000, 400, 1.0, "a test"), (method,))
    (one,) = survey(request, [shipped()[key]])
    return one, timeline.timeline(one)


def test_a_step_goes_through_its_phases_and_never_above_the_plans_peak(run, llama_8b):
    for overrides, method in (((), "lora"), (("adapter=null", "train.weight_dtype=bf16"), "full"), ((), "nf4")):
        one, made = moments(run, llama_8b, *overrides, key="h200", method=method)
        assert list(dict.fromkeys(moment.phase for moment in made)) == list(timeline.PHASES)
        highest = max(moment.total for moment in made)
        assert highest <= one.plan.memory.total * 1.001
        assert highest > 0.9 * one.plan.memory.total
        assert all(count >= 0 for moment in made for count in moment.bytes.values())


def test_activations_grow_forward_and_shrink_backward(run, llama_8b):
    _, made = moments(run, llama_8b)
    forward = [moment.bytes["activations"] for moment in made if moment.phase == "forward"]
    backward = [moment.bytes["activations"] for moment in made if moment.phase == "backward"]
    assert forward == sorted(forward)
    assert backward == sorted(backward, reverse=True)
    assert made[0].bytes["activations"] == made[-1].bytes["activations"] == 0
    assert made[-1].bytes["gradients"] > made[0].bytes["gradients"] == 0
