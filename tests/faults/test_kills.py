"""kill -9 at any moment, and the same command again until it is done: the run is as if nothing had happened."""

import random
import shutil
import signal
import time

import pytest

from support.killed import BUILD, PPO, SAVE_EVERY, TRIES, Run, answered, differing, fit, judged, server, simulator, spread

ANNEALED, BY_SUCCESS = ({"class_path": name} for name in ("NoiseAnnealing", "NoiseBySuccess"))
CACHED = fit("PolicyRL", BY_SUCCESS, search=simulator(cache="answers.sqlite", variants=2))


def over_http(mode, url):
    return fit("PolicyRL", ANNEALED, search=server(url, mode=mode, cache="answers.sqlite"))


def variants(kind, url):
    """Configurations by name; what a name has after a colon begins with the answers that the run of that name kept."""
    if kind == "GRPO, two updates":
        served = {mode: over_http(mode, url) for mode in ("record", "replay")}
        own = {"simulator": CACHED, "kept:simulator": CACHED, "bm25": fit("PolicyRL", ANNEALED)}
        return own | {"record": served["record"], "replay:record": served["replay"]}
    if kind == "PPO":
        return {"ppo": fit("PolicyRL", ANNEALED, **PPO)}
    return {"fine-tuning": fit("SimulatorSFT")} if kind == "SFT" else {"build": BUILD}


@pytest.mark.parametrize("kind", ["SFT", "GRPO, two updates", "PPO", "the data builder"])
def test_killed_runs_end_as_if_nothing_had_happened(kind, warm, serve, times, full, figure, tmp_path):
    configs = list(variants(kind, serve(answered).url()).items())[: None if full else 2]
    count = times(50, default=len(configs))
    rng = random.Random(f"kills of {kind}")
    whole, lives = {}, {}
    for name, config in configs:
        if former := name.partition(":")[2]:
            whole[name], lives[name] = whole[former], lives[former]
            continue
        run, begun = Run(tmp_path / f"whole {name}", config), time.monotonic()
        whole[name], lives[name] = run.end(warm), time.monotonic() - begun
    kills, equal, served, rounded, wrong, left, lost = 0, 0, 0, 0, [], [], 0
    for i, part in enumerate(spread(1.0, count, f"moments of {kind}")):
        name, config = configs[i % len(configs)]
        moment = part * lives[name]
        for _ in range(TRIES):
            run = beginning(tmp_path, f"{i} {name}", config)
            code, _, _ = run.live(warm, moment)
            if code:
                break
            moment *= 0.8  # What had ended before is begun once more.
        assert code == -signal.SIGKILL
        kills += 1
        for _ in range((0, 0, 0, 1, 2)[i % 5]):
            kills += run.live(warm, rng.uniform(0, lives[name]))[0] == -signal.SIGKILL
        found = run.end(warm)
        differs = differing(found, whole[name])
        equal += not differs
        # A server answers in any order, which decides what is computed together.
        if differs and name.startswith("re"):
            served += 1
            differs = [] if judged(found, whole[name]) == "rounded" else differs
            rounded += not differs
        wrong += [(i, name, part, differs)] if differs else []
        left += run.left()
        lost = max(lost, run.lost)
    held = f"{equal} of {count - served} equal after {kills} kills"
    held += f", {rounded} of {served} with an engine on a server equal up to rounding" if served else ""
    held += f", {lost} finished steps done again at most, {len(left)} temporary files left"
    figure(1, f"kill -9 at random moments: {kind}", held)
    assert not wrong
    assert not left
    assert lost <= (0 if kind == "the data builder" else SAVE_EVERY)


def beginning(folder, name, config):
    """A folder for a run, with the answers of another one in it where the name says so."""
    run = Run(folder / name, config)
    if former := name.partition(":")[2]:
        shutil.copy(folder / f"whole {former}" / "answers.sqlite", run.home)
    return run
