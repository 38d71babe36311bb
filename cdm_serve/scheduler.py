"""Which pictures share the next engine call. Pure policy: no clock, no threads, no arrays; the time is an argument.

    scheduler = Scheduler(costs, max_batch=8)
    scheduler.add(Task(id=1, bucket=(128, 128), steps=4, arrival=0.0, deadline=0.25, min_steps=1))
    while call := scheduler.schedule(now):         # a stage and who takes part in it
        ...                                        # the engine runs it
        finished = scheduler.postprocess(call, now)

The policy, at every edge between two engine calls:

1. Order. Higher priority first, and every `aging_s` of waiting raises a picture by one priority, so nobody starves.
   Among equals the earliest deadline that can still be met, then those whose deadline is lost or who have none,
   oldest first.
2. Elastic steps. Pictures that allow fewer steps get the largest common cap under which the most deadlines are met.
3. What is one decoding away from being finished goes first, unless the leader would miss its deadline by that, or a
   later call together with those who will be ready then saves everybody more time than it costs.
4. The leader's step takes along pictures of its shape at any step of any schedule, newcomers too (their text is
   encoded first), while the cost model says that it pays for all who wait and will come meanwhile. One place of a full
   call goes to the first who has no deadline to meet, in the place of somebody whose own can wait for the next call.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from cdm_serve.costs import STAGES, TEXT, Bucket, CostModel, Stage
from cdm_serve.forecast import Forecast
from cdm_serve.inflow import Inflow
from cdm_serve.tasks import Call, Task

BUSIEST = 0.75
"""The highest load that is believed: what was accepted in a rush is not for ever."""


class Scheduler:
    """Owns the order of unfinished pictures. Calls come from one thread."""

    def __init__(self, costs: CostModel, max_batch: int, aging_s: float = 5.0) -> None:
        assert max_batch >= 1
        assert aging_s > 0
        self.costs = costs
        self.max_batch = max_batch
        self.aging_s = aging_s
        self._tasks: dict[int, Task] = {}
        self._forecast = Forecast(costs, max_batch)
        self._ends: dict[Call, float] = {}
        self._began: dict[Call, float] = {}
        self._since: float | None = None  # when the last call ended, if there has been work ever since
        self._cap = 1
        self._inflow = Inflow()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """Take a picture in; it may join from the next `schedule` on."""
        assert task.steps >= 1
        assert task.min_steps is None or 1 <= task.min_steps <= task.steps
        assert task.id not in self._tasks
        task.planned = task.steps
        self._tasks[task.id] = task
        self._inflow.add(self._work(task), task.arrival)

    def withdraw(self, id: int) -> None:
        """Undo the `add` of a picture that is not let in after all."""
        task = self._tasks.pop(id)
        self._inflow.take_back(self._work(task))

    def cancel(self, id: int) -> int:
        """Forget a picture; the steps it will not run, which is none if it is not here. A running step is not saved."""
        task = self._tasks.pop(id, None)
        if task is None:
            return 0
        return task.left - (task.running and task.stage == "denoise")

    def schedule(self, now: float, stages: Iterable[Stage] = STAGES) -> Call | None:
        """The next call among `stages`, or None when there is nothing for them. Its members run until `postprocess`."""
        order = self._order(now, [task for task in self._tasks.values() if task.arrival <= now])
        self._plan(order, now)
        members = self._members([task for task in order if not task.running], frozenset(stages), now)
        if not members:
            self._since = None
            return None
        for task in members:
            task.running = True
        stage = members[0].stage
        bucket = TEXT if stage == "encode" else members[0].bucket
        call = Call(stage, bucket, tuple(t.id for t in members), tuple(t.left for t in members))
        self._ends[call] = now + self.costs.seconds(stage, bucket, len(members))
        if len(self._tasks) >= self.max_batch:
            self._began[call] = now if self._since is None or len(self._ends) > 1 else self._since
        return call

    def postprocess(self, call: Call, now: float) -> tuple[int, ...]:
        """Take in that `call` has run until `now`; retire and return the pictures that are finished by it."""
        self._ends.pop(call, None)
        began = self._began.pop(call, None)
        self._since = now
        if began is not None:
            full = self.costs.each(call.stage, call.bucket, self.max_batch)
            self._forecast.spent(now - began, len(call.ids) * full)
        finished = []
        for id in call.ids:
            task = self._tasks.get(id)
            if task is None:  # cancelled while its call ran
                continue
            task.running = False
            if call.stage == "encode":
                task.encoded = True
            elif call.stage == "denoise":
                task.done += 1
            else:
                del self._tasks[id]
                finished.append(id)
                if task.deadline < inf:
                    self._forecast.learn(now > task.deadline, task.arrival, now)
        return tuple(finished)

    def excess(self, task: Task, now: float) -> float:
        """Seconds by which the accepted work is too much for `task`: 0 if its deadline, and all others, would hold.

        A picture without a deadline is never too much, though one of higher priority may break what was promised.
        Everybody who allows fewer steps is counted with the fewest. A deadline that is lost anyway protects nobody.
        """
        task.planned = task.steps
        if task.deadline == inf:
            return 0.0
        order = self._order(now, [*self._tasks.values(), task], others=1)
        place = order.index(task)
        with_it = self._finishes(order, now)
        missed = [with_it[place] - task.deadline]
        del order[place]
        for other, without, finish in zip(
            order[place:], self._finishes(order, now)[place:], with_it[place + 1 :], strict=True
        ):
            if without <= other.deadline:
                missed.append(finish - other.deadline)
        return max(0.0, *missed)

    def predicted(self, task: Task, now: float) -> float:
        """When `task`, which is among the accepted, should be finished, everybody in the fewest steps they allow."""
        order = self._order(now, list(self._tasks.values()))
        return self._finishes(order, now)[order.index(task)]

    def leaving(self, now: float, count: int) -> float:
        """Seconds until `count` of the pictures should be finished, everybody at its present plan."""
        order = self._order(now, list(self._tasks.values()))
        finishes = sorted(self._finishes(order, now, max((task.planned for task in order), default=1)))
        return max(0.0, finishes[min(count, len(finishes)) - 1] - now) if finishes else 0.0

    # The parts of the policy.

    def _busy(self, now: float) -> float:
        """Seconds until the running calls should have ended."""
        return max([0.0, *(end - now for end in self._ends.values())])

    def _order(self, now: float, tasks: list[Task], others: int = 0) -> list[Task]:
        """First in order first; `others` of them are not here yet."""
        self._forecast.look(len(tasks) - others, sum(task.planned for task in tasks), now)
        least, aging = self._forecast.least, self.aging_s
        ranked = []
        for task in tasks:
            live, due = False, task.deadline
            if due < inf:
                task.least = least(task)
                live = now + task.least <= due
            task.live = live
            task.level = level = task.priority + int((now - task.arrival) // aging)
            ranked.append((-level, not live, due if live else 0.0, task.arrival, task.id, task))
        ranked.sort()
        return [rank[-1] for rank in ranked]

    def _finishes(self, order: list[Task], now: float, cap: int = 1) -> list[float]:
        busy = self._busy(now)
        forecast = self._forecast
        return [now + seconds for seconds in forecast.finishes(forecast.rows(order), busy, cap)]

    def _plan(self, order: list[Task], now: float) -> None:
        """Give every elastic picture its steps: the largest common cap under which the most deadlines are met."""
        elastic = [task for task in order if task.min_steps is not None]
        if not elastic:
            return
        busy = self._busy(now)
        top = max(task.steps for task in elastic)
        self._cap = self._forecast.cap(self._forecast.rows(order), now, busy, self._cap, top)
        for task in elastic:
            if not task.running and task.left:
                task.planned = max(min(self._cap, task.steps), task.done + task.fewest)

    def _members(self, ready: list[Task], allowed: frozenset[Stage], now: float) -> list[Task]:
        decodable: list[Task] = []
        working: list[Task] = []
        for task in ready:
            if (stage := task.stage) in allowed:
                (decodable if stage == "decode" else working).append(task)
        if decodable:
            group = self._fill("decode", decodable, now)
            if not working or not (
                self._urgent(working[0], group, now) or self._held(decodable, working, now)
            ):
                return group
        if not working:
            return []
        group = self._fill("denoise", working, now) if "denoise" in allowed else working
        if all(task.encoded for task in group):
            return group
        # Others' texts come along where that is cheaper than a call of their own later.
        chosen = {task.id for task in group}
        newcomers = [task for task in group if not task.encoded]
        newcomers += [task for task in working if not task.encoded and task.id not in chosen]
        return newcomers[: self._best("encode", TEXT, len(newcomers), now)]

    def _urgent(self, leader: Task, group: list[Task], now: float) -> bool:
        """Would `leader` miss a deadline that it can meet, because `group` is decoded first?"""
        if not leader.live or leader.level < group[0].level:
            return False
        return (
            now + leader.least + self.costs.seconds("decode", group[0].bucket, len(group)) > leader.deadline
        )

    def _held(self, decodable: list[Task], working: list[Task], now: float) -> bool:
        """Is it better to decode some steps later, together with those who will then be ready?

        One call in the place of two saves time for everybody in the system; the price is the waiting of those who are
        ready. Only the leader's step brings others there, so a group of another shape is not held.
        """
        bucket = decodable[0].bucket
        group = [task for task in decodable if task.bucket == bucket]
        if (
            len(group) >= self.max_batch
            or working[0].bucket != bucket
            or working[0].level < decodable[0].level
        ):
            return False
        mates = sorted(task.left for task in self._alike(working) if task.encoded)
        step = self.costs.seconds("denoise", bucket, max(1, len(mates)))
        decode = self.costs.seconds("decode", bucket, len(group))
        slack = min((task.deadline - now for task in group if task.live), default=inf)
        others = len(self._tasks) - len(group)
        for joining, left in enumerate(mates[: self.max_batch - len(group)], start=1):
            together = self.costs.seconds("decode", bucket, len(group) + joining)
            saved = decode + self.costs.seconds("decode", bucket, joining) - together
            wait = left * step
            if wait + together <= slack and others * saved > len(group) * wait:
                return True
        return False

    def _alike(self, candidates: list[Task]) -> list[Task]:
        """The first candidate and those of its shape, as many as a call can take."""
        bucket = candidates[0].bucket
        return [task for task in candidates if task.bucket == bucket][: self.max_batch]

    def _fill(self, stage: Stage, candidates: list[Task], now: float) -> list[Task]:
        """The first candidate and those of its shape that share its call, first in order first."""
        bucket = candidates[0].bucket
        group = [task for task in candidates if task.bucket == bucket]
        batch = self._best(stage, bucket, len(group), now)
        if 1 < batch < len(group):
            self._share(group, batch, now + self.costs.seconds(stage, bucket, batch))
        return group[:batch]

    def _best(self, stage: Stage, bucket: Bucket, ready: int, now: float) -> int:
        """The batch for `ready` pictures. All in the system wait for the engine, wherever they stand, and so will those
        who come before the queue is empty: at a load of ρ that makes n / (1 - ρ)."""
        crowd = len(self._tasks) / (1 - min(BUSIEST, self._inflow.share(now)))
        return self.costs.best_batch(stage, bucket, crowd, min(ready, self.max_batch))

    def _work(self, task: Task) -> float:
        """Seconds of the engine that a picture takes in full batches, in all the steps that it allows."""
        each, full = self.costs.each, self.max_batch
        text = 0.0 if task.encoded else each("encode", TEXT, full)
        return text + task.steps * each("denoise", task.bucket, full) + each("decode", task.bucket, full)

    def _share(self, group: list[Task], batch: int, end: float) -> None:
        """Let the first without a deadline to meet into a full call that has none such, for the last who can wait."""
        other = next((task for task in group if not task.live), None)
        if other is None or other in group[:batch]:
            return
        for place in range(batch - 1, 0, -1):
            if group[place].level == other.level and end + group[place].least <= group[place].deadline:
                group[place] = other
                return
