"""The dry run: what a job will take of memory, time and disk."""
