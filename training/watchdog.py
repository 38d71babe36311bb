"""Whether a distillation is failing although every number is finite; no torch, so that logs can be judged afterwards.

    watchdog = Watchdog(WatchdogConfig())
    for step, values in …:
        verdict = watchdog.observe(step, values)      # level ok | warn | stop, and a diagnosis in words

Every signal is smoothed exponentially over the steps that log it. Most are judged against the run's own first
observations (their mean), for what is normal differs between teachers; two quotients are not, so that a run which is
broken from its first steps is seen too: x0_std over the teacher's (teacher_std), and how far the fake teacher is from
the teacher over how far the samples are (`…_delta` over `…_distance`). Beyond a warning limit it warns once an
episode, and again when that is over; beyond the stop limit for `watchdog_patience` observations running it stops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Level = Literal["ok", "warn", "stop"]


class WatchdogConfig(BaseModel):
    """Limits; factors are against the mean of the run's own first observations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    watchdog: Literal["off", "warn", "stop"] = Field(
        "stop", description="what the watchdog may do: nothing, warn, or stop a run that fails"
    )
    watchdog_reference: int = Field(
        20, ge=1, description="first observations of a signal that set its reference"
    )
    watchdog_smoothing: float = Field(
        0.95, ge=0, lt=1, description="decay of each signal's exponential average"
    )
    watchdog_patience: int = Field(30, ge=1, description="observations beyond a stop limit before stopping")
    watchdog_std: float = Field(
        2.0, gt=1, description="stop: factor, up or down, of the latents' spread x0_std"
    )
    watchdog_mean: float = Field(1.0, gt=0, description="stop: shift of x0_mean in spreads of the reference")
    watchdog_fake: float = Field(6.0, gt=1, description="stop: factor of the fake teacher's loss")
    watchdog_ca: float = Field(10.0, gt=1, description="stop: factor of the CFG-augmentation loss")
    watchdog_distance: float = Field(8.0, gt=1, description="stop: factor of a mean distance to the teacher")
    watchdog_norm: float = Field(30.0, gt=1, description="stop: factor of a gradient norm")
    watchdog_gap: float = Field(
        0.04, ge=0, lt=1, description="warn: |teacher − fake teacher| below this share of |teacher − sample|"
    )
    watchdog_spread: float = Field(
        2.5,
        gt=1,
        description="stop: factor, up or down, of x0_std against the teacher's own x̂0 (teacher_std)",
    )
    watchdog_floored: float = Field(
        0.995, gt=0, le=1, description="warn: share of samples at the weight's floor"
    )
    watchdog_cosine: float = Field(
        0.7, gt=0, le=1, description="warn: CA and DM opposed, cosine below minus this"
    )
    watchdog_warn: float = Field(0.5, gt=0, le=1, description="share of a stop limit's logarithm that warns")


@dataclass(frozen=True)
class Verdict:
    """What one step's numbers say."""

    level: Level
    diagnosis: str = ""


@dataclass
class Signal:
    """Memory of one logged value."""

    seen: int = 0
    reference: float = 0.0
    smooth: float = 0.0
    beyond: int = 0
    warned: bool = False


@dataclass(frozen=True)
class Rule:
    """How far a value is from its limit: `excess` 1 is the stop limit (warn-only rules never stop)."""

    excess: float
    text: str
    stops: bool = True


SPREAD = "the student's latents {what}; lower lr_student or guidance, or raise fake updates (student_every)"
FAKE = "the fake teacher does not follow the student and DM is meaningless; raise lr_fake or student_every"
SAME = "the fake teacher is still the teacher and DM does nothing; raise lr_fake, unless the student has converged"
GROWTH = "the student moves away from the teacher; lower guidance, weight_ca or lr_student"
FLOW = "what was learnt is being lost; lower lr_student, or lengthen warmup"
NORM = "updates are erratic; lower the learning rate (lr_student, lr_fake) or lengthen warmup"
FLOOR = "the weight no longer adapts to the sample; lower weight_floor"
OPPOSED = "CA and DM cancel each other; lower guidance, or weight_ca against weight_dm"


@dataclass
class Watchdog:
    """Judges each step's values; its state is JSON, so that a resumed run judges as an uninterrupted one."""

    config: WatchdogConfig
    signals: dict[str, Signal] = field(default_factory=dict)

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict:
        """The verdict on what step `step` logged; names it does not know are ignored."""
        if self.config.watchdog == "off":
            return Verdict("ok")
        stops, warns = [], []
        for name, value in (*values.items(), *self._ratios(values).items()):
            if not math.isfinite(value):
                stops.append(f"{name}={value}: no longer a number; lower the learning rates or guidance")
                continue
            if not self._watched(name):
                continue
            signal = self.signals.setdefault(name, Signal())
            self._smooth(signal, value)
            if signal.seen <= self.config.watchdog_reference:
                continue
            rule = self._rule(name, signal)
            signal.beyond = signal.beyond + 1 if rule.stops and rule.excess >= 1 else 0
            said = f"step {step}: {rule.text}"
            if signal.beyond >= self.config.watchdog_patience:
                stops.append(said)
            elif rule.excess >= (self.config.watchdog_warn if rule.stops else 1):
                if not signal.warned:
                    warns.append(said)
                signal.warned = True
            elif signal.warned and rule.excess < 0.9 * (self.config.watchdog_warn if rule.stops else 1):
                signal.warned = False
                warns.append(f"step {step}: {name} is {signal.smooth:.3g}, within its limits again")
        level: Level = (
            "stop" if stops and self.config.watchdog == "stop" else "warn" if stops or warns else "ok"
        )
        return Verdict(level, "; ".join(stops + warns))

    @property
    def troubled(self) -> bool:
        """Whether a warning is still open of what may stop a run."""
        return any(
            signal.warned and self._rule(name, signal).stops
            for name, signal in self.signals.items()
            if signal.warned
        )

    def counters(self) -> dict[str, Any]:
        """State as JSON."""
        return {name: vars(signal).copy() for name, signal in self.signals.items()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Put back what `counters` gave."""
        self.signals = {name: Signal(**each) for name, each in counters.items()}

    def _smooth(self, signal: Signal, value: float) -> None:
        signal.seen += 1
        if signal.seen <= self.config.watchdog_reference:
            signal.reference += (value - signal.reference) / signal.seen
            signal.smooth = signal.reference
        else:
            decay = self.config.watchdog_smoothing
            signal.smooth = decay * signal.smooth + (1 - decay) * value

    def _ratios(self, values: Mapping[str, float]) -> dict[str, float]:
        """Signals that are sane or not by themselves, without the run's own beginning: quotients of logged values."""
        pairs = {
            "x0_spread": ("x0_std", "teacher_std"),
            "dm_gap": ("dm_delta", "dm_distance"),
            "cdm_gap": ("cdm_delta", "cdm_distance"),
        }
        return {
            name: values[over] / max(values[under], 1e-12)
            for name, (over, under) in pairs.items()
            if over in values and under in values
        }

    def _watched(self, name: str) -> bool:
        known = ("x0_std", "x0_spread", "x0_mean", "fake", "ca", "cos_ca_dm", "flow_loss")
        return name in known or name.endswith(("_distance", "_norm", "_floored", "_gap"))

    def _rule(self, name: str, signal: Signal) -> Rule:
        config, now, reference = self.config, signal.smooth, signal.reference
        if name == "cos_ca_dm":
            return self._absolute(name, -now, config.watchdog_cosine, OPPOSED)
        if name.endswith("_floored"):
            return self._absolute(name, now, config.watchdog_floored, FLOOR)
        if name.endswith("_gap"):
            text = f"{name} is {now:.3g} (limit {config.watchdog_gap:g}): {SAME}"
            return Rule(config.watchdog_gap / max(now, 1e-12), text, stops=False)
        if name == "x0_spread":
            what = "are wider than" if now > 1 else "are narrower than"
            factor = max(now, 1 / max(now, 1e-12))
            advice = SPREAD.format(what=f"{what} the teacher's")
            text = f"x0_std is {now:.2g}× the teacher's own (limit {config.watchdog_spread:g}×): {advice}"
            return Rule(math.log(factor) / math.log(config.watchdog_spread), text)
        if name == "x0_mean":
            spread = self.signals["x0_std"].reference if "x0_std" in self.signals else 1.0
            shift = abs(now - reference) / max(spread, 1e-12)
            advice = SPREAD.format(what="drift")
            text = f"{name} is {now:.3g}, {shift:.2g} spreads from {reference:.3g} "
            text += f"(limit {config.watchdog_mean:g}): {advice}"
            return Rule(shift / config.watchdog_mean, text)
        factor = max(now, 1e-12) / max(reference, 1e-12)
        if name == "x0_std":
            what = "saturate" if factor > 1 else "collapse to one picture"
            return self._growth(
                name, signal, max(factor, 1 / factor), config.watchdog_std, SPREAD.format(what=what)
            )
        limit, advice = {
            "fake": (config.watchdog_fake, FAKE),
            "ca": (config.watchdog_ca, GROWTH),
            "flow_loss": (config.watchdog_distance, FLOW),
        }.get(
            name,
            (config.watchdog_norm, NORM) if name.endswith("_norm") else (config.watchdog_distance, GROWTH),
        )
        return self._growth(name, signal, factor, limit, advice)

    def _growth(self, name: str, signal: Signal, factor: float, limit: float, advice: str) -> Rule:
        text = f"{name} is {signal.smooth:.3g} against {signal.reference:.3g} at first, {factor:.2g}× "
        text += f"(limit {limit:g}×): {advice}"
        return Rule(math.log(factor) / math.log(limit), text)

    def _absolute(self, name: str, value: float, limit: float, advice: str) -> Rule:
        return Rule(
            value / limit, f"{name} is beyond its limit ({value:.3g} of {limit:g}): {advice}", stops=False
        )
