"""Alarms over a run: what raises them, what clears them, and that a resumed run has the same."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.alarms import AT_VALIDATION, Finding, Subject, validation_alarms
from autoencoder.config import DataConfig, TrainAutoencoderConfig
from autoencoder.monitor import Monitor
from autoencoder.objective_config import KLConfig, LikelihoodConfig, ObjectiveConfig
from autoencoder.remedies import remedy
from autoencoder.runtime.alarms import Alarm, AlarmNews
from tests.children import SMALL, run

SUBJECT = Subject(images=10_000, dims=3072, latents=256, channels=4, bounds=(1e-4, 100.0))
HEALTHY = {
    "kl_nats": 300.0, "nll_nats": -2000.0, "shuffled_delta_nats": 4000.0, "share_near_prior": 0.05, "active_channels": 4.0,
    "share_at_clamp": 0.0, "sharpness": 0.9, "effective_beta": 1.0, "likelihood_scale": 0.1,
}  # fmt: skip


def train(monitor: Monitor, lines: list[dict[str, float]], every: int = 500, first: int = 0) -> list[tuple[int, AlarmNews]]:
    """The monitor's news after each line, with the images that had been seen."""
    told = []
    for number, line in enumerate(lines, 1):
        images = first + number * every
        monitor.training(HEALTHY | line, images)
        told.append((images, monitor.news()))
    return told


def raised(told: list[tuple[int, AlarmNews]]) -> list[tuple[int, str]]:
    return [(images, alarm.name) for images, news in told for alarm in news.raised]


def cleared(told: list[tuple[int, AlarmNews]]) -> list[tuple[int, str]]:
    return [(images, name) for images, news in told for name in news.cleared]


# Training lines


def test_a_healthy_run_raises_nothing() -> None:
    monitor = Monitor(SUBJECT)
    # The rate begins at nothing and the loss falls fast, as it does in every run.
    lines = [{"kl_nats": min(300.0, 5.0 * n**2), "nll_nats": 6000 - 400.0 * n} for n in range(20)]
    told = train(monitor, lines)
    monitor.validation(HEALTHY, 10_000)
    assert raised(told) == []
    assert monitor.news() == AlarmNews()


def test_a_rate_of_nothing_under_a_flat_nll_is_a_collapse_said_once() -> None:
    told = train(Monitor(SUBJECT), [{"kl_nats": 0.5, "nll_nats": 3000.0 - n} for n in range(20)])
    # 0.005 nats for each of 256 latents are 1.28. Judged from a tenth of the run on.
    assert raised(told) == [(1000, "collapse")]
    assert all(news.standing == ("collapse",) for images, news in told if images >= 1000)


def test_a_rate_of_nothing_while_the_nll_falls_is_a_start() -> None:
    # The NLL falls by more than 0.01 * 3072 nats from line to line.
    told = train(Monitor(SUBJECT), [{"kl_nats": 0.5, "nll_nats": 3000.0 - 40 * n} for n in range(20)])
    assert raised(told) == []


def test_an_alarm_is_cleared_at_twice_its_threshold_and_said_once() -> None:
    rates = [0.5] * 4 + [2.0] * 4 + [3.0] * 4 + [1.3] * 4 + [0.5] * 2
    told = train(Monitor(SUBJECT), [{"kl_nats": rate} for rate in rates])
    # Between 1.28 and 2.56 it stays as it is; lines 1 to 4 raise it, line 9 clears it, line 18 is the second below again.
    assert raised(told) == [(1000, "collapse"), (9000, "collapse")]
    assert cleared(told) == [(4500, "collapse")]


def test_finer_logs_do_not_make_it_hastier() -> None:
    def nll(images: float) -> float:
        return 3000 - 40 * images / 250

    coarse = train(Monitor(SUBJECT), [{"kl_nats": 0.5, "nll_nats": nll(250 * n)} for n in range(40)], every=250)
    fine = train(Monitor(SUBJECT), [{"kl_nats": 0.5, "nll_nats": nll(10 * n)} for n in range(1000)], every=10)
    assert raised(coarse) == raised(fine) == []


def test_a_price_far_above_the_bounds_own_is_told_between_validations() -> None:
    told = train(Monitor(SUBJECT), [{"kl_nats": 6.0, "effective_beta": 50.0}] * 6)
    assert raised(told) == [(1000, "dominating_kl")]
    assert raised(train(Monitor(SUBJECT), [{"kl_nats": 6.0, "effective_beta": 1.0}] * 6)) == []
    assert raised(train(Monitor(SUBJECT), [{"kl_nats": 60.0, "effective_beta": 50.0}] * 6)) == []


def test_a_discriminator_that_is_right_of_nearly_every_patch_has_won() -> None:
    lines = [{}] * 6 + [{"discriminator_accuracy": right} for right in (0.97, 0.93, 0.96, 0.99, 0.92, 0.89)]
    told = train(Monitor(SUBJECT), lines)
    # Two windows in a row above 0.95 raise it, one below 0.9 clears it.
    assert raised(told) == [(5000, "discriminator_won")]
    assert cleared(told) == [(6000, "discriminator_won")]
    (alarm,) = (alarm for _, news in told for alarm in news.raised)
    assert "right of 99.0% of patches" in alarm.message


def test_the_remedy_of_a_won_game_is_not_what_is_in_force() -> None:
    gated = ObjectiveConfig(adversarial=AdversarialConfig(name="hinge", r1=1.0))
    free = ObjectiveConfig(adversarial=AdversarialConfig(name="hinge", gate=(0.0, 1.0)))
    assert "raise its penalty" in remedy("discriminator_won", gated) and "Hold it" not in remedy("discriminator_won", gated)
    assert "penalise its gradient" in remedy("discriminator_won", free) and "Hold it" in remedy("discriminator_won", free)


def test_lines_without_a_finite_step_are_passed_over() -> None:
    monitor = Monitor(SUBJECT)
    monitor.training({"kl_weight": 1.0}, 2000)
    assert monitor.news() == AlarmNews()


# Validations

BAD: dict[str, tuple[dict[str, float], dict[str, float], dict[str, float]]] = {
    # Figures that raise it, that leave it as it is, that clear it.
    "collapse": ({"shuffled_delta_nats": 2.0}, {"shuffled_delta_nats": 4.0}, {"shuffled_delta_nats": 7.0}),
    "dominating_kl": (
        {"effective_beta": 5.0, "share_near_prior": 0.6},
        {"effective_beta": 5.0, "share_near_prior": 0.4},
        {"effective_beta": 1.9, "share_near_prior": 0.6},
    ),
    "idle_channels": ({"active_channels": 3.0}, {}, {"active_channels": 4.0}),
    "scale_at_bound": ({"likelihood_scale": 1.0e-4}, {}, {"likelihood_scale": 2e-4}),
    "logvar_at_clamp": ({"share_at_clamp": 0.002}, {"share_at_clamp": 0.0007}, {"share_at_clamp": 0.0001}),
}


@pytest.mark.parametrize("name", list(AT_VALIDATION))
def test_validations_raise_keep_and_clear_each_alarm(name: str) -> None:
    bad, between, good = BAD[name]
    monitor = Monitor(SUBJECT)
    monitor.validation(HEALTHY | bad, 900)
    assert monitor.news() == AlarmNews()  # within the grace
    monitor.validation(HEALTHY | bad, 1000)
    news = monitor.news()
    assert [(a.name, a.remedy) for a in news.raised] == [(name, remedy(name, ObjectiveConfig()))]
    assert [a.name for a in validation_alarms(HEALTHY | bad, SUBJECT)] == [name]
    assert "objective." in news.raised[0].remedy
    if between:
        monitor.validation(HEALTHY | between, 2000)
        assert monitor.news() == AlarmNews(standing=(name,))
        assert validation_alarms(HEALTHY | between, SUBJECT) == []
    monitor.validation(HEALTHY | good, 3000)
    assert monitor.news() == AlarmNews(cleared=(name,))
    assert monitor.standing == []


def test_where_all_channels_are_idle_it_is_a_collapse() -> None:
    seen = HEALTHY | {"kl_nats": 0.1, "active_channels": 0.0, "shuffled_delta_nats": 0.0, "share_near_prior": 1.0}
    assert [a.name for a in validation_alarms(seen, SUBJECT)] == ["collapse"]


def test_one_idle_channel_of_sixteen_is_none_too_many() -> None:
    subject = Subject(images=10_000, dims=3072, latents=1024, channels=16, bounds=None)
    assert validation_alarms(HEALTHY | {"active_channels": 15.0}, subject) == []
    assert [a.name for a in validation_alarms(HEALTHY | {"active_channels": 14.0}, subject)] == ["idle_channels"]


def test_what_training_raised_a_validation_does_not_clear() -> None:
    monitor = Monitor(SUBJECT)
    assert raised(train(monitor, [{"kl_nats": 0.5}] * 4)) == [(1000, "collapse")]
    monitor.validation(HEALTHY | {"kl_nats": 0.5}, 2000)
    monitor.validation(HEALTHY, 2000)
    assert monitor.news() == AlarmNews(standing=("collapse",))
    assert cleared(train(monitor, [{}] * 2, first=2000)) == [(2500, "collapse")]


@pytest.mark.parametrize(
    ("name", "levels", "low", "binds"),
    [
        ("laplace", 256, 1e-4, True),
        ("discretized_logistic", 256, 1e-4, False),
        ("discretized_logistic", 65536, 1e-4, True),
        ("discretized_gaussian", 256, 1e-2, True),
    ],
)
def test_a_lower_bound_below_the_bins_does_no_harm(name: Any, levels: Any, low: float, binds: bool) -> None:
    likelihood = LikelihoodConfig(name=name, scale="pixel", levels=levels, bounds=(low, 100.0))
    config = TrainAutoencoderConfig(out="x", data=DataConfig(resolution=32), objective=ObjectiveConfig(likelihood=likelihood))
    subject = Subject.of(config, (4, 8, 8))
    assert (subject.dims, subject.latents, subject.low_bound_binds) == (3072, 256, binds)
    seen = HEALTHY | {"scales_at_low_bound": 0.4, "scales_at_high_bound": 0.0}
    assert [a.name for a in validation_alarms(seen, subject)] == (["scale_at_bound"] if binds else [])
    upper = HEALTHY | {"scales_at_low_bound": 0.0, "scales_at_high_bound": 0.02}
    assert [a.name for a in validation_alarms(upper, subject)] == ["scale_at_bound"]


def test_an_alarm_without_its_figures_is_not_judged() -> None:
    no_likelihood = {k: v for k, v in HEALTHY.items() if k not in ("nll_nats", "shuffled_delta_nats", "effective_beta", "likelihood_scale")}
    assert validation_alarms(no_likelihood | {"kl_nats": 0.0, "share_near_prior": 1.0}, SUBJECT) == []


def test_a_standing_alarm_has_the_figures_last_seen() -> None:
    monitor = Monitor(Subject(images=10_000, dims=3072, latents=1024, channels=16, bounds=None))
    monitor.validation(HEALTHY | {"active_channels": 12.0}, 2000)
    monitor.validation(HEALTHY | {"active_channels": 8.0}, 3000)
    assert [a.message[:7] for a in monitor.news().raised] == ["4 of 16"]
    assert [a.message[:7] for a in monitor.standing] == ["8 of 16"]
    # Not bad enough to be raised, not good enough to be cleared.
    monitor.validation(HEALTHY | {"active_channels": 15.0}, 4000)
    assert [a.message for a in monitor.standing] == ["1 of 16 latent channels is inactive"]
    assert [a.message[:7] for a in monitor.restated(HEALTHY | {"active_channels": 10.0})] == ["6 of 16"]
    assert [a.message[:7] for a in monitor.restated(HEALTHY | {"active_channels": 16.0})] == ["1 of 16"]
    assert [a.message[:7] for a in monitor.standing] == ["1 of 16"]
    assert monitor.news() == AlarmNews(standing=("idle_channels",))


def test_latents_whose_exchange_gains_are_no_cost() -> None:
    (alarm,) = validation_alarms(HEALTHY | {"shuffled_delta_nats": -46.5}, SUBJECT)
    assert alarm.message == "the KL is 300 nats an image, and images decode as well from another image's latents"
    (alarm,) = validation_alarms(HEALTHY | {"shuffled_delta_nats": 1.5}, SUBJECT)
    assert "costs 1.5 nats" in alarm.message


# Controls and remedies

TARGET = KLConfig(control="target", target=100.0, bounds=(1e-3, 10.0))
GECO = KLConfig(control="geco", target_rmse=0.1)


@pytest.mark.parametrize(
    ("kl", "off", "between", "held", "said"),
    [
        (TARGET, {"kl_nats": 89.0}, {"kl_nats": 92.0}, {"kl_nats": 97.0}, "the KL is 89 nats an image, the target 100;"),
        (TARGET, {"kl_nats": 112.0}, {"kl_nats": 108.0}, {"kl_nats": 103.0}, "the KL is 112 nats an image, the target 100;"),
        (GECO, {"mean_squared_error": 0.0121}, {"mean_squared_error": 0.0107}, {"mean_squared_error": 0.0102}, "the RMS error is 0.11,"),
    ],
)
def test_a_target_that_is_missed_is_told_from_half_of_the_run_on(
    kl: KLConfig, off: dict[str, float], between: dict[str, float], held: dict[str, float], said: str
) -> None:
    subject = Subject(images=10_000, dims=3072, latents=256, channels=4, bounds=None, objective=ObjectiveConfig(kl=kl))
    told = train(Monitor(subject), [{"kl_weight": 0.5} | off] * 12 + [{"kl_weight": 0.5} | between] * 2 + [{"kl_weight": 0.5} | held] * 2)
    assert raised(told) == [(5000, "target_missed")]
    assert cleared(told) == [(7500, "target_missed")]
    (alarm,) = (alarm for _, news in told for alarm in news.raised)
    assert alarm.message.startswith(said)
    assert alarm.message.endswith("the weight, 0.5, is between its bounds")
    # One window alone is noise.
    assert raised(train(Monitor(subject), [{"kl_weight": 0.5} | (off if n % 2 else held) for n in range(20)])) == []


@pytest.mark.parametrize(("weight", "said"), [(1e-3, "lower bound, 0.001"), (9.8, "upper bound, 10")])
def test_a_target_missed_at_a_bound_says_so(weight: float, said: str) -> None:
    subject = Subject(images=10_000, dims=3072, latents=256, channels=4, bounds=None, objective=ObjectiveConfig(kl=TARGET))
    told = train(Monitor(subject), [{"kl_nats": 20.0, "kl_weight": weight}] * 20)
    (alarm,) = (alarm for _, news in told for alarm in news.raised)
    assert alarm.message.endswith(said)
    assert "objective.kl.bounds" in alarm.remedy


@pytest.mark.parametrize("name", [*AT_VALIDATION, "target_missed"])
@pytest.mark.parametrize("kl", [TARGET, GECO])
def test_no_remedy_is_what_is_in_force(name: str, kl: KLConfig) -> None:
    said = remedy(name, ObjectiveConfig(kl=kl))
    # The weight is the controller's: it can only be given a start.
    assert not said.startswith(("Lower objective.kl.weight", "Raise objective.kl.weight"))
    assert "schedule" not in said
    assert "(objective.kl.control=" not in said


def test_remedies_go_on_from_where_a_run_is() -> None:
    annealed = ObjectiveConfig(kl=KLConfig(schedule="linear", anneal_images=1000, free_bits=2.0))
    said = remedy("collapse", annealed, encoder_steps=True)
    assert "more slowly (objective.kl.anneal_images)" in said
    assert "raise the floor of each channel" in said
    assert "encoder_steps" not in said
    assert "schedule=linear" not in remedy("idle_channels", annealed)
    likelihood = LikelihoodConfig(name="discretized_logistic")
    assert "discretised likelihood" not in remedy("scale_at_bound", ObjectiveConfig(likelihood=likelihood))


# State and words


def stream() -> list[Callable[[Monitor], None]]:
    """A run whose alarms come and go."""

    def line(number: int) -> Callable[[Monitor], None]:
        figures = HEALTHY | {"kl_nats": 0.3 if number // 12 % 2 else 200.0, "effective_beta": 9.0 if number % 50 > 25 else 1.0}
        return lambda monitor: monitor.training(figures, 130 * number)

    def validation(number: int) -> Callable[[Monitor], None]:
        figures = HEALTHY | {"active_channels": 3.0 + number % 2, "share_near_prior": 0.7, "share_at_clamp": 0.01 * (number % 3)}
        return lambda monitor: monitor.validation(figures, 130 * number)

    return [event(number) for number in range(1, 77) for event in ((line, validation) if number % 10 == 0 else (line,))]


def test_a_run_resumed_anywhere_says_the_same() -> None:
    events = stream()
    whole = Monitor(SUBJECT)
    wanted, states = [], []
    for event in events:
        event(whole)
        wanted.append(whole.news())
        states.append(json.loads(json.dumps(whole.state())))
    assert len({name for news in wanted for name in news.standing}) == 4
    for cut in range(1, len(events)):
        resumed = Monitor(SUBJECT)
        resumed.load_state(states[cut - 1])
        found = []
        for event in events[cut:]:
            event(resumed)
            found.append(resumed.news())
        assert found == wanted[cut:]
        assert resumed.state() == whole.state()


def test_news_are_lines_and_words() -> None:
    news = AlarmNews(("a", "b"), (Alarm("b", "found 3", "Do this"),), ("c",))
    assert news.line() == {"alarms": ["a", "b"], "raised": [{"name": "b", "message": "found 3", "remedy": "Do this"}], "cleared": ["c"]}
    assert news.messages() == ["alarm b: found 3. Do this", "alarm c: cleared"]
    assert AlarmNews().line() == {}


def test_every_finding_is_bad_good_or_between() -> None:
    for bad, between, good in BAD.values():
        for figures in (bad, between, good):
            for rule in AT_VALIDATION.values():
                found = rule(HEALTHY | figures, SUBJECT)
                assert isinstance(found, Finding)
                assert not (found.bad and found.good)


# Runs


def test_a_run_driven_into_collapse_says_so_before_half_of_it(tmp_path: Path) -> None:
    driven = ["--objective.kl.weight=1000", "--optimizer.lr=1e-2", "--train.images=320", "--log.every_images=16"]
    assert run([*SMALL, *driven, "--out", str(tmp_path / "run")], output=tmp_path / "console", pictures=True) == 0
    said = (tmp_path / "console").read_text().splitlines()
    assert said[-1].startswith(f"finished: {tmp_path / 'run' / 'report.html'}; ")
    assert "collapse" in said[-1]
    assert not any("  weight " in line for line in said if line.lstrip().startswith("train"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if any(alarm["name"] == "collapse" for alarm in line.get("raised", [])))
    assert first["images"] <= 160
    assert "collapse" in lines[-1]["alarms"]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "collapse" in [alarm["name"] for alarm in evaluation["alarms"]]
    assert "Lower objective.kl.weight" in (tmp_path / "run" / "report.html").read_text()
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000040" / "state.json").read_text())
    assert "collapse" in state["task"]["monitor"]["standing"]


def test_a_run_that_misses_its_target_says_so(tmp_path: Path) -> None:
    # No weight within these bounds takes the KL to so many nats in 20 steps.
    control = ["--objective.kl.control=target", "--objective.kl.target=5000", "--objective.kl.weight=0.6", "--objective.kl.bounds=[0.5, 2]"]
    assert run([*SMALL, *control, "--out", str(tmp_path / "run")], output=tmp_path / "console", pictures=True) == 0
    said = (tmp_path / "console").read_text().splitlines()
    assert any("  weight 0." in line for line in said if line.lstrip().startswith("train"))
    assert "target_missed" in said[-1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(line["images"] for line in lines if "target_missed" in line.get("alarms", [])) >= 80
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    (alarm,) = (alarm for alarm in evaluation["alarms"] if alarm["name"] == "target_missed")
    assert "lower bound, 0.5" in alarm["message"]
    target = evaluation["objective"]["target"]
    assert target["wanted"] == 5000
    assert target["reached"] < 4500
    assert "lower bound, 0.5" in target["words"]
    assert target["words"] in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_learns_raises_nothing(tmp_path: Path) -> None:
    assert run([*SMALL, "--objective.kl.weight=0.01", "--optimizer.lr=1e-2", "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["raised"] for line in lines if "raised" in line] == []
    assert all("alarms" not in line for line in lines)
    last = lines[-1]
    assert last["shuffled_delta_nats"] > 0
    assert last["active_units"] > 0


def test_alarms_that_only_another_encoder_would_clear_are_not_raised_about_a_frozen_one() -> None:
    frozen = dataclasses.replace(SUBJECT, frozen_encoder=True)
    bad = HEALTHY | {"active_channels": 0.0, "share_at_clamp": 1.0, "kl_nats": 0.0, "share_near_prior": 1.0, "shuffled_delta_nats": 0.0}
    assert {a.name for a in validation_alarms(bad, SUBJECT)} >= {"collapse", "logvar_at_clamp"}
    assert validation_alarms(bad, frozen) == []
