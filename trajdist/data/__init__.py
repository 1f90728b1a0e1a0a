"""Images: where they come from, how they are decoded, the loader that Accelerate shards, the trajectory cache."""
