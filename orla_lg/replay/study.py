"""One file's replay: what its engines are, the unchanged setting first, and then other settings beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orla_lg import config
from orla_lg.core.boundary.plain import counted
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.operation.policy_choice import refined as both_levels
from orla_lg.core.policies import DEFAULT_REQUEST, DEFAULT_STAGE, NAMES, name_of, policies, policy
from orla_lg.errors import ConfigError, did_you_mean
from orla_lg.replay import public
from orla_lg.replay.calibration import Calibrated, fitted, pool, refined
from orla_lg.replay.figures import TOLERANCE, as_seen, figures_of, matches
from orla_lg.replay.report import ReplayReport
from orla_lg.replay.simulation import Arrangement, Played, SimulatedBackend, Simulation, with_scaled
from orla_lg.replay.traffic import BackendSetting, RecordedSetting
from orla_lg.replay.verdict import verdict_of
from orla_lg.replay.workload import Workload
from orla_lg_sim.parameters import EngineParameters, load

Showing = Callable[[str], Callable[[int, int], None]]
"""Returns what shows how much is done of what it names."""

ALL = "all"
MEMORIES = {"FlushAtBoundary": "flush_at_boundary", "FlushPerRequest": "flush_per_request",
            "ReleaseOnly": "release_only"}  # fmt: skip
"""By class, as a file has it, the name of a policy of caches; any other is the default one."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What is other than it was."""

    name: str
    policy: str | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    cap: int | None = None
    engines: int | None = None
    pool: int | None = None
    speed: float | None = None
    memory: str | None = None
    admission: bool | None = None


def what_ifs(args: argparse.Namespace) -> list[WhatIf]:
    """Return the settings that a command line asks for: one for each value, or one with all of them.

    Raises:
        ConfigError: A name is not known, or a value that may be given once only is given twice.
    """
    made: list[dict[str, Any]] = []
    names = [each for said in args.policy or () for each in (NAMES if said == ALL else (said,))]
    for each in dict.fromkeys(names):
        policy(each)
        made.append({"name": f"policy {each}", "policy": each})
    if args.mapping:
        pairs = dict(_pair(each) for each in args.mapping)
        made.append({"name": f"mapping {' '.join(args.mapping)}", "mapping": pairs})
    for name in ("cap", "engines", "pool", "speed"):
        made += [{"name": f"{name} {value:,}", name: value} for value in getattr(args, name) or ()]
    for each in args.memory or ():
        memory_policy(each)
        made.append({"name": f"memory {each}", "memory": each})
    made += [{"name": f"admission {each}", "admission": each == "on"} for each in args.admission or ()]
    if not args.together or not made:
        return [WhatIf(**each) for each in made]
    whole: dict[str, Any] = {"name": ", ".join(each["name"] for each in made)}
    for each in made:
        for name, value in each.items():
            if name != "name" and whole.setdefault(name, value) != value:
                raise ConfigError(f"--together: one --{name} only, got {whole[name]} and {value}")
    return [WhatIf(**whole)]


def _pair(said: str) -> tuple[str, str]:
    stage, equals, backend = said.partition("=")
    if not (stage and equals and backend):
        raise ConfigError(f"--mapping {said}: expected STAGE=BACKEND, as in draft=light")
    return stage, backend


class Study:
    """One file's replay.

    Args:
        workload: What the file holds.
        config: The configuration that the calls were served under; ``None``: as the file says.
        kv_tokens: By backend (``*``: any), what its KV cache holds.
        parameters: By backend (``*``: any), a file with its engine in numbers.
        tolerance: So far a figure may be off.
        anyway: Whether other settings are compared where the unchanged one does not match.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        config: Path | None = None,
        kv_tokens: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        tolerance: float = TOLERANCE,
        anyway: bool = False,
    ) -> None:
        self.workload = workload
        self.report = ReplayReport(
            workload.seen.source, len(workload.calls), len(workload.by_run), {}, {}, {}, None, anyway=anyway
        )
        self._kv_tokens, self._parameters = dict(kv_tokens or {}), dict(parameters or {})
        self._tolerance = tolerance
        self._setting = self._found(config)
        self._given = self._parameters_given()
        self._unchanged: Arrangement | None = None

    # What was there

    def _found(self, file: Path | None) -> RecordedSetting:
        seen = self.workload.seen
        used = dict.fromkeys(each.seen.backend or "" for each in self.workload.counted)
        if not used:
            raise ConfigError(
                f"{seen.source}: none of its {counted(len(seen.calls), 'call')} can be simulated: each failed, went "
                "past orla_lg, or ran on an engine that counts no tokens"
            )
        if file is not None:
            setting = _configured(config.load(file))
        elif seen.setting is not None:
            setting = seen.setting
        else:
            setting = RecordedSetting()
            if seen.happened:
                self.report.notes.append(
                    "the file does not say under which policies and caps it was written: orla_lg's defaults are "
                    "taken; --config FILE names an orla.toml that says so"
                )
        known = {name: setting.backends.get(name) or BackendSetting(name) for name in (*used, *setting.backends)}
        for name, each in known.items():
            each = known[name] = self._with_known_policies(each)
            if (given := self._kv_tokens.get(name, self._kv_tokens.get("*"))) is not None:
                known[name] = replace(each, kv_tokens=given)
            elif each.kv_tokens is None and each.slots and each.context_tokens:
                known[name] = replace(each, kv_tokens=each.slots * each.context_tokens)
        for named in (*self._kv_tokens, *self._parameters):
            if named != "*" and named not in known:
                raise ConfigError(f"no backend of {seen.source} is called {named!r}{did_you_mean(named, known)}")
        return replace(setting, backends=known, memory=MEMORIES.get(setting.memory, "default"))

    def _with_known_policies(self, backend: BackendSetting) -> BackendSetting:
        """Return a backend's setting without policies that its user wrote: a file has their names alone."""
        foreign = sorted({backend.stage_policy, *backend.request_policy.values()} - {*NAMES})
        if not foreign:
            return backend
        self.report.notes.append(
            f"backend {backend.name!r} was served by {', '.join(map(repr, foreign))}, no policy of orla_lg's: "
            f"{DEFAULT_STAGE} stands in its place, so the unchanged setting need not match"
        )
        stage = backend.stage_policy if backend.stage_policy in NAMES else DEFAULT_STAGE
        requests = {name: each if each in NAMES else DEFAULT_REQUEST for name, each in backend.request_policy.items()}
        return replace(backend, stage_policy=stage, request_policy=requests)

    def _parameters_given(self) -> dict[str, EngineParameters]:
        given = {name: load(path) for name, path in self._parameters.items()}
        if "*" not in given and not self.workload.seen.happened and public.BACKEND not in given:
            raise ConfigError(
                f"{self.workload.seen.source} says nothing of an engine; give --parameters FILE, as `orla-lg sim "
                "calibrate` writes it of a live engine (docs/simulation.md has one to begin with)"
            )
        return {
            name: given.get(name, given["*"] if "*" in given else next(iter(given.values())))
            for name in self._setting.backends
            if name in given or "*" in given
        }

    def check(self, whats: Sequence[WhatIf]) -> None:
        """Check what is asked for against what the file can tell.

        Raises:
            ConfigError: It names a backend that is not there, or needs what the file does not have.
        """
        known = self._setting.backends
        for what in whats:
            for backend in what.mapping.values():
                if backend not in known:
                    raise ConfigError(f"--mapping: the file has no backend {backend!r}{did_you_mean(backend, known)}")
            if not self.workload.knows_prompts and (what.pool or what.engines or what.memory or what.admission):
                raise ConfigError(
                    f"{what.name}: {self.workload.seen.source} does not say which prompts begin alike (an older "
                    "version wrote it), so it says nothing about caches; about policies, caps and speeds it does"
                )

    # The unchanged setting

    def begin(self, showing: Showing) -> None:
        """Find the engines' numbers, simulate the unchanged setting, and hold it against what happened.

        Raises:
            ConfigError: The engines' numbers cannot be found.
        """
        counted_calls = [each.seen for each in self.workload.counted]
        engines: dict[str, Calibrated] = {}
        spare = next(iter(self._given.values()), None)
        for name, setting in self._setting.backends.items():
            mine, tokens = [call for call in counted_calls if call.backend == name], setting.kv_tokens
            if name in self._given:
                found = Calibrated(self._given[name], 0)
                tokens = tokens or found.parameters.kv_tokens
            elif mine:
                found = fitted(name, mine)
            elif spare is not None or engines:  # no call ran there: like another one, until --parameters says more
                found = next(iter(engines.values()), Calibrated(spare or EngineParameters(), 0))
                self.report.notes.append(f"no call ran on {name!r}: its engine is taken to be as fast as the others'")
            else:
                continue
            parameters = pool(counted_calls, tokens, found.parameters)
            engines[name] = replace(found, parameters=parameters)
        played: list[Played] = []

        def play(parameters: Mapping[str, EngineParameters]) -> list[Played]:
            played[:] = self._simulated(self._arranged(parameters), showing("finding the engine's numbers"))
            return played

        if any(each.calls for each in engines.values()):
            engines = refined(engines, play)
        self._unchanged = self._arranged({name: each.parameters for name, each in engines.items()})
        played[:] = self._simulated(self._unchanged, showing("the unchanged setting"))
        self._judge(engines, played)

    def _judge(self, engines: Mapping[str, Calibrated], played: Sequence[Played]) -> None:
        report, seen = self.report, self.workload.seen
        report.engines, report.unchanged = engines, figures_of(played)
        report.happened = figures_of(as_seen(self.workload)) if seen.happened else dict.fromkeys(report.unchanged)
        report.ended_early["unchanged"] = sum(bool(each.error) for each in played if each.call.seen.is_counted)
        if seen.happened:
            assert self._unchanged is not None
            found = matches(report.happened, report.unchanged, self._tolerance)
            report.verdict = verdict_of(self.workload, self._unchanged, found, played)
        self._note(len(self.workload.calls) - len(self.workload.counted))

    def _note(self, uncounted: int) -> None:
        seen, notes = self.workload.seen, self.report.notes
        if seen.broken:
            more = f" (and {seen.broken - len(seen.faults)} more)" if seen.broken > len(seen.faults) else ""
            notes.append(
                f"{counted(seen.broken, 'line')} of {seen.source} could not be read: {'; '.join(seen.faults)}{more}"
            )
        if uncounted:
            notes.append(f"{counted(uncounted, 'call')} failed, went elsewhere or have no token counts: each takes "
                         "as long as it took")  # fmt: skip
        if unstreamed := sorted(name for name, each in self.report.engines.items() if not each.streamed):
            notes.append(f"calls of {', '.join(map(repr, unstreamed))} did not stream: when first tokens came is not "
                         "known, and prefill and decode were told apart by lengths alone")  # fmt: skip
        if not self.workload.knows_prompts:
            notes.append("the file does not say which prompts begin alike: what each call found cached is taken as "
                         "given, and nothing is concluded about caches")  # fmt: skip
        if seen.lost_beginnings:
            notes.append(f"{counted(seen.lost_beginnings, 'prompt')} begin with pieces that stand in no line of the "
                         "file: what they share with others before it is not known")  # fmt: skip

    def _arranged(self, parameters: Mapping[str, EngineParameters]) -> Arrangement:
        setting = self._setting
        backends = {name: SimulatedBackend(setting.backends[name], each) for name, each in parameters.items()}
        return Arrangement("unchanged", backends, None, setting.admission, setting.memory)

    def _simulated(self, arrangement: Arrangement, show: Callable[[int, int], None]) -> list[Played]:
        total = len(self.workload.calls)
        return Simulation(self.workload, arrangement, lambda done: show(done, total)).run()

    # Other settings

    def play(self, what: WhatIf, show: Callable[[int, int], None]) -> None:
        """Simulate another setting, and put its figures into the report."""
        assert self._unchanged is not None
        base, calls = self._unchanged, [each.seen for each in self.workload.counted]
        backends = {name: _changed(each, what, calls) for name, each in base.backends.items()}
        admission = base.admission if what.admission is None else what.admission
        arrangement = Arrangement(
            what.name, backends, what.policy, admission, what.memory or base.memory, what.mapping
        )
        played = self._simulated(arrangement, show)
        self.report.others[what.name] = figures_of(played)
        early = sum(bool(each.error) for each in played if each.call.seen.is_counted)
        self.report.ended_early[what.name] = early
        if early > self.report.ended_early["unchanged"]:
            self.report.notes.append(f"{what.name}: {counted(early, 'call')} ended without an answer")
        if what.policy is not None and what.policy in _READS and not any(_READS[what.policy](call) for call in calls):
            self.report.notes.append(f"{what.name}: no call of the file has what it orders by")


_READS: Mapping[str, Callable[[Any], Any]] = {
    "priority": lambda call: call.priority,
    "edf": lambda call: call.deadline_s,
    "fair": lambda call: call.tenant,
}
"""By policy, the hint without which it orders by arrival."""


def _changed(backend: SimulatedBackend, what: WhatIf, calls: Sequence[Any]) -> SimulatedBackend:
    setting, parameters = backend.setting, backend.parameters
    if what.cap is not None:
        setting = replace(setting, max_concurrency=what.cap)
    if what.admission:  # the core goes by what the engine says of its cache
        setting = replace(setting, kv_tokens=setting.kv_tokens or parameters.kv_tokens)
    if what.pool is not None:
        parameters = pool(calls, what.pool, parameters)
        setting = replace(setting, kv_tokens=None if setting.kv_tokens is None else what.pool)
    if what.speed is not None:
        parameters = with_scaled(parameters, prefill=1 / what.speed, decode=1 / what.speed)
    return SimulatedBackend(setting, parameters, what.engines or backend.engines)


def _configured(settings: config.Settings) -> RecordedSetting:
    """Return what a configuration says of the setting."""
    stages, requests = both_levels(settings.policy, settings.stage_policy, settings.request_policy)
    made = {}
    for backend in settings.backends:
        ordered_by = policies(backend.name, stages or "workflow_fcfs", requests or "workflow_fcfs")
        cost = backend.cost
        made[backend.name] = BackendSetting(
            backend.name, backend.engine, backend.max_concurrency, backend.capacity,
            stage_policy=name_of(ordered_by.stage),
            request_policy={stage: name_of(each) for stage, each in ordered_by.requests.items()},
            prices=(cost.input_per_mtoken, cost.output_per_mtoken, cost.cached_input_per_mtoken),
        )  # fmt: skip
    memory = settings.memory if isinstance(settings.memory, str) else type(settings.memory).__name__
    return RecordedSetting(made, settings.admission, memory)
