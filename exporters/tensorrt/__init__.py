"""TensorRT engines of the standard graph, without plugins, compiled for GPUs that need not be here."""
