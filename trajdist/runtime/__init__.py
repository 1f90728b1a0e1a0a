"""The processes of a job and the machine under them: Accelerate, signals, watchdog, screen, clocks."""
