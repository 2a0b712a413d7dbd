"""What trajectories are worth: metrics with confidence intervals, tables and reports."""
