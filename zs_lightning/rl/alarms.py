"""Rules by which a run is found to be dying: pure functions of its vitals.

Each returns what is wrong, in numbers, and what to change; None while all is well. The thresholds
are rules of thumb that healthy runs of the miniature keep far away from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from zs_lightning.rl.vitals import FEW, WINDOW, History

MOST_EMPTY, ENOUGH_SEARCHES = 0.5, 20
"""A larger share of empty results, among so many searches or more, is hardly the queries' fault."""
JUST_NOW = 3
"""Steps in which a policy that is thrown off its feet shows it."""
CHANCE = math.log(1e6)
"""Noise is off its plan where chance would do it once in a million times."""

LR = "model.optimizer.init_args.lr"
CALMER = f"lower {LR}, raise model.loss.kl_coef"
TAGS = "set model.reward.format_weight to 0.1, or begin with an instruct model or a supervised start (PolicySFT)"
ROLLOUTS = "see trajectories/train.jsonl"


class Finding(NamedTuple):
    reason: str
    hint: str


@dataclass(frozen=True)
class Rule:
    """What is looked for under a name."""

    name: str
    find: Callable[[History], Finding | None]
    is_fatal: bool = False
    """Whether what comes after it is worth nothing."""


def above(name: str, limit: float, said: str, hint: str) -> Callable[[History], Finding | None]:
    """A rule: no more than this share of the rollouts does what is said."""

    def find(history: History) -> Finding | None:
        share = history.share(name)
        return Finding(said.format(share), hint) if share is not None and share > limit else None

    return find


# ------------------------------------------------------------------ what is learnt


def reward(history: History) -> Finding | None:
    """Runs that collapse seldom come back; noise alone takes a third in the miniature."""
    best, now = history.best.get("reward", 0.0), history.mean("reward")
    if now is None or best <= 0 or now >= best / 2:
        return None
    reason = f"it is {now:.3g}, below half of its best mean over {WINDOW} steps, {best:.3g}"
    return Finding(reason, f"{CALMER}, or let the noise rise less (NoiseAnnealing.end)")


def score(history: History) -> Finding | None:
    """Answers that are never right: not even one in fifty."""
    share, steps = history.share("scored"), history.tail()
    if share is None or share >= 0.02:
        return None
    right, of = history.total("scored", steps), history.total("rollouts", steps)
    reason = f"only {right:.0f} of {of:.0f} rollouts of the last {steps} steps earned an answer's reward"
    hint = f"{ROLLOUTS} for answers beside the golden ones; a larger or an instruct model may do"
    return Finding(reason, hint)


def groups(history: History) -> Finding | None:
    """Rollouts of a question that all earn the same have no advantage over each other."""
    same, scored = history.mean("frac_reward_zero_std"), history.share("scored")
    # Where nothing is ever right, that is what to say.
    if same is None or scored is None or same <= 0.9 or scored < 0.02:
        return None
    are = "right" if scored > 0.5 else "wrong"
    change = "harder" if are == "right" else "easier"
    reason = f"{same:.0%} of the questions had equal rewards, most of them all {are}"
    hint = f"train on {change} questions (data.source), raise model.group_size, or set model.refill"
    return Finding(reason, hint)


def learning(history: History) -> Finding | None:
    steps = history.tail()
    norms = history.values("grad_norm", steps) if steps else []
    if norms and not any(norms):
        hint = "see the alarms of score and groups: rollouts of a question must differ"
        return Finding(f"all gradients of the last {steps} steps were 0", hint)
    if norms and all(norms) and not any(history.values("moved", steps)):
        hint = f"raise {LR}, or train in another precision (trainer.precision, model.model.dtype)"
        reason = f"the weights have not changed in {steps} steps, with gradients of {fmean(norms):.2g}"
        return Finding(reason, hint)
    return None


def likelihood(history: History) -> Finding | None:
    """Lazy likelihood displacement (arXiv 2512.04220): right answers become less likely, until all
    collapses. In a healthy run they become likelier."""
    best, now = history.best.get("logprob"), history.logprob()
    if best is None or now is None or now > best - 0.1 or now > 1.5 * best:
        return None
    reason = f"tokens of right rollouts have a log-probability of {now:.3g}, after {best:.3g}"
    hold = "set model.loss.likelihood_coef to 0.1 with model.updates_per_rollout at 2 or more"
    return Finding(reason, f"{CALMER}, {hold}, or go back to an earlier model")


def entropy(history: History) -> Finding | None:
    """Below a tenth of what it began with, rollouts of a question are all alike."""
    first, now = history.first.get("entropy", 0.0), history.mean("entropy")
    right = history.share("right")
    # Who knows the answers need not doubt; and a step with nothing to learn from has 0.
    if not now or right is None or now >= first / 10 or right > 0.9:
        return None
    reason = f"it is {now:.2g}, after {first:.2g} at the start"
    return Finding(reason, f"{CALMER} or model.rollout.temperature")


def learning_rate(history: History) -> Finding | None:
    """Steps that are far too large throw the policy off at once."""
    found = []
    kl, doubt = history.values("kl", JUST_NOW), history.values("entropy", JUST_NOW)
    if kl and fmean(kl) > 1.0:
        found.append(f"KL to the start is {fmean(kl):.2g} nats a token")
    first = history.first.get("entropy", 0.0)
    if doubt and fmean(doubt) > max(1.0, 3 * first):
        found.append(f"entropy rose from {first:.2g} to {fmean(doubt):.2g}")
    norms = [norm for norm in history.values("grad_norm", WINDOW) if norm]
    before, now = norms[:-JUST_NOW], norms[-JUST_NOW:]
    # Those of a few rollouts differ by as much.
    if history.tail() and len(before) >= 2 * FEW and fmean(now) > 20 * median(before):
        found.append(f"gradients rose from {median(before):.2g} to {fmean(now):.2g}")
    return Finding(" and ".join(found), f"lower {LR}, begin anew") if found else None


# ------------------------------------------------------------------ what is written


def actions(history: History) -> Finding | None:
    """Turns without a search or an answer."""
    share = history.share("invalid", "turns")
    if share is None or share <= 0.5:
        return None
    before = history.first["invalid"] / max(1.0, history.first["turns"])
    reason = f"{share:.0%} of the turns neither search nor answer, {before:.0%} at the start"
    if before < share / 2:
        return Finding(reason, f"lower {LR}, begin anew")
    return Finding(reason, TAGS)


def no_search(history: History) -> Finding | None:
    share = history.share("queries")
    if share is None or share >= 0.05:
        return None
    hint = (
        "ask what the model does not know (data.source), lower model.reward.search_cost or the noise, or "
        "train on the rollouts that search (model.loss.deepest_share)"
    )
    return Finding(f"{share:.2f} searches a rollout: the policy does not search any more", hint)


def thought(history: History) -> Finding | None:
    """A tenth of the thoughts that the policy began with is nearly nothing beside the tags."""
    share = history.share("thought", "turns")
    before = history.first.get("thought", 0.0) / max(1.0, history.first.get("turns", 0.0))
    # Who hardly thought at all has nothing to lose.
    if share is None or before < 10 or share >= before / 10:
        return None
    reason = f"a turn has {share:.1f} characters beside its action, after {before:.0f} at the start"
    return Finding(reason, CALMER)


# ------------------------------------------------------------------ what is found


def empty_results(empty: float, searches: float) -> str:
    """What is wrong with so many empty results among the searches; empty if nothing is."""
    if searches < ENOUGH_SEARCHES or empty < MOST_EMPTY * searches:
        return ""
    return f"found nothing in {empty:.0f} of {searches:.0f} searches"


def results(history: History) -> Finding | None:
    wrong = empty_results(history.total("empty", FEW), history.total("searches", FEW))
    hint = f"{ROLLOUTS} for the queries; does model.search know what the questions are about?"
    return Finding(f"the engine {wrong}", hint) if wrong else None


only_search = above(
    "spent", 0.8, "{:.0%} of the rollouts search until their turns are spent",
    "set model.reward.search_cost, lower the noise, or raise model.rollout.max_turns",
)  # fmt: skip
truncation = above(
    "cut", 0.5, "{:.0%} of the rollouts are cut for their length",
    "raise model.rollout.max_new_tokens and max_length",
)  # fmt: skip
# The policy writes <information> itself, which ends its turn and takes its reward.
forged = above("forged", 0.1, "{:.0%} of the rollouts write their own results", TAGS)
# A run is ended where they are a fifth of a step, see modules/health.py.
failed_searches = above(
    "failed", 0.05, "the engine failed in {:.0%} of the rollouts",
    f"{ROLLOUTS} for what failed; raise http.timeout of model.search (or of model.reward, where a judge fails) "
    "or lower http.concurrency",
)  # fmt: skip


def noise(history: History) -> Finding | None:
    """By Hoeffding's form of the binomial bound, which holds for steps of different plans and for
    shares of a result: few searches deviate by chance, and are not to be blamed."""
    draws, drawn = history.total("draws", WINDOW), history.total("noise", WINDOW)
    if not draws:
        return None
    found = drawn / draws
    planned = sum(step.get("draws", 0.0) * step.get("noise/planned", 0.0) for step in history.recent) / draws
    if draws * divergence(found, planned) <= CHANCE:
        return None
    reason = f"{found:.2f} of {draws:.0f} searches were noisy, where {planned:.2f} was planned"
    return Finding(reason, "an engine of yours must obey SearchRequest.noise_prob; report one of ours")


def divergence(share: float, planned: float) -> float:
    """KL of two yes-or-no distributions, in nats: how unlikely the share is by chance."""
    total = 0.0
    for found, expected in ((share, planned), (1 - share, 1 - planned)):
        # Rounding may leave a little less than 0.
        if found > 0:
            total += found * math.log(found / expected) if expected > 0 else math.inf
    return total


# ------------------------------------------------------------------ how it is computed


def skipped(history: History) -> Finding | None:
    count = history.total("skipped", FEW)
    if not count:
        return None
    reason = f"{count:.0f} of the last {FEW} steps met numbers that are not finite"
    return Finding(reason, f"see bad_steps; lower {LR}, or use trainer.precision 32-true")


def sampling_gap(history: History) -> Finding | None:
    """The policy that is trained is not the one that sampled: dropout, quantisation, precision."""
    gap = history.mean("policy/sampling_gap")
    if gap is None or gap <= 0.05:
        return None
    hint = "set model.lora.dropout to 0, model.loss.importance_cap to 2, or leave out quantization"
    return Finding(f"sampled and trained log-probabilities are {gap:.2g} nats a token apart", hint)


RULES = (
    Rule("reward", reward, is_fatal=True),
    Rule("score", score, is_fatal=True),
    Rule("groups", groups),
    Rule("learning", learning, is_fatal=True),
    Rule("likelihood", likelihood, is_fatal=True),
    Rule("entropy", entropy, is_fatal=True),
    Rule("learning rate", learning_rate, is_fatal=True),
    Rule("actions", actions),
    Rule("no search", no_search),
    Rule("only search", only_search),
    Rule("thought", thought),
    Rule("truncation", truncation),
    Rule("forged results", forged),
    Rule("empty results", results, is_fatal=True),
    Rule("failed searches", failed_searches),
    Rule("noise", noise),
    Rule("skipped steps", skipped),
    Rule("sampling gap", sampling_gap),
)
"""In the order in which they are said."""
