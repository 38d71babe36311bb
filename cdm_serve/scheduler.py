"""Which pictures share the next engine call. Pure policy: no clock, no threads, no arrays; the time is an argument.

    scheduler = Scheduler(costs, max_batch=8)
    scheduler.add(Task(id=1, bucket=(128, 128), steps=4, arrival=0.0, deadline=0.25, min_steps=1))
    while call := scheduler.schedule(now):         # a stage and who takes part in it
        ...                                        # the engine runs it
        finished = scheduler.postprocess(call)

The policy, at every edge between two engine calls:

1. Order. Higher priority first, and every `aging_s` of waiting raises a picture by one priority, so nobody starves.
   Among equals the earliest deadline that can still be met, then those whose deadline is lost or who have none,
   oldest first.
2. Elastic steps. Pictures that allow fewer steps get the largest common cap under which the most deadlines are met.
3. What is one decoding away from being finished goes first, unless the leader would miss its deadline by that.
4. The leader's step takes along pictures of its shape at any step of any schedule, newcomers too (their text is
   encoded first), while the cost model says that it pays and no member's deadline breaks by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from cdm_serve.costs import STAGES, TEXT, CostModel, Stage
from cdm_serve.tasks import Call, Task

BROKEN = 0.02
"""The share of deadlines that predictions may break: fewer would refuse what could have been served."""
LEARN = 0.05


class Scheduler:
    """Owns the order of unfinished pictures. Calls come from one thread."""

    def __init__(self, costs: CostModel, max_batch: int, aging_s: float = 5.0) -> None:
        assert max_batch >= 1
        assert aging_s > 0
        self.costs = costs
        self.max_batch = max_batch
        self.aging_s = aging_s
        self._tasks: dict[int, Task] = {}
        self._batch = 1
        self._busy_until = 0.0
        self._stretch = 1.0

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """Take a picture in; it may join from the next `schedule` on."""
        assert task.steps >= 1
        assert task.min_steps is None or 1 <= task.min_steps <= task.steps
        assert task.id not in self._tasks
        task.planned = task.steps
        self._tasks[task.id] = task

    def cancel(self, id: int) -> int:
        """Forget a picture; the steps it will not run, which is none if it is not here. A running step is not saved."""
        task = self._tasks.pop(id, None)
        if task is None:
            return 0
        return task.left - (task.running and task.stage == "denoise")

    def schedule(self, now: float, stages: Iterable[Stage] = STAGES) -> Call | None:
        """The next call among `stages`, or None when there is nothing for them. Its members run until `postprocess`."""
        waiting = [task for task in self._tasks.values() if task.arrival <= now]
        if not waiting:
            return None
        self._pace(now)
        order = sorted(waiting, key=lambda task: self._rank(task, now))
        self._plan(order, now)
        allowed = frozenset(stages)
        ready = [task for task in order if not task.running]
        members = self._members(ready, allowed, now)
        if not members:
            return None
        for task in members:
            task.running = True
        stage = members[0].stage
        bucket = TEXT if stage == "encode" else members[0].bucket
        self._busy_until = now + self.costs.seconds(stage, bucket, len(members))
        return Call(stage, bucket, tuple(t.id for t in members), tuple(t.left for t in members))

    def postprocess(self, call: Call, now: float) -> tuple[int, ...]:
        """Take in that `call` has run until `now`; retire and return the pictures that are finished by it."""
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
                self._learn(task, now)
        return tuple(finished)

    def excess(self, task: Task, now: float) -> float:
        """Seconds by which the accepted work is too much for `task`: 0 if its deadline, and all others, would hold.

        Everybody who allows fewer steps is counted with the fewest. A deadline that is lost anyway protects nobody.
        """
        task.planned = task.steps
        if task.deadline == inf:
            return 0.0
        self._pace(now)
        before = sorted(self._tasks.values(), key=lambda other: self._rank(other, now))
        order = sorted([*before, task], key=lambda other: self._rank(other, now))
        held, holding = (self._finishes(tasks, now, cap=1) for tasks in (before, order))
        missed = [holding[task.id] - task.deadline]
        missed += [holding[other.id] - other.deadline for other in before if held[other.id] <= other.deadline]
        return max(0.0, *missed)

    def _learn(self, task: Task, now: float) -> None:
        """Let predictions grow when deadlines break, and shrink when they hold, until `BROKEN` of them break."""
        if task.deadline < inf:
            self._stretch = max(1.0, self._stretch + LEARN * ((now > task.deadline) - BROKEN))

    def leaving(self, now: float, count: int) -> float:
        """Seconds until `count` of the pictures should be finished, everybody at its present plan."""
        self._pace(now)
        order = sorted(self._tasks.values(), key=lambda task: self._rank(task, now))
        finishes = sorted(
            self._finishes(order, now, cap=max((task.planned for task in order), default=1)).values()
        )
        return max(0.0, finishes[min(count, len(finishes)) - 1] - now) if finishes else 0.0

    # The parts of the policy.

    def _pace(self, now: float) -> None:
        arrived = sum(task.arrival <= now for task in self._tasks.values())
        self._batch = max(1, min(arrived, self.max_batch))

    def _rank(self, task: Task, now: float) -> tuple[float, bool, float, float, int]:
        aged = task.priority + (now - task.arrival) // self.aging_s
        lost = task.deadline == inf or now + self._least(task) > task.deadline
        return (-aged, lost, 0.0 if lost else task.deadline, task.arrival, task.id)

    def _least(self, task: Task) -> float:
        """Seconds until the picture is finished if it is in every call from now on, in as few steps as it allows."""
        steps = task.capped(1) - task.done
        encode = 0.0 if task.encoded else self.costs.seconds("encode", TEXT, 1)
        step = self.costs.seconds("denoise", task.bucket, self._batch)
        return encode + steps * step + self.costs.seconds("decode", task.bucket, 1)

    def _plan(self, order: list[Task], now: float) -> None:
        """Give every elastic picture its steps: the largest common cap under which the most deadlines are met."""
        elastic = [task for task in order if task.min_steps is not None]
        if not elastic:
            return
        cap = best = max(task.steps for task in elastic)
        wanted = sum(now + self._least(task) <= task.deadline < inf for task in order)
        met = self._met(order, now, cap)
        while met < wanted and cap > 1:
            cap -= 1
            if (held := self._met(order, now, cap)) > met:
                met, best = held, cap
        for task in elastic:
            if not task.running:
                task.planned = task.capped(best)

    def _met(self, order: list[Task], now: float, cap: int) -> int:
        finishes = self._finishes(order, now, cap)
        return sum(finishes[task.id] <= task.deadline < inf for task in order)

    def _finishes(self, order: list[Task], now: float, cap: int) -> dict[int, float]:
        """When each should be finished under `cap`: served in order at full batches, and at best at its own pace."""
        busy = max(0.0, self._busy_until - now)  # the call that runs has to end first
        finishes, ahead = {}, busy
        for task in order:
            steps = (task.planned if task.running else task.capped(cap)) - task.done
            steps -= task.running and task.stage == "denoise"  # that step is the running call
            ahead += steps * self.costs.each("denoise", task.bucket, self.max_batch)
            ahead += self.costs.each("decode", task.bucket, self.max_batch)
            if not task.encoded:
                ahead += self.costs.each("encode", TEXT, self.max_batch)
            own = steps * self.costs.seconds("denoise", task.bucket, self._batch)
            own += self.costs.seconds("decode", task.bucket, 1)
            finishes[task.id] = now + self._stretch * max(ahead, busy + own)
        return finishes

    def _members(self, ready: list[Task], allowed: frozenset[Stage], now: float) -> list[Task]:
        decodable = [task for task in ready if task.stage == "decode"] if "decode" in allowed else []
        working = [task for task in ready if task.stage in allowed and task.stage != "decode"]
        if decodable:
            group = self._fill("decode", decodable, now)
            if not working or not (self._urgent(working[0], group, now) or self._held(group, working, now)):
                return group
        if not working:
            return []
        group = self._fill("denoise", working, now) if "denoise" in allowed else working
        if all(task.encoded for task in group):
            return group
        # Others' texts come along where that is cheaper than a call of their own later.
        newcomers = [task for task in (*group, *(t for t in working if t not in group)) if not task.encoded]
        return newcomers[: self.costs.best_batch("encode", TEXT, len(newcomers), self.max_batch)]

    def _urgent(self, leader: Task, group: list[Task], now: float) -> bool:
        """Would `leader` miss a deadline that it can meet, because `group` is decoded first?"""
        finish = now + self._least(leader)
        delay = self.costs.seconds("decode", group[0].bucket, len(group))
        return finish <= leader.deadline < finish + delay

    def _held(self, group: list[Task], working: list[Task], now: float) -> bool:
        """Is it better to decode `group` some steps later, together with those who will then be ready?

        One call in the place of two saves time for everybody in the system; the price is the group's waiting.
        """
        bucket = group[0].bucket
        mates = [task for task in working if task.bucket == bucket and task.encoded][: self.max_batch]
        step = self.costs.seconds("denoise", bucket, max(1, len(mates)))
        decode = self.costs.seconds("decode", bucket, len(group))
        others = len(self._tasks) - len(group)
        for steps in sorted({task.left for task in mates}):
            joining = sum(task.left <= steps for task in mates)
            together = self.costs.seconds("decode", bucket, len(group) + joining)
            saved = decode + self.costs.seconds("decode", bucket, joining) - together
            wait = steps * step
            late = any(now + decode <= task.deadline < now + wait + together for task in group)
            if len(group) + joining <= self.max_batch and not late and others * saved > len(group) * wait:
                return True
        return False

    def _fill(self, stage: Stage, candidates: list[Task], now: float) -> list[Task]:
        """The first candidate and those of its shape that share its call, first in order first."""
        bucket = candidates[0].bucket
        group = [task for task in candidates if task.bucket == bucket]
        batch = self.costs.best_batch(stage, bucket, len(group), self.max_batch)
        single = self.costs.seconds(stage, bucket, 1)
        while batch > 1:
            longer = self.costs.seconds(stage, bucket, batch) - single
            # Whose deadline is lost already breaks nothing.
            finishes = [(now + self._least(task), task.deadline) for task in group[:batch]]
            if not any(finish <= deadline < finish + longer for finish, deadline in finishes):
                break
            batch -= 1
        return group[:batch]
