"""What fifty steps of fine-tuning and a toy task of reinforcement learning came to when these numbers were written down."""

from statistics import mean

from support.killed import SHORT, Run, curves, fit

LOSSES = [0.66855, 0.62676, 0.61774, 0.61846, 0.59820]
"""Of fine-tuning, the mean of ten steps each."""
REWARDS = [0.269, 0.766, 0.988, 0.998, 0.996]
"""Of the toy task's first seed, likewise."""
QUESTIONS = "question,answer\nName the country of Belen Gija?,Tolepan\nName the country of Mupo Hupo?,Bikasi\n"
"""There are twelve countries, and nothing but practice tells which it is."""


def trained(module, folder, warm, steps, seed=0, batch_size=2, lr=5e-4, **options):
    """The curves of a run of so many steps."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0}}
    config = fit(module, optimizer=optimizer, **options)
    data = {"batch_size": batch_size, "steps": steps}
    if module == "PolicyRL":
        data["source"] = {"class_path": "FileSource", "init_args": {"path": "toy.csv", "splits": {"train": 1.0}}}
    trainer = {**config["trainer"], "val_check_interval": None, "limit_val_batches": 0}
    again = {"seed_everything": seed, "run": {"folder": "run", "save_every": steps}}
    run = Run(folder / str(seed), {**config, **again, "data": data, "trainer": trainer})
    (run.home / "toy.csv").write_text(QUESTIONS)
    code, _, err = run.live(warm)
    assert code == 0, err
    return curves(run.folder)


def tens(curve):
    values = [value for _, value in curve]
    return [mean(values[i : i + 10]) for i in range(0, len(values), 10)]


def test_fine_tuning_has_the_losses_that_it_had(warm, figure, tmp_path):
    options = {"lora": {"r": 8}, "batch_size": 8, "lr": 6e-3}
    found = tens(trained("SimulatorSFT", tmp_path, warm, 50, **options)["sft/loss"])
    off = max(abs(a - b) for a, b in zip(found, LOSSES, strict=True))
    figure(20, "fifty steps of fine-tuning", f"losses of five times ten steps within {off:.0e} of those written down")
    assert off < 2e-4


def test_a_policy_learns_a_toy_task(warm, full, figure, tmp_path):
    options = {"lora": None, "group_size": 32, "updates_per_rollout": 1, "reward": {"class_path": "AnswerReward"}}
    options["rollout"] = {**SHORT, "max_new_tokens": 24}
    ends = []
    for seed in range(5 if full else 1):
        rewards = tens(trained("PolicyRL", tmp_path, warm, 50 if full else 24, seed, lr=1e-3, **options)["reward"])
        ends.append(rewards[-1])
        if seed == 0:
            off = max(abs(a - b) for a, b in zip(rewards, REWARDS, strict=False))
    solved = sum(end > 0.9 for end in ends)
    held = f"{solved} of {len(ends)} seeds end with a reward above 0.9, the least {min(ends):.2f}"
    figure(20, "a toy task of two questions", f"{held}; the first one's curve within {off:.2f} of that written down")
    assert solved == len(ends)
    assert off < 0.1
