"""What training made, as a folder that other programs load: a plain PEFT adapter or a plain model,
with its card."""
