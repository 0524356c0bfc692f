"""Train one trial: torch, never Optuna."""
