"""The ONNX exporter: the standard graph, its lowering for a target, and the files."""
