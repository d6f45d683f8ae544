"""Steps that are recorded give what steps as they are give. The recorder of the tests runs the work again: no GPU."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from library.training.denoising import Question
from library.training.step_capture import USUAL_STEPS, CapturedSteps, map_tensors


def question(number: int, width: int = 8) -> Question:
    generator = torch.Generator().manual_seed(number)
    noisy, target = torch.randn(2, 2, 4, 8, width, generator=generator)
    conds = {"hidden": torch.randn(2, 77, 6, generator=generator)}
    return Question(noisy, torch.tensor([number, 5]), conds, target, torch.ones(2), None, None)


class Step:
    """A loss of all that a question holds."""

    def __init__(self):
        self.calls = 0

    def __call__(self, question: Question) -> Tensor:
        self.calls += 1
        asked = (question.noisy * question.timesteps.view(-1, 1, 1, 1)).mean() + question.conds["hidden"].sum()
        return asked + (question.target.mean(dim=(1, 2, 3)) * question.weights).mean()


class Recorder:
    """Repeats work on the inputs that it was given, as a graph does."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recordings += 1
        result = torch.zeros(())

        def replay() -> Tensor:
            return result.copy_(work())

        return replay


def test_each_shape_is_recorded_once_after_its_first_steps_and_losses_are_the_same():
    step, recorder = Step(), Recorder()
    captured = CapturedSteps(step, recorder)
    asked = [question(number, width=8 if number % 2 else 16) for number in range(20)]
    losses = [captured(one) for one in asked]
    assert torch.equal(torch.stack(losses), torch.stack([Step()(one) for one in asked]))
    assert recorder.recordings == 2 and len(captured.recorded) == 2
    assert all(count == USUAL_STEPS + 1 for count in captured.seen.values())


def test_what_cannot_be_recorded_runs_as_usual_with_one_line(caplog):
    def refuse(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    captured = CapturedSteps(Step(), refuse)
    with caplog.at_level(logging.WARNING):
        losses = [captured(question(number)) for number in range(8)]
    assert torch.equal(torch.stack(losses), torch.stack([Step()(question(number)) for number in range(8)]))
    assert caplog.text.count("--cuda_graphs is not used") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_graph_of_a_gpu_gives_the_same_losses():
    step = Step()
    captured = CapturedSteps(step)
    on_gpu = [move(question(number)) for number in range(8)]
    losses = torch.stack([captured(one) for one in on_gpu])
    torch.testing.assert_close(losses, torch.stack([step(one) for one in on_gpu]))


def move(one: Question) -> Question:
    return map_tensors(one, Tensor.cuda)
