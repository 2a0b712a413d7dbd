"""Where the seconds of a step went, and which key to change: a table, and rules.

The rules are pure functions of what was measured; each sentence has the number that it follows
from. The thresholds are rules of thumb.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

ROLLOUTS = ("generate", "search")
OTHER = "other"
ROWS = (*ROLLOUTS, "score", "reference", "values", "update", "validation", "saves", "callbacks", OTHER)
WIDTH = 80
LAST = 0.9
"""The rollouts after this share of them are the last ones."""
TAIL, REPEATED, CUT, PADDED = 0.25, 0.3, 0.9, 0.25
"""Shares from which on they are named: of a step for its last rollouts, of searches for those that
were asked before, of the limit of a result for its tokens, of micro-batches for their padding."""
MANY_PASSES, ROOM = 4, 0.7
"""Passes of an update that may become fewer, where the card's peak is below this share."""
WORTH, SENTENCES = 0.1, 3
"""Least share of a step that is worth a sentence, beside the largest; most sentences."""


@dataclass(frozen=True)
class Setup:
    """What the rules know of a configuration; what a run does not have stays as it is here."""

    slots: int = 0
    """Of the policy, as many as fitted."""
    asked_slots: int = 0
    engine: str = ""
    """policy (a simulator on its base), simulator, server or local."""
    search_slots: int = 0
    """Of a simulator; of a server its http.concurrency."""
    result_tokens: int = 0
    """Most tokens of a simulator's result."""
    shares_results: bool = True
    """Whether a query that was asked before may find what was written for it."""
    has_adapter: bool = True
    checkpointing: bool = False
    updates: int = 1
    card: float | None = None
    """Share of the card's memory that was taken at the peak; None without a card."""


@dataclass(frozen=True)
class Measured:
    """Means of a step."""

    steps: int
    seconds: dict[str, float]
    """By row; they add up to the step."""
    callbacks: dict[str, float] = field(default_factory=dict)
    """Those of the row `callbacks`, by name."""
    counts: dict[str, float] = field(default_factory=dict)
    """Of one process: rollouts, sampled (tokens of the policy), searches, repeated, written (tokens
    of a simulator), rounds (passes of the policy), visits (times that all rollouts waited for a
    search), late (seconds of the last rollouts), passes, read, padded and trained (tokens of the
    micro-batches)."""
    setup: Setup = Setup()
    warming: bool = False
    """Whether it is the first step, for want of others."""

    @property
    def whole(self) -> float:
        return sum(self.seconds.values())

    def share(self, row: str) -> float:
        return self.seconds.get(row, 0.0) / max(1e-9, self.whole)

    def of(self, name: str) -> float:
        return self.counts.get(name, 0.0)

    def ratio(self, name: str, of: str) -> float:
        return self.of(name) / max(1e-9, self.of(of))

    def rate(self, name: str, row: str) -> float:
        return self.of(name) / max(1e-9, self.seconds.get(row, 0.0))

    @property
    def padding(self) -> float:
        return 1 - self.ratio("read", "padded") if self.of("padded") else 0.0

    @property
    def at_a_time(self) -> float:
        """Rows of a pass of the policy's generator, where a simulator on its base writes as
        well."""
        both = self.of("sampled") + (self.of("written") if self.setup.engine == "policy" else 0.0)
        return both / max(1.0, self.of("rounds"))


# ------------------------------------------------------------------ which key to change


def generate(m: Measured) -> str:
    setup, rollouts, written = m.setup, m.of("rollouts"), m.of("written")
    if setup.slots < setup.asked_slots:
        said = f"memory holds only {setup.slots} of {setup.asked_slots} slots"
        return f"{said}; lower model.rollout.max_length, or set model.model.quantization: nf4"
    # More slots than rollouts would stay empty.
    if rollouts > setup.slots:
        return f"{rollouts:.0f} rollouts share {setup.slots} slots; raise model.rollout.slots"
    if setup.engine == "policy" and written > m.of("sampled"):
        said = f"{written / (written + m.of('sampled')):.0%} of its tokens are the simulator's"
        return f"{said}; lower model.search.count or max_new_tokens"
    said = f"{m.of('rounds'):.0f} passes draw {m.ratio('sampled', 'rollouts'):.0f} tokens a rollout"
    return f"{said}; lower model.rollout.max_new_tokens or max_turns, which the longest ones spend"


def search(m: Measured) -> str:
    setup, searches = m.setup, m.of("searches")
    written, at_once = m.ratio("written", "searches"), m.ratio("searches", "visits")
    if setup.engine == "simulator" and at_once > setup.search_slots:
        said = f"{at_once:.0f} searches at a time share {setup.search_slots} slots"
        return f"{said}; raise model.search.slots"
    # What a server takes at once is the user's to know.
    if setup.engine == "server" and m.of("rollouts") > setup.search_slots:
        said = f"{m.of('rollouts'):.0f} rollouts ask for {setup.search_slots} searches at a time"
        return f"{said}; raise model.search.http.concurrency, if the server bears it"
    if not setup.shares_results and m.ratio("repeated", "searches") >= REPEATED:
        said = f"{m.of('repeated'):.0f} of {searches:.0f} searches ask what another rollout asked"
        return f"{said}; set model.search.variants and a cache, which keeps what was written"
    if setup.result_tokens and written >= CUT * setup.result_tokens:
        said = f"results have {written:.0f} tokens of at most {setup.result_tokens}"
        return f"{said}; lower model.search.max_new_tokens"
    if setup.engine == "simulator":
        said = f"a result has {written:.0f} tokens of the simulator"
        return f"{said}; lower model.search.count, or take a smaller or quantised model.search.model"
    instead = "set model.search.http.cache, or take a faster server"
    instead = instead if setup.engine == "server" else "take another model.search, or a smaller corpus"
    return f"rollouts wait for {searches:.0f} searches; {instead}"


def update(m: Measured) -> str:
    setup, trained, peak = m.setup, m.of("trained"), m.setup.card or 0.0
    passes = m.of("passes") / setup.updates
    if setup.checkpointing and peak < ROOM:
        said = "each pass computes its forward twice"
        said += f", with {peak:.0%} of the card's memory taken at most" if peak else ""
        return f"{said}; set model.checkpointing: false, if memory suffices"
    # On a CPU larger passes are not faster.
    if 0 < peak < ROOM and passes >= MANY_PASSES:
        said = f"{passes:.0f} passes leave {1 - peak:.0%} of the card's memory"
        return f"{said}; raise model.micro_batch_tokens"
    if m.padding >= PADDED:
        return f"{m.padding:.0%} of the micro-batches is padding; lower model.micro_batch_tokens"
    if setup.updates > 1:
        return f"a step is learnt from {setup.updates} times; lower model.updates_per_rollout"
    said = f"{trained:,.0f} tokens are trained at {m.rate('trained', 'update'):,.0f} a second"
    fewer = "model.group_size" if m.of("rollouts") else "data.batch_size"
    less = ", or train less with model.lora (a lower r)" if setup.has_adapter else ""
    return f"{said}; lower {fewer}{less}"


def callbacks(m: Measured) -> str:
    name = max(m.callbacks, key=lambda name: m.callbacks[name])
    key = "lower run.keep_trajectories" if name == "RunFiles" else "leave it out of trainer.callbacks"
    return f"{name} takes {m.callbacks[name]:.3g} s; {key}"


RULES: dict[str, Callable[[Measured], str]] = {
    "generate": generate,
    "search": search,
    "score": lambda m: f"{m.rate('rollouts', 'score'):.0f} rollouts a second are judged; make model.reward faster",
    "reference": lambda m: f"{rate(m, 'reference')}; model.loss.kl_coef: 0 leaves it out",
    "values": lambda m: f"{rate(m, 'values')}; a model.estimator other than ppo has no critic",
    "update": update,
    "validation": lambda m: "raise trainer.val_check_interval, or lower data.validation_rows",
    "saves": lambda m: f"{m.seconds['saves']:.3g} s go to disk; raise run.save_every",
    "callbacks": callbacks,
    OTHER: lambda m: "rows, metrics, curves and other ranks take it; see data.source and trainer.logger",
}
"""What the seconds of a row come from, and what to change."""


def tail(m: Measured) -> str:
    late = m.of("late") / max(1e-9, m.whole)
    if late < TAIL:
        return ""
    said = f"the last tenth of the rollouts is waited for in {late:.0%} of a step"
    return f"{said}: lower model.rollout.max_new_tokens or max_turns"


def advice(m: Measured) -> list[str]:
    """One to three sentences, on the largest rows and on the last rollouts."""
    rows = sorted(m.seconds, key=m.share, reverse=True)
    rows = rows[:1] + [row for row in rows[1:] if m.share(row) >= WORTH]
    found = [f"{row} is {m.share(row):.0%} of a step: {RULES[row](m)}" for row in rows]
    # Their seconds are in the rows of the rollouts already, and so no row of their own.
    late = [said] if (said := tail(m)) else []
    return found[: SENTENCES - len(late)] + late


# ------------------------------------------------------------------ how it is shown


def rate(m: Measured, row: str) -> str:
    """What a row achieved."""
    if row == "generate":
        shared = f" + {m.rate('written', row):,.0f} (simulator)" if m.setup.engine == "policy" else ""
        return f"{m.rate('sampled', row):,.0f}{shared} tokens/s, {m.at_a_time:.0f} at a time"
    if row == "search":
        at_once = f"{m.ratio('searches', 'visits'):.0f} searches at a time"
        return f"{m.rate('written', row):,.0f} tokens/s, {at_once}" if m.of("written") else f"{m.of('searches'):.0f} searches"
    if row in ("reference", "values"):
        return f"{m.rate('read', row):,.0f} tokens/s read"
    if row == "update":
        padding = f", {m.padding:.0%} padding" if m.of("padded") else ""
        passes = "1 pass" if m.of("passes") == 1 else f"{m.of('passes'):.0f} passes"
        return f"{m.rate('trained', row):,.0f} tokens/s trained, {passes}{padding}"
    largest = sorted(m.callbacks.items(), key=lambda item: -item[1])[:3] if row == "callbacks" else []
    return ", ".join(f"{name} {seconds:.3f}" for name, seconds in largest)


def lines(m: Measured) -> list[str]:
    """The table and the sentences, on 80 columns."""
    digits = 3 if m.whole < 10 else 1
    of = "the first one, which warms up" if m.warming else f"mean of {m.steps} after the first"
    found = [f"where the seconds of a step went ({of}):", "─" * WIDTH]
    for row in ROWS:
        if seconds := m.seconds.get(row, 0.0):
            said = f"{row:<10}{seconds:>9.{digits}f} s{m.share(row):>6.0%}   {rate(m, row)}"
            found.append(said[:WIDTH].rstrip())
    found += ["─" * WIDTH, f"{'a step':<10}{m.whole:>9.{digits}f} s{1:>6.0%}", ""]
    for sentence in advice(m):
        found += textwrap.wrap(sentence, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return [*found, ""]
