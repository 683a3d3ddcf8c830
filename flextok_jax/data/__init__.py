"""Images for training and evaluation: sources, uint8 transforms, and the step-to-batch pipeline."""
