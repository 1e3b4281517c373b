"""Learning rates against their closed forms; the plateau's memory; the decay of the weight average."""

import math

import pytest

from hpcmlip.config import OptimSection, ScheduleSection
from hpcmlip.training.schedules import SCHEDULES, Plateau, Position, ema_decay, is_exhausted, rate

LR = 1e-2


def optim(**schedule) -> OptimSection:
    return OptimSection(lr=LR, schedule=ScheduleSection(**schedule))


def at(section: OptimSection, epoch: float, *, step: int = 10**6, warmup_epochs: float = 0.0, plateau=None) -> float:
    return rate(section, Position(step, epoch, 100, warmup_epochs), plateau or Plateau())


def test_every_kind_of_the_config_has_a_schedule():
    assert set(SCHEDULES) == set(ScheduleSection.model_fields["kind"].annotation.__args__)


@pytest.mark.parametrize("epoch", [0.0, 0.5, 33.3, 99.99])
def test_constant(epoch):
    assert at(optim(kind="constant"), epoch) == LR


@pytest.mark.parametrize("epoch", [0.0, 12.5, 50.0, 100.0])
def test_cosine(epoch):
    expected = 1e-4 + (LR - 1e-4) * (1 + math.cos(math.pi * epoch / 100)) / 2
    assert at(optim(kind="cosine", min_lr=1e-4), epoch) == pytest.approx(expected, rel=1e-14)


def test_exponential_falls_by_the_factor_in_the_decay_epochs():
    section = optim(kind="exponential", factor=0.97, decay_epochs=2.0)
    assert at(section, 0) == LR
    assert at(section, 2.0) == pytest.approx(LR * 0.97, rel=1e-14)
    assert at(section, 7.0) == pytest.approx(LR * 0.97**3.5, rel=1e-14)


def test_staircase_falls_at_once_every_so_many_epochs():
    section = optim(kind="exponential", factor=0.97, decay_epochs=4.0, staircase=True)
    for epoch in (0.0, 3.99, 4.0, 4.01, 7.5, 8.0, 50.0):
        assert at(section, epoch) == pytest.approx(LR * 0.97 ** (epoch // 4), rel=1e-14)


def test_one_cycle_rises_from_a_25th_and_falls_to_the_minimum():
    section = optim(kind="one_cycle", rise=0.25, min_lr=1e-6)
    assert at(section, 0) == pytest.approx(LR / 25, rel=1e-14)
    assert at(section, 12.5) == pytest.approx((LR / 25 + LR) / 2, rel=1e-12)
    assert at(section, 25) == pytest.approx(LR, rel=1e-14)
    assert at(section, 62.5) == pytest.approx((LR + 1e-6) / 2, rel=1e-12)
    assert at(section, 100) == pytest.approx(1e-6, rel=1e-12)


def test_one_cycle_rises_from_the_rate_given():
    assert at(optim(kind="one_cycle", start_lr=4e-3), 0) == 4e-3


@pytest.mark.parametrize(("start", "final"), [(5e-4, 5e-6), (5e-4, 5e-4 * 5e-6 / LR)], ids=["nominal", "optax"])
@pytest.mark.parametrize("epoch", [0, 7])
def test_one_cycle_of_lines_in_each_epoch(start, final, epoch):
    """The schedule of the JAT work, in both readings of its last rate: three lines an epoch, with T = 100 steps."""
    section = optim(kind="one_cycle_linear", start_lr=start, rise=0.45, min_lr=final, per="epoch")
    for t in range(100):
        if t < 45:
            expected = start + (LR - start) * t / 45
        elif t < 90:
            expected = LR + (start - LR) * (t - 45) / 45
        else:
            expected = start + (final - start) * (t - 90) / 10
        assert at(section, epoch + t / 100) == pytest.approx(expected, rel=1e-10)


def test_one_cycle_of_lines_in_a_run():
    section = optim(kind="one_cycle_linear", rise=0.5, min_lr=1e-6)
    found = [at(section, epoch) for epoch in (0, 25, 50, 75)]
    assert found == pytest.approx([LR / 25, 0.52 * LR, LR, 0.52 * LR], rel=1e-12)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"kind": "cosine", "staircase": True}, "staircase has no effect with kind cosine, only with exponential"),
        ({"kind": "plateau", "per": "epoch"}, "per has no effect with kind plateau"),
        ({"kind": "constant", "start_lr": 1e-4}, "start_lr has no effect with kind constant"),
        ({"kind": "one_cycle_linear", "rise": 0.6}, "at most 0.5"),
        ({"kind": "one_cycle", "per": "epoch", "warmup_steps": 3}, "set warmup_steps to 0"),
    ],
)
def test_options_of_another_schedule_are_refused(section, complaint):
    with pytest.raises(ValueError, match=complaint):
        ScheduleSection(**section)


@pytest.mark.parametrize("kind", ["constant", "cosine", "exponential", "plateau"])
def test_warmup_is_a_line_from_0_and_the_schedule_begins_after_it(kind):
    section = optim(kind=kind, warmup_steps=20)
    assert [at(section, s / 10, step=s, warmup_epochs=2.0) for s in (0, 9, 19)] == pytest.approx(
        [LR / 20, LR / 2, LR], rel=1e-14
    )
    assert at(section, 2.0, step=20, warmup_epochs=2.0) == pytest.approx(LR, rel=1e-14)


def test_plateau_falls_after_patience_validations_and_remembers_the_best():
    section = optim(kind="plateau", factor=0.5, patience=2, min_lr=3e-3)
    memory, rates, best = Plateau(), [], []
    for objective in [5.0, 4.0, 4.0, 4.5, 4.2, 3.9, math.nan, 4.0, 4.0, 4.0]:
        memory = memory.after(objective, section.schedule)
        rates.append(at(section, 1.0, plateau=memory) / LR)
        best.append((memory.best, memory.since_best))
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert best[-1] == (3.9, 4) and best[5] == (3.9, 0)
    assert is_exhausted(section, memory) and not is_exhausted(section, Plateau(scale=0.5))


def test_other_schedules_ignore_the_plateau_but_count_for_the_early_stop():
    section = optim(kind="cosine", patience=1)
    memory = Plateau().after(1.0, section.schedule).after(2.0, section.schedule).after(2.0, section.schedule)
    assert memory == Plateau(1.0, 1.0, 2, 2) and not is_exhausted(section, memory)


def test_decay_of_the_average_grows_to_its_value():
    assert [ema_decay(0.99, n) for n in (0, 8, 10**6)] == [0.1, 0.5, 0.99]
