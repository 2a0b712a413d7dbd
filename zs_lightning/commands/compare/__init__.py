"""Results of runs side by side, in the terminal and on pages."""
