"""Text to token ids and back, as llama.cpp does it. Shared by the runner and by calibration (plan/calibrate.py)."""
