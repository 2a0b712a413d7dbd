"""Advantages from values by their definition."""

import torch


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def by_definition(values, rewards, masks, gamma, lam):
    """Of each trained token, the sum over all later ones of its row, from a list of one row at a time."""
    advantages = []
    for row_values, reward, mask in zip(values, rewards, masks, strict=True):
        own = [v for v, sampled in zip(row_values, mask, strict=True) if sampled]
        states = [*own, 0.0]
        gains = [0.0] * (len(own) - 1) + [reward] if own else []
        for i in range(len(own)):
            later = range(i, len(own))
            advantages.append(sum((gamma * lam) ** (k - i) * (gains[k] + gamma * states[k + 1] - states[k]) for k in later))
    return tensor(*advantages)
