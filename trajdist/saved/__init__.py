"""What a run keeps on disk: its directory, models, adapters and checkpoints."""
