"""Both phases: batches, loop, objectives, validation, calibration."""
