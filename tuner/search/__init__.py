"""What to try next. Optuna, never torch."""
