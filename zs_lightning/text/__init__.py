"""Strings only: tags and actions, prompts, answers and their scores."""
