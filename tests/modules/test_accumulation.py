"""One step of weights, whatever divides the batch: micro-batches, or ranks that add up."""

from datetime import timedelta
from itertools import product

import pytest
import torch
from torch import distributed, multiprocessing

from support.detached import alike, policy, prepare, random_trajectories, step
from support.ports import free_port
from zs_lightning.models.specs import LoraSpec
from zs_lightning.rl.losses import LossSpec

MEANS, UPDATES = ("token", "sequence", "constant"), (1, 2)
ROWS = {"all": (7, 2, 1.0), "of one rank": (1, 0, 1.0), "without signal": (3, 3, 1.0), "chosen": (7, 2, 0.6)}
"""How many trajectories, how many of them with advantage 0, and the share that is trained on."""


def weights(folder, mean, updates, tokens, count, zero, share):
    """After the updates on one batch. In float64: what is left of a difference is no rounding."""
    # Right rollouts are held in the second update, which some need.
    loss = LossSpec(mean=mean, likelihood_coef=0.5 if updates > 1 else 0.0, deepest_share=share)
    module = policy(folder, LoraSpec(r=4), loss=loss, micro_batch_tokens=tokens, updates_per_rollout=updates)
    module.policy.double()
    # Decays weights whose gradient is 0 too: without any signal there may be no step.
    module.own_optimizer = torch.optim.SGD(module.trainable().values(), lr=0.1, weight_decay=0.1)
    prepared = prepare(module, random_trajectories(4, count, zero) + (alike() if updates > 1 else []))
    for _ in range(updates):
        sums = step(module, prepared)
    assert updates == 1 or sums["fallen_rows"] > 0
    return {name: p.detach().clone() for name, p in module.trainable().items()}


def cases(tokens):
    """Arguments of `weights`, by case."""
    found = {(mean, updates, "all"): (mean, updates, tokens, *ROWS["all"]) for mean, updates in product(MEANS, UPDATES)}
    return found | {("token", 1, name): ("token", 1, tokens, *ROWS[name]) for name in ROWS}


def one_of_two(rank, port, folder, path):
    address, patience = f"tcp://127.0.0.1:{port}", timedelta(seconds=600)
    distributed.init_process_group("gloo", address, patience, rank=rank, world_size=2)
    found = {case: weights(folder, *arguments) for case, arguments in cases(64).items()}
    torch.save(found, f"{path}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def expected(tiny_folder):
    return {case: weights(tiny_folder, *arguments) for case, arguments in cases(100_000).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for case, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[case][name], tensor, atol=1e-6, rtol=0, msg=f"{case} {name}")


@pytest.mark.parametrize("tokens", [64, 512])
def test_micro_batches_make_the_same_step(tokens, tiny_folder, expected):
    assert_equal({case: weights(tiny_folder, *arguments) for case, arguments in cases(tokens).items()}, expected)


def test_two_ranks_make_the_same_step(tiny_folder, expected, tmp_path):
    # Forked, since loading the libraries twice takes most of the time.
    multiprocessing.start_processes(one_of_two, (free_port(), tiny_folder, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in (0, 1):
        assert_equal(torch.load(tmp_path / str(rank), weights_only=True), expected)


def test_without_signal_there_is_no_step_and_else_there_is(tiny_folder, expected):
    start = {name: p.double() for name, p in policy(tiny_folder, LoraSpec(r=4)).trainable().items()}
    for case, tensors in expected.items():
        moved = max(float((tensors[name] - start[name]).abs().max()) for name in start)
        assert moved == 0 if case[-1] == "without signal" else moved > 1e-3, case
