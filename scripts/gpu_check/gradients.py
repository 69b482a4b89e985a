"""Hand-written against numeric gradients, in float64."""

from gpu_check.part import Outcome, Work, judged
from segnet_scratch.lab.proof.gradcheck import gradchecks, names


def gradients(work: Work) -> Outcome:
    """The shapes that suit each op once, then with other seeds while there is time. On the host: single ops only."""
    chosen = [name for name in names() if work.on_gpu or name != "segnet"]
    seeds = compared = 0
    worst, problems = 0.0, []
    while seeds == 0 or not work.over:
        for result in gradchecks(chosen, work.device, seeds, None if work.on_gpu else 2):
            compared, worst = compared + result.compared, max(worst, result.worst)
            if not result.passed:
                problems.append(str(result))
            if seeds and work.over:
                break
        seeds += 1
    text = f"{len(chosen)} ops, {seeds} seeds, {compared} derivatives, worst error {worst:.1e}"
    return judged(text, problems)
