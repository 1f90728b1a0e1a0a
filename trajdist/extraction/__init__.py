"""From images to trajectories: the frozen backbone, the pooling of its blocks, their projection."""
