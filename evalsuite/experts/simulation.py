"""One trace under many cache sizes and policies, and what its hit rates say about another model."""

from collections.abc import Sequence

from evalsuite.core.cache import CacheCounters
from evalsuite.core.value import Value
from evalsuite.experts.predict import Routing
from evalsuite.experts.simulate import LayerSteps, layer_steps, simulate
from evalsuite.experts.trace import PHASES, Phase, Trace, TraceFacts


class SimulatedCell(Value):
    """One policy and size in one phase; `tokens` went through the model in it."""

    phase: Phase
    tokens: int
    counters: CacheCounters

    @property
    def bytes_per_token(self) -> float | None:
        """Experts copied to the device; None where the phase has no tokens."""
        return self.counters.bytes_moved / self.tokens if self.tokens else None


class Simulation(Value):
    """A trace, and every policy and size asked for."""

    trace: TraceFacts
    cells: tuple[SimulatedCell, ...]

    def cell(self, policy: str, size: int, phase: Phase) -> SimulatedCell:
        """Raises KeyError where that was not simulated."""
        for cell in self.cells:
            if (cell.counters.policy, cell.counters.size, cell.phase) == (policy, size, phase):
                return cell
        raise KeyError((policy, size, phase))

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.counters.policy for cell in self.cells))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({cell.counters.size for cell in self.cells}))


class Simulator:
    """A trace made ready: its steps are found once."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._layers: list[LayerSteps] = layer_steps(trace)

    def run(self, policies: Sequence[str], sizes: Sequence[int]) -> Simulation:
        """Every policy at every size, decode and prefill apart and together.

        Raises:
            UsageError: a policy that does not exist, or a size below 1.
        """
        cells: list[SimulatedCell] = []
        for size in sizes:
            for policy in policies:
                found = simulate(self.trace, policy, size, self._layers)
                cells += [
                    SimulatedCell(phase=phase, tokens=self.trace.tokens(phase), counters=found[phase])
                    for phase in PHASES
                ]
        return Simulation(trace=self.trace.facts, cells=tuple(cells))

    def routing(self, policy: str, experts: int) -> Routing:
        """The trace's decode hit rates for a model with `experts` experts a layer.

        Another number of experts is met by their share: N of E experts are taken to be hit as often as the
        same share of the trace's own experts, rounded to whole ones.
        """
        mine = self.trace.facts.geometry.experts
        known: dict[int, float] = {}

        def hit_rate(size: int) -> float:
            scaled = max(1, round(size * mine / experts))
            if scaled not in known:
                rate = simulate(self.trace, policy, scaled, self._layers)["decode"].hit_rate
                known[scaled] = 0.0 if rate is None else rate
            return known[scaled]

        same = "" if experts == mine else ", by share"
        return Routing(f"trace, {policy}{same}", hit_rate)
