from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kiln.build.events import Wait
from kiln.builders.admission import Admission

MEMORY = 100


@dataclass
class Simulation:
    """Drives an admission with random arrivals and ends, and keeps its own account."""

    slots: int
    overtaken_max: int
    memory: dict[int, int] = field(default_factory=dict)
    priority: dict[int, int] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    overtaken: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.admission = Admission(slots=self.slots, memory_bytes=MEMORY, overtaken_max=self.overtaken_max)

    def arrive(self, memory: int, priority: int) -> None:
        ticket = self.admission.enter(memory, priority)
        self.memory[ticket], self.priority[ticket] = min(memory, MEMORY), priority
        self.waiting.append(ticket)
        self.admit()

    def end(self, index: int) -> None:
        everyone = self.running + self.waiting
        if everyone:
            ticket = everyone[index % len(everyone)]
            (self.running if ticket in self.running else self.waiting).remove(ticket)
            self.admission.leave(ticket)
            self.admit()

    def admit(self) -> None:
        for ticket in self.admission.admit():
            self.waiting.remove(ticket)
            for other in self.waiting:
                if (-self.priority[other], other) < (-self.priority[ticket], ticket):
                    self.overtaken[other] = self.overtaken.get(other, 0) + 1
            self.running.append(ticket)

    def line(self) -> list[int]:
        return sorted(self.waiting, key=lambda ticket: (-self.priority[ticket], ticket))

    def free(self) -> int:
        return MEMORY - sum(self.memory[ticket] for ticket in self.running)


ARRIVAL = st.tuples(st.just("arrive"), st.integers(1, 150), st.integers(-1, 1))
END = st.tuples(st.just("end"), st.integers(0, 50), st.just(0))


@given(slots=st.integers(1, 5), most=st.integers(0, 4), steps=st.lists(ARRIVAL | END, max_size=120))
def test_no_limit_is_passed_nobody_starves_and_no_room_is_wasted(
    slots: int, most: int, steps: list[tuple[str, int, int]]
) -> None:
    simulation = Simulation(slots, most)
    for what, number, priority in steps:
        if what == "arrive":
            simulation.arrive(number, priority)
        else:
            simulation.end(number)
        assert len(simulation.running) <= slots
        assert simulation.free() >= 0
        assert all(times <= most for times in simulation.overtaken.values())
        line = simulation.line()
        if line and len(simulation.running) < slots:
            assert simulation.memory[line[0]] > simulation.free(), "the first in line fits and does not run"
        for place, ticket in enumerate(line):
            assert simulation.admission.place(ticket).ahead == place
            full = len(simulation.running) == slots
            assert simulation.admission.place(ticket).wait is (Wait.SLOT if full else Wait.MEMORY)
        assert simulation.admission.waiting == len(line)
    while simulation.running:
        simulation.end(0)
    assert not simulation.waiting, "somebody is left waiting for nobody"


def test_a_small_build_passes_a_big_one_but_not_for_ever() -> None:
    admission = Admission(slots=2, memory_bytes=100, overtaken_max=2)
    first = admission.enter(60)
    assert admission.admit() == [first]
    big = admission.enter(100)
    small = [admission.enter(10) for _ in range(3)]
    assert admission.admit() == [small[0]]
    admission.leave(small[0])
    assert admission.admit() == [small[1]]
    admission.leave(small[1])
    assert admission.admit() == []
    admission.leave(first)
    assert admission.admit() == [big]


def test_priority_goes_before_arrival() -> None:
    admission = Admission(slots=1, memory_bytes=100)
    running = admission.enter(1)
    assert admission.admit() == [running]
    later, sooner = admission.enter(1), admission.enter(1, priority=5)
    admission.leave(running)
    assert admission.admit() == [sooner]
    admission.leave(sooner)
    assert admission.admit() == [later]


def test_what_needs_more_than_there_is_runs_alone() -> None:
    admission = Admission(slots=4, memory_bytes=100)
    huge, small = admission.enter(1000), admission.enter(1)
    assert admission.admit() == [huge]
    admission.leave(huge)
    assert admission.admit() == [small]
