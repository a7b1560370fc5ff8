"""TFDS builders. Each lives in its own module, imports tensorflow_datasets, and never TensorFlow."""
