"""The K plan: how it is found (rank), applied to weights (fold) and stored (plan_file)."""
